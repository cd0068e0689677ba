"""The ledger's peak is what was measured, on every rank of every layout.

Measured twice, neither time by the ledger: by the count of torch's allocator over all threads, and
by the kernel as growth of the process.
"""

import json
from pathlib import Path

import pytest

from megatron_mone.profiling.ledger import KINDS
from tests.integration import ledger_ranks
from tests.parity.layouts import DISTRIBUTED_OPTIMIZER, EP2, EP4, ETP1, FULL_RECOMPUTE, PP2, TP2
from tests.training_cases import MOCK, MONE, TINY, Case, run_cases

pytestmark = pytest.mark.slow

TOLERANCE = 0.02

# Large enough that pages and Python objects are small beside tensors.
MODEL = (
    *(*TINY, *MONE, *MOCK, "--hidden-size", "256", "--num-attention-heads", "8"),
    *("--num-experts", "8", "--moe-ffn-hidden-size", "512", "--seq-length", "512"),
    *("--max-position-embeddings", "512", "--train-iters", "5", "--lr", "0", "--min-lr", "0"),
)
BATCH_4, BATCH_8 = ("--global-batch-size", "4"), ("--global-batch-size", "8")
LAYOUTS = {
    2: {
        "EP 2, distributed optimizer": (*EP2, *DISTRIBUTED_OPTIMIZER, *BATCH_4),
        "TP 2": (*TP2, *BATCH_4),
        "PP 2": (*PP2, *BATCH_4),
    },
    4: {
        "EP 4 in bf16, distributed optimizer": (*EP4, *DISTRIBUTED_OPTIMIZER, *BATCH_8, "--bf16"),
        "TP 2 x EP 2": (*TP2, *EP2, *ETP1, *BATCH_4),
        "EP 2 x PP 2, recompute": (*EP2, *PP2, *FULL_RECOMPUTE, *BATCH_8),
    },
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ledger")
    for ranks, layouts in LAYOUTS.items():
        cases = [Case(name, (*MODEL, *flags)) for name, flags in layouts.items()]
        run_cases(cases, ranks, folder, run=ledger_ranks.main)
    return folder


def ranks_of(folder: Path, name: str) -> list[dict]:
    """What each rank of a layout measured."""
    ranks = next(ranks for ranks, layouts in LAYOUTS.items() if name in layouts)
    return [
        json.loads((folder / name / f"memory-{rank}.json").read_text()) for rank in range(ranks)
    ]


@pytest.mark.parametrize("name", NAMES)
def test_peak_is_the_measured_one(measured, name):
    for found in ranks_of(measured, name):
        peak = found["record"]["peak_bytes"]
        assert peak == pytest.approx(found["allocator_peak"], rel=TOLERANCE)
        assert peak == pytest.approx(found["base"] + found["growth"], rel=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_every_kind_is_there(measured, name):
    for found in ranks_of(measured, name):
        record = found["record"]
        assert sum(record["by_kind"].values()) == record["peak_bytes"]
        most = {kind: max(record["timeline"][kind]) for kind in KINDS}
        assert all(most.values()), most
        assert most["activations"] > 0.03 * record["peak_bytes"]


def test_adam_in_float32_keeps_two_moments_and_the_gradient_of_every_weight(measured):
    for found in ranks_of(measured, "TP 2"):
        kinds = found["record"]["by_kind"]
        assert kinds["gradients"] == pytest.approx(kinds["weights"], rel=0.01)
        assert kinds["optimizer"] == pytest.approx(2 * kinds["weights"], rel=0.01)


def test_recompute_is_a_pass_of_its_own(measured):
    """A rank that runs layers again makes the activations of one layer at a time."""
    whole = [
        max(found["record"]["timeline"]["activations"]) for found in ranks_of(measured, "PP 2")
    ]
    again = ranks_of(measured, "EP 2 x PP 2, recompute")
    assert max(max(f["record"]["timeline"]["activations"]) for f in again) < max(whole)
