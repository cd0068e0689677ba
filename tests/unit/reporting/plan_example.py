"""A made-up plan and search whose numbers agree with each other, as the planner writes them."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.planning.cost.pipeline import Schedule, simulate
from megatron_mone.planning.cost.rank_memory import ORDER
from megatron_mone.planning.plan_document import Plan, PlannedModel, Search

SEQUENCE, BATCH = 4096, 256
LIMIT = 79.6
# ms of one micro-batch's forward in a layer, by profiler phase
_COMMON = {"attention": 1.9, "layer norm": 0.3, "router": 0.2, "permute": 0.5}
_EXPERTS = {
    "mone": {"gate GEMM": 1.0, "selection": 0.3, "up/down GEMM": 0.7, "balance loss": 0.1},
    "moe": {"up/down GEMM": 2.9},
    "moe-active": {"up/down GEMM": 0.9},
}
_EXPOSED = {"expert parallel": 0.9, "tensor parallel": 0.15}


def as_plan(document: dict[str, Any]) -> Plan:
    """The plan of an example, perhaps changed."""
    return Plan.of(document, Path("plan.json"))


def as_model(document: dict[str, Any]) -> PlannedModel:
    """One of an example's `models`, perhaps changed."""
    return PlannedModel.model_validate(document)


def as_search(document: dict[str, Any]) -> Search:
    """The search of an example, perhaps changed."""
    return Search.of(document, Path("search.json"))


def example_plan(
    names: tuple[str, ...] = ("mone", "moe"),
    *,
    gpus: int = 128,
    pp: int = 4,
    vpp: int = 2,
    micro_batches: int = 16,
    sweeps: bool = True,
) -> dict[str, Any]:
    """A plan of `megatron-mone/plan/1`.

    Args:
        names: of the models: "mone", "moe" or "moe-active"; stock ones keep more activations.
        gpus: of the job.
        pp, vpp, micro_batches: of the pipeline.
        sweeps: whether there is a scaling curve and the sweeps.
    """
    models = [_model(name, gpus, pp, vpp, micro_batches) for name in names]
    return {
        "schema": "megatron-mone/plan/1",
        **_head("moe-30b-a3b-mone", gpus),
        "models": models,
        "scaling": [_point(models, 128 * 2**i) for i in range(8)] if sweeps else [],
        "ratio_sweep": [_swept(r, 1 + 8 * r) for r in (1.0, 0.5, 0.25, 0.125)] if sweeps else [],
        "expert_sweep": [
            {"topk": topk, **_swept(2 / topk, 4 + topk / 4), "exposed_comm_ms": 9.5 * topk}
            for topk in (2, 4, 8, 16)
        ]
        if sweeps
        else [],
    }


def example_search(candidates: int = 60, seed: int = 3, best: int = 5) -> dict[str, Any]:
    """A search of `megatron-mone/plan-search/2`; its Pareto front and best are true."""
    random = np.random.default_rng(seed)
    found = [_candidate(random) for _ in range(candidates)]
    found = list({one["name"]: one for one in found}.values())
    found.sort(key=lambda one: one["step_ms"])
    lowest = np.inf
    for one in found:
        one["pareto"] = bool(one["peak_gib"] < lowest)
        lowest = one["peak_gib"] if one["pareto"] else lowest
    fastest = [one for one in found if one["fits"]][:best]
    reason = "Megatron refuses pipeline_model_parallel_size: 48 layers are not divisible by 5"
    return {
        "schema": "megatron-mone/plan-search/2",
        **_head("moe-30b-a3b-mone", 128),
        "candidates": found,
        "refused": [{"layout": f"tp={tp},ep=8,pp=5", "reason": reason} for tp in (1, 2, 4)],
        "hopeless": ["tp=1,ep=1,pp=1"],
        "not_tried": {"slower": 1200, "limit": 24},
        "least_ms": 900.0,
        "axes": {"precision": "left out", "offload": "left out"},
        "best": [
            {"layout": one["name"], "why": "no tensor-parallel traffic, least pipeline bubble"}
            for one in fastest
        ],
    }


def _head(model: str, gpus: int) -> dict[str, Any]:
    return {
        "model": model, "gpus": gpus, "tokens_per_step": SEQUENCE * BATCH,
        "cluster": {"name": "h100-ndr", "device": "NVIDIA H100 SXM5 80 GB", "memory_gib": LIMIT,
                    "node_devices": 8, "domain_devices": 8},
        "efficiency": "assumed: nothing was measured",
        "routing": {"kind": "balanced", "hottest": 1.0},
        "warnings": ["Routing is taken as balanced: real routing is slower by up to a quarter."],
    }  # fmt: skip


