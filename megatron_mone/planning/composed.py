"""Traces of whole stages put together from a few small ones, for a search over many layouts.

What a layer executes, sends and keeps does not depend on the pipeline it stands in. So one small
job of a few stages (UNIT) is traced for each shape of a layer, and a stage of any pipeline is

    stage = rest + embedding (if first) + head (if last) + n x layer, for each kind of layer

where layer, embedding, head and rest are differences of traces: of three layers and two, and so on.
Counts of operators and collectives, and bytes, are added as those differences say, so that some
counts are negative: sums are right, lists are not to be read. What is once a step is scaled to the
job's replicas: collectives over them grow, shards of the distributed optimizer shrink, to within
their padding. So is a plan for more or fewer devices. A plan that is shown is traced whole.
May touch: the tracer's processes and cache, by way of the Planner.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from megatron_mone.common.phases import OPTIMIZER
from megatron_mone.planning.cost.documents import with_documents
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import hottest
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.planner import Planned, Planner, rows_of
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Collective, Op, StageMemory, Trace
from megatron_mone.planning.tracing.trace_server import TracedJob

OVER_REPLICAS = ("dp", "dp-cp", "edp", "intra_distributed_optimizer_instance_group", "world")
_WHOLE = ("aten.zero_",)  # of the optimizer's operators: all gradients, not those this rank owns


def scaled_facts(facts: JobFacts, gpus: int) -> JobFacts | None:
    """The facts on other devices, tokens of a device alike; None where the layout does not fit, or
    is DeepSpeed's or Megatron FSDP's, whose buckets do not grow with its replicas.

    Args:
        facts: of a job.
        gpus: W of the other.
    """
    if facts.zero_stage is not None or facts.fsdp:
        return None
    factor = Fraction(gpus, facts.world_size)
    counts = [factor * count for count in (facts.dp, facts.edp, facts.global_batch_size)]
    if any(count.denominator > 1 or count < 1 for count in counts):
        return None
    dp, edp, batch = map(int, counts)
    flops = (
        "model_flops_per_step", "executed_flops_per_step", "active_flops_per_step",
        "score_flops_per_step",
    )  # fmt: skip
    return replace(
        facts, world_size=gpus, dp=dp, edp=edp, global_batch_size=batch,
        **{name: getattr(facts, name) * float(factor) for name in flops},
    )  # fmt: skip


def scaled_traces[Place](
    traces: Mapping[Place, Trace], facts: JobFacts, gpus: int
) -> dict[Place, Trace]:
    """Traces of the job that `scaled_facts` describes.

    Args:
        traces: of the job of `facts`.
        facts: of that job.
        gpus: W of the other.
    """
    factor = Fraction(gpus, facts.world_size)
    shard = 1 / factor if facts.distributed_optimizer else Fraction(1)
    known: dict[int, tuple[Op, ...]] = {}  # equal stages stay the same object: predict() knows them

    def ops(trace: Trace) -> tuple[Op, ...]:
        if id(trace.ops) not in known:
            known[id(trace.ops)] = tuple(_scaled_op(op, shard) for op in trace.ops)
        return known[id(trace.ops)]

    return {
        place: replace(
            trace,
            world_size=gpus,
            ops=ops(trace),
            collectives=tuple(_scaled(one, factor, shard) for one in trace.collectives),
            memory=replace(
                trace.memory,
                optimizer=round(trace.memory.optimizer * shard),
                expert_optimizer=round(trace.memory.expert_optimizer * shard),
                host_optimizer=round(trace.memory.host_optimizer * shard),
            ),
        )
        for place, trace in traces.items()
    }


def _scaled(one: Collective, factor: Fraction, shard: Fraction) -> Collective:
    if one.group not in OVER_REPLICAS or one.of_micro_batch:
        return one
    ranks = max(1, round(one.ranks * factor))
    size = round(one.bytes * shard) if one.kind == "all_gather" else one.bytes
    return replace(one, ranks=ranks, bytes=size)


def _scaled_op(op: Op, shard: Fraction) -> Op:
    if op.phase != OPTIMIZER or op.name in _WHOLE:
        return op
    moved = round(op.bytes_read * shard), round(op.bytes_written * shard)
    return replace(op, bytes_read=moved[0], bytes_written=moved[1])


UNIT_LAYERS = 2  # of a unit stage; one more tells a layer from the rest
_THROUGH_STAGES = ("mp", "tp-ep-pp")
_PLAIN = ("embedding", "norm", "head", "no layer")


@dataclass(frozen=True)
class StageContents:
    """What a virtual stage holds, as its key says.

    Attributes:
        layers: kind -> how many.
        embedding, head: whether it is the first, and the last.
    """

    layers: Mapping[str, int]
    embedding: bool
    head: bool


def stage_contents(key: str) -> StageContents | None:
    """Read from the key of a stage (stages.VirtualStage); None where it cannot be put together."""
    layers: dict[str, int] = {}
    parts = key.split(", ")
    for part in parts:
        kind, times, count = part.partition("*")
        if kind == "mtp":
            if "head" not in parts:
                return None  # on a stage of its own
        elif times:
            layers[kind] = layers.get(kind, 0) + int(count)
        elif part not in _PLAIN:
            return None  # layers that differ by their number
    return StageContents(layers, "embedding" in parts, "head" in parts)


@dataclass(frozen=True)
class Sum:
    """A trace that can be added, subtracted and multiplied."""

    ops: Counter[Op]
    collectives: Counter[Collective]
    memory: dict[str, float]

    @classmethod
    def of(cls, trace: Trace) -> Sum:
        """What a trace holds."""
        ops: Counter[Op] = Counter()
        collectives: Counter[Collective] = Counter()
        for op in trace.ops:
            ops[replace(op, count=1)] += op.count
        for one in trace.collectives:
            collectives[replace(one, count=1)] += one.count
        memory = {f.name: float(getattr(trace.memory, f.name)) for f in fields(StageMemory)}
        return cls(ops, collectives, memory)

    def plus(self, other: Sum, times: int = 1) -> Sum:
        """This and so many times the other."""
        ops, collectives = Counter(self.ops), Counter(self.collectives)
        for op, count in other.ops.items():
            ops[op] += times * count
        for one, count in other.collectives.items():
            collectives[one] += times * count
        memory = {name: size + times * other.memory[name] for name, size in self.memory.items()}
        return Sum(ops, collectives, memory)

    def trace(self, like: Trace, gpus: int, stages: int, unit_stages: int) -> Trace:
        """As a trace of a job of `stages` stages; the parts are of one of `unit_stages`."""
        moved: Counter[tuple[str, str]] = Counter()
        for one, count in self.collectives.items():
            moved[one.kind, one.group] += count * one.bytes
        collectives = []
        for one, count in self.collectives.items():
            if one.group == "pp":
                count = max(count, 0)
                one = replace(one, stride=gpus // stages, ranks=stages)
            elif one.group in _THROUGH_STAGES:
                one = replace(one, ranks=one.ranks * stages // unit_stages)
            # What adds up to nothing belongs to layers that this stage has not.
            if count and one.ranks > 1 and moved[one.kind, one.group] > 0:
                collectives.append(replace(one, count=count))
        return replace(
            like,
            world_size=gpus,
            ops=tuple(replace(op, count=count) for op, count in self.ops.items() if count),
            collectives=tuple(collectives),
            memory=StageMemory(**{name: round(size) for name, size in self.memory.items()}),
        )


@dataclass(frozen=True)
class Unit:
    """Of what the stages of every pipeline of one sharding are put together.

    Attributes:
        parts: each kind of layer, "embedding", "head" and "rest" -> what it does, sends and keeps.
        like: a trace of the unit job.
        facts: of the unit job, its devices those of one stage.
        tied: whether the head's weights are the embedding's.
    """

    parts: Mapping[str, Sum]
    like: Trace
    facts: JobFacts
    tied: bool

    def trace(self, key: str, gpus: int, stages: int) -> Trace:
        """Of a virtual stage, with as many replicas as the unit job has.

        Args:
            key: of a stage that can be put together.
            gpus: W.
            stages: P.
        """
        contents = stage_contents(key)
        assert contents is not None, key
        whole = _stage(contents, self.parts)
        if self.tied and contents.embedding and contents.head:
            whole = _without_copy(whole, self.parts["embedding"])
        return whole.trace(self.like, gpus, stages, self.facts.pp)


class Composer:
    """Plans jobs from unit traces; jobs that cannot be, as the Planner does.

    Args:
        planner: of the cluster.
    """

    def __init__(self, planner: Planner) -> None:
        self._planner = planner
        self._units: dict[tuple[str, ...], Unit] = {}

    def plan(self, job: JobSpec, gpus: int) -> Planned:
        """As Planner.plan, with composed traces.

        Raises:
            ValueError: one line; Megatron refuses the layout.
            RuntimeError: one line; a trace failed.
        """
        planner = self._planner
        description = planner.tracer.describe(planner.flags(job), gpus)
        facts = with_documents(description.facts, planner.document_tokens)
        keys = description.keys
        kinds = layer_kinds(job, keys)
        if kinds is None:
            return planner.plan(job, gpus)
        unit = self.unit(job, facts, kinds)
        known = {key: unit.trace(key, gpus, facts.pp) for key in set(keys.values())}
        traces = {place: known[key] for place, key in keys.items()}
        # As if the unit's replicas of a stage were the job's: what is once a step follows them.
        traces = {**scaled_traces(traces, unit.facts, gpus // facts.pp)}
        traced = TracedJob(facts, traces, 0.0, 0)
        prediction = predict(traces, facts, planner.cluster, planner.efficiency)
        rows = rows_of(planner.skew, facts)
        return Planned(job, traced, dict(keys), prediction, hottest(rows, max(1, facts.ep)))

    def unit(self, job: JobSpec, facts: JobFacts, kinds: Sequence[str]) -> Unit:
        """Trace the unit job of a layout, if no other layout of its sharding has it.

        Args:
            job: in the layout.
            facts: of it.
            kinds: of all its layers, in order.

        Raises:
            ValueError: one line; Megatron refuses the layout.
            RuntimeError: one line; a trace failed.
        """
        planner, first, last = self._planner, kinds[0], kinds[-1]
        unit, stages = _unit_job(job, facts, sorted(set(kinds)), first, last)
        flags = planner.flags(unit)
        name = tuple(flags)
        if name not in self._units:
            ranks = _unit_ranks(facts) * len(stages)
            traced = planner.tracer.trace(flags, ranks, rows_of(planner.skew, facts))
            sums = [Sum.of(traced.traces[p, 0]) for p in range(len(stages))]
            at = {stage: number for number, stage in enumerate(stages)}
            layers = {k: sums[at[f"{k} more"]].plus(sums[at[k]], -1) for k in set(kinds)}
            parts = {
                **layers,
                "rest": sums[at[last]].plus(layers[last], -UNIT_LAYERS),
                "embedding": sums[0].plus(sums[at[first]], -1),
                "head": sums[-1].plus(sums[at[last]], -1),
            }
            of_stage = replace(traced.facts, world_size=_unit_ranks(facts))
            self._units[name] = Unit(parts, traced.traces[0, 0], of_stage, is_tied(job))
        return self._units[name]


def is_tied(job: JobSpec) -> bool:
    """Whether the head's weights are the embedding's, and a pipeline holds them at both ends."""
    return not job.values().get("untie_embeddings_and_output_weights")


def layer_kinds(job: JobSpec, keys: Mapping[tuple[int, int], str]) -> list[str] | None:
    """The kind of every decoder layer, in order; None where stages cannot be put together.

    Args:
        job: whose they are.
        keys: (p, v) -> key of the virtual stage.
    """
    # In the order in which a micro-batch goes through them.
    places = sorted(keys, key=lambda place: (place[1], place[0]))
    contents = [stage_contents(keys[place]) for place in places]
    if {"mone_layer_freq", "hybrid_layer_pattern"} & job.model.keys() or None in contents:
        return None
    found = []
    for place in places:
        for part in keys[place].split(", "):
            kind, times, count = part.partition("*")
            if times and kind != "mtp":
                found += [kind] * int(count)
    return found


def _stage(contents: StageContents, parts: Mapping[str, Sum]) -> Sum:
    whole = parts["rest"]
    if contents.embedding:
        whole = whole.plus(parts["embedding"])
    if contents.head:
        whole = whole.plus(parts["head"])
    for kind, count in contents.layers.items():
        whole = whole.plus(parts[kind], count)
    return whole


def _without_copy(whole: Sum, embedding: Sum) -> Sum:
    """A stage that is first and last without the head's own copy of tied weights."""
    held = ("weights", "gradients", "optimizer")
    memory = {**whole.memory, **{n: whole.memory[n] - embedding.memory[n] for n in held}}
    sent = {one: n for one, n in whole.collectives.items() if one.group != "embedding"}
    return Sum(whole.ops, Counter(sent), memory)


