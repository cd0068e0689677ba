"""JSON from outside, checked: a fault is one ValueError line with the file, the place and the fix.

Reads the file it is given, and touches nothing else. Nothing in a file is executed; numbers are
finite, texts that get printed are short and printable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

LARGEST_FILE = 512 << 20
LONGEST_TEXT = 500
LARGEST_WHOLE = 2**63 - 1


class UnreadableFile(ValueError):
    """A file that holds no JSON: cut short, damaged, too large, or not to be opened."""


def load(path: Path, fix: str) -> Any:
    """The JSON value in a file.

    Args:
        path: at most LARGEST_FILE bytes.
        fix: what the user can do about a file that is no JSON.

    Raises:
        UnreadableFile: one line.
    """
    try:
        size = path.stat().st_size
        if size > LARGEST_FILE:
            raise UnreadableFile(
                f"{path}: {size >> 20} MiB is over the {LARGEST_FILE >> 20} MiB that such a file "
                f"may have; {fix}"
            )
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise UnreadableFile(f"{path}: cannot be read ({error.strerror}); {fix}") from None
    except RecursionError:
        raise UnreadableFile(f"{path}: is nested too deep; {fix}") from None
    except UnreadableFile:
        raise
    except ValueError as error:  # JSONDecodeError, UnicodeDecodeError, a number of 5,000 digits
        reason = " ".join(str(error).split())[:LONGEST_TEXT]
        raise UnreadableFile(f"{path}: not JSON, or cut short ({reason}); {fix}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


class Fault(ValueError):
    """What is wrong with a value, in words; `at`, a place inside of it."""

    def __init__(self, words: str, *at: str | int) -> None:
        super().__init__(words)
        self.at = at


class Field:
    """One value of a JSON file, which knows its place in it.

    Every method either returns what its name says or raises a ValueError of one line.
    """

    def __init__(self, value: Any, path: Path, fix: str, place: str = "") -> None:
        self.value = value
        self._path, self._fix, self._place = path, fix, place

    def fail(self, fault: str) -> NoReturn:
        """Raise the ValueError of this place."""
        place = f"{self._place}: " if self._place else ""
        raise ValueError(f"{self._path}: {place}{fault}; {self._fix}")

    def checked[Value](self, check: Callable[[Any], Value]) -> Value:
        """What one of the checks below gives."""
        try:
            return check(self.value)
        except Fault as fault:
            self.fail(str(fault))

    def __getitem__(self, key: str) -> Field:
        """The member `key` of an object."""
        members = self._typed(dict, "an object")
        if key not in members:
            self.fail(f"has no field {key!r}")
        return self._inside(members[key], f".{key}" if self._place else key)

    def __contains__(self, key: str) -> bool:
        return key in self._typed(dict, "an object")

    def members(self) -> Iterator[tuple[str, Field]]:
        """The members of an object; their keys are printable."""
        for name, value in self._typed(dict, "an object").items():
            self._inside(name, "").checked(key)
            yield name, self._inside(value, f".{name}" if self._place else name)

    def elements(self) -> Iterator[Field]:
        """The elements of a list."""
        for index, value in enumerate(self._typed(list, "a list")):
            yield self._inside(value, f"[{index}]")

    def text(self, choices: Sequence[str] | None = None) -> str:
        """A short printable text, one of `choices` if they are given."""
        return self.checked(text if choices is None else lambda value: choice(value, choices))

    def whole(self) -> int:
        """A whole number."""
        return self.checked(whole)

    def number(self) -> float:
        """A finite number, 0 or more."""
        return float(self.checked(number))

    def has_schema(self, schema: str) -> None:
        """Refuse a document whose field `schema` is another one, or another version of this one."""
        found, (family, _, version) = self["schema"].text(), schema.rpartition("/")
        if found == schema:
            return
        if found.rpartition("/")[0] == family:
            self.fail(f"schema is {found}, this version reads /{version}: it was made by another")
        self.fail(f"schema is {found}, not {schema}: it is another kind of file")

    def _typed(self, kind: type, words: str) -> Any:
        if not isinstance(self.value, kind):
            self.fail(f"must be {words}")
        return self.value

    def _inside(self, value: Any, place: str) -> Field:
        return Field(value, self._path, self._fix, self._place + place)


def is_text(value: Any) -> bool:
    """Whether a value is a short printable text."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def number(value: Any) -> float:
    """Finite, 0 or more; not true or false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Fault("must be a number")
    if not 0 <= value <= sys.float_info.max:  # false for NaN too
        raise Fault(f"{str(value)[:40]} is not a finite number of 0 or more")
    return value


def positive(value: Any) -> float:
    """A number above 0."""
    if number(value) == 0:
        raise Fault("is 0, it must be above 0")
    return value


def difference(value: Any) -> float:
    """A number found by subtraction, which rounding may leave a hair below 0."""
    return value if isinstance(value, float) and -1e-6 < value < 0 else number(value)


def signed(value: Any) -> float:
    """Finite, of either sign; not true or false."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Fault("must be a number")
    if not abs(value) <= sys.float_info.max:  # false for NaN too
        raise Fault(f"{str(value)[:40]} is not a finite number")
    return value


def whole(value: Any, most: int = LARGEST_WHOLE, least: int = 0) -> int:
    """An int from `least` to `most`."""
    if not isinstance(value, int):
        raise Fault("must be a whole number")
    if isinstance(value, bool) or not 0 <= value <= most:
        raise Fault(f"{str(value)[:40]} is not a whole number from 0 to {most}")
    if value < least:
        raise Fault(f"is {value}, it must be {least} or more")
    return value


def text(value: Any) -> str:
    """Short and printable."""
    if not isinstance(value, str):
        raise Fault("must be a text")
    if not is_text(value):
        raise Fault(f"{value[:40]!r} is not a printable text of 1 to {LONGEST_TEXT} characters")
    return value


def key(value: Any) -> str:
    """A name in an object, short and printable."""
    if not is_text(value):
        raise Fault(f"has the key {value[:40]!r}, which is no short printable text")
    return value


def words(value: Any) -> str:
    """A text of any length that is not blank."""
    if not isinstance(value, str) or not value.strip():
        raise Fault("must be a text")
    return value


def any_text(value: Any) -> str:
    """A text of any length, perhaps empty."""
    if not isinstance(value, str):
        raise Fault("must be a text")
    return value


def column(value: Any) -> NDArray[Any]:
    """[N] finite numbers of 0 or more, int64 or float64 as they are written."""
    array = signed_column(value)
    if len(array) and array.min() < 0:
        raise Fault("has a value that is not a finite number of 0 or more")
    return array


def signed_column(value: Any) -> NDArray[Any]:
    """[N] finite numbers, likewise."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if not isinstance(value, list):
        raise Fault("must be a list of numbers")
    if not value:
        return np.zeros(0)
    try:
        array = np.asarray(value)
    except ValueError:  # lists of unequal lengths inside
        raise Fault("must be a list of numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise Fault("must be a list of numbers")
    if not np.isfinite(array).all():
        raise Fault("has a value that is not a finite number of 0 or more")
    return array


def choice(value: Any, choices: Sequence[str]) -> str:
    """A short printable text that is one of `choices`."""
    if text(value) not in choices:
        raise Fault(f"{value!r} is none of {', '.join(choices)}")
    return value


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in first, value in second) of every key that differs; "absent" is a value."""
    return [
        (key, first.get(key, "absent"), second.get(key, "absent"))
        for key in sorted(first.keys() | second.keys())
        if first.get(key, "absent") != second.get(key, "absent")
    ]
