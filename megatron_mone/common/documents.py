"""Documents that cross a boundary: one typed class writes and reads each JSON file.

A subclass of `Document` names the file's schema and its fields; a fault in a file is one ValueError
line with the file, the place in it and the fix. Objects inside are `Part`s: strict, frozen, and
without fields that they do not name. Values are of the kinds below: numbers finite, texts short
and printable. Imports pydantic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError, core_schema

from megatron_mone.common.checked_json import LARGEST_WHOLE, LONGEST_TEXT, is_text, load
from megatron_mone.common.files import atomic_write

Place = tuple[str | int, ...]


def fault(words: str, *at: str | int) -> PydanticCustomError:
    """What a check raises: the fault in words, `at` a place inside of the value checked."""
    return PydanticCustomError("fault", "{words}", {"words": words, "at": at})


# Kinds of values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of value, for `Annotated`.

    Attributes:
        words: that name it in the documentation.
        check: what it gets it returns, a list as an array if the kind is a column; raises `fault`.
    """

    words: str
    check: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        plain = core_schema.plain_serializer_function_ser_schema(_plain)
        return core_schema.no_info_plain_validator_function(self.check, serialization=plain)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise fault("must be a number")
    if not 0 <= value <= sys.float_info.max:  # false for NaN too
        raise fault(f"{str(value)[:40]} is not a finite number of 0 or more")
    return value


def _positive(value: Any) -> float:
    if _number(value) == 0:
        raise fault("is 0, it must be above 0")
    return value


def _difference(value: Any) -> float:
    return value if isinstance(value, float) and -1e-6 < value < 0 else _number(value)


def _whole(value: Any, most: int = LARGEST_WHOLE, least: int = 0) -> int:
    if not isinstance(value, int):
        raise fault("must be a whole number")
    if isinstance(value, bool) or not 0 <= value <= most:
        raise fault(f"{str(value)[:40]} is not a whole number from 0 to {most}")
    if value < least:
        raise fault(f"is {value}, it must be {least} or more")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise fault("must be a text")
    if not is_text(value):
        raise fault(f"{value[:40]!r} is not a printable text of 1 to {LONGEST_TEXT} characters")
    return value


def _key(value: Any) -> str:
    if not is_text(value):
        raise fault(f"has the key {value[:40]!r}, which is no short printable text")
    return value


