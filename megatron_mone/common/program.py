"""Functions with typed parameters -> the commands of a program, by typer.

A command is one function: its parameters are the options, its docstring the help as it stands, its
result the exit status. A mistake is one line on stderr and status 2, without a usage block.
Imports nothing heavy, so that commands start fast; their functions import what they need.
"""

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.common.command_line import ERROR, fail
from megatron_mone.common.exit_status import INTERRUPTED, USER_ERROR
from megatron_mone.common.spelling import nearest_name

PASSES_UNKNOWN = {"ignore_unknown_options": True, "allow_extra_args": True}
"""Context settings: flags that the command does not know are Megatron's, in `context.args`."""
PASSES_REST = {"allow_extra_args": True}
"""Context settings: what stands after `--` is in `context.args`, unread."""

WORDS = "megatron_mone.words"
"""Key of `context.meta`: all words of the command, as typed."""


class Command(TyperCommand):
    """One command: its mistakes are lines, its help is its docstring."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Leave in `ctx.args` what is not this command's."""
        ctx.meta[WORDS] = list(args)
        cut = args.index("--") if ctx.allow_extra_args and "--" in args else len(args)
        counts = {
            flag: one.nargs
            for one in self.params
            if not getattr(one, "is_flag", True)
            for flag in one.opts
        }
        for place, flag in enumerate(args[:cut]):
            count = counts.get(flag, 0)
            values = args[place + 1 : min(cut, place + 1 + count)]
            # Click would take the next flag for a value.
            if len(values) < count or any(value.startswith("--") for value in values):
                words = "one argument" if count == 1 else f"{count} arguments"
                ctx.fail(f"argument {flag}: expected {words}")
        passes, ctx.allow_extra_args = ctx.allow_extra_args, True  # what is left is told below
        try:
            super().parse_args(ctx, args[:cut])
        finally:
            ctx.allow_extra_args = passes
        if ctx.args and not ctx.ignore_unknown_options and not ctx.resilient_parsing:
            ctx.fail(_unknown(ctx, ctx.args[0]))
        ctx.args = [*ctx.args, *args[cut + 1 :]]
        return ctx.args

    def invoke(self, ctx: Any) -> int:
        """Run the function; its status, or 2 after one line for a wrong value or file."""
        try:
            return super().invoke(ctx) or 0
        except (ValueError, OSError) as error:
            return fail(error)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return INTERRUPTED

    def format_usage(self, ctx: Any, formatter: Any) -> None:
        """As argparse begins it."""
        pieces = " ".join(self.collect_usage_pieces(ctx))
        formatter.write_usage(ctx.command_path, pieces, prefix="usage: ")

    def format_help_text(self, ctx: Any, formatter: Any) -> None:
        """The docstring with its lines and examples."""
        formatter.write(f"\n{self.help}\n" if self.help else "")


class _Group(TyperGroup):
    format_usage = Command.format_usage
    format_help_text = Command.format_help_text

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        known = self.list_commands(ctx)
        if args[0] not in known and not ctx.resilient_parsing:
            hint = nearest_name(args[0], known)
            ctx.fail(f"invalid choice: {args[0]!r}{hint} (choose from {', '.join(known)})")
        return super().resolve_command(ctx, args)


class Program(typer.Typer):
    """Commands that are started by one name.

    Args:
        completes: whether the program installs its shell's completion.
    """

    def __init__(self, help: str | None = None, *, completes: bool = False) -> None:
        super().__init__(
            cls=_Group, help=help, add_completion=completes, rich_markup_mode=None,
            pretty_exceptions_enable=False,
        )  # fmt: skip

    def command(self, name: str | None = None, **settings: Any) -> Callable[[Any], Any]:
        """Register a function, in which a parameter that is a dataclass stands for its fields."""
        register = super().command(name, **{"cls": Command, **settings})

        def add(function: Callable[..., int | None]) -> Callable[..., int | None]:
            register(_spread(function))
            return function

        return add

    def main(self, arguments: Sequence[str] | None = None) -> int:
        """Run a command line.

        Args:
            arguments: its words; None takes the process's.

        Returns:
            The exit status.

        Raises:
            SystemExit: 2 after the line that says what is wrong with an option.
        """
        end_with_starter()
        command = typer.main.get_command(self)
        words = None if arguments is None else list(arguments)
        try:
            return command.main(words, standalone_mode=False) or 0
        except typer.TyperException as error:
            print(f"{ERROR} {_words(error)}; see --help", file=sys.stderr)
            raise SystemExit(USER_ERROR) from None


