"""A prediction as the parts of a plan (plan_document.py) that people and reports read.

May touch: nothing.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.host_cost import host_of
from megatron_mone.planning.cost.prediction import Prediction
from megatron_mone.planning.cost.rank_cost import collective_seconds
from megatron_mone.planning.cost.rank_memory import ORDER, RankMemory
from megatron_mone.planning.plan_document import (
    ChunkTimes,
    ClusterFacts,
    Fix,
    HostPart,
    Layout,
    Memory,
    Pass,
    PlannedModel,
    Range,
    Shape,
    Stage,
    Timeline,
)
from megatron_mone.planning.plan_document import Collective as CollectiveCalls
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective

GIB = 2**30
MOST_EVENTS = 20_000


def model_document(
    name: str,
    prediction: Prediction,
    stage_kinds: Mapping[tuple[int, int], str],
    cheapest_fix: Fix | None = None,
    faster_stages: Fix | None = None,
) -> PlannedModel:
    """One element of a plan's `models`.

    Args:
        name: of the model compared.
        prediction: of its step.
        stage_kinds: (stage, chunk) -> what it holds, in short.
        cheapest_fix: where it does not fit.
        faster_stages: layers moved between stages, where that is faster.
    """
    facts, memory_P = prediction.facts, prediction.memory_P
    fullest = memory_P[prediction.fullest]
    return PlannedModel(
        name=name,
        shape=_shape(facts),
        layout=layout_document(facts),
        fits=prediction.fits,
        first_unfit=prediction.first_unfit,
        cheapest_fix=cheapest_fix,
        **figures(prediction),
        memory_gib=memory_document(fullest),
        step_ms_band=Range(low=1e3 * prediction.band.low, high=1e3 * prediction.band.high),
        peak_gib_band=Range(
            low=prediction.peak_band.low / GIB, high=prediction.peak_band.high / GIB
        ),
        stages=[_stage(prediction, stage, stage_kinds) for stage in range(facts.pp)],
        parts_ms=_ms(prediction.parts),
        phases_ms=_ms(prediction.phases),
        exposed_comm_ms=1e3 * prediction.exposed,
        hidden_comm_ms=1e3 * prediction.hidden,
        bubble_ms=1e3 * prediction.parts["bubble"],
        fill_ms=1e3 * (prediction.parts["bubble"] - prediction.imbalance),
        imbalance_ms=1e3 * prediction.imbalance,
        faster_stages=faster_stages,
        collectives=_collectives(prediction),
        timeline=_timeline(prediction),
        **_host(prediction),
    )


def _shape(facts: JobFacts) -> Shape:
    experts = facts.num_experts
    return Shape(
        num_layers=facts.num_layers, hidden_size=facts.hidden_size, seq_length=facts.seq_length,
        num_experts=experts, moe_router_topk=facts.topk if experts else 0,
        moe_ffn_hidden_size=facts.moe_ffn_hidden_size,
        neurons_per_token=facts.neurons_per_token if experts else 0,
        params_dtype=facts.params_dtype,
    )  # fmt: skip


def figures(prediction: Prediction) -> dict[str, Any]:
    """Time and rates of a step."""
    return {
        "step_ms": 1e3 * prediction.seconds,
        "tokens_per_s_per_gpu": prediction.tokens_per_second,
        "tflops_per_gpu": prediction.flops_per_second / 1e12,
        "mfu": prediction.utilisation,
        "executed_tflops_per_gpu": prediction.executed_flops / prediction.seconds / 1e12,
    }


def layout_document(facts: JobFacts) -> Layout:
    """The layout of a job."""
    recompute = facts.recompute_granularity or "none"
    if recompute == "selective":
        recompute = "+".join(facts.recompute_modules)
    sizes = {
        name: getattr(facts, name)
        for name in Layout.model_fields
        if name not in ("vpp", "recompute")
    }
    return Layout(**sizes, vpp=facts.vp, recompute=recompute)


def memory_document(memory: RankMemory) -> Memory:
    """GiB of one rank, by part, and their sum."""
    return Memory(**{k: getattr(memory, k) / GIB for k in ORDER}, peak=memory.peak / GIB)


def _host(prediction: Prediction) -> dict[str, Any]:
    """What is the host's, where it has anything."""
    stage = max(range(prediction.facts.pp), key=lambda stage: prediction.memory_P[stage].host)
    held, work = prediction.memory_P[stage].host, prediction.host_P[stage]
    if not held:
        return {}
    host = host_of(prediction.cluster)
    part = HostPart(
        memory_gib=held / GIB,
        limit_gib=host.memory_bytes / GIB,
        to_host_gib=work.to_host / GIB,
        to_device_gib=work.to_device / GIB,
        copy_ms=1e3 * sum(work.copying(host)),
        update_ms=1e3 * work.updating(host),
    )
    return {"host": part}