def _model(name: str, gpus: int, pp: int, vpp: int, micro_batches: int) -> dict[str, Any]:
    layers = 48 // (pp * vpp)
    phases = {phase: 3 * layers * ms for phase, ms in (_COMMON | _EXPERTS[name]).items()}
    exposed = {group: 3 * layers * ms for group, ms in _EXPOSED.items()}
    a_pass = sum(phases.values()) + sum(exposed.values())
    run = simulate(Schedule(pp, micro_batches, vpp, None, False), a_pass / 3, 2 * a_pass / 3, 0.4)
    end = float(run.end_P.max())
    busy = a_pass * vpp * micro_batches
    times = {"gather": 11.0, "reduce": 38.0, "optimizer": 24.0}
    parts = {
        "compute": sum(phases.values()) * vpp * micro_batches,
        **{group: ms * vpp * micro_batches for group, ms in exposed.items()},
        "bubble": end - busy, "data parallel": times["gather"] + times["reduce"],
        "optimizer": times["optimizer"],
    }  # fmt: skip
    step = sum(parts.values())
    rate = 1e3 * SEQUENCE * BATCH / step / gpus
    last = int(run.end_P.argmax())
    stages = [_stage(name, i, pp, vpp, layers, a_pass, float(run.end_P[i])) for i in range(pp)]
    fullest = max((stage["memory_gib"] for stage in stages), key=lambda memory: memory["peak"])
    return {
        "name": name, "layout": _layout(gpus, pp, vpp, micro_batches),
        "fits": fullest["peak"] <= LIMIT, "first_unfit": first_unfit(fullest),
        "cheapest_fix": {"change": "recompute moe_act", "step_ms": 1.06 * step, "peak_gib": 70.2}
        if fullest["peak"] > LIMIT else None,
        "step_ms": step, "tokens_per_s_per_gpu": rate, "tflops_per_gpu": 0.03 * rate,
        "mfu": 0.03 * rate / 989, "executed_tflops_per_gpu": 0.024 * rate,
        "memory_gib": fullest, "stages": stages, "parts_ms": parts,
        "phases_ms": {phase: ms * vpp * micro_batches for phase, ms in phases.items()},
        "exposed_comm_ms": sum(parts[group] for group in (*exposed, "data parallel")),
        "hidden_comm_ms": 61.0, "bubble_ms": parts["bubble"],
        "collectives": _collectives(layers * vpp * micro_batches),
        "timeline": {
            "shown": "all",
            "stages": [
                [[e.start, e.end, "F" if e.work.forward else "B", e.work.micro_batch, e.work.chunk]
                 for e in run.events if e.stage == stage]
                for stage in range(pp)
            ],
            "gather_ms": times["gather"],
            "reduce_ms": [times["reduce"] if i == last else 20.0 for i in range(pp)],
            "optimizer_ms": times["optimizer"],
        },
    }  # fmt: skip


def _layout(gpus: int, pp: int, vpp: int, micro_batches: int) -> dict[str, Any]:
    dp = gpus // pp
    return {"tp": 1, "cp": 1, "pp": pp, "vpp": vpp, "dp": dp, "ep": 8, "etp": 1, "edp": dp // 8,
            "micro_batch_size": 1, "global_batch_size": BATCH, "micro_batches": micro_batches,
            "recompute": "none"}  # fmt: skip


def _stage(
    name: str, stage: int, pp: int, vpp: int, layers: int, a_pass: float, end: float
) -> dict[str, Any]:
    kept = {"mone": 24.0, "moe": 39.0, "moe-active": 14.0}[name] * (1 - 0.4 * stage / pp)
    ends = 2.4 if stage in (0, pp - 1) else 0.0
    kind = "mone" if name == "mone" else "moe"
    texts = [f"{kind}*{layers}"] * vpp
    texts[0] = f"embedding, {texts[0]}" if stage == 0 else texts[0]
    texts[-1] += ", norm, head" if stage == pp - 1 else ""
    memory = {"weights": 14.1 + ends, "gradients": 14.1 + ends, "optimizer": 10.6 + ends,
              "activations": kept, "transient": 2.3, "buffers": 1.7, "context": 1.0,
              "fragmentation": 0.03 * (kept + 2.3)}  # fmt: skip
    chunk = {"forward_ms": a_pass / 3, "backward_ms": 2 * a_pass / 3}
    return {"stage": stage, "layers": " | ".join(texts), "end_ms": end, "chunks": [chunk] * vpp,
            "memory_gib": {**memory, "peak": sum(memory.values())}}  # fmt: skip


