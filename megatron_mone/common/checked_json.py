"""JSON from outside, checked: a fault is one ValueError line with the file, the place and the fix.

Reads the file it is given, and touches nothing else. Nothing in a file is executed; numbers are
finite, texts that get printed are short and printable.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
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
        for key, value in self._typed(dict, "an object").items():
            if not is_text(key):
                self.fail(f"has the key {key[:40]!r}, which is no short printable text")
            yield key, self._inside(value, f".{key}" if self._place else key)

    def elements(self) -> Iterator[Field]:
        """The elements of a list."""
        for index, value in enumerate(self._typed(list, "a list")):
            yield self._inside(value, f"[{index}]")

    def text(self, choices: tuple[str, ...] | None = None) -> str:
        """A short printable text, one of `choices` if they are given."""
        value = self._typed(str, "a text")
        if not is_text(value):
            self.fail(f"{value[:40]!r} is not a printable text of 1 to {LONGEST_TEXT} characters")
        if choices is not None and value not in choices:
            self.fail(f"{value!r} is none of {', '.join(choices)}")
        return value

    def texts(self, length: int, choices: tuple[str, ...]) -> None:
        """Check a list of `length` texts, each one of `choices`."""
        values = self._typed(list, "a list of texts")
        if len(values) != length:
            self.fail(f"has {len(values)} values where there should be {length}")
        for value in values:
            if value not in choices:
                self.fail(f"{str(value)[:40]!r} is none of {', '.join(choices)}")

    def flag(self) -> bool:
        """True or false."""
        return self._typed(bool, "true or false")

    def whole(self, most: int = LARGEST_WHOLE) -> int:
        """A whole number from 0 to `most`."""
        value = self._typed(int, "a whole number")
        if isinstance(value, bool) or not 0 <= value <= most:
            self.fail(f"{str(value)[:40]} is not a whole number from 0 to {most}")
        return value

    def number(self) -> float:
        """A finite number, 0 or more."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail("must be a number")
        if not 0 <= value <= sys.float_info.max:  # false for NaN too
            self.fail(f"{str(value)[:40]} is not a finite number of 0 or more")
        return float(value)

    def numbers(self, length: int | None = None) -> NDArray[Any]:
        """[length] finite numbers of 0 or more, int64 or float64 as they are written."""
        values = self._typed(list, "a list of numbers")
        if length is not None and len(values) != length:
            self.fail(f"has {len(values)} values where there should be {length}")
        if not values:
            return np.zeros(0)
        try:
            array = np.asarray(values)
        except ValueError:  # lists of unequal lengths inside
            self.fail("must be a list of numbers")
        if array.ndim != 1 or array.dtype.kind not in "if":
            self.fail("must be a list of numbers")
        if not np.isfinite(array).all() or array.min() < 0:
            self.fail("has a value that is not a finite number of 0 or more")
        return array

    def _typed(self, kind: type, words: str) -> Any:
        if not isinstance(self.value, kind):
            self.fail(f"must be {words}")
        return self.value

    def _inside(self, value: Any, place: str) -> Field:
        return Field(value, self._path, self._fix, self._place + place)


def is_text(value: Any) -> bool:
    """Whether a value is a short printable text."""
    return isinstance(value, str) and 0 < len(value) <= LONGEST_TEXT and value.isprintable()


def check_schema(document: Field, schema: str) -> None:
    """Refuse a document whose field `schema` is another one, or another version of this one."""
    family = schema.rpartition("/")[0]
    found = document["schema"].text()
    if found == schema:
        return
    if found.rpartition("/")[0] == family:
        version = schema.removeprefix(family)
        document.fail(f"schema is {found}, this version reads {version}: it was made by another")
    document.fail(f"schema is {found}, not {schema}: it is another kind of file")


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in first, value in second) of every key that differs; "absent" is a value."""
    return [
        (key, first.get(key, "absent"), second.get(key, "absent"))
        for key in sorted(first.keys() | second.keys())
        if first.get(key, "absent") != second.get(key, "absent")
    ]
