"""One layer of the model, profiled on this rank: a step takes what its operators do not.

The profiler is started beside this process, as a job of one rank: it measures Megatron's own step,
module by module, on the device of this rank. May touch: the process, the folder of the profile.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_mone.common.child_processes import tied
from megatron_mone.common.local_ranks import free_port
from megatron_mone.common.phases import COMMUNICATION, DATA, OPTIMIZER
from megatron_mone.common.places import program_words
from megatron_mone.common.surroundings import without_ranks
from megatron_mone.profiling.profile_document import Profile

STEPS = 8
_NOT_OF_PASSES = (*COMMUNICATION, DATA, OPTIMIZER)


def small_step_ms(flags: Sequence[str], folder: Path, limit: float) -> dict[str, float]:
    """Milliseconds of each phase of a step, the quietest half of the steps.

    Args:
        flags: of the small job.
        folder: of its profile.
        limit: seconds that the process may take.

    Raises:
        RuntimeError: one line; it failed, or took longer.
    """
    flags = [*flags, "--train-iters", "1000", "--eval-interval", "1000", "--eval-iters", "0"]
    steps = ["--steps", str(STEPS), "--windows", "2", "--warm-up", "2", "--no-memory"]
    words = [*program_words("profile"), *steps, "--out", str(folder), *flags]
    own = {"RANK": "0", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"), "WORLD_SIZE": "1",
           "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "log").open("w") as log:
        try:
            done = subprocess.run(
                [sys.executable, *words], env={**without_ranks(os.environ), **own}, stdout=log,
                stderr=log, timeout=max(1.0, limit), preexec_fn=tied(), check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the small job took longer than its {limit:.0f} s") from None
    if done.returncode:
        lines = (folder / "log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"the small job failed: {lines[-1] if lines else done.returncode}")
    return dict(Profile.read_folder(folder).runs[0].phases)


def of_passes(phases_ms: Mapping[str, float]) -> float:
    """Of those, the milliseconds of forward and backward passes."""
    return sum(ms for phase, ms in phases_ms.items() if phase not in _NOT_OF_PASSES)