def _words(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise fault("must be a text")
    return value


def _any_text(value: Any) -> str:
    if not isinstance(value, str):
        raise fault("must be a text")
    return value


def _column(value: Any) -> NDArray[Any]:
    array = _signed_column(value)
    if len(array) and array.min() < 0:
        raise fault("has a value that is not a finite number of 0 or more")
    return array


def _signed_column(value: Any) -> NDArray[Any]:
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise fault("must be a list of numbers")
    if not value:
        return np.zeros(0)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths inside
        raise fault("must be a list of numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise fault("must be a list of numbers")
    if not np.isfinite(array).all():
        raise fault("has a value that is not a finite number of 0 or more")
    return array


def one_of(choices: Sequence[str]) -> Kind:
    """A text that is one of `choices`."""
    allowed = frozenset(choices)

    def check(value: Any) -> str:
        if _text(value) not in allowed:
            raise fault(f"{value!r} is none of {', '.join(choices)}")
        return value

    return Kind(" or ".join(choices) if len(choices) < 5 else "text", check)


def texts_of(choices: Sequence[str]) -> Kind:
    """A list of many texts, each one of `choices`."""
    allowed = frozenset(choices)

    def check(value: Any) -> list[str]:
        if not isinstance(value, list):
            raise fault("must be a list of texts")
        for one in value:
            if not isinstance(one, str) or one not in allowed:
                raise fault(f"{str(one)[:40]!r} is none of {', '.join(choices)}")
        return value

    return Kind("list of texts", check)


def whole(most: int, least: int = 0) -> Kind:
    """A whole number from `least` to `most`."""
    return Kind("whole number", lambda value: _whole(value, most, least))


Number = Annotated[float, Kind("number", _number)]
"""Finite, 0 or more; an int stays one."""
Positive = Annotated[float, Kind("number", _positive)]
Difference = Annotated[float, Kind("number", _difference)]
"""Found by subtraction, which rounding may leave a hair below 0."""
Whole = Annotated[int, Kind("whole number", _whole)]
AtLeast1 = Annotated[int, whole(LARGEST_WHOLE, least=1)]
Text = Annotated[str, Kind("text", _text)]
"""Short and printable."""
Key = Annotated[str, Kind("text", _key)]
"""Of an object whose keys no schema fixes."""
Words = Annotated[str, Kind("text", _words)]
"""Of any length, as pages shorten it: Megatron's own words, for one."""
AnyText = Annotated[str, Kind("text", _any_text)]
Column = Annotated[NDArray[Any], Kind("list of numbers", _column)]
"""[N] finite numbers of 0 or more, int64 or float64 as they are written."""
SignedColumn = Annotated[NDArray[Any], Kind("list of numbers", _signed_column)]
"""The same, of either sign: found by subtraction."""


# Objects ------------------------------------------------------------------------------------------


class Part(BaseModel):
    """An object inside a document."""

    model_config = ConfigDict(
        strict=True, frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True
    )

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        known = cls.model_fields.keys()
        if (
            isinstance(value, dict)
            and cls.model_config.get("extra") != "allow"
            and value.keys() - known
        ):
            unknown = next(key for key in value if key not in cls.model_fields)
            raise fault(f"{unknown[:40]!r} is none of {', '.join(cls.model_fields)}")
        return value

    def plain(self) -> dict[str, Any]:
        """As JSON has it: fields in their order, those that were absent left out."""
        return self.model_dump(exclude_unset=True)


class Document(Part):
    """The content of one JSON file.

    A subclass says in its header what stands in field `schema`, the file's first (None: the file
    has no such field), how to get a right file, and the indent with which it is written:

        class Plan(Document, schema="megatron-mone/plan/1", again="plan again", indent=1):
    """

    SCHEMA: ClassVar[str | None] = None
    AGAIN: ClassVar[str]
    INDENT: ClassVar[int | None] = None

    def __init_subclass__(
        cls, *, schema: str | None = None, again: str = "", indent: int | None = None
    ) -> None:
        super().__init_subclass__()
        cls.SCHEMA, cls.AGAIN, cls.INDENT = schema, again, indent

    @classmethod
    def read(cls, path: Path, fix: str) -> Self:
        """The checked document in a file.

        Args:
            path: of at most checked_json.LARGEST_FILE bytes.
            fix: what the user can do about a file that cannot be read or is no JSON.

        Raises:
            checked_json.UnreadableFile: one line; the file is no JSON.
            ValueError: one line; it is not such a document.
        """
        return cls.of(load(path, fix), path)

    @classmethod
    def of(cls, value: Any, path: Path) -> Self:
        """The document of a JSON value; errors are in the name of `path`.

        Raises:
            ValueError: one line.
        """
        if not isinstance(value, dict):
            raise ValueError(f"{path}: must be an object; {cls.AGAIN}")
        fields = dict(value)
        if cls.SCHEMA is not None:
            try:
                _check_schema(fields, cls.SCHEMA)
            except PydanticCustomError as error:
                raise ValueError(f"{path}: {error}; {cls.AGAIN}") from None
            del fields["schema"]
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            raise ValueError(f"{path}: {_first_fault(error)}; {cls.AGAIN}") from None

    def plain(self) -> dict[str, Any]:
        """As `Part.plain`, the schema first."""
        head = {} if self.SCHEMA is None else {"schema": self.SCHEMA}
        return {**head, **super().plain()}

    def write(self, path: Path) -> None:
        """Write the file whole or not at all, into a folder that there is."""
        separators = (",", ":") if self.INDENT is None else None
        text = json.dumps(
            self.plain(), indent=self.INDENT, separators=separators, allow_nan=False
        )  # fmt: skip
        atomic_write(path, text.encode() + b"\n")


def _check_schema(fields: dict[str, Any], schema: str) -> None:
    if "schema" not in fields:
        raise fault("has no field 'schema'")
    try:
        found = _text(fields["schema"])
    except PydanticCustomError as error:
        raise fault(f"schema: {error}") from None
    family, _, version = schema.rpartition("/")
    if found.rpartition("/")[0] != family:
        raise fault(f"schema is {found}, not {schema}: it is another kind of file")
    if found != schema:
        raise fault(
            f"schema is {found}, this version reads /{version}: it was made by another"
        )  # fmt: skip


def _first_fault(error: ValidationError) -> str:
    """ "models[0].step_ms: must be a number" of the first of pydantic's errors."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "fault":
        words, place = first["ctx"]["words"], place + first["ctx"]["at"]
        if place[-1:] == ("[key]",):
            place = place[:-2]
    elif kind == "missing":
        words, place = f"has no field {place[-1]!r}", place[:-1]
    else:
        words = _WORDS.get(kind, first["msg"])
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in place)
    return f"{text.removeprefix('.')}: {words}" if text else words


_WORDS = {
    "model_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "bool_type": "must be true or false",
}


def check_lengths(
    length: int, columns: Sequence[tuple[Place, Sequence[Any] | NDArray[Any]]]
) -> None:
    """Refuse the first of `columns`, each with its place, that has not `length` values."""
    for place, column in columns:
        if len(column) != length:
            raise fault(f"has {len(column)} values where there should be {length}", *place)


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse a list `what + "s"` of objects whose field `name` is that of two, or that has none."""
    for index, name in enumerate(names):
        if name in names[:index]:
            raise fault(f"{name!r} is the name of two {what}s", f"{what}s", index, "name")
