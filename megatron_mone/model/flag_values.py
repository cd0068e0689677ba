"""Values as the words of command-line flags, and the refusals of flags in plain words.

May touch: the types of a parser's actions; no Megatron state.
"""

import argparse
import re
import types
from argparse import Action, ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

_SWITCH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_PATTERN = "a whole number, or a list of 0 and 1 such as ([0]+[1]*3)*2"
# Megatron's own functions; anything else of that kind is told by its choices or not at all.
_TAKEN = {
    "moe_freq_type": _PATTERN,
    "la_freq_type": _PATTERN,
    "no_rope_freq_type": _PATTERN,
    "tuple_type": "whole numbers with commas between, such as 128,0",
    "bool": "any text for true, and nothing for false",
}


def flag_words(name: str, value: Any, actions: Sequence[Action], source: object) -> list[str]:
    """The words that make a parser read `value`.

    Args:
        name: of the argument.
        value: None leaves the default.
        actions: the flags of that argument.
        source: what holds the value, named in errors.

    Raises:
        ValueError: one line, for a value that the flag does not take.
    """
    if value is None:
        return []
    action = actions[0]
    try:
        if action.nargs == 0:
            return _switch(value, actions)
        flag = action.option_strings[0]
        if action.nargs is None:
            word = (
                _joined([*value], action)
                if isinstance(value, list | tuple)
                else _word(value, action)
            )
            # argparse takes -1e-3 or -x for a flag where it stands alone.
            return [f"{flag}={word}"] if word.startswith("-") else [flag, word]
        return _list_words(flag, [*value] if isinstance(value, list | tuple) else [value], action)
    except ValueError as error:
        raise ValueError(f"{source}: {name} = {value!r} {error}") from None


def refuse_in_words(parser: ArgumentParser) -> None:
    """Have the flags whose types are functions refuse a value by saying what they take.

    argparse says "invalid moe_freq_type value", and lets the KeyError of an enum through.
    """
    for action in parser._actions:
        is_function = isinstance(action.type, types.FunctionType | types.MethodType)
        if is_function and not hasattr(action.type, "says_what_it_takes"):
            action.type = _refusing(action)


def _refusing(action: Action) -> Callable[[str], Any]:
    read: Any = action.type
    allowed = _taken(action)

    def reading(text: str) -> Any:
        try:
            return read(text)
        except ArgumentTypeError:
            raise
        except KeyError:
            raise ArgumentTypeError(f"{text!r} is none of its values: {allowed}") from None
        except Exception:
            raise ArgumentTypeError(f"{text!r} is not allowed: it must be {allowed}") from None

    reading.says_what_it_takes = True  # type: ignore[attr-defined]
    reading.reads = read.__name__  # type: ignore[attr-defined]
    return reading


def _taken(action: Action) -> str:
    choices = action.choices
    if choices is None and action.dest.startswith("cuda_graph_"):
        from megatron.core.transformer.enums import CudaGraphModule

        choices = ["full", "full_iteration", "full_iteration_inference", *CudaGraphModule]
    if choices is not None:
        return ", ".join(getattr(choice, "name", str(choice)) for choice in choices)
    return _TAKEN.get(_type_name(action), "a value that this flag takes (see --help)")


def _type_name(action: Action) -> str:
    return str(getattr(action.type, "reads", None) or getattr(action.type, "__name__", ""))


def _switch(value: Any, actions: Sequence[Action]) -> list[str]:
    if isinstance(value, str):
        value = _SWITCH.get(value.strip().lower(), value)
    if not isinstance(value, bool):
        raise ValueError("must be true or false")
    for action in actions:
        if isinstance(action, BooleanOptionalAction):
            return [next(o for o in action.option_strings if o.startswith("--no-") is not value)]
        if action.const is value:
            return [action.option_strings[0]]
    if actions[0].default == value:
        return []
    raise ValueError("has no Megatron flag; leave it out")


def _word(value: Any, action: Action) -> str:
    """One value as one word."""
    if isinstance(value, dict | list | tuple):
        raise ValueError("must be a value, not a mapping or a list in a list")
    if value is None:
        raise ValueError("must be values, not null")
    kind = action.type
    if kind is bool:
        return _truth(value)
    if isinstance(value, bool):
        raise ValueError(f"must be {_wanted(action)}: write a text in quotes")
    if kind is int:
        return _whole(value)
    if kind is float:
        try:
            float(value)
        except ValueError:
            raise ValueError("must be a number") from None
    if isinstance(value, str) and _type_name(action) in _TAKEN:
        return "".join(value.split())  # Megatron's patterns hold no spaces
    return _plain(value) if isinstance(value, float) else str(value)


def _wanted(action: Action) -> str:
    if action.type is int:
        return "a whole number"
    return "a number" if action.type is float else "a text or a number"


def _truth(value: Any) -> str:
    """Megatron reads some flags by `bool`, for which any text is true."""
    value = _SWITCH.get(str(value).strip().lower()) if not isinstance(value, bool) else value
    if value is None:
        raise ValueError("must be true or false")
    return "true" if value else ""


def _whole(value: Any) -> str:
    try:
        if isinstance(value, str):
            return str(int(value))
        if value == int(value):
            return str(int(value))
    except (ValueError, OverflowError):  # no number, nan or infinite
        pass
    raise ValueError("must be a whole number")


def _plain(value: float) -> str:
    """Exactly the number, without the exponent that argparse takes for a flag after a minus."""
    text = repr(value)
    return format(Decimal(text), "f") if text.startswith("-") and "e" in text else text


def _joined(values: list[Any], action: Action) -> str:
    """A list as the one word of a flag: [0,1] for layer patterns, 128,0 for a tuple."""
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in values):
        raise ValueError("must be one value, or a list of whole numbers where it is a pattern")
    if action.type in (int, float):
        raise ValueError("must be one number, not a list")
    if _type_name(action) == "tuple_type":
        return ",".join(map(_whole, values))
    if _type_name(action) in _TAKEN:
        return f"[{','.join(map(_whole, values))}]"
    return str(values)


def _list_words(flag: str, values: list[Any], action: Action) -> list[str]:
    """The words of a flag that takes several."""
    if isinstance(action.nargs, int) and len(values) != action.nargs:
        raise ValueError(f"must be {action.nargs} values")
    if not values and action.nargs == argparse.ONE_OR_MORE:
        if not action.default:
            return []
        raise ValueError("must hold at least one value; leave it out for the default")
    words = [_word(value, action) for value in values]
    for word in words:
        # As argparse tells a flag: not a negative number, and no text with a space in it.
        if word.startswith("-") and " " not in word and not re.match(r"^-(\d+|\d*\.\d+)$", word):
            if len(words) == 1:
                return [f"{flag}={word}"]
            raise ValueError(f"holds {word!r}, which a list on the command line cannot: it is read "
                             "as a flag")  # fmt: skip
    return [flag, *words]
