"""The axes of a search: how a model may be sharded, pipelined, recomputed, and its state kept.

Sizes are those that the devices, layers and experts admit; whether a layout is allowed is
Megatron's to say. Touches nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from megatron_mone.planning.job import (
    FULL_RECOMPUTE,
    NO_RECOMPUTE,
    SHORT,
    STATES,
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


@dataclass(frozen=True, order=True)
class Shards:
    """What a layer's trace depends on.

    Attributes:
        tp, cp, ep, etp: sizes of the parallel groups.
        mbs: samples of a micro-batch.
        recompute: "none", "full", or modules joined by +.
        state: of STATES: the precision of gradients and of the optimizer's moments.
    """

    tp: int
    cp: int
    ep: int
    etp: int
    mbs: int
    recompute: str = NO_RECOMPUTE
    state: str = STATES[0]

    @property
    def fields(self) -> dict[str, Any]:
        """As Megatron's arguments."""
        sizes = {SHORT[name]: getattr(self, name) for name in ("tp", "cp", "ep", "etp", "mbs")}
        state = {} if self.state == STATES[0] else state_fields(self.state)
        return {
            **sizes,
            "sequence_parallel": True if self.tp > 1 else None,
            **recompute_fields(self.recompute),
            **state,
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


def recomputes(model: Mapping[str, Any]) -> list[str]:
    """What may be made again in the backward, the cheapest first.

    Args:
        model: a job's arguments.
    """
    latent = ["mla_up_proj"] if model.get("multi_latent_attention") else []
    if not model.get("num_experts"):
        lists = [["layernorm"], ["layernorm", *latent, "mlp"]]
    else:
        shared = ["shared_experts"] if model.get("moe_shared_expert_intermediate_size") else []
        small = ["layernorm", "moe_act"]
        lists = [["moe_act"], small, [*small, *latent, *shared], ["layernorm", *latent, "moe"]]
    found = [NO_RECOMPUTE, *("+".join(modules) for modules in lists), FULL_RECOMPUTE]
    return list(dict.fromkeys(found))


def states(facts: JobFacts, model: Mapping[str, Any]) -> list[str]:
    """Precisions to try: the job's own, then smaller ones where it names none itself.

    Args:
        facts: of any layout of the model.
        model: a job's arguments.
    """
    given = any(name in model for state in STATES for name in state_fields(state))
    if given or not facts.distributed_optimizer or facts.params_dtype != "bfloat16":
        return [STATES[0]]
    return list(STATES)


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
