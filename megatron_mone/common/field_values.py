"""Values of a dataclass's fields, read by the fields' types: one line for a value of the wrong one.

Imports nothing of Megatron, so that commands start fast. A whole float (6.0, 1e3) is taken for an
integer, as in run files; text is never taken for a number, nor a bool.
"""

import math
import numbers
import os
import types
from typing import Any, Literal, Union, get_args, get_origin

_LARGEST_EXACT = 2**53  # of a float's whole numbers
_LONGEST_SHOWN = 80  # characters of a value in an error
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
}


def read_value(name: str, value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it.

    Args:
        name: of the field, for the error.
        value: of any type.
        hint: the field's type: bool, int, float, str, a Literal of texts, list[int], and unions of
            these and None.

    Raises:
        ValueError: one line with the field, the value and what is taken.
    """
    kinds = _kinds(hint)
    for kind in kinds:
        taken, read = _read(value, kind)
        if taken:
            return read
    allowed = " or ".join(_word(kind) for kind in kinds if kind is not type(None))
    raise ValueError(f"{name} = {_shown(value)} is not allowed: it must be {allowed}{_hint(value)}")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # an integer of more than 4300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _read(value: Any, kind: Any) -> tuple[bool, Any]:
    """(whether the kind takes the value, the value as the kind has it)."""
    if kind is type(None):
        return value is None, None
    if kind is bool or isinstance(value, bool):
        return kind is bool and isinstance(value, bool), value
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if get_origin(kind) is list:
        return _read_list(value, get_args(kind)[0])
    if kind is str:
        return _read_text(value)
    is_number = isinstance(value, numbers.Real) and _is_finite(value)
    if kind is int:
        whole = is_number and value == math.floor(value)
        whole = whole and (isinstance(value, numbers.Integral) or abs(value) < _LARGEST_EXACT)
        return whole, int(value) if whole else value
    return is_number, float(value) if is_number else value


def _read_list(value: Any, kind: Any) -> tuple[bool, Any]:
    if not isinstance(value, list | tuple):
        return False, value
    entries = [_read(entry, kind) for entry in value]
    return all(taken for taken, _ in entries), [read for _, read in entries]


def _read_text(value: Any) -> tuple[bool, Any]:
    """Text that is not empty, a path, or a number that YAML read where text was meant."""
    if isinstance(value, numbers.Integral):
        return True, str(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    return isinstance(value, str) and bool(value.strip()), value


def _word(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind))
    if get_origin(kind) is list:
        return "a list of whole numbers"
    return _WORDS[kind]


def _hint(value: Any) -> str:
    """That a number in quotes is text."""
    if not isinstance(value, str):
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return " (a number in quotes is text: write it without them)"


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
