"""A NaN in one rank's expert stops the whole job, and the message says where it began."""

import pytest

from tests import forked_ranks
from tests.integration import nan_rank
from tests.training_cases import MOCK, MONE, TINY

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
    words = [*TINY, *MONE, *MOCK, "--train-iters", "20", "--expert-model-parallel-size", "2"]
    words += [flag.format(tmp=tmp_path) for flag in flags]
    log = tmp_path / "log.txt"
    job = forked_ranks.start(2, nan_rank.main, (deferred, words), log)
    assert job.wait(timeout=900) != 0
    said = log.read_text()
    lines = [line for line in said.splitlines() if line.startswith("megatron-mone: error")]
    assert len(lines) == 1, said[-3000:]
    assert "rank 1: layer 2, expert 3 gave NaN or infinity in" in lines[0]
    assert "iteration        4/" not in said
