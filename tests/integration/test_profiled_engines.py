"""Both engines, and DeepSpeed's own MoE layer, side by side: the same model, where each
communicates in a step, and our counts against those of DeepSpeed's comms logger and FLOPS profiler.
"""

import json
from collections import Counter

import pytest

from megatron_mone.common import phases
from tests import forked_ranks
from tests.training_cases import MOCK, MONE, TINY

pytestmark = pytest.mark.slow

RANKS, EP = 4, 2
AGAINST = (
    *("moe", "grouped_mm", "deepspeed", "deepspeed-moe:moe_aux_loss_coeff=0"),
    *("ZeRO 0:engine=deepspeed:zero_stage=0", "with balance loss:moe_aux_loss_coeff=1"),
)
BY_DEEPSPEED = ("deepspeed", "deepspeed-moe", "ZeRO 0", "ZeRO 2", "ZeRO 3")
FORWARD, BACKWARD = phases.FORWARD, phases.BACKWARD
GRAD_REDUCE, GATHER = phases.GRAD_REDUCE, phases.PARAMETER_GATHER


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """ZeRO 2 reduces in buckets so small that hooks of the backward pass fill them."""
    folder = tmp_path_factory.mktemp("engines")
    return run_ranks(folder, EP, (*AGAINST, zero(folder, 2, reduce_bucket_size=20_000)))


@pytest.fixture(scope="module")
def zero3(tmp_path_factory):
    """It takes no expert parallelism; even the smallest parameters are let go of after use."""
    folder = tmp_path_factory.mktemp("zero3")
    own = zero(
        folder, 3, stage3_param_persistence_threshold=0, stage3_max_reuse_distance=0,
        stage3_prefetch_bucket_size=0,
    )  # fmt: skip
    return run_ranks(folder, 1, (own,))


def zero(folder, stage, **settings):
    """A run of a stage with settings of DeepSpeed's own."""
    (folder / "zero.json").write_text(json.dumps({"zero_optimization": settings}))
    own = f"zero_stage={stage}:deepspeed_config={folder / 'zero.json'}"
    return f"ZeRO {stage}:engine=deepspeed:{own}"


def run_ranks(folder, expert_parallel, against):
    """{run: what it found} of each rank."""
    words = [
        *(*TINY, *MONE, *MOCK, "--mone-backend", "cpu", "--train-iters", "20"),
        *("--expert-model-parallel-size", str(expert_parallel), "--moe-aux-loss-coeff", "0"),
        *("--clip-grad", "0.1"),
    ]
    log = folder / "log"
    job = forked_ranks.start(RANKS, rank, (words, against, str(folder)), log)
    assert job.wait(timeout=900) == 0, log.read_text(errors="replace")[-6000:]
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(RANKS)]


def rank(*given) -> None:
    """Imports Megatron, which these tests do not."""
    from tests.integration import engine_ranks

    engine_ranks.main(*given)


def test_deepspeeds_layer_is_the_same_model(ranks):
    """Same initial weights, choices and shares: the losses of Megatron's stock layer, step by step,
    though DeepSpeed steps it."""
    (run, *_) = ranks
    stock, theirs = run["moe"]["losses"], run["deepspeed-moe"]["losses"]
    assert theirs == pytest.approx(stock, rel=1e-5)
    assert len(set(stock)) == 3  # it learns
    assert theirs[1] != pytest.approx(run["mone"]["losses"][1], rel=1e-5)


def test_both_engines_train_the_model_alike(ranks, zero3):
    for run, name in (
        *((ranks[0], name) for name in ("deepspeed", "ZeRO 0", "ZeRO 2")), (zero3[0], "ZeRO 3"),
    ):  # fmt: skip
        for what in ("losses", "norms"):
            assert run[name][what] == pytest.approx(run["mone"][what], rel=1e-5), name
        assert min(run["mone"]["norms"]) > 0.2  # every step is clipped


def test_deepspeeds_balance_loss_reaches_the_gate(ranks):
    (run, *_) = ranks
    with_it, without = run["with balance loss"]["losses"], run["deepspeed-moe"]["losses"]
    assert with_it[0] == without[0]
    assert with_it[2] != pytest.approx(without[2], rel=1e-6)


def found(run, *, of):
    """(phase, pass) -> calls of collectives "operation group"."""
    result: Counter = Counter()
    for words, calls in run["collectives"]["where"].items():
        key, phase, pass_ = words.split(", ")
        if key == of:
            result[phase, pass_] += calls
    return dict(result)


def test_gradients_are_reduced_where_the_engine_does(ranks):
    """Of experts over their replicas, where nothing else is sent: ZeRO 0 and 1 as the step begins,
    ZeRO 2 in the backward pass."""
    for run in ranks:
        for name in ("deepspeed", "deepspeed-moe", "ZeRO 0"):
            assert set(found(run[name], of="all_reduce edp")) == {(GRAD_REDUCE, FORWARD)}, name
        assert set(found(run["ZeRO 2"], of="all_reduce edp")) == {(GRAD_REDUCE, BACKWARD)}
        assert found(run["ZeRO 2"], of="all_reduce dp-cp")[GRAD_REDUCE, BACKWARD] > 0


def test_parameters_are_gathered_after_the_update(ranks):
    for run in ranks:
        for name in ("deepspeed", "deepspeed-moe", "ZeRO 2"):
            for group in ("dp-cp", "edp"):
                gathered = found(run[name], of=f"all_gather {group}")
                assert set(gathered) == {(GATHER, FORWARD)}, (name, group)
        for name in ("mone", "moe", "ZeRO 0"):
            assert not any(GATHER in words for words in run[name]["collectives"]["where"]), name


