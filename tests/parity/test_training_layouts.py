"""Layout never changes meaning: a training run gives the same losses on one rank as on any layout.

Every layout starts from one checkpoint written by one rank (Megatron seeds experts by rank, so
fresh weights differ between layouts), trains 10 steps of the same global batches in fp32, and must
show the same language-model loss, balance losses and gradient norm: relative error <= 1e-5.
"""

from pathlib import Path

import pytest

from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS = 10
TOLERANCE = 1e-5
TAGS = ("lm loss", "load_balancing_loss", "mone/ng_loss", "grad-norm")
LAYOUTS = {
    "DP2": [],
    "EP2": ["--expert-model-parallel-size", "2"],
    "EP2 allgather": [
        *("--expert-model-parallel-size", "2"),
        *("--moe-token-dispatcher-type", "allgather"),
    ],
    "PP2": ["--pipeline-model-parallel-size", "2"],
    "TP2 ETP2": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "TP2 ETP1": [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-tensor-parallel-size", "1"),
    ],
    "TP2 EP2": [
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "2"),
    ],
    "DP2 distributed optimizer": ["--use-distributed-optimizer"],
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    start = folder / "start"
    common = [*TINY, *MONE, *MOCK]
    resume = [*common, "--load", str(start), "--finetune", "--train-iters", str(STEPS)]
    one_step = [*common, "--train-iters", "1", "--save", str(start), "--save-interval", "1"]
    run_cases([Case("start-run", tuple(one_step)), Case("one rank", tuple(resume))], 1, folder)
    run_cases([Case(n, (*resume, *flags)) for n, flags in LAYOUTS.items()], 2, folder)
    return folder


def worst_error(folder: Path, name: str, tag: str) -> float:
    wanted, got = scalars(folder / "one rank", tag), scalars(folder / name, tag)
    assert len(wanted) == STEPS, f"{tag}: {wanted}"
    assert sorted(wanted) == sorted(got), f"{name}: {tag}: {got}"
    return max(abs(got[s] - wanted[s]) / abs(wanted[s]) for s in wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_losses_as_one_rank(runs, layout):
    errors = {tag: worst_error(runs, layout, tag) for tag in TAGS}
    print(f"{layout:28s}" + "".join(f" {tag} {e:.1e}" for tag, e in errors.items()))
    assert max(errors.values()) <= TOLERANCE, errors


def test_losses_fall(runs):
    """The comparison would be empty if nothing were learnt."""
    losses = scalars(runs / "one rank", "lm loss")
    assert losses[STEPS] < losses[1]
