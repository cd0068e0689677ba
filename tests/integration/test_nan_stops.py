"""A NaN in one rank's expert stops the whole job, and the message says where it began."""

import os
import subprocess
import sys

import pytest

from tests.training_cases import MOCK, MONE, ROOT, TINY

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("deferred", "flags"),
    [
        (False, []),
        (True, ["--save", "{tmp}", "--save-interval", "99"]),  # Megatron would run the step again
        (True, ["--no-check-for-nan-in-loss-and-grad"]),
    ],
    ids=["at once", "when the loss is refused", "before the optimizer"],
)
def test_nan_in_one_expert_names_rank_layer_and_expert(deferred, flags, tmp_path):
    """At once, or as on a GPU at the end of the step: before the optimizer's, or when Megatron
    refuses the loss, which is NaN on both ranks by then."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "tests.integration.nan_rank", *TINY, *MONE, *MOCK, "--train-iters", "20"),
        *("--expert-model-parallel-size", "2"),
        *(flag.format(tmp=tmp_path) for flag in flags),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DEFER": str(deferred)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("megatron-mone: error")]
    assert len(lines) == 1, done.stderr[-3000:]
    assert "rank 1: layer 2, expert 3 gave NaN or infinity in" in lines[0]
    assert "iteration        4/" not in done.stdout
