"""Documents that cross a boundary: one typed class writes and reads each JSON file.

A subclass of `Document` names the file's schema and its fields; a fault in a file is one ValueError
line with the file, the place in it and the fix. Objects inside are `Part`s: strict, frozen, and
without fields that they do not name. Values are of the kinds below: numbers finite, texts short
and printable. Imports pydantic.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError, model_validator
from pydantic_core import core_schema

from megatron_mone.common import checked_json
from megatron_mone.common.checked_json import LARGEST_WHOLE, Fault, Field, choice, load
from megatron_mone.common.files import atomic_write

Place = tuple[str | int, ...]


# Kinds of values ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of value, for `Annotated`.

    Attributes:
        words: that name it in the documentation.
        check: what it gets it returns, a list as an array if the kind is a column; raises a Fault.
    """

    words: str
    check: Callable[[Any], Any]

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> core_schema.CoreSchema:
        plain = core_schema.plain_serializer_function_ser_schema(_plain)
        return core_schema.no_info_plain_validator_function(self.check, serialization=plain)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray) else value


def one_of(choices: Sequence[str]) -> Kind:
    """A text that is one of `choices`."""
    words = " or ".join(choices) if len(choices) < 5 else "text"
    return Kind(words, lambda value: choice(value, choices))


def texts_of(choices: Sequence[str]) -> Kind:
    """A list of many texts, each one of `choices`."""
    allowed = frozenset(choices)

    def check(value: Any) -> list[str]:
        if not isinstance(value, list):
            raise Fault("must be a list of texts")
        for one in value:
            if not isinstance(one, str) or one not in allowed:
                raise Fault(f"{str(one)[:40]!r} is none of {', '.join(choices)}")
        return value

    return Kind("list of texts", check)


def whole(most: int = LARGEST_WHOLE, least: int = 0) -> Kind:
    """A whole number from `least` to `most`."""
    return Kind("whole number", lambda value: checked_json.whole(value, most, least))


Number = Annotated[float, Kind("number", checked_json.number)]
"""Finite, 0 or more; an int stays one."""
Positive = Annotated[float, Kind("number", checked_json.positive)]
Difference = Annotated[float, Kind("number", checked_json.difference)]
"""Found by subtraction, which rounding may leave a hair below 0."""
Signed = Annotated[float, Kind("number", checked_json.signed)]
"""Finite, of either sign."""
Whole = Annotated[int, whole()]
AtLeast1 = Annotated[int, whole(least=1)]
Text = Annotated[str, Kind("text", checked_json.text)]
"""Short and printable."""
Key = Annotated[str, Kind("text", checked_json.key)]
"""Of an object whose keys no schema fixes."""
Words = Annotated[str, Kind("text", checked_json.words)]
"""Of any length, as pages shorten it: Megatron's own words, for one."""
AnyText = Annotated[str, Kind("text", checked_json.any_text)]
Column = Annotated[NDArray[Any], Kind("list of numbers", checked_json.column)]
"""[N] finite numbers of 0 or more, int64 or float64 as they are written."""
SignedColumn = Annotated[NDArray[Any], Kind("list of numbers", checked_json.signed_column)]
"""The same, of either sign: found by subtraction."""


# Objects ------------------------------------------------------------------------------------------


def _fail_fast(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("type") in ("list", "dict"):
            schema["fail_fast"] = True
        for inside in schema.values():
            _fail_fast(inside)
    elif isinstance(schema, list | tuple):
        for inside in schema:
            _fail_fast(inside)


class Part(BaseModel):
    """An object inside a document."""

    model_config = ConfigDict(
        strict=True, frozen=True, arbitrary_types_allowed=True, use_attribute_docstrings=True
    )

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> core_schema.CoreSchema:
        """Lists and objects of free names stop at their first fault: a file may have millions."""
        schema = handler(source)
        _fail_fast(schema)
        return schema

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        known, any_name = cls.model_fields, cls.model_config.get("extra") == "allow"
        if isinstance(value, dict) and not any_name and not value.keys() <= known.keys():
            unknown = next(key for key in value if key not in known)
            raise Fault(f"{unknown[:40]!r} is none of {', '.join(known)}")
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
            Field(value, path, cls.AGAIN).has_schema(cls.SCHEMA)
            del fields["schema"]
        return record_of(cls, fields, path, cls.AGAIN)

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


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
"""Of the kinds asked for: one takes 7 ms to make, and a search reads a thousand records of two."""


def record_of[Record](kind: type[Record], value: Any, path: Path, fix: str) -> Record:
    """A Part, or a dataclass whose fields are of the kinds above, of a JSON value.

    Args:
        kind: to be made.
        value: whose fields that it has not are passed over.
        path: that errors are in the name of.
        fix: what the user can do about a wrong one.

    Raises:
        ValueError: one line that names the place and what is wrong there.
    """
    try:
        if kind not in _ADAPTERS:
            _ADAPTERS[kind] = TypeAdapter(kind)
        made: Record = _ADAPTERS[kind].validate_python(value)
        return made
    except ValidationError as error:
        raise ValueError(f"{path}: {_first_fault(error)}; {fix}") from None


def _first_fault(error: ValidationError) -> str:
    """ "models[0].step_ms: must be a number" of the first of pydantic's errors."""
    first = error.errors(include_url=False, include_input=False)[0]
    kind, place = first["type"], first["loc"]
    if kind == "value_error":
        fault = first["ctx"]["error"]
        words, place = str(fault), place + getattr(fault, "at", ())
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
    "dataclass_type": "must be an object",
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
            raise Fault(f"has {len(column)} values where there should be {length}", *place)


def check_names(names: Sequence[str], what: str) -> None:
    """Refuse a list `what + "s"` of objects of which two have one name; `names` are theirs."""
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            raise Fault(f"{name!r} is the name of two {what}s", f"{what}s", index, "name")
        seen.add(name)