def parse[T](kind: type[T], words: Sequence[str]) -> tuple[T, list[str]]:
    """Options alone, as a command with a parameter of this dataclass reads them.

    Returns:
        The options, and the words that are none of them.

    Raises:
        SystemExit: 2 after the line that says what is wrong.
    """
    found: list[tuple[T, list[str]]] = []
    program = Program()

    def read(context: typer.Context, given: Any) -> None:
        found.append((given, context.args))

    read.__annotations__["given"] = kind
    program.command(context_settings=PASSES_UNKNOWN)(read)
    status = program.main(words)
    if not found:
        raise SystemExit(status)
    return found[0]


def _words(error: typer.TyperException) -> str:
    """What is wrong with a command line, in the words of argparse."""
    context, option = getattr(error, "ctx", None), getattr(error, "option_name", None)
    parameter, kind = getattr(error, "param", None), type(error).__name__
    if kind == "NoSuchOption":
        return _unknown(context, str(option))
    if kind == "BadOptionUsage":
        return f"argument {option}: expected one argument"
    if parameter is None:
        return " ".join(error.message.split()).rstrip(".")
    named = parameter.opts[0] if parameter.param_type_name == "option" else parameter.metavar
    if kind == "MissingParameter":
        return f"the following arguments are required: {named or parameter.name}"
    return f"argument {named or parameter.name}: {_value_words(error)}"


def _value_words(error: typer.TyperException) -> str:
    cause: Any = error.__cause__
    if cause is None or not hasattr(cause, "errors"):
        return error.message
    found = cause.errors()[0]
    if found["type"].endswith("_parsing"):
        return f"invalid {found['type'].removesuffix('_parsing')} value: {found['input']!r}"
    return found["msg"].removeprefix("Value error, ")


def _unknown(context: Any, word: str) -> str:
    if not (isinstance(context.command, Command) and context.allow_extra_args):
        return f"unrecognized arguments: {word}{_nearest(context, word)}"
    where = "; Megatron flags and programs go after --"
    return f"unknown argument {word!r}{_nearest(context, word)}{where}"


def _nearest(context: Any, word: str) -> str:
    params = context.command.get_params(context)
    known = [flag for one in params for flag in one.opts if flag.startswith("-")]
    return nearest_name(word.partition("=")[0], known)


def _spread(function: Callable[..., int | None]) -> Callable[..., int | None]:
    """A function whose parameters are the fields of those of `function` that are dataclasses."""
    hints = get_type_hints(function, include_extras=True)
    given = inspect.signature(function).parameters
    kinds = {name: hints[name] for name in given if is_dataclass(hints[name])}
    parameters: list[inspect.Parameter] = []
    for name, parameter in given.items():
        if name in kinds:
            types = get_type_hints(kinds[name], include_extras=True)
            parameters += [_parameter(one, types[one.name]) for one in _options(kinds[name])]
        else:
            parameters.append(parameter.replace(annotation=hints[name], kind=_KEYWORD))

    def called(**values: Any) -> int | None:
        for name, kind in kinds.items():
            values[name] = kind(**{one.name: values.pop(one.name) for one in _options(kind)})
        return function(**values)

    called.__doc__, called.__name__ = function.__doc__, function.__name__
    called.__annotations__ = {one.name: one.annotation for one in parameters}
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return called


def _options(kind: Any) -> list[Field[Any]]:
    return [one for one in fields(kind) if one.init]


_KEYWORD = inspect.Parameter.KEYWORD_ONLY


def _parameter(one: Field[Any], kind: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if one.default is MISSING else one.default
    return inspect.Parameter(one.name, _KEYWORD, default=default, annotation=kind)