def test_zero3_gathers_around_modules_and_reduces_in_the_backward_pass(zero3):
    for run in zero3:
        gathered = found(run["ZeRO 3"], of="all_gather dp-cp")
        assert set(gathered) == {(GATHER, FORWARD), (GATHER, BACKWARD)}
        reduced = found(run["ZeRO 3"], of="reduce_scatter dp-cp")
        assert set(reduced) == {(GRAD_REDUCE, BACKWARD)}


@pytest.mark.parametrize("name", ["mone", "deepspeed", "deepspeed-moe", "ZeRO 2"])
def test_rows_are_exchanged_in_dispatch_and_combine(ranks, name):
    for run in ranks:
        exchanged = found(run[name], of="all_to_all ep")
        both = [(phase, pass_) for phase in ("dispatch", "combine")
                for pass_ in (FORWARD, BACKWARD)]  # fmt: skip
        assert set(exchanged) == set(both)
        if name == "deepspeed-moe":  # one exchange each way in each of two layers
            assert set(exchanged.values()) == {2}


def test_ranks_agree_on_capacity_in_dispatch(ranks):
    for run in ranks:
        agreed = found(run["deepspeed-moe"], of="all_reduce ep")
        assert agreed == {(phases.DISPATCH, FORWARD): 2}


def test_no_collective_of_a_step_is_in_a_phase_of_compute(ranks):
    for run in ranks:
        for name, one in run.items():
            for words in one["collectives"]["where"]:
                assert words.split(", ")[1] in phases.COMMUNICATION, (name, words)


# What ours sees of a step and DeepSpeed's logger does not, for Megatron and we call torch for it.
NOT_LOGGED = {
    "all_reduce dp-cp": "the mean loss of a step",
    "all_reduce world": "the norm of all gradients",
}
OF_MEGATRON = {"all_to_all ep", "all_gather tp-ep"}
"""Its dispatcher's, not in DeepSpeed's layer."""
OPERATION = {
    "all_reduce": "all_reduce", "all_gather_into_tensor": "all_gather",
    "all_to_all_single": "all_to_all", "reduce_scatter_tensor": "reduce_scatter",
}  # fmt: skip


@pytest.mark.parametrize("name", BY_DEEPSPEED)
def test_bytes_by_collective_are_those_of_deepspeeds_logger(ranks, zero3, name):
    for run in zero3 if name == "ZeRO 3" else ranks:
        seen = run[name]["collectives"]
        ours: Counter = Counter()
        for key, (calls, size) in seen["ours"].items():
            if name != "deepspeed-moe" and key in OF_MEGATRON:
                continue
            operation = key.split()[0]
            ours[operation, "calls"] += calls
            ours[operation, "bytes"] += size
        theirs: Counter = Counter()
        for logged, (calls, size) in seen["theirs"].items():
            theirs[OPERATION[logged], "calls"] += calls
            theirs[OPERATION[logged], "bytes"] += size
        ours.subtract(theirs)
        beyond = {key: value for key, value in ours.items() if value}
        assert beyond == {("all_reduce", "calls"): len(NOT_LOGGED), ("all_reduce", "bytes"): 8 + 4}
        assert theirs["reduce_scatter" if name == "ZeRO 3" else "all_reduce", "bytes"] > 1000


def executed(run, *phases_):
    formula = run["operations"]["formula"]
    return sum(formula.get(phase, {"executed": 0})["executed"] for phase in phases_)


@pytest.mark.parametrize("name", ["moe", "deepspeed-moe"])
def test_operations_are_those_of_deepspeeds_profiler(ranks, name):
    """It counts products in forward passes: a third of those of a step."""
    for run in ranks:
        assert executed(run[name], *phases.PHASES) == 3 * run[name]["operations"]["deepspeed"] > 1e6


def test_deepspeeds_profiler_does_not_see_experts_of_other_kernels(ranks):
    """It counts nothing of torch's grouped_mm, and nothing of our kernels; of MoNE's experts the
    gate where torch multiplies it."""
    for run in ranks:
        for name in ("grouped_mm", "mone", "deepspeed", "ZeRO 2"):
            counts = run[name]["operations"]
            gate = executed(run[name], phases.GATE_GEMM)
            gate -= counts["by operation"].get("native dense_products", 0)
            seen = executed(run[name], phases.ATTENTION, phases.ROUTER, phases.LOSS) / 3 + gate
            assert seen == counts["deepspeed"], name
            assert executed(run[name], phases.UP_DOWN_GEMM) > 0


def test_the_formula_is_what_ran(ranks):
    """In DeepSpeed's layer with the padding; its gate has two sums over experts besides, each with
    one way back, that torch runs as products."""
    tokens, experts, layers = 64, 4, 2
    sums = 2 * 2 * 2 * tokens * experts * layers
    for run in ranks:
        for name, one in run.items():
            in_gate = sums if name in ("deepspeed-moe", "with balance loss") else 0
            counted = one["operations"]["counted"]
            assert executed(one, *phases.PHASES) + in_gate == counted, name


def test_padding_is_computed_and_not_active(ranks):
    """Every expert computes as many rows from each rank as the fullest expert of any has."""
    for run in ranks:
        counts = run["deepspeed-moe"]["operations"]
        experts = counts["formula"][phases.UP_DOWN_GEMM]
        (rows,), computed = counts["rows"], sum(counts["computed"])
        assert computed > rows
        assert experts["executed"] / experts["active"] == pytest.approx(computed / rows)
    routed = sum(run["deepspeed-moe"]["operations"]["rows"][0] for run in ranks)
    assert routed == 8 * 32 * 2 * 2  # samples, tokens, top-2, layers: none is dropped
