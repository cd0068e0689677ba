"""The formula's operations are those that ran: module_flops against torch's counter, rank by rank.

Real Megatron train steps on CPU ranks. Nothing is within a tolerance: products are integers. On the
grouped_mm route, which Megatron does not take on a CPU, see test_module_flops.

Megatron's num_floating_point_operations stands beside both. It differs by two conventions, and the
tests hold it to exactly these: it leaves out the router, and takes half of the attention scores as
masked, where its local attention computes them all.
"""

import json

import pytest

from megatron_mone.common.phases import (
    ATTENTION,
    DENSE_MLP,
    GATE_GEMM,
    LOSS,
    ROUTER,
    SHARED_EXPERTS,
    UP_DOWN_GEMM,
)
from tests.parity.layouts import CP2, EP2, ETP1, FULL_RECOMPUTE, MOE_RECOMPUTE, PP2, TP2
from tests.training_cases import MOCK, MONE, TINY, Case, start

pytestmark = pytest.mark.slow

STEP = (*TINY, *MOCK, "--train-iters", "1", "--global-batch-size", "4")
REFERENCE = (*MONE, "--mone-backend", "reference")
NATIVE = (*MONE, "--mone-backend", "cpu")
SHARED = ("--moe-shared-expert-intermediate-size", "24")
GQA = ("--group-query-attention", "--num-query-groups", "2")
DENSE_FIRST = ("--moe-layer-freq", "([0]+[1]*1)")
MTP = ("--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "0.1")
MLA = (
    *("--multi-latent-attention", "--q-lora-rank", "16", "--kv-lora-rank", "24"),
    *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "4", "--v-head-dim", "12"),
)
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
BLOCK_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "block"),
    *("--recompute-num-layers", "1"),
)
UNGATED = ("--squared-relu",)
HYBRID = (
    *("--hybrid-layer-pattern", "M*E-", "--mamba-state-dim", "16", "--mamba-head-dim", "8"),
    *("--mamba-num-groups", "2"),
)
PREDICTING = ("--hybrid-layer-pattern", "M*E-/*E/*E")
ONE_RANK = {
    "stock": (),
    "stock, without gated units": UNGATED,
    "reference": REFERENCE,
    "native": NATIVE,
    "native, most kept": ("--mone-neuron-ratio", "0.75", "--mone-backend", "cpu"),
    "softmax": (*MONE, "--mone-activation", "softmax"),
    "shared experts": (*NATIVE, *SHARED),
    "shared experts with a gate": (*SHARED, "--moe-shared-expert-gate"),
    "latent experts, experts recompute": (*NATIVE, "--moe-latent-size", "16", *MOE_RECOMPUTE),
    "grouped queries": GQA,
    "dense first layer": DENSE_FIRST,
    "one MoNE layer of two, threshold": (
        *(*NATIVE, "--mone-layer-freq", "[0,1]"),
        *("--mone-selection", "threshold", "--mone-threshold", "0.5"),
    ),
    "prediction": (*NATIVE, *MTP),
    "latent attention, recompute": (*MLA, *SELECTIVE, "mla_up_proj"),
    "native, full recompute": (*NATIVE, *FULL_RECOMPUTE, *SHARED),
    "native, block recompute": (*NATIVE, *BLOCK_RECOMPUTE, *DENSE_FIRST),
    "native, experts recompute": (*NATIVE, *MOE_RECOMPUTE),
    "reference, experts recompute": (*REFERENCE, *MOE_RECOMPUTE),
    "nested recompute": (*SHARED, *SELECTIVE, "moe", "shared_experts"),
    "parts recompute": (*DENSE_FIRST, *SELECTIVE, "core_attn", "mlp"),
    "packed": (*NATIVE, "--dataloader-inter-document-masking"),
    "packed, recompute": (*NATIVE, "--dataloader-inter-document-masking", *SELECTIVE, "core_attn"),
    "prediction, full recompute": (*MTP, *FULL_RECOMPUTE),
    "hybrid": (*NATIVE, *HYBRID),
    "hybrid, prediction": (*NATIVE, *HYBRID, *PREDICTING),
    "hybrid, prediction, full recompute": (*NATIVE, *HYBRID, *PREDICTING, *FULL_RECOMPUTE),
    "hybrid, full recompute": (*NATIVE, *HYBRID, *FULL_RECOMPUTE, "--mamba-num-heads", "2"),
}
TWO_RANKS = {
    "EP2": (*NATIVE, *EP2),
    "TP2 ETP2": (*NATIVE, *TP2, *SHARED, *GQA),
    "TP2 ETP2, reference": (*REFERENCE, *TP2),
    "TP2 ETP1": (*NATIVE, *TP2, *ETP1),
    "TP2, latent attention": (*TP2, *MLA, *DENSE_FIRST, *SHARED, "--moe-shared-expert-gate"),
    "PP2": (*NATIVE, *PP2, *MTP),
    "CP2": (*NATIVE, *CP2),
    "hybrid, TP2": (*NATIVE, *TP2, *HYBRID),
    "hybrid, CP2": (*NATIVE, *CP2, *HYBRID),
    "hybrid, PP2": (*NATIVE, *PP2, *HYBRID, "--hybrid-layer-pattern", "M*|E-"),
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory):
    """{case: what each rank found}; both sizes of job run at once."""
    folder = tmp_path_factory.mktemp("flops")
    jobs = []
    for cases, ranks in ((ONE_RANK, 1), (TWO_RANKS, 2)):
        todo = [Case(name, tuple(_flags(own))) for name, own in cases.items()]
        jobs.append(start(todo, ranks, folder, run=run))
    for job, cases in zip(jobs, (ONE_RANK, TWO_RANKS), strict=True):
        log = folder / f"{next(iter(cases))}.log"
        assert job.wait(timeout=900) == 0, log.read_text(errors="replace")[-6000:]
    return {
        name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(ranks)]
        for ranks, cases in ((1, ONE_RANK), (2, TWO_RANKS))
        for name in cases
    }