def cluster_document(cluster: Cluster) -> ClusterFacts:
    """What reports say of a cluster."""
    return ClusterFacts(
        name=cluster.name,
        device=cluster.device.name,
        memory_gib=cluster.device.memory_bytes / GIB,
        node_devices=cluster.node_devices,
        domain_devices=cluster.domain.devices,
    )


def _stage(prediction: Prediction, stage: int, stage_kinds: Mapping[tuple[int, int], str]) -> Stage:
    costs = prediction.costs_PV[stage]
    return Stage(
        stage=stage,
        layers=" | ".join(stage_kinds[stage, chunk] for chunk in range(len(costs))),
        memory_gib=memory_document(prediction.memory_P[stage]),
        end_ms=1e3 * float(prediction.run.end_P[stage]),
        busy_ms=1e3 * float(prediction.busy_P[stage]),
        imbalance_ms=1e3 * float(prediction.imbalance_P[stage]),
        chunks=[
            ChunkTimes(forward_ms=1e3 * c.forward.seconds, backward_ms=1e3 * c.backward.seconds)
            for c in costs
        ],
    )


def _ms(seconds: Mapping[str, float]) -> dict[str, float]:
    return {name: 1e3 * value for name, value in seconds.items()}


def _collectives(prediction: Prediction) -> list[CollectiveCalls]:
    """Equal collectives of a rank of the stage that ends last, their calls in a step."""
    calls: Counter[tuple[str, str, int, int, int]] = Counter()
    for one in prediction.collectives:
        calls[one.kind, one.group, one.ranks, one.stride, one.bytes] += one.count * (
            prediction.facts.micro_batches if one.of_micro_batch else 1
        )
    found = []
    for (kind, group, ranks, stride, size), count in calls.items():
        one = Collective(kind, size, group, ranks, stride, "other", "forward")
        ms = 1e3 * collective_seconds(
            one, prediction.facts, prediction.cluster, prediction.efficiency
        )
        found.append(
            CollectiveCalls(kind=kind, group=group, ranks=ranks, stride=stride, calls=count,
                            bytes=size, ms=ms)
        )  # fmt: skip
    return sorted(found, key=lambda one: -one.calls * one.ms)


def _timeline(prediction: Prediction) -> Timeline:
    """Passes of every stage; of very many the first and last micro-batches."""
    run, facts = prediction.run, prediction.facts
    passes = len(run.events)
    keep = max(1, MOST_EVENTS * facts.micro_batches // max(passes, 1) // 2)
    whole = passes <= MOST_EVENTS
    stages: list[list[Pass]] = [[] for _ in range(facts.pp)]
    for event in run.events:
        number = event.work.micro_batch
        if whole or number < keep or number >= facts.micro_batches - keep:
            start, end = round(1e3 * event.start, 3), round(1e3 * event.end, 3)
            kind = "F" if event.work.forward else "B"
            stages[event.stage].append((start, end, kind, number, event.work.chunk))
    return Timeline(
        shown="all" if whole else f"the first and last {keep} micro-batches",
        stages=stages,
        gather_ms=1e3 * prediction.gathering,
        reduce_ms=np.array([1e3 * seconds for seconds in prediction.reducing_P]),
        optimizer_ms=1e3 * prediction.parts["optimizer"],
    )
