"""What a rank of a refusal case runs; forked, for each case is a job of its own."""

from __future__ import annotations

import os
import sys
import tempfile

from tests.refusal_cases import CASES


def run(name: str, flags: list[str], folder: str) -> None:
    """Train as `python -m megatron_mone.pretrain` does.

    Args:
        name: of the case.
        flags: of the job.
        folder: for temporary files.
    """
    from megatron_mone import pretrain
    from tests.training_cases import spare_repeated_work

    spare_repeated_work()
    case = next(case for case in CASES if case.name == name)
    os.environ["WORLD_SIZE"] = str(case.world)
    tempfile.tempdir = folder
    if case.prepare is not None:
        case.prepare()
    sys.argv = ["pretrain", *flags]
    pretrain.main()
