"""The jobs whose steps `megatron-mone calibrate` times: a few layers of the model.

One in the job's own layout, as far as the ranks here hold it, with its tokens a rank and two layers
a stage (one where a stage of the job has no more than two): what its phases and collectives take in
a step. On GPUs also one layer on one rank with few tokens, whose step takes what the host does. May
touch: the tracer's processes and cache.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from megatron_mone.planning.cost.measured_times import operator_key
from megatron_mone.planning.fitting.node_times import Operator, Place, SmallJob
from megatron_mone.planning.job import SHORT, JobSpec
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.tracing.gpu_job import is_gpu_job
from megatron_mone.planning.tracing.trace import Collective, Op

LAYERS = 2
"""Of a stage, where the job's has more: what is once a step, as its first collective, which waits
for the ranks that the passes made late, counts for less then."""
FEW_TOKENS = 32
MOST_MICRO_BATCHES = 4
"""Of a step; the first of them finds what the optimizer left cold."""
_SIZES = ("tp", "cp", "pp", "ep", "etp")
_DROPPED = dict.fromkeys(
    ("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage",
     "pipeline_model_parallel_layout", "decoder_first_pipeline_num_layers",
     "decoder_last_pipeline_num_layers",
     "overlap_moe_expert_parallel_comm", "delay_wgrad_compute", "overlap_grad_reduce",
     "overlap_param_gather", "moe_layer_freq", "mtp_num_layers",
     "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split",
     "microbatch_group_size_per_virtual_pipeline_stage",
     "num_distributed_optimizer_instances", "moe_router_num_groups", "moe_router_group_topk",
     "hybrid_context_parallel", "recompute_granularity", "recompute_modules", "recompute_method",
     "recompute_num_layers", "train_samples", "cuda_graph_impl")
)  # fmt: skip
_OF_TENSORS = dict.fromkeys(("sequence_parallel", "tp_comm_overlap"))
"""Dropped where nothing is tensor-parallel."""


def small_jobs(
    planner: Planner, job: JobSpec, gpus: int, here: int
) -> tuple[SmallJob | None, SmallJob | None, list[str]]:
    """(in the layout, of few tokens, why one is not there); the second None on CPU ranks.

    Args:
        planner: that plans the job.
        job: the job itself.
        gpus: W.
        here: ranks that are to run it.
    """
    values, notes = job.values(), []
    found: list[SmallJob | None] = []
    sizes = sizes_here(values, gpus, here)
    batch = values.get(SHORT["mbs"]) or 1
    replicas = gpus // _product(values, "tp", "cp", "pp")
    micro_batches = max(1, (values.get(SHORT["gbs"]) or batch * replicas) // (batch * replicas))
    micro_batches = min(micro_batches, MOST_MICRO_BATCHES)
    is_gpu = is_gpu_job(planner.flags(job))
    of_stage = (values.get("num_layers") or 1) // _size(values, "pp")
    layers = max(1, min(LAYERS, of_stage - 1))
    whole = {"mbs": batch, "gbs": batch * sizes["dp"] * micro_batches}
    few = dict.fromkeys((*_SIZES, "dp", "mbs", "gbs"), 1)
    kinds: list[tuple[str, dict[str, int], dict[str, Any]]] = [
        ("the small job", sizes | whole, {"num_layers": layers * sizes["pp"]})
    ]
    if is_gpu:
        kinds.append(("one layer on one rank", few, {"seq_length": FEW_TOKENS, "num_layers": 1}))
    for name, layout, changes in kinds:
        try:
            found.append(_traced(planner, job, layout, changes))
        except (ValueError, RuntimeError) as error:
            reason = str(error).strip().splitlines()[-1]
            notes.append(f"{name} of the model is not traced: {reason}")
            found.append(None)
    return found[0], found[1] if is_gpu else None, notes


def sizes_here(values: Mapping[str, Any], gpus: int, here: int) -> dict[str, int]:
    """Sizes of the groups of a layout, dp among them, that are the largest so many ranks hold.

    Stages are given up before experts are brought together; a size is a divisor of the job's.

    Args:
        values: of the job.
        gpus: W.
        here: ranks.
    """
    tp = _divisor(_size(values, "tp"), here)
    cp = _divisor(_size(values, "cp"), here // tp)
    etp_asked = values.get(SHORT["etp"]) or _size(values, "tp")
    dp_asked = max(1, gpus // _product(values, "tp", "cp", "pp"))
    found = []
    for pp in range(1, 1 + here // (tp * cp)):
        if _size(values, "pp") % pp:
            continue
        dp = _divisor(dp_asked, here // (tp * cp * pp))
        etp = _divisor(etp_asked, tp * cp * dp, tp * cp * dp)
        ep = _divisor(_size(values, "ep"), tp * cp * dp // etp, tp * cp * dp // etp)
        found.append({"tp": tp, "cp": cp, "pp": pp, "ep": ep, "etp": etp, "dp": dp})
    return max(found, key=lambda sizes: (sizes["ep"] * sizes["etp"], sizes["pp"], sizes["dp"]))


def _size(values: Mapping[str, Any], name: str) -> int:
    return int(values.get(SHORT[name]) or 1)


def _product(values: Mapping[str, Any], *names: str) -> int:
    found = 1
    for name in names:
        found *= _size(values, name)
    return found


def _divisor(of: int, most: int, also_of: int = 0) -> int:
    """The largest divisor that is no more than `most`; of `also_of` too."""
    return next(n for n in range(min(of, most), 0, -1) if of % n == 0 and also_of % n == 0)


def _traced(
    planner: Planner, job: JobSpec, layout: Mapping[str, int], changes: Mapping[str, Any]
) -> SmallJob:
    values = job.values()
    found: dict[str, Any] = {**_DROPPED, **changes}
    if layout["tp"] == 1:
        found |= _OF_TENSORS
    found |= {SHORT[name]: layout[name] for name in (*_SIZES, "mbs", "gbs")}
    if experts := values.get("num_experts"):
        ep, topk = layout["ep"], values.get("moe_router_topk") or 2
        each = max(experts // _size(values, "ep"), -(-topk // ep))
        found["num_experts"] = each * ep
    known = {name: value for name, value in found.items() if value is not None or name in values}
    ranks = layout["tp"] * layout["cp"] * layout["pp"] * layout["dp"]
    flags = planner.flags(job.with_layout(known))
    traced = planner.tracer.trace(flags, ranks)
    micro_batches, stages = traced.facts.micro_batches, layout["pp"]
    counts: dict[Any, float] = defaultdict(float)
    first: dict[Any, Op] = {}
    places: dict[str, Place] = {}
    for trace in traced.traces.values():
        for op in trace.ops:
            if op.of_device:
                key = (operator_key(op), op.phase, op.of_step)
                first.setdefault(key, op)
                counts[key] += op.count * (1 if op.of_step else micro_batches) / stages
        for one in trace.collectives:
            if within_stage(one, ranks // stages) and not one.in_pass:
                place = Place(group=one.group, ranks=one.ranks, stride=one.stride)
                places.setdefault(one.group, place)
    launches = sum(n for key, n in counts.items() if is_kernel(first[key]) and not key[-1])
    return SmallJob(
        flags=flags, ranks=ranks, launches=max(1, round(launches)),
        operators=[operator_of(op) for op in first.values()], counts=list(counts.values()),
        groups=list(places.values()),
    )  # fmt: skip


def within_stage(one: Collective, ranks: int) -> bool:
    """Whether a collective's group is of one stage, of so many ranks: what others wait for is the
    pipeline's, which the planner knows. Stages are the outermost groups of Megatron's ranks."""
    return one.ranks > 1 and (one.ranks - 1) * one.stride < ranks


def is_kernel(op: Op) -> bool:
    """Whether the device does something: nodes of autograd and waits are the host's alone."""
    return bool(op.flops or op.bytes_read or op.bytes_written)


def operator_of(op: Op) -> Operator:
    """As the files have it."""
    return Operator(
        name=op.name, inputs=list(map(list, op.inputs)), outputs=list(map(list, op.outputs)),
        dtype=op.dtype, bytes_read=op.bytes_read, bytes_written=op.bytes_written, flops=op.flops,
        phase=op.phase,
    )  # fmt: skip
