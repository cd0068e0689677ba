"""Search: layouts of one model on given devices, tried one after another; who is fast, who fits.

Sizes are powers of two that the devices, layers and experts admit; whether a layout is allowed is
Megatron's to say. What cannot fit even empty of activations is left out before it is traced. All
are planned from composed traces (composed.py), the fastest few then from whole ones. Of one layout
that does not fit, the cheapest single change by which it does (`cheapest_fix`).
May touch: the tracer's processes and cache, by way of the Planner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from megatron_mone.planning.composed import Composer
from megatron_mone.planning.job import SHORT, JobSpec, recompute_fields, short_layout
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace import Trace

_SMALL_STATE = {
    "use_precision_aware_optimizer": True,
    "main_grads_dtype": "bf16",
    "exp_avg_dtype": "bf16",
    "exp_avg_sq_dtype": "bf16",
}


def changes(facts: JobFacts) -> Iterator[tuple[str, dict[str, Any]]]:
    """(what it is in words, Megatron arguments) of single changes, cheap ones first."""
    modules = "layernorm+moe_act" if facts.num_experts else "layernorm+mlp"
    if facts.recompute_granularity == "":
        yield f"recompute {modules}", recompute_fields(modules)
    if facts.num_experts and "moe" not in facts.recompute_modules:
        yield "recompute layernorm and moe", recompute_fields("layernorm+moe")
    if facts.distributed_optimizer:
        yield "optimizer moments and main gradients in bf16", dict(_SMALL_STATE)
    if facts.micro_batch_size > 1:
        yield "micro batch 1", {SHORT["mbs"]: 1}
    if facts.ep and facts.num_experts % (2 * facts.ep) == 0 and facts.edp % 2 == 0:
        yield f"ep {2 * facts.ep}", {SHORT["ep"]: 2 * facts.ep}
    if facts.dp % 2 == 0 and facts.edp % 2 == 0 and 2 * facts.pp * facts.vp <= facts.num_layers:
        layers = {"pipeline_model_parallel_layout": None}
        yield f"pp {2 * facts.pp}", {SHORT["pp"]: 2 * facts.pp, **layers}
    if facts.dp % 2 == 0:
        wider = {SHORT["tp"]: 2 * facts.tp, SHORT["etp"]: facts.etp, "sequence_parallel": True}
        yield f"tp {2 * facts.tp}", wider
    if facts.recompute_granularity != "full":
        yield "recompute full", recompute_fields("full")


def cheapest_fix(
    planner: Planner,
    planned: Planned,
    gpus: int,
    progress: Callable[[str], None] | None = None,
) -> tuple[str, Planned] | None:
    """The fastest of the changes that make a layout fit; None where no single one does.

    Args:
        planner: of the cluster.
        planned: that does not fit.
        gpus: W.
        progress: told what is tried.
    """
    best: tuple[str, Planned] | None = None
    for words, fields in changes(planned.traced.facts):
        if progress is not None:
            progress(words)
        try:
            tried = planner.plan(planned.job.with_layout(fields), gpus)
        except ValueError:
            continue  # Megatron refuses this change in this layout: the next one
        if not tried.prediction.fits:
            continue
        if best is None or tried.prediction.seconds < best[1].prediction.seconds:
            best = words, tried
    return best


RECOMPUTES = ("none", "layernorm+moe_act", "full")
DENSE_RECOMPUTES = ("none", "layernorm+mlp", "full")
LONG_SEQUENCE = 16384  # tokens above which context parallelism is tried
_SHARDING = ("tp", "pp", "ep", "etp")
_WITHOUT_PADDING = 0.98
"""Of the optimizer's state, whose shards are padded, and rounded where they are scaled."""


@dataclass(frozen=True)
class Candidate:
    """A layout that was planned.

    Attributes:
        layout: in short.
        planned: what came of it.
    """

    layout: str
    planned: Planned


@dataclass
class Found:
    """What a search found.

    Attributes:
        candidates: planned, fastest first.
        refused: (layout, reason) of those Megatron refuses.
        hopeless: layouts whose weights, gradients and optimizer alone pass the device's memory.
        not_tried: beyond the limit, or after an interrupt.
    """

    candidates: list[Candidate] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)
    hopeless: list[str] = field(default_factory=list)
    not_tried: int = 0

    @property
    def fitting(self) -> list[Candidate]:
        """Those that fit, fastest first."""
        return sorted((c for c in self.candidates if c.planned.prediction.fits), key=_seconds)