def first_unfit(memory: dict[str, float]) -> str | None:
    """The part at which the running total passes the device's memory."""
    totals = np.cumsum([memory[part] for part in ORDER])
    return next((part for part, total in zip(ORDER, totals, strict=True) if total > LIMIT), None)


def _collectives(passes: int) -> list[dict[str, Any]]:
    rows = [
        ("all_to_all", "ep", 8, 1, 4 * passes, 2**27, 0.46, True),
        ("reduce_scatter", "dp-cp", 32, 1, 24, 2**28, 4.1, False),
        ("all_gather", "dp-cp", 32, 1, 24, 2**27, 2.0, False),
        ("send", "pp", 2, 32, 32, 2**24, 0.4, True),
        ("all_reduce", "world", 128, 1, 2, 4, 0.05, True),
    ]
    names = ("kind", "group", "ranks", "stride", "calls", "bytes", "ms", "exposed")
    return [dict(zip(names, row, strict=True)) for row in rows]


def _point(models: list[dict[str, Any]], gpus: int) -> dict[str, Any]:
    """Slower with more GPUs, and with less memory until the shards cannot get smaller."""
    slower = 1.0 + 0.03 * np.log2(gpus / 128) ** 1.5
    return {"gpus": gpus, "models": {
        model["name"]: {
            "step_ms": model["step_ms"] * slower,
            "tokens_per_s_per_gpu": model["tokens_per_s_per_gpu"] / slower,
            "tflops_per_gpu": model["tflops_per_gpu"] / slower,
            "peak_gib": model["memory_gib"]["peak"] - 1.2 * np.log2(gpus / 128),
            "fits": bool(model["memory_gib"]["peak"] - 1.2 * np.log2(gpus / 128) <= LIMIT),
        }
        for model in models
    }}  # fmt: skip


def _swept(r: float, work: float) -> dict[str, Any]:
    """An entry of a sweep, `work` in units of a ninth of the dense expert."""
    expert = 300.0 * work
    step = 2200.0 + expert
    return {"r": r, "neurons": round(768 * r), "step_ms": step, "expert_ms": expert,
            "tokens_per_s_per_gpu": 1e3 * SEQUENCE * BATCH / step / 128,
            "peak_gib": 55.0 + 27.0 * r, "active_flops": 2e16 * work}  # fmt: skip


def _candidate(random: np.random.Generator) -> dict[str, Any]:
    tp, ep, pp, vpp = (int(random.choice(sizes)) for sizes in ((1, 2, 4), (8, 16, 32), (2, 4, 8),
                                                               (1, 2, 4)))  # fmt: skip
    recompute = str(random.choice(["none", "moe_act", "full"]))
    compute = {"none": 3000.0, "moe_act": 3250.0, "full": 4000.0}[recompute]
    parts = {"compute": compute, "expert parallel": 14.0 * ep, "tensor parallel": 160.0 * (tp - 1),
             "bubble": 120.0 * pp / vpp, "data parallel": 50.0, "optimizer": 24.0}  # fmt: skip
    peak = {"none": 88.0, "moe_act": 66.0, "full": 40.0}[recompute] - 4 * tp + vpp - 0.2 * ep
    step = sum(parts.values())
    return {
        "name": f"tp={tp},ep={ep},pp={pp},vp={vpp},recompute={recompute}",
        "layout": {"tp": tp, "cp": 1, "pp": pp, "vpp": vpp, "dp": 128 // tp // pp, "ep": ep,
                   "etp": 1, "edp": max(1, 128 // pp // ep), "micro_batch_size": 1,
                   "global_batch_size": BATCH, "micro_batches": 2 * tp * pp,
                   "recompute": recompute},
        "fits": peak <= LIMIT, "step_ms": step, "peak_gib": peak, "parts_ms": parts,
        "tokens_per_s_per_gpu": 1e3 * SEQUENCE * BATCH / step / 128, "pareto": False,
    }  # fmt: skip
