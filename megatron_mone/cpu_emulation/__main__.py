"""`python -m megatron_mone.cpu_emulation SCRIPT ARGS...` or `... -m MODULE ARGS...`."""

import runpy
import sys
from pathlib import Path

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.cpu_emulation import install

USAGE = "usage: python -m megatron_mone.cpu_emulation [SCRIPT | -m MODULE] ARGS..."


def main(arguments: list[str]) -> None:
    """Install the emulation, then run a script or module as `__main__` with the arguments left."""
    as_module = arguments[:1] == ["-m"]
    target, *rest = arguments[1:] if as_module else arguments or [""]
    if not target or target in ("-h", "--help"):
        raise SystemExit(USAGE)
    end_with_starter()
    install()
    sys.argv = [target, *rest]
    if as_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
        return
    # As `python SCRIPT` does it: the script's folder is the first place for its imports.
    sys.path.insert(0, str(Path(target).resolve().parent))
    runpy.run_path(target, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
