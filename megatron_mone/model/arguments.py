"""A run file and flags -> Megatron's arguments with ours, checked.

Everything is read from the words handed in; sys.argv is neither read nor changed. May touch:
Megatron's global arguments, which its own validation sets.
"""

import argparse
import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.patch import Replaced, wrapping
from megatron_mone.model import failure


def parse_arguments(words: Sequence[str], elsewhere: bool = False) -> argparse.Namespace:
    """Read --config and flags, check files and folders, and let Megatron validate the rest.

    Args:
        words: of the command line, without the program's name.
        elsewhere: another machine will run this: its files, folders and devices are not looked for.

    Raises:
        ValueError: anything wrong in the run file, the flags or the files they name.
    """
    from megatron.training import arguments

    from megatron_mone.checkpoint import upcycling
    from megatron_mone.checkpoint.vocabulary import keep_padded_vocabulary
    from megatron_mone.deepspeed.settings import for_engine
    from megatron_mone.model.checks import (
        check_checkpoint,
        check_layout,
        check_run,
        check_settings,
        check_values,
    )
    from megatron_mone.model.loss_check import settle_rerun_mode
    from megatron_mone.model.profile_window import window_of

    words, _ = for_engine(written_out(words))
    given = parse_given(words)
    (check_values if elsewhere else check_run)(given)
    try:
        args = arguments.parse_and_validate_args(extra_args_provider=reading(words))
    except ValueError:
        raise
    except SystemExit:  # the one exit() there is
        raise ValueError(
            "checkpoint_activations is no longer read: pass --recompute-activations"
        ) from None
    except Exception as error:
        raise ValueError(f"Megatron refuses the arguments: {failure.words(error)}") from error
    check_layout(args)
    check_settings(args)
    upcycling.begin(args, given, elsewhere)
    if not elsewhere:
        check_checkpoint(args)  # compares widths that validation derives
    keep_padded_vocabulary(args, given.padded_vocab_size)
    settle_rerun_mode(args)
    window_of(args)  # refuses a wrong one
    return args


def parse_given(words: Sequence[str]) -> argparse.Namespace:
    """Megatron's arguments as `words` give them, each of which something reads.

    Args:
        words: of the command line, those of a run file written out.

    Raises:
        ValueError: from the parser or `check_flags`.
    """
    from megatron.training.arguments import parse_args

    from megatron_mone.model.checks.flags import check_flags

    if any(word.partition("=")[0] == "--yaml-cfg" for word in words):
        # What it holds would replace all arguments, ours too.
        raise ValueError("yaml_cfg is not read here: give Megatron's arguments in a --config FILE")
    defaults: dict[str, Any] = {}
    given = parse_args(reading(words, defaults))
    check_flags(given, defaults)
    return given


def reading(
    words: Sequence[str], defaults: dict[str, Any] | None = None
) -> Callable[[argparse.ArgumentParser], argparse.ArgumentParser]:
    """An extra_args_provider of Megatron's: adds our flags, notes all defaults, has `words` parsed.

    megatron/training/arguments.py: parse_args takes no words, and asks the parser that its provider
    hands back for those of sys.argv.
    """

    def provide(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        actions = add_arguments(parser)._actions
        if defaults is not None:
            defaults.update({a.dest: a.default for a in reversed(actions)})  # the first counts
        parser.parse_args = partial(parser.parse_args, words)  # type: ignore[method-assign, assignment]
        return parser

    return provide


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our flags, and errors of one line instead of Megatron's thousand lines of usage."""
    from megatron_mone.checkpoint import ownership, verify
    from megatron_mone.common.spelling import nearest_name
    from megatron_mone.config import add_mone_args
    from megatron_mone.deepspeed import settings
    from megatron_mone.model import profile_window, routing_files
    from megatron_mone.model.flag_values import refuse_in_words
    from megatron_mone.model.trackers import flags as trackers

    add_mone_args(parser)
    profile_window.add_arguments(parser)
    routing_files.add_arguments(parser)
    verify.add_arguments(parser)
    ownership.add_arguments(parser)
    settings.add_arguments(parser)
    trackers.add_arguments(parser)
    refuse_in_words(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]
    for action in parser._actions:
        # "(e.g. 1.10 = 10%)" of transformer_config.py is a wrong format, which ends --help.
        action.help = re.sub(r"(?<!%)%(?![(%])", "%%", action.help or "") or None

    def one_line(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        hint = nearest_name(unknown[0], flags) if message.startswith("unrecognized") else ""
        raise ValueError(message + hint)

    parser.error = one_line  # type: ignore[method-assign,assignment]
    return parser


def flag_parser() -> argparse.ArgumentParser:
    """A parser of Megatron's flags and ours, for its actions."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


@contextmanager
def one_parser() -> Iterator[None]:
    """While it lasts every parser of Megatron's flags is a copy of one that has ours too.

    Megatron adds eight hundred flags anew for each, which takes 10 ms, three times in a job. Only
    for a process in which nobody adds others, such as one that forks a child for each of many jobs.
    """
    from megatron.training import arguments

    parser = flag_parser()
    with (
        Replaced(arguments, "add_megatron_arguments", lambda given: copy.copy(parser)),
        Replaced(sys.modules[__name__], "add_arguments", lambda given: given),
    ):
        yield


def written_out(words: Sequence[str]) -> list[str]:
    """The words with the flags that `--config FILE` stands for in its place, before those given.

    Raises:
        ValueError: the run file is wrong.
    """
    from megatron_mone.model.run_config import load_run, to_flags

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    known, rest = own.parse_known_args(words)
    if known.config is None:
        return list(words)
    return to_flags(load_run(known.config), flag_parser(), known.config) + rest


def _once_a_class(read: Callable[[Any, type], dict[str, str]]) -> Callable[..., dict[str, str]]:
    known: dict[type, dict[str, str]] = {}

    def docstrings(group: Any, config: type) -> dict[str, str]:
        if config not in known:
            known[config] = read(group, config)
        return known[config]

    return docstrings


PATCHES = (
    wrapping(
        "docstrings-once",
        "megatron.training.argument_utils: ArgumentGroupFactory._get_field_docstrings",
        _once_a_class,
        why="every parser parses the source of 15 classes anew, for the texts of --help: 0.2 of"
        " the 0.25 s that it takes, three times in a job",
        needed_while="inspect.getsource(src_cfg_class)",
    ),
)