def _unit_ranks(facts: JobFacts) -> int:
    """Ranks of one stage of the unit job: two copies at least of everything."""
    return 2 * math.lcm(facts.tp * facts.cp, facts.ep * facts.etp)


def _unit_job(
    job: JobSpec, facts: JobFacts, kinds: list[str], first: str, last: str
) -> tuple[JobSpec, list[str]]:
    """The unit job, and its stages by name: two layers of each kind, and three."""
    stages = [(f"first {first}", first, UNIT_LAYERS)]
    for kind in kinds:
        stages += [(kind, kind, UNIT_LAYERS), (f"{kind} more", kind, UNIT_LAYERS + 1)]
    stages.append((f"last {last}", last, UNIT_LAYERS))
    layout = [f"t*{count}" for _, _, count in stages]
    layout[0] = "E" + layout[0]
    layout[-1] += "m" * int(job.values().get("mtp_num_layers") or 0) + "L"
    pattern = "+".join(f"[{int(kind != 'dense')}]*{count}" for _, kind, count in stages)
    replicas = _unit_ranks(facts) // (facts.tp * facts.cp)
    changes = {
        "num_layers": sum(count for _, _, count in stages),
        "pipeline_model_parallel_size": len(stages),
        "pipeline_model_parallel_layout": "|".join(layout),
        "num_virtual_stages_per_pipeline_rank": None,
        "overlap_moe_expert_parallel_comm": None,
        "delay_wgrad_compute": None,
        "ep_overlap_early_attn_memory_release": None,
        "account_for_embedding_in_pipeline_split": None,
        "account_for_loss_in_pipeline_split": None,
        "decoder_first_pipeline_num_layers": None,
        "decoder_last_pipeline_num_layers": None,
        "moe_layer_freq": f"({pattern})" if facts.num_experts else None,
        "global_batch_size": replicas * facts.micro_batch_size,
    }
    return job.with_layout(changes), [name for name, _, _ in stages]