def _flags(own):
    return [flag for flag in (*STEP, *own) if own != UNGATED or flag != "--swiglu"]


def run(todo: str, folder: str) -> None:
    """A rank; it imports Megatron, which these tests do not."""
    from tests.integration import flop_ranks

    flop_ranks.main(todo, folder)


@pytest.mark.parametrize("case", [*ONE_RANK, *TWO_RANKS])
def test_formula_is_what_ran_on_every_rank(steps, case):
    for rank, step in enumerate(steps[case]):
        formula = sum(phase["executed"] for phase in step["formula"].values())
        assert formula == step["counted"], (rank, step)
        assert step["counted"] > 1e6


def test_local_attention_multiplies_the_scores_of_a_whole_micro_batch(steps):
    """Mock documents are as long as samples, 32 tokens, of which two are packed."""
    [step], [plain] = steps["packed"], steps["native"]
    assert step["documents"] == 32
    packed, whole = (one["formula"]["attention"] for one in (step, plain))
    hidden, layers, tokens, length = 32, 2, 4 * 32, 32
    more = 3 * 2 * tokens * layers * 2 * hidden * (2 * length - length)
    assert packed == {"executed": whole["executed"] + more, "active": whole["active"]}


def executed(step, *phases):
    return sum(step["formula"].get(phase, {"executed": 0})["executed"] for phase in phases)


def active(step):
    return sum(phase["active"] for phase in step["formula"].values())


@pytest.mark.parametrize("case", [
    "stock", "reference", "native", "native, most kept", "shared experts", "grouped queries", "EP2",
    "TP2 ETP2", "TP2 ETP1", "CP2",
])  # fmt: skip
def test_every_module_has_its_own(steps, case):
    """Hooks tell backward passes apart where a module's input feeds nothing else; the router's also
    feeds the experts, so that it is what remains."""
    for step in steps[case]:
        inside = step["inside"]
        assert executed(step, ATTENTION) == inside["self_attention"] > 0
        assert executed(step, GATE_GEMM, UP_DOWN_GEMM) == inside["experts"] > 0
        assert executed(step, SHARED_EXPERTS) == inside["shared_experts"]
        assert executed(step, LOSS) == inside["output_layer"] > 0
        rest = ("self_attention", "experts", "shared_experts", "output_layer")
        assert executed(step, ROUTER) == step["counted"] - sum(inside[name] for name in rest) > 0


def test_gate_that_chooses_is_the_dense_product_of_the_native_kernels(steps):
    (step,) = steps["native"]
    assert executed(step, GATE_GEMM) == step["operations"]["native dense_products"]
    (repeated,) = steps["native, experts recompute"]
    assert executed(repeated, GATE_GEMM) == executed(step, GATE_GEMM)


def test_active_is_what_kernels_of_kept_neurons_run(steps):
    """The same model on another backend; recompute is not active."""
    (native,), (reference,) = steps["native"], steps["reference"]
    assert reference["rows"] == native["rows"]
    assert active(reference) == native["counted"] == active(native)
    assert reference["counted"] > native["counted"]
    for case in ("native, experts recompute", "reference, experts recompute"):
        (repeated,) = steps[case]
        assert active(repeated) == active(native)
        assert repeated["counted"] > steps[case.split(",")[0]][0]["counted"]


def test_ranks_share_the_work_of_one(steps):
    """TP, EP, PP and CP divide it: what all ranks execute is what one rank would."""
    (one,) = steps["native"]
    for case in ("EP2", "CP2"):
        assert sum(step["counted"] for step in steps[case]) == one["counted"], case
    (predicting,) = steps["prediction"]
    assert sum(step["counted"] for step in steps["PP2"]) == predicting["counted"]


@pytest.mark.parametrize("case", [
    "stock", "stock, without gated units", "shared experts with a gate", "grouped queries",
    "dense first layer",
])  # fmt: skip
def test_megatrons_own_count_lacks_the_router_and_half_the_scores(steps, case):
    """It also lacks the gate of shared experts, one weight for each hidden unit."""
    (step,) = steps[case]
    tokens, sequence, hidden, layers, experts = 4 * 32, 32, 32, 2, 4
    moe_layers = 1 if case == "dense first layer" else 2
    router = 6 * tokens * hidden * experts * moe_layers
    half_of_scores = 6 * tokens * sequence * hidden * layers
    gate = 6 * tokens * hidden * layers if "a gate" in case else 0
    assert step["counted"] == step["megatron"] + router + half_of_scores + gate
    assert executed(step, ROUTER) == router
    assert (executed(step, DENSE_MLP) > 0) == (case == "dense first layer")
