"""How a command of this project says that its input is wrong: one line on stderr, status 2.

Imports nothing heavy, so that commands start fast.
"""

import argparse
import sys
from typing import NoReturn

from megatron_mone.common.exit_status import USER_ERROR

ERROR = "megatron-mone: error:"


class OneLineParser(argparse.ArgumentParser):
    """One line per mistake; argparse would print the usage before it."""

    def __init__(self, description: str | None) -> None:
        super().__init__(
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Print the mistake and leave with USER_ERROR."""
        self.exit(USER_ERROR, f"{ERROR} {message}; see --help\n")


def fail(error: ValueError | OSError) -> int:
    """Print what is wrong in one line; returns USER_ERROR.

    Args:
        error: a ValueError with our own words, or what the system says of a file.
    """
    text = str(error)
    if isinstance(error, OSError) and error.filename is not None:
        text = f"{error.filename}: {error.strerror}"
    print(f"{ERROR} {' '.join(text.split())}", file=sys.stderr)
    return USER_ERROR
