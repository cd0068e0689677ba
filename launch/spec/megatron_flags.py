"""Megatron's flags: what a run file and words say of one, and the parser, imported in silence.

Touches nothing.
"""

import itertools
import logging
import warnings
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from typing import Any


def stated(name: str, values: Mapping[str, Any], words: Sequence[str]) -> Any:
    """The value of an argument as it was written; None where nobody set it.

    Args:
        name: of the argument, such as micro_batch_size.
        values: arguments of the run file.
        words: Megatron flags after it, of which the last wins.
    """
    flag = f"--{name.replace('_', '-')}"
    found = values.get(name)
    for word, following in itertools.pairwise([*words, ""]):
        if word == flag:
            found = following
        elif word.startswith(f"{flag}="):
            found = word.removeprefix(f"{flag}=")
    return found


def stated_words(name: str, values: Mapping[str, Any], words: Sequence[str]) -> list[str] | None:
    """As `stated`, of an argument that takes several words."""
    flag = f"--{name.replace('_', '-')}"
    found = values.get(name)
    for place, word in enumerate(words):
        if word == flag:
            following = words[place + 1 :]
            found = list(itertools.takewhile(lambda word: not word.startswith("--"), following))
        elif word.startswith(f"{flag}="):
            found = [word.removeprefix(f"{flag}=")]
    if found is None or isinstance(found, list):
        return found if found is None else [str(word) for word in found]
    return [str(found)]


def whole_number(name: str, values: Mapping[str, Any], words: Sequence[str]) -> int | None:
    """As `stated`, of an argument that is a size.

    Raises:
        ValueError: it is no whole number.
    """
    found = stated(name, values, words)
    if found is None:
        return None
    if not (str(found).isascii() and str(found).isdecimal()):
        raise ValueError(f"{name} = {found!r} must be a whole number")
    return int(found)


def flag_parser() -> ArgumentParser:
    """A parser of its own for each caller, who may change it.

    Raises:
        ImportError: Megatron-Core is not installed here.
    """
    with warnings.catch_warnings():
        # On import Megatron and torch say which GPU packages are missing: no news here.
        warnings.simplefilter("ignore")
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        from megatron_mone.model.arguments import flag_parser

        return flag_parser()
