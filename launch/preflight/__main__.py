"""Check the nodes of a job before training, in the job itself.

    python -m launch.preflight check --hosts FILE [--limit NAME=VALUE ...]
    python -m launch.preflight judge LINES --hosts FILE --need N [--limit NAME=VALUE ...]

check runs as every task of an srun and prints one JSON line; judge reads the lines of all tasks,
names bad nodes and writes the nodes to train on beside LINES. NAME is a field of
launch/preflight/limits.py.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.preflight.check import check
from launch.preflight.judge import judge
from launch.preflight.limits import Limits, read_limits
from megatron_mone.common.command_line import OneLineParser, fail


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line: 0, 69 from judge when too few nodes are good, 2 on a user's mistake."""
    own = parser()
    options = own.parse_args(arguments)
    judging = options.action == "judge"
    if judging != (options.lines is not None) or judging != (options.need is not None):
        own.error("judge takes LINES and --need, check neither")
    try:
        limits = _limits(options.limit)
        if judging:
            return judge(options.lines, options.hosts, options.need, limits)
        # One write: lines of many tasks go to one file.
        os.write(sys.stdout.fileno(), f"{check(options.hosts, limits)}\n".encode())
        return 0
    except (ValueError, OSError) as error:
        return fail(error)


def parser() -> OneLineParser:
    """The command line."""
    own = OneLineParser(__doc__)
    own.prog = "python -m launch.preflight"
    own.add_argument("action", choices=("check", "judge"))
    own.add_argument("lines", nargs="?", type=Path, metavar="LINES", help="what check printed")
    own.add_argument("--hosts", type=Path, required=True, help="one host name a line")
    own.add_argument("--need", type=_count, metavar="N", help="nodes to train on")
    own.add_argument(
        "--limit", action="extend", nargs="+", default=[], metavar="NAME=VALUE",
        help="of launch/preflight/limits.py; may be repeated",
    )  # fmt: skip
    return own


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return value


def _limits(given: Sequence[str]) -> Limits:
    pairs = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--limit {text!r} must be NAME=VALUE")
        pairs[name] = value
    return read_limits(pairs)


if __name__ == "__main__":
    sys.exit(main())
