"""--grid texts -> the points of a sweep, each with the Megatron flags that make it.

    r=1/2,1/4       mone_neuron_ratio of 0.5 and of 0.25
    lr=3e-3,1e-3    a second --grid: all combinations

Numbers have one spelling each (1/2, .5 and 0.50 are 0.5), so that a point is the same point however
it was written. Imports Megatron, for the names and types of its arguments; reads no file.
"""

import argparse
import functools
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from launch.spec.megatron_flags import flag_parser
from megatron_mone.common.spelling import nearest_name
from megatron_mone.model.run_config import to_flags

SHORT = {"r": "mone_neuron_ratio"}
"""Names of --grid that stand for longer ones."""
FORM = "ARGUMENT=VALUE,VALUE, like r=1/2,1/4"
_FOLDERS = ("save", "load", "tensorboard_dir")
_NUMBER = re.compile(r"-?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d{1,3})?", re.ASCII)
_FRACTION = re.compile(r"(-?\d+)/(\d+)", re.ASCII)
_EXACT_DIGITS = 20
_SWITCH = {"true": True, "false": False}


@dataclass(frozen=True)
class Point:
    """One combination of a grid's values.

    Attributes:
        values: argument (Megatron's name) -> value, in the grid's order.
        flags: the words that set them on Megatron's command line.
    """

    values: tuple[tuple[str, str], ...]
    flags: tuple[str, ...]


def read_grid(
    texts: Sequence[str], run_values: Mapping[str, Any], words: Sequence[str]
) -> tuple[Point, ...]:
    """All combinations of a grid; none for an empty grid.

    Args:
        texts: `ARGUMENT=VALUE,VALUE` each.
        run_values: arguments of the run file.
        words: Megatron flags after it.

    Raises:
        ValueError: one line: not of that form, an unknown argument (with the nearest known name),
            a value that the argument does not take, or a switch that no flag can turn back.
    """
    split = [_split(text) for text in texts]
    names = [name for name, _ in split]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"--grid {twice[0]} is given twice: write all its values in one --grid")
    if not split:
        return ()
    actions = _actions()
    axes = [_axis(name, values, actions, run_values, words) for name, values in split]
    return tuple(
        Point(
            tuple((name, value) for name, value, _ in point),
            tuple(word for *_, flags in point for word in flags),
        )
        for point in itertools.product(*axes)
    )


def number_text(text: str) -> str | None:
    """The one spelling of a number or fraction; None of what is neither.

    Exact where the decimal ends within 20 digits, else the digits that give the same float64.

    Raises:
        ValueError: a fraction over zero, or a number beyond float64.
    """
    fraction = _FRACTION.fullmatch(text)
    if fraction is None and not _NUMBER.fullmatch(text):
        return None
    if fraction is not None and int(fraction[2]) == 0:
        raise ValueError(f"{text} is over zero: write a fraction such as 1/4")
    value = Fraction(text)
    try:
        near = float(value)
    except OverflowError:
        raise ValueError(f"{text} is too large for a number") from None
    for digits in range(_EXACT_DIGITS + 1):
        scaled = value * 10**digits
        if scaled.denominator == 1 and len(str(scaled.numerator)) <= _EXACT_DIGITS:
            sign, whole = "-" if scaled < 0 else "", f"{abs(scaled.numerator):0{digits + 1}d}"
            return sign + (f"{whole[:-digits]}.{whole[-digits:]}" if digits else whole)
    return repr(near)


def _split(text: str) -> tuple[str, list[str]]:
    name, equals, listed = text.partition("=")
    values = re.split(r",(?![^\[]*\])", listed)  # a layer pattern such as [0,1] is one value
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name) or not equals or "" in values:
        raise ValueError(f"--grid {text!r} must be {FORM}")
    return SHORT.get(name, name), values


@functools.cache
def _actions() -> dict[str, list[argparse.Action]]:
    """Argument name -> its flags' actions, from Megatron's own parser and ours."""
    try:
        parser = flag_parser()
    except ImportError as error:
        raise ValueError(
            f"--grid needs Megatron-Core where it is given, to check names and values ({error}): "
            "start the sweep in an environment that could train"
        ) from error
    actions: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        actions.setdefault(action.dest, []).append(action)
    return actions


def _axis(
    name: str,
    values: Sequence[str],
    actions: Mapping[str, list[argparse.Action]],
    run_values: Mapping[str, Any],
    words: Sequence[str],
) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, value, flags) of each value."""
    if name not in actions or name == "help":
        raise ValueError(f"--grid {name}: unknown argument{nearest_name(name, list(actions))}")
    if name in _FOLDERS:
        raise ValueError(f"--grid {name}: each case has a folder of its own; leave it out")
    own = actions[name]
    found = {}
    for text in values:
        try:
            value, shown = _value(text, own)
            flags = to_flags({name: value}, _Actions(own), Path("--grid"))
            if not flags:
                _check_default(value, run_values.get(name), own, words)
        except ValueError as error:
            raise ValueError(f"--grid {name}={text}: {error}") from error
        found[shown] = (name, shown, tuple(flags))
    return list(found.values())


class _Actions(argparse.ArgumentParser):
    """A parser with only these actions, for `to_flags`."""

    def __init__(self, actions: list[argparse.Action]) -> None:
        super().__init__(add_help=False)
        self._actions = actions


def _value(text: str, actions: Sequence[argparse.Action]) -> tuple[Any, str]:
    """A value as `to_flags` takes it, and its one spelling."""
    action = actions[0]
    if action.nargs == 0:
        if text not in _SWITCH:
            raise ValueError("must be true or false")
        return _SWITCH[text], text
    shown: str | None = text
    # Other types of Megatron's evaluate the text: the ranks may, a launcher should not.
    if action.type in (int, float):
        shown = number_text(text)
        if shown is None or (action.type is int and not re.fullmatch(r"-?\d+", shown)):
            kind = "a whole number" if action.type is int else "a number or a fraction such as 1/4"
            raise ValueError(f"must be {kind}")
    known = [getattr(choice, "name", str(choice)) for choice in action.choices or ()]
    if known and text not in known:
        raise ValueError(f"must be one of {', '.join(known)}{nearest_name(text, known)}")
    assert shown is not None
    return shown, shown


def _check_default(
    value: Any, in_file: Any, actions: Sequence[argparse.Action], words: Sequence[str]
) -> None:
    """Refuse a default that has no flag, where the run file or a flag set something else."""
    options = {option for action in actions for option in action.option_strings}
    if in_file not in (None, value) or options & set(words):
        raise ValueError(
            "Megatron has no flag to turn this back: leave it out of the run file and the flags"
        )
