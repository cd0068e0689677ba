"""The profiler attached to real training runs: it changes no number, claims the whole step, and
finds the phases, rows and traffic that each layout must have."""

import json
from pathlib import Path

import pytest

from megatron_mone.common import phases
from megatron_mone.profiling.merge import merge
from tests.parity.layouts import FULL_RECOMPUTE
from tests.training_cases import MOCK, MONE, TINY, Case, recorded, run_cases

pytestmark = pytest.mark.slow

# Four ranks; TINY has 2 layers, 4 experts, top-2 routing, sequences of 32, batches of 8.
WINDOW = range(2, 5)
TRAIN = (*TINY, *MONE, *MOCK, "--train-iters", "5", "--mone-backend", "cpu")
LAYOUTS = {
    "EP2 PP2": ("--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
    "TP2 EP2": (
        *("--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "2"),
        *("--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"),
    ),
    "hybrid EP2 PP2": (
        *("--expert-model-parallel-size", "2", "--pipeline-model-parallel-size", "2"),
        *("--hybrid-layer-pattern", "M*E|E", "--mamba-state-dim", "16", "--mamba-head-dim", "16"),
        *("--mamba-num-groups", "2"),
    ),
    "EP4 recomputed": ("--expert-model-parallel-size", "4", *FULL_RECOMPUTE),
}
DEEPSPEED = ("--engine", "deepspeed", "--zero-stage")
ZERO = {
    "ZeRO 0 EP4": (*DEEPSPEED, "0", "--expert-model-parallel-size", "4"),
    "ZeRO 1 EP2 in bf16": (*DEEPSPEED, "1", "--expert-model-parallel-size", "2", "--bf16"),
    "ZeRO 2 TP2 EP2": (
        *(*DEEPSPEED, "2", "--tensor-model-parallel-size", "2", "--sequence-parallel"),
        *("--expert-tensor-parallel-size", "1", "--expert-model-parallel-size", "2"),
    ),
    "ZeRO 3 recomputed": (*DEEPSPEED, "3", *FULL_RECOMPUTE),
}
LAYOUTS |= ZERO
STOCK = "stock EP4"
ROWS = 8 * 32 * 2 * 2  # batch x sequence x top-2 x layers
MODEL_PHASES = {
    *(phases.EMBEDDING, phases.ATTENTION, phases.LAYER_NORM, phases.ROUTER, phases.PERMUTE),
    *(phases.DISPATCH, phases.UP_DOWN_GEMM, phases.COMBINE, phases.LOSS, phases.OPTIMIZER),
    *(phases.GRAD_REDUCE, phases.CLIPPING, phases.DATA, phases.OTHER),
}  # fmt: skip
MONE_PHASES = {phases.GATE_GEMM, phases.SELECTION, phases.BALANCE_LOSS}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiled")
    window = f"{WINDOW[0]}:{WINDOW[-1]}"
    cases = []
    for name, flags in LAYOUTS.items():
        profiled = ("--mone-profile-steps", window)  # into the TensorBoard folder of the case
        cases += [
            Case(f"{name}, plain", (*TRAIN, *flags)),
            Case(name, (*TRAIN, *flags, *profiled)),
        ]
    stock = (*TINY, *MOCK, "--train-iters", "5", "--expert-model-parallel-size", "4")
    cases.append(Case(STOCK, (*stock, "--mone-profile-steps", window)))
    run_cases(cases, 4, folder)
    return folder


def profile(runs: Path, name: str) -> dict:
    return merge(runs / name / "profile").plain()["runs"][0]


def records(runs: Path, name: str) -> list[dict]:
    files = sorted((runs / name / "profile" / "ranks").iterdir())
    return [json.loads(path.read_text())["runs"][0] for path in files]


@pytest.mark.parametrize("name", LAYOUTS)
def test_profiling_changes_no_number(runs, name):
    plain, profiled = recorded(runs / f"{name}, plain"), recorded(runs / name)
    for tag in ("lm loss", "grad-norm", "mone/ng_loss"):
        assert len(plain[tag]) == 5
        assert profiled[tag] == plain[tag]


@pytest.mark.parametrize("name", [*LAYOUTS, STOCK])
def test_phases_claim_the_step(runs, name):
    """Every ms has a phase, and what none claims is small even where a step takes 50 ms."""
    for rank in records(runs, name):
        assert rank["steps"] == [step - 1 for step in WINDOW]
        for i, step in enumerate(rank["step_ms"]):
            ms = [times[i] for passes in rank["phases"].values() for times in passes.values()]
            assert sum(ms) == pytest.approx(step)
        other = sum(sum(times) for times in rank["phases"][phases.OTHER].values())
        assert other < 0.1 * sum(rank["step_ms"]), name


@pytest.mark.parametrize("name", [*LAYOUTS, STOCK])
def test_a_layout_has_its_phases(runs, name):
    found = set(profile(runs, name)["phases"])
    assert found >= MODEL_PHASES
    assert (found >= MONE_PHASES) == (name != STOCK)
    assert name == STOCK or found.isdisjoint({phases.DENSE_MLP, phases.SHARED_EXPERTS})
    assert (phases.MAMBA in found) == ("hybrid" in name)
    assert (phases.PIPELINE_BUBBLE in found) == ("PP" in name)


def test_a_phase_has_its_passes(runs):
    """Attention, experts and balance loss run back; selection does not; recompute is apart."""
    passes = profile(runs, "EP2 PP2")["passes"]
    for phase in (phases.ATTENTION, phases.ROUTER, phases.UP_DOWN_GEMM, phases.BALANCE_LOSS):
        assert set(passes[phase]) == {"forward", "backward"}, phase
        assert min(passes[phase].values()) > 0
    assert set(passes[phases.SELECTION]) == set(passes[phases.OPTIMIZER]) == {"forward"}
    again = profile(runs, "EP4 recomputed")["passes"]
    assert set(again[phases.ATTENTION]) == {"forward", "backward", "recompute"}
    # The second forward takes the first one's mask.
    assert "recompute" not in again[phases.SELECTION]


@pytest.mark.parametrize(
    ("name", "gathered"),
    [
        ("EP2 PP2", None),
        ("TP2 EP2", {"forward"}),  # sharded by Megatron's distributed optimizer
        ("ZeRO 0 EP4", None),
        ("ZeRO 1 EP2 in bf16", {"forward"}),
        ("ZeRO 2 TP2 EP2", {"forward"}),
        ("ZeRO 3 recomputed", {"forward", "backward", "recompute"}),
    ],
)
def test_parameters_are_gathered_where_they_are_sharded(runs, name, gathered):
    passes = profile(runs, name)["passes"]
    if gathered is None:
        assert phases.PARAMETER_GATHER not in passes
    else:
        assert set(passes[phases.PARAMETER_GATHER]) == gathered
    assert set(passes[phases.CLIPPING]) == set(passes[phases.OPTIMIZER]) == {"forward"}
    assert set(passes[phases.GRAD_REDUCE]) <= {"forward", "backward"}


@pytest.mark.parametrize("name", [*LAYOUTS, STOCK])
def test_rows_are_counted_once(runs, name):
    ranks = records(runs, name)
    assert [sum(rows) for rows in zip(*(r["rows"] for r in ranks), strict=True)] == [ROWS] * 3
    layers = profile(runs, name)["routing"]["layers"]
    assert [sum(layer["rows"]) for layer in layers] == [ROWS // 2 * 3] * 2


@pytest.mark.parametrize("name", LAYOUTS)
def test_kept_neurons_are_a_quarter(runs, name):
    assert profile(runs, name)["neurons"]["kept_ratio"] == pytest.approx(0.25)
    for rank in records(runs, name):
        for layer in rank["neurons"]["layers"]:
            assert layer["kept"] == layer["rows"] * 12  # of 48


def test_traffic_is_what_the_layout_sends(runs):
    """Rows of H = 32 in float32 with their probability, there and back, forward and backward."""
    traffic = profile(runs, STOCK)["communication"]["all_to_all ep"]
    # A micro-batch holds 2 of the 8 samples, so each rank has one: 4 exchanges in each of 2 layers,
    # and the backward of probabilities.
    assert traffic["calls"] == pytest.approx(2 * 6)
    rows = ROWS / 2 / 4  # of a layer, from one rank
    assert traffic["bytes"] == pytest.approx(2 * rows * 3 / 4 * (4 * 32 * 4 + 2 * 4), rel=0.2)


def test_flops_have_the_phases_of_products(runs):
    flops = profile(runs, "EP4 recomputed")["flops"]
    assert set(flops["modules"]) == {
        *(phases.ATTENTION, phases.ROUTER, phases.GATE_GEMM, phases.UP_DOWN_GEMM, phases.LOSS)
    }  # fmt: skip
    assert flops["executed"] > flops["active"] > 0  # recompute runs twice what is needed once
