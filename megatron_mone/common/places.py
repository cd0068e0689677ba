"""Where the project's own files lie, and what it keeps for a user. Touches nothing."""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
ROOT = PACKAGE.parent
"""The folder that holds `megatron_mone`: a checkout, or the site-packages of an installation."""

CONFIG_ROOT = (PACKAGE / "configs").resolve()
"""Where the package has a link to, in a checkout; in an installation, its own folder."""

IS_CHECKOUT = CONFIG_ROOT.parent == ROOT
"""Whether the rest of the project (tools/, .git, constraints.txt) lies beside the package."""


def user_cache(name: str) -> Path:
    """`megatron-mone/NAME` in the user's cache folder: XDG_CACHE_HOME, or ~/.cache."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # A relative path is to be ignored, says the XDG base directory specification.
    base = Path(home) if Path(home).is_absolute() else Path.home() / ".cache"
    return base / "megatron-mone" / name


def program_words(name: str) -> tuple[str, ...]:
    """What follows `python`: a file of tools/, or, where an installation has none, a command.

    Args:
        name: of the file, without its suffix: merge_profile, `merge-profile` as a command, or
            bench_layer, `bench layer`.
    """
    if IS_CHECKOUT:
        return (str(ROOT / "tools" / f"{name}.py"),)
    return ("-m", "megatron_mone", *name.replace("bench_", "bench ").replace("_", "-").split())
