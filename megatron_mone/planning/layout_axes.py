"""The axes of a search: how a model may be sharded, pipelined, recomputed, and where and how
precisely its state is kept.

Sizes are those that the devices, layers and experts admit; whether a layout is allowed is
Megatron's to say. Touches nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_mone.planning.job import (
    BF16,
    BF16_MOMENTS,
    FP32,
    FULL_RECOMPUTE,
    NO_OFFLOAD,
    NO_RECOMPUTE,
    OFFLOAD,
    ON_HOST,
    SHORT,
    STATES,
    offload_fields,
    recompute_fields,
    state_fields,
)
from megatron_mone.planning.stage_split import Split, layout_text
from megatron_mone.planning.tracing.job_facts import JobFacts

LONG_SEQUENCE = 16384  # tokens above which context parallelism is tried
MOST_TP, MOST_CP, MOST_PP = 8, 8, 64
CHUNKS = (1, 2, 4)
MICRO_BATCH_SIZES = (1, 2, 4)
SPLIT_AS = "pipeline_model_parallel_layout"
PRECISION = "precision"
ALLOWABLE = (PRECISION, OFFLOAD)
"""Axes that a user allows: other numerics, and work and memory of the host."""
ALLOWED, NEEDED, LEFT_OUT = "allowed", "needed", "left out"
AXIS_USES = (ALLOWED, NEEDED, LEFT_OUT)
"""What became of such an axis: needed is one without which nothing fits."""
_ALLOWED_AS = {FP32: "", BF16_MOMENTS: PRECISION, BF16: PRECISION, ON_HOST: OFFLOAD}


@dataclass(frozen=True, order=True)
class Shards:
    """What a layer's trace depends on.

    Attributes:
        tp, cp, ep, etp: sizes of the parallel groups.
        mbs: samples of a micro-batch.
        recompute: "none", "full", or modules joined by +.
        state: of STATES: the precision of gradients and of the optimizer's moments, and where
            these are.
        offload: "none", or modules joined by + whose activations go to the host.
    """

    tp: int
    cp: int
    ep: int
    etp: int
    mbs: int
    recompute: str = NO_RECOMPUTE
    state: str = FP32
    offload: str = NO_OFFLOAD

    @property
    def fields(self) -> dict[str, Any]:
        """As Megatron's arguments."""
        sizes = {SHORT[name]: getattr(self, name) for name in ("tp", "cp", "ep", "etp", "mbs")}
        state = {} if self.state == FP32 else state_fields(self.state)
        offload = {} if self.offload == NO_OFFLOAD else offload_fields(self.offload)
        return {
            **sizes,
            "sequence_parallel": True if self.tp > 1 else None,
            **recompute_fields(self.recompute),
            **state,
            **offload,
        }


@dataclass(frozen=True, order=True)
class Pipeline:
    """Stages and what stands on them.

    Attributes:
        pp, vpp: P stages and V chunks of each.
        split: decoder layers of each virtual stage.
        even: whether that is Megatron's own split, which needs no words.
    """

    pp: int
    vpp: int
    split: Split
    even: bool

    def fields(self, mtp: int) -> dict[str, Any]:
        """As Megatron's arguments; a job's own split over other stages goes."""
        chunks = self.vpp if self.even and self.vpp > 1 else None
        return {
            SHORT["pp"]: self.pp,
            SHORT["vpp"]: chunks,
            "num_layers_per_virtual_pipeline_stage": None,
            "decoder_first_pipeline_num_layers": None,
            "decoder_last_pipeline_num_layers": None,
            "account_for_embedding_in_pipeline_split": None,
            "account_for_loss_in_pipeline_split": None,
            "microbatch_group_size_per_vp_stage": None,
            SPLIT_AS: None if self.even else layout_text(self.split, mtp),
        }


def all_shards(facts: JobFacts, gpus: int, domain: int) -> Iterator[Shards]:
    """Every way to shard a layer, without recomputation, its state as the job has it.

    Args:
        facts: of any layout of the model: its experts, sequence and batch.
        gpus: W.
        domain: devices of an NVLink domain, which tensor parallelism does not leave.
    """
    experts = max(facts.num_experts, 1)
    context = powers(MOST_CP) if facts.seq_length >= LONG_SEQUENCE else [1]
    of_experts = [ep for ep in divisors(gpus) if experts % ep == 0]
    sizes = product(powers(min(domain, MOST_TP)), context, of_experts, MICRO_BATCH_SIZES)
    for tp, cp, ep, mbs in sizes:
        for etp in sorted({1, tp}) if facts.num_experts else [1]:
            if gpus % (tp * cp) == 0 and gpus % (ep * etp) == 0:
                yield Shards(tp, cp, ep, etp, mbs)


