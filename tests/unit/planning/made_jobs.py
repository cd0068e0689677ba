"""Jobs made by hand: facts, traces and clusters small enough to work out on paper."""

from dataclasses import replace

from megatron_mone.common.device import Device
from megatron_mone.common.phases import ATTENTION, BACKWARD, DISPATCH, FORWARD, OPTIMIZER
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster, Domain, Network
from megatron_mone.planning.cost.roofline import DEFAULTS, Curve, Operation
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective, Op, StageMemory, Trace

FACTS = JobFacts(
    world_size=16, tp=1, cp=1, pp=2, vp=1, ep=4, etp=1, dp=8, edp=2, micro_batch_size=1,
    global_batch_size=32, micro_batches=4, seq_length=128, params_dtype="bfloat16", fp8="",
    num_layers=4, hidden_size=64, num_experts=8, topk=2, router_groups=0, router_group_topk=0,
    moe_ffn_hidden_size=32, neurons_per_token=8, dispatcher="alltoall", overlap_grad_reduce=False,
    overlap_param_gather=False, overlap_tp=False, overlap_expert_parallel=False, overlap_p2p=False,
    delay_wgrad=False, microbatch_group_size_per_vp_stage=2, distributed_optimizer=True,
    num_distributed_optimizer_instances=1, bucket_size=0, recompute_granularity="",
    recompute_modules=(), model_flops_per_step=4e15, executed_flops_per_step=4e15,
    active_flops_per_step=3e15,
)  # fmt: skip
# 1e12 operations, 1e9 bytes a second; links of 1e9 and 1e8 bytes a second, no latencies.
CLUSTER = Cluster(
    name="paper",
    device=Device("paper GPU", {"bf16": 1e12, "fp32": 5e11}, 100e6, 1e9),
    node_devices=8,
    domain=Domain(8, 1e9, 1e9, 0.0, 1.0),
    network=Network(1e8, 0.0, 8, 32, 1.0, 1.0),
    launch_latency=0.0,
    sources={},
)
PERFECT = Curve(1.0, 0.0, 0.0, 1, 0.0, 1.0, 0.0, 0.0)
EXACT = Efficiency(
    dict.fromkeys(DEFAULTS, PERFECT), overlap_tax=0.0, hidden_share=1.0, source="perfect"
).without_host()
MEMORY = StageMemory(10_000_000, 20_000_000, 15_000_000, 5_000_000, 6_000_000, 9_000_000)


def gemm(rows: int, columns: int, depth: int, dtype: str, itemsize: int) -> Operation:
    """A product whose operands and result move once.

    Args:
        rows, columns, depth: M, N, K.
        dtype: of the peak.
        itemsize: bytes of an element of all three.
    """
    moved = itemsize * (rows * depth + depth * columns + rows * columns)
    return Operation("gemm", dtype, 2.0 * rows * columns * depth, moved, rows, columns, depth)


def grouped_gemm(
    rows_per_group: list[int],
    columns: int,
    depth: int,
    dtype: str,
    itemsize: int,
    kept: float = 1.0,
) -> Operation | None:
    """Products of one kernel, one a group (expert); None if no group has a row.

    Args:
        rows_per_group: may be uneven and hold zeros; groups without rows move no weights.
        columns, depth: of every group.
        dtype: of the peak.
        itemsize: bytes of an element.
        kept: share of the [rows, columns] entries that are computed and written.
    """
    counts = [count for count in rows_per_group if count]
    if not counts:
        return None
    rows = sum(counts)
    moved = itemsize * (rows * depth + len(counts) * depth * columns + kept * rows * columns)
    flops = 2.0 * rows * columns * depth * kept
    mean = rows / len(counts)
    return Operation("grouped_gemm", dtype, flops, moved, mean, columns, depth, kept)


def product(milliseconds, pass_=FORWARD, phase=ATTENTION, count=1):
    """A GEMM of so many milliseconds on the paper GPU, whose bytes take no time to speak of."""
    rows, columns = 100, 100
    depth = round(milliseconds * 1e9 / (2 * rows * columns))
    return Op(
        "aten.mm", ((rows, depth), (depth, columns)), ((rows, columns),), "bfloat16", 1, 1,
        2 * rows * columns * depth, phase, pass_, count,
    )  # fmt: skip


def move(milliseconds, pass_=FORWARD, phase=ATTENTION, name="aten.add", count=1):
    """An operator that moves bytes for so many milliseconds."""
    size = round(milliseconds * 1e6)
    return Op(name, ((size,),), ((size,),), "bfloat16", size // 2, size - size // 2, 0, phase,
              pass_, count)  # fmt: skip


def exchange(milliseconds, pass_=FORWARD, phase=DISPATCH):
    """An all-to-all of 4 ranks of one domain that takes so long: 3/4 of its bytes leave a rank."""
    return Collective("all_to_all", round(milliseconds * 1e6 * 4 / 3), "ep", 4, 1, phase, pass_)


def trace(*records, memory=MEMORY):
    """Of the given ops and collectives."""
    return Trace(
        16, 0, 1, "fused", {1: 64},
        tuple(one for one in records if isinstance(one, Op)),
        tuple(one for one in records if isinstance(one, Collective)), memory,
    )  # fmt: skip


STAGE = trace(
    product(10), exchange(1), product(20, BACKWARD), exchange(2, BACKWARD),
    move(3, phase=OPTIMIZER, name="fused.adam"),
    Collective("reduce_scatter", 8_000_000, "dp-cp", 8, 1, "grad reduce", FORWARD),
    Collective("all_gather", 1_000_000, "dp-cp", 8, 1, "exposed communication", FORWARD),
)  # fmt: skip
TRACES = {(0, 0): STAGE, (1, 0): STAGE}


def facts(**changes):
    """FACTS with changes."""
    return replace(FACTS, **changes)
