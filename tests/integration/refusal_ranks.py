"""What the ranks of a refusal case run; forked, for each case is a job of its own."""

import os
import tempfile
import time
from pathlib import Path

from megatron_mone.common.files import atomic_write
from tests.refusal_cases import BASE, CASES

ELSEWHERE = "elsewhere"


def run(name: str, flags: list[str], folder: str) -> None:
    """Train as `python -m megatron_mone.pretrain` does, after the flags were checked as `launch
    submit` and the planner have them checked.

    Args:
        name: of the case.
        flags: of the job.
        folder: for temporary files; rank 0 writes what the check says to its file ELSEWHERE.
    """
    from megatron_mone import pretrain
    from tests.training_cases import spare_repeated_work

    spare_repeated_work()
    case = next(case for case in CASES if case.name == name)
    said = Path(folder, ELSEWHERE)
    if os.environ["RANK"] == "0":
        atomic_write(said, _checked_elsewhere(flags, case.world).encode())
    while not said.exists():  # whoever fails takes the others with it
        time.sleep(0.01)
    os.environ["WORLD_SIZE"] = str(case.world)
    tempfile.tempdir = folder
    if case.prepare is not None:
        case.prepare()
    pretrain.main(flags)


def save_base(folder: str, *flags: str) -> None:
    """Train BASE with more flags and save it: a checkpoint that cases load."""
    from megatron_mone import pretrain
    from tests.training_cases import spare_repeated_work

    spare_repeated_work()
    pretrain.main([*BASE, *flags, "--save", folder, "--save-interval", "2"])


def _checked_elsewhere(flags: list[str], world: int) -> str:
    """What the planner's process and that of `launch submit` say of a job; empty: they take it."""
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars

    from megatron_mone.model import checks
    from megatron_mone.planning.tracing.gpu_job import parse_gpu_job

    own, here = dict(os.environ), (checks.check_run, checks.check_checkpoint)
    checks.check_run, checks.check_checkpoint = checks.check_values, lambda args: None
    try:
        parse_gpu_job(flags, world, 0)
    except ValueError as error:
        return str(error)
    finally:
        checks.check_run, checks.check_checkpoint = here
        os.environ.clear()
        os.environ.update(own)
        global_vars.destroy_global_vars()
        destroy_num_microbatches_calculator()
    return ""