@dataclass(frozen=True)
class Held:
    """Bytes that a layout holds from step to step, and at least what others of the model hold.

    Attributes:
        facts: of the layout.
        dense, expert: weights and gradients, summed over the ranks of one pipeline.
        dense_state, expert_state: of the optimizer, the same, as if no replicas shared it.
    """

    facts: JobFacts
    dense: float
    expert: float
    dense_state: float
    expert_state: float

    @classmethod
    def of(cls, traces: Mapping[tuple[int, int], Trace], facts: JobFacts) -> Held:
        """Read from the traces of a layout."""
        memories = [trace.memory for trace in traces.values()]
        expert = sum(m.expert_weights + m.expert_gradients for m in memories)
        state = sum(m.expert_optimizer for m in memories)
        return cls(
            facts,
            sum(m.weights + m.gradients for m in memories) - expert,
            expert,
            (sum(m.optimizer for m in memories) - state) * _sharing(facts, facts.dp * facts.cp),
            state * _sharing(facts, facts.edp),
        )

    def least_bytes(self, sizes: Mapping[str, int], gpus: int) -> float:
        """Of an average rank of a pipeline, which the fullest does not fall short of.

        What tensor parallelism does not shard and what a pipeline holds twice, as embeddings at
        both of its ends, is not told from the rest: fewer shards or stages than were read are taken
        to hold no more. Experts are sharded whole by expert parallelism and by stages; where
        Megatron keeps them among the rest, as at ep = 1 (`_set_expert_parameter_attributes`), a
        layout tells of others with the same shards of them.

        Args:
            sizes: short names of SHORT -> size.
            gpus: W.
        """
        facts, stages = self.facts, sizes["pp"]
        is_apart = self.expert > 0 or not facts.num_experts
        if not is_apart and any(sizes[n] != getattr(facts, n) for n in ("tp", "ep", "etp")):
            return 0.0
        dense = min(1.0, facts.tp / sizes["tp"]) / max(stages, facts.pp)
        expert = facts.ep / sizes["ep"] * min(1.0, facts.etp / sizes["etp"]) / stages
        replicas = _sharing(facts, gpus // (sizes["tp"] * stages))
        copies = _sharing(facts, gpus // (sizes["ep"] * sizes["etp"] * stages))
        state = dense * self.dense_state / replicas + expert * self.expert_state / copies
        return dense * self.dense + expert * self.expert + _WITHOUT_PADDING * state


def _sharing(facts: JobFacts, replicas: int) -> int:
    """How many replicas share a piece of the optimizer's state."""
    if not facts.distributed_optimizer:
        return 1
    return max(1, replicas // facts.num_distributed_optimizer_instances)


def layouts(facts: JobFacts, gpus: int, domain: int) -> Iterator[dict[str, Any]]:
    """Sizes by short name, and `recompute`; those likely to be fast first.

    Args:
        facts: of any layout of the model: its layers, experts, sequence and batch.
        gpus: W.
        domain: devices of an NVLink domain, which tensor parallelism does not leave.
    """
    experts = max(facts.num_experts, 1)
    context = _powers(8) if facts.seq_length >= LONG_SEQUENCE else [1]
    choices = product(
        _powers(min(domain, 8)), context, _powers(min(facts.num_layers, 32)), (1, 2, 4),
        [ep for ep in _powers(gpus) if experts % ep == 0], (1, 2),
    )  # fmt: skip
    found = []
    for tp, cp, pp, vpp, ep, mbs in choices:
        for etp in {1, tp} if facts.num_experts else {1}:
            sizes = dict(tp=tp, cp=cp, pp=pp, vpp=vpp, ep=ep, etp=etp, mbs=mbs)
            if _divides(sizes, facts, gpus):
                for recompute in RECOMPUTES if facts.num_experts else DENSE_RECOMPUTES:
                    found.append({**sizes, "recompute": recompute})
    yield from sorted(found, key=lambda sizes: _rank(sizes, facts, gpus, domain))


def _powers(most: int) -> list[int]:
    return [1 << exponent for exponent in range(most.bit_length())]


def _divides(sizes: Mapping[str, int], facts: JobFacts, gpus: int) -> bool:
    """Whether there are as many devices and samples as the sizes ask for."""
    of_model = sizes["tp"] * sizes["cp"] * sizes["pp"]
    of_experts = sizes["ep"] * sizes["etp"] * sizes["pp"]
    if gpus % of_model or gpus % of_experts or sizes["pp"] * sizes["vpp"] > facts.num_layers:
        return False
    samples = sizes["mbs"] * (gpus // of_model)
    if (sizes["vpp"] > 1 and sizes["pp"] == 1) or facts.global_batch_size % samples:
        return False
    micro_batches = facts.global_batch_size // samples
    return sizes["vpp"] == 1 or micro_batches % sizes["pp"] == 0


def _rank(sizes: Mapping[str, Any], facts: JobFacts, gpus: int, domain: int) -> tuple[float, ...]:
    """A rough guess of what costs time; only the order of trying depends on it."""
    samples = sizes["mbs"] * (gpus // (sizes["tp"] * sizes["cp"] * sizes["pp"]))
    bubble = (sizes["pp"] - 1) / (facts.global_batch_size / samples) / sizes["vpp"]
    away = max(0, sizes["ep"] * sizes["etp"] // domain - 1) ** 0.5
    recompute = (RECOMPUTES + DENSE_RECOMPUTES).index(sizes["recompute"]) % len(RECOMPUTES)
    costs = (
        0.1 * sizes["tp"].bit_length() + 0.15 * sizes["etp"].bit_length() + bubble
        + 0.03 * away + 0.12 * recompute + 0.05 * sizes["cp"].bit_length()
    )  # fmt: skip
    return costs, *(float(sizes[name]) for name in ("pp", "vpp", "ep", "mbs"))


def as_changes(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Megatron arguments of a layout of `layouts`."""
    changes: dict[str, Any] = {SHORT[k]: v for k, v in sizes.items() if k in SHORT}
    if sizes["vpp"] == 1:
        changes[SHORT["vpp"]] = None
    changes["sequence_parallel"] = True if sizes["tp"] > 1 else None
    # A layout file may split layers over its own stages.
    changes["pipeline_model_parallel_layout"] = None
    return {**changes, **recompute_fields(sizes["recompute"])}


def search(
    planner: Planner,
    job: JobSpec,
    gpus: int,
    limit: int,
    whole: int,
    progress: Callable[[int, int, str], None] | None = None,
) -> Found:
    """Plan up to `limit` layouts; an interrupt ends it with what there is.

    Args:
        planner: of the cluster.
        job: whose layout is changed.
        gpus: W.
        limit: layouts to plan; refused and hopeless ones do not count.
        whole: of the fastest that fit, how many are planned from whole traces in the end.
        progress: told (planned, limit, layout).

    Raises:
        ValueError: one line; Megatron refuses the model in every layout, or DeepSpeed or Megatron
            FSDP cuts it over replicas.
    """
    found = Found()
    known: dict[tuple[int, ...], Held] = {}
    facts = _facts(planner, job, gpus)
    if facts.zero_stage is not None:
        raise ValueError(
            f"{job.name}: a search with engine = 'deepspeed' is not made: what ZeRO shards is not "
            "composed of layers; plan its layouts one by one, or give engine = megatron"
        )
    if facts.fsdp:
        raise ValueError(
            f"{job.name}: a search with use_megatron_fsdp = True is not made: what it cuts is not "
            "composed of layers; plan its layouts one by one, or leave it out"
        )
    tried = list(layouts(facts, gpus, planner.cluster.domain.devices))
    left = iter(tried)
    composer = Composer(planner)
    try:
        while len(found.candidates) < limit:
            sizes = next(left, None)
            if sizes is None:
                break
            candidate = job.with_layout(as_changes(sizes))
            name = short_layout(candidate.values())
            if _is_hopeless(known.values(), sizes, planner, gpus):
                found.hopeless.append(name)
                continue
            if progress is not None:
                progress(len(found.candidates), limit, name)
            try:
                planned = composer.plan(candidate, gpus)
            except ValueError as error:
                found.refused.append((name, str(error)))
                continue
            held = Held.of(planned.traced.traces, planned.traced.facts)
            known.setdefault(tuple(sizes[name] for name in _SHARDING), held)
            found.candidates.append(Candidate(name, planned))
        for one in found.fitting[:whole]:
            place = found.candidates.index(one)
            again = planner.plan(one.planned.job, gpus)
            found.candidates[place] = replace(one, planned=again)
    except KeyboardInterrupt:
        pass
    found.not_tried = sum(1 for _ in left)
    found.candidates.sort(key=_seconds)
    return found


def _seconds(candidate: Candidate) -> float:
    return candidate.planned.prediction.seconds


def _is_hopeless(
    known: Iterable[Held], sizes: Mapping[str, Any], planner: Planner, gpus: int
) -> bool:
    """Whether any of the planned layouts says that this one holds too much."""
    least = max((one.least_bytes(sizes, gpus) for one in known), default=0.0)
    return least > planner.cluster.device.memory_bytes


def _facts(planner: Planner, job: JobSpec, gpus: int) -> JobFacts:
    """Of the model: any layout says them that Megatron accepts."""
    smallest = dict(tp=1, cp=1, pp=1, vpp=1, ep=1, etp=1, mbs=1, recompute="none")
    plain = job.with_layout(as_changes(smallest))
    return planner.tracer.describe(planner.flags(plain), gpus).facts


def pareto(candidates: Sequence[Candidate]) -> set[str]:
    """Layouts than which none is both faster and smaller; `candidates` fastest first."""
    front, least = set(), float("inf")
    for one in candidates:
        peak = one.planned.prediction.peak
        if peak < least:
            front.add(one.layout)
            least = peak
    return front


def explain(one: Candidate, best: Candidate) -> str:
    """Why a layout is as fast as it is, and what it loses to the fastest."""
    prediction, first = one.planned.prediction, best.planned.prediction
    shares = sorted(prediction.parts.items(), key=lambda part: -part[1])
    spent = ", ".join(
        f"{100 * seconds / prediction.seconds:.0f}% {name}"
        for name, seconds in shares
        if seconds > 0.01 * prediction.seconds
    )
    if one is best:
        return spent
    losses = {
        name: prediction.parts.get(name, 0.0) - first.parts.get(name, 0.0)
        for name in {**prediction.parts, **first.parts}
    }
    worst = max(losses, key=lambda name: losses[name])
    slower = 100 * (prediction.seconds / first.seconds - 1)
    return f"{spent}; {slower:.1f}% slower, most of it {worst} (+{1e3 * losses[worst]:.0f} ms)"
