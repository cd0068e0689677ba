"""A trace of one rank in one process is what that rank does in a real job.

The same collectives with the same bytes, the same operations, the same weights, gradients and
optimizer state, and the same bytes kept for backward.

Real jobs of four CPU ranks over gloo, profiled; their routers send tokens as the tracer assumes.
"""

import json
import resource
import subprocess
from pathlib import Path

import pytest

from megatron_mone.planning.tracing.trace import Trace
from megatron_mone.planning.tracing.trace_worker import CPU
from megatron_mone.planning.tracing.worker_pool import WorkerPool
from tests import forked_ranks
from tests.integration import traced_ranks
from tests.parity.layouts import (
    ALLGATHER,
    CP2,
    DISTRIBUTED_OPTIMIZER,
    EP2,
    ETP1,
    FULL_RECOMPUTE,
    PP2,
    TP2,
    VPP2,
)
from tests.training_cases import MOCK, MONE, TINY
from tests.unit.planning.one_trace import trace_rank

pytestmark = pytest.mark.slow

RANKS = 4
STOCK = (*TINY, *MOCK, "--train-iters", "2")
# A first step gathers no parameters where that overlaps with forward passes, and agrees on more.
PROFILED = ("--mone-profile-steps", "2:2")
NATIVE = (*STOCK, *MONE, "--mone-backend", "cpu")
# One micro-batch of 2 samples on each data-parallel rank.
BATCH_4 = ("--global-batch-size", "4")
CASES = {
    "stock EP2": (*STOCK, *EP2),
    "EP2": (*NATIVE, *EP2, *DISTRIBUTED_OPTIMIZER, "--bf16"),
    "TP2": (*NATIVE, *TP2, *BATCH_4),
    "TP2 EP2 ETP1": (*NATIVE, *TP2, *EP2, *ETP1, *BATCH_4, *DISTRIBUTED_OPTIMIZER),
    "stock EP2 PP2": (*STOCK, *EP2, *PP2, *BATCH_4),
    "EP2 PP2, recompute": (*NATIVE, *EP2, *PP2, *BATCH_4, *FULL_RECOMPUTE),
    # An interleaved schedule takes as many micro-batches as there are stages.
    "PP2 VPP2": (*NATIVE, *PP2, *VPP2, "--num-layers", "4"),
    "CP2 EP2, allgather": (*NATIVE, *CP2, *EP2, *ALLGATHER, *BATCH_4),
    "more parts": (
        *(*NATIVE, *EP2, *DISTRIBUTED_OPTIMIZER, "--overlap-grad-reduce", "--overlap-param-gather"),
        *("--moe-shared-expert-intermediate-size", "24", "--moe-layer-freq", "([0]+[1]*1)"),
        *("--mtp-num-layers", "1", "--group-query-attention", "--num-query-groups", "2"),
    ),
}
TRACED = [
    *((name, 1) for name in CASES if "PP2" not in name),
    *((name, rank) for name in CASES if "PP2" in name for rank in (0, 3)),  # each stage
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """CASE/ of the real jobs, and CASE-RANK.json of the traces."""
    folder = tmp_path_factory.mktemp("traced")
    todo = folder / "cases.json"
    todo.write_text(
        json.dumps([[name, [*flags, *PROFILED], False] for name, flags in CASES.items()])
    )
    for name in CASES:
        (folder / name).mkdir()
    _wait(folder, RANKS, traced_ranks.run, (str(todo), str(folder)))
    for name, rank in TRACED:
        job = {"flags": CASES[name], "world_size": RANKS, "rank": rank, "rows": None}
        _wait(folder, 1, traced_ranks.trace, (job, str(folder / f"{name}-{rank}.json")))
    return folder


def _wait(folder: Path, ranks: int, run, arguments: tuple) -> None:
    log = folder / "log"
    job = forked_ranks.start(ranks, run, arguments, log)
    try:
        status = job.wait(timeout=300)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    assert status == 0, log.read_text(errors="replace")[-6000:]


def of(folder: Path, name: str, rank: int) -> tuple[Trace, dict, dict]:
    """(trace, what the real rank held, its profile)."""
    trace = Trace.read(folder / f"{name}-{rank}.json")
    held = json.loads((folder / name / f"held-{rank}.json").read_text())
    [profile] = (folder / name / "profile" / "ranks").glob(f"*{rank}.json")
    return trace, held, json.loads(profile.read_text())["runs"][0]


@pytest.mark.parametrize(("name", "rank"), TRACED)
def test_collectives_are_those_of_a_real_rank(folder, name, rank):
    trace, _, profile = of(folder, name, rank)
    real = {
        kind: (found["calls"][0], found["bytes"][0])
        for kind, found in profile["communication"].items()
    }
    assert trace.traffic() == real
    # Without --save no step is run again, so the ranks need not agree on that (loss_check.py).
    assert len(real) > 4 - ("all_reduce world" not in real)


@pytest.mark.parametrize(("name", "rank"), TRACED)
def test_what_is_kept_from_step_to_step_is_exact(folder, name, rank):
    trace, held, _ = of(folder, name, rank)
    memory = trace.memory
    assert memory.weights == held["weights"] > 0
    assert memory.gradients == held["gradients"] > 0
    assert memory.optimizer == held["optimizer"] > 0


@pytest.mark.parametrize(("name", "rank"), TRACED)
def test_operations_are_the_formulas(folder, name, rank):
    trace, held, _ = of(folder, name, rank)
    assert trace.rows == {int(layer): rows for layer, rows in held["rows"].items()}
    by_phase: dict[str, int] = {}
    for op in trace.ops:
        if op.flops:
            by_phase[op.phase] = by_phase.get(op.phase, 0) + op.flops * op.count
    # Where an expert's ranks choose neurons together, a real rank holds about its share of them.
    tolerance = 0.01 if name == "TP2" else 0
    assert trace.flops == pytest.approx(sum(held["flops"].values()), rel=tolerance, abs=0)
    assert by_phase == pytest.approx(held["flops"], rel=tolerance, abs=0)
    assert trace.flops == sum(by_phase.values()) > 0


@pytest.mark.parametrize(("name", "rank"), TRACED)
def test_tensors_kept_for_backward(folder, name, rank):
    trace, held, _ = of(folder, name, rank)
    # As for operations; each kept neuron leaves its gate, its up product and its index.
    tolerance = 0.02 if name == "TP2" else 0
    assert trace.memory.activations == pytest.approx(held["activations"], rel=tolerance, abs=0)
    assert trace.memory.activations > 0


def test_products_of_the_experts_by_pass(folder):
    """A gate of all neurons forward; at kept ones two products more, three again where the mask is
    known, and six backward. One layer of 128 rows, H = 32, F = 48, S = 12."""
    trace = Trace.read(folder / "EP2 PP2, recompute-0.json")
    kept, dense = 2 * 32 * 128 * 12, 2 * 32 * 128 * 48
    own = [op for op in trace.ops if op.name.startswith("mone.")]
    # The balance loss multiplies nothing, and counts nothing before the pass that has gradients.
    assert {(op.name, op.pass_) for op in own if not op.flops} == {
        ("mone.row_sums", "recompute"), ("mone.share_sums", "recompute"),
        ("mone.row_sums", "backward"), ("mone.share_slopes", "backward"),
    }  # fmt: skip
    assert {(op.name, op.pass_): op.flops for op in own if op.flops} == {
        ("mone.gate", "forward"): dense,
        ("mone.up_down", "forward"): 2 * kept,
        ("mone.up_down", "recompute"): 3 * kept,
        ("mone.up_down_backward", "backward"): 6 * kept,
    }


def test_a_rank_of_1024_takes_little_memory(tmp_path):
    """In a process of its own; the memory is the largest of this process' children so far."""
    layout = (
        *("--expert-model-parallel-size", "8", "--tensor-model-parallel-size", "8"),
        *("--sequence-parallel", "--pipeline-model-parallel-size", "16", "--num-layers", "32"),
        *("--num-attention-heads", "8", "--num-experts", "16", "--hidden-size", "64", *ETP1),
        *("--global-batch-size", "16"),
    )
    flags = [*TINY, *MOCK, *MONE, "--mone-backend", "cpu", *layout]
    # 8 tokens a rank, 2 experts each; the first 2 of the 16 experts are this rank's.
    rows = [8, 3, 5, *[0] * 13]
    pool = WorkerPool(CPU, tmp_path / "pool", 1, 600.0)
    try:
        trace = trace_rank({CPU: pool}, flags, 1024, 512, rows)
    finally:
        pool.close()
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 << 20  # KiB
    assert trace.world_size == 1024
    assert trace.rows == {17: 8 * 11, 18: 8 * 11}  # from the 8 ranks of its expert group
    groups = {one.group: (one.ranks, one.stride) for one in trace.collectives}
    # Megatron's order: TP fastest, then (expert) data, then pipeline.
    assert groups["tp"] == (8, 1)
    assert groups["ep"] == (8, 1)
    assert groups["pp"] == (16, 64)
    assert groups["edp"] == (8, 8)


def test_a_wrong_flag_is_one_line(trace_pools):
    with pytest.raises(ValueError, match="moe_router_topk = 9") as failure:
        trace_rank(trace_pools, [*TINY, *MOCK, "--moe-router-topk", "9"], 1, 0)
    assert "\n" not in str(failure.value)


def test_a_rank_outside_the_job_is_refused(trace_pools):
    with pytest.raises(ValueError, match="rank = 4 is not one of the 4 ranks"):
        trace_rank(trace_pools, [*TINY, *MOCK], 4, 4)
