"""YAML from a user, checked: a fault is one ValueError line with file, field, value and fix.

Every value is checked as it is taken. Reads the file it is given by safe loading, and touches
nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from megatron_mone.common.spelling import nearest_name


def read_yaml(path: Path, example: str) -> Section:
    """The whole of a file; `example` as in Section.

    Raises:
        ValueError: one line, for what cannot be read or is no mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from None
    return Section(path, values, example)


class Section:
    """One mapping of a file.

    Args:
        path: the file, named in errors.
        values: what the file holds at `place`.
        example: ends an error about what is missing, such as "FILE is a whole example".
        place: the names that lead here, joined by dots; "" for the whole file.
    """

    def __init__(self, path: Path, values: Any, example: str, place: str = "") -> None:
        self.path, self.place, self.example = path, place, example
        if not isinstance(values, dict):
            found = place or "the file"
            raise ValueError(f"{path}: {found} must hold names and values; {self.example}")
        self.values: dict[str, Any] = {str(key): value for key, value in values.items()}

    def fail(self, name: str, fault: str) -> NoReturn:
        """Raise the one-line ValueError of a field."""
        shown = repr(self.values.get(name))[:60]
        raise ValueError(f"{self.path}: {self._at(name)} = {shown} {fault}")

    def only(self, *names: str) -> None:
        """Refuse any other field."""
        for name in self.values:
            if name not in names:
                raise ValueError(
                    f"{self.path}: unknown field {self._at(name)!r}"
                    f"{nearest_name(name, list(names))}; known here: {', '.join(names)}"
                )

    def section(self, name: str) -> Section:
        """The mapping under a name."""
        return Section(self.path, self._value(name), self.example, self._at(name))

    def text(self, name: str) -> str:
        """A text that is not blank."""
        value = self._value(name)
        if not isinstance(value, str) or not value.strip():
            self.fail(name, "must be a text; write it in quotes")
        return " ".join(value.split())

    def number(self, name: str, least: float | None = None) -> float:
        """A finite number: at least `least`, or without it more than 0."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(name, "must be a number, such as 3.5 (not 35e-1)")
        # Comparisons alone, since a whole number may be too large for a float.
        above = value > 0 if least is None else value >= least
        if not above or not value <= sys.float_info.max:
            bound = "greater than 0" if least is None else f"{least:g} or more"
            self.fail(name, f"must be finite and {bound}")
        return float(value)

    def whole(self, name: str) -> int:
        """A whole number from 1."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            self.fail(name, "must be a whole number of 1 or more")
        return value

    def share(self, name: str) -> float:
        """A number in (0, 1]."""
        value = self.number(name)
        if value > 1:
            self.fail(name, "must be at most 1: it is a share of the peak")
        return value

    def _value(self, name: str) -> Any:
        if name not in self.values:
            raise ValueError(f"{self.path}: {self._at(name)} is missing; {self.example}")
        return self.values[name]

    def _at(self, name: str) -> str:
        return f"{self.place}.{name}" if self.place else name