def all_stages(shards: Shards, facts: JobFacts, gpus: int) -> Iterator[tuple[int, int]]:
    """(pp, vpp) that leave whole replicas and whole micro-batches.

    Args:
        shards: of a layer.
        facts: of any layout of the model.
        gpus: W.
    """
    for pp, vpp in product(divisors(gpus), CHUNKS):
        of_model = shards.tp * shards.cp * pp
        of_experts = shards.ep * shards.etp * pp
        if pp > MOST_PP or pp * vpp > facts.num_layers or gpus % of_model or gpus % of_experts:
            continue
        samples = shards.mbs * (gpus // of_model)
        if facts.global_batch_size % samples or (vpp > 1 and pp == 1):
            continue
        if vpp == 1 or facts.global_batch_size // samples % pp == 0:
            yield pp, vpp


@dataclass(frozen=True)
class Axes:
    """What is tried of every sharding, the job's own first, then what costs least.

    Attributes:
        recomputes: what is made again in the backward: "none", modules, "full".
        states: of STATES.
        offloads: whose activations go to the host: "none", or modules.
    """

    recomputes: tuple[str, ...] = (NO_RECOMPUTE,)
    states: tuple[str, ...] = (FP32,)
    offloads: tuple[str, ...] = (NO_OFFLOAD,)

    @property
    def faster(self) -> tuple[str, ...]:
        """States by which a step may be shorter: the job's own, and less precise ones."""
        return tuple(state for state in self.states if state != ON_HOST)

    def within(self, allowed: Collection[str]) -> Axes:
        """Those of a user who allows so much.

        Args:
            allowed: of ALLOWABLE.
        """
        states = tuple(one for one in self.states if _ALLOWED_AS[one] in {"", *allowed})
        offloads = self.offloads if OFFLOAD in allowed else self.offloads[:1]
        return replace(self, states=states, offloads=offloads)

    @property
    def allowed(self) -> list[str]:
        """Of ALLOWABLE, those by which there is anything to try."""
        found = {_ALLOWED_AS[state] for state in self.states}
        if len(self.offloads) > 1:
            found.add(OFFLOAD)
        return [name for name in ALLOWABLE if name in found]


def axes_of(facts: JobFacts, model: Mapping[str, Any], has_host: bool) -> Axes:
    """All that there is to try, but nothing that the job says itself.

    Args:
        facts: of any layout of the model.
        model: a job's arguments.
        has_host: whether the cluster's file says what its host can hold and do.
    """
    return Axes(
        tuple(_recomputes(model)),
        tuple(one for one in _states(facts, model) if has_host or one != ON_HOST),
        tuple(_offloads(model) if has_host else [NO_OFFLOAD]),
    )


def _recomputes(model: Mapping[str, Any]) -> list[str]:
    latent = ["mla_up_proj"] if model.get("multi_latent_attention") else []
    if not model.get("num_experts"):
        lists = [["layernorm"], ["layernorm", *latent, "mlp"]]
    else:
        shared = ["shared_experts"] if model.get("moe_shared_expert_intermediate_size") else []
        small = ["layernorm", "moe_act"]
        lists = [["moe_act"], small, [*small, *latent, *shared], ["layernorm", *latent, "moe"]]
    found = [NO_RECOMPUTE, *("+".join(modules) for modules in lists), FULL_RECOMPUTE]
    return list(dict.fromkeys(found))


def _states(facts: JobFacts, model: Mapping[str, Any]) -> list[str]:
    given = any(name in model for name in state_fields(FP32))
    if given or not facts.distributed_optimizer or facts.params_dtype != "bfloat16":
        return [FP32]
    return list(STATES)


def _offloads(model: Mapping[str, Any]) -> list[str]:
    given = any(name in model for name in offload_fields(NO_OFFLOAD))
    fused = model.get("transformer_impl", "transformer_engine") == "transformer_engine"
    if given or not fused:
        return [NO_OFFLOAD]
    attention, experts = "core_attn+attn_proj", "expert_fc1+moe_act"
    if not model.get("num_experts"):
        return [NO_OFFLOAD, attention]
    return [NO_OFFLOAD, experts, f"{attention}+{experts}"]


def powers(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [1 << exponent for exponent in range(most.bit_length())]


def divisors(number: int) -> list[int]:
    """Of a number from 1, in order."""
    return [one for one in range(1, number + 1) if number % one == 0]


def sized(facts: JobFacts, shards: Shards, pipeline: Pipeline, gpus: int) -> JobFacts:
    """The facts of a layout, from those of any other of the model.

    Args:
        facts: of the other.
        shards, pipeline: of the layout.
        gpus: W.
    """
    dp = max(1, gpus // (shards.tp * shards.cp * pipeline.pp))
    is_full = shards.recompute == FULL_RECOMPUTE
    none = shards.recompute == NO_RECOMPUTE
    return replace(
        facts, world_size=gpus, tp=shards.tp, cp=shards.cp, pp=pipeline.pp, vp=pipeline.vpp,
        ep=shards.ep, etp=shards.etp, dp=dp,
        edp=max(1, gpus // (shards.ep * shards.etp * pipeline.pp)), micro_batch_size=shards.mbs,
        micro_batches=facts.global_batch_size // (shards.mbs * dp),
        microbatch_group_size_per_vp_stage=pipeline.pp,
        recompute_granularity="" if none else "full" if is_full else "selective",
        recompute_modules=() if none or is_full else tuple(shards.recompute.split("+")),
    )  # fmt: skip
