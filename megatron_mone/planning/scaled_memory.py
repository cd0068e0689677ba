"""Bytes of any layout, at least, scaled from units of small groups: parameters by what shards them,
dense and expert ones apart, and what a micro-batch keeps by its tokens.

What is held from step to step is never more than what the planner finds; activations are an
estimate. May touch: the tracer's processes and cache, by way of the units.
Shapes: P stages, S virtual stages; K parts (kinds of layer, embedding, head, rest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_mone.planning.composed import Unit, is_tied
from megatron_mone.planning.job import FP32, NO_OFFLOAD
from megatron_mone.planning.layout_axes import Shards
from megatron_mone.planning.layout_model import Numbers
from megatron_mone.planning.small_groups import SmallGroups
from megatron_mone.planning.tracing.job_facts import JobFacts

WITHOUT_PADDING = 0.98
"""Of the optimizer's state, whose shards are padded, and rounded where they are scaled."""
_BIG = 1 << 16  # bytes of a part that is more than a few flags


@dataclass(frozen=True)
class _Held:
    """[K] bytes of each part on one rank, and of its optimizer as if no replicas shared it."""

    dense: Numbers
    expert: Numbers
    dense_state: Numbers
    expert_state: Numbers

    @classmethod
    def of(cls, unit: Unit, parts: Sequence[str]) -> _Held:
        facts = unit.facts
        replicas = facts.world_size // facts.tp
        copies = facts.world_size // (facts.ep * facts.etp)

        def column(name: str) -> Numbers:
            return np.array([unit.parts[part].memory[name] for part in parts])

        expert = column("expert_weights") + column("expert_gradients")
        state = column("expert_optimizer")
        return cls(
            column("weights") + column("gradients") - expert,
            expert,
            (column("optimizer") - state) * _sharing(facts, replicas),
            state * _sharing(facts, copies),
        )


def _sharing(facts: JobFacts, replicas: int) -> int:
    """How many replicas share a piece of the optimizer's state."""
    if not facts.distributed_optimizer:
        return 1
    return max(1, replicas // facts.num_distributed_optimizer_instances)


class ScaledMemory:
    """Of every layout.

    Args:
        groups: the units.
    """

    def __init__(self, groups: SmallGroups) -> None:
        self._groups, self.model = groups, groups.model
        self._held: dict[str, _Held] = {}
        self._sharded = self._share_by_tensor()

    def stage_bytes(self, shards: Shards, stages: int, n_SK: Numbers, weights: float) -> Numbers:
        """[P] bytes of the optimizer, and of so large a share of weights and gradients.

        Args:
            shards: of a layer.
            stages: P.
            n_SK: parts of each virtual stage.
            weights: the share.
        """
        facts, held = self.model.facts, self._of_state(shards.state)
        dense = self._sharded / shards.tp + 1 - self._sharded
        expert = self._groups.base.ep / (shards.ep * shards.etp)
        if self._groups.base.ep == 1:  # experts are among the rest
            dense = np.minimum(dense, 1 / (shards.ep * shards.etp))
        replicas = _sharing(facts, self.model.gpus // (shards.tp * stages))
        copies = _sharing(facts, self.model.gpus // (shards.ep * shards.etp * stages))
        if self._groups.base.ep == 1:
            replicas = max(replicas, copies)
        held_K = weights * (dense * held.dense + expert * held.expert)
        state_K = dense * held.dense_state / replicas + expert * held.expert_state / copies
        bytes_S = n_SK @ (held_K + WITHOUT_PADDING * state_K)
        if stages == 1 and is_tied(self.model.job):
            # The head's weights are the embedding's.
            bytes_S -= (held_K + state_K)[-3]
        return np.asarray(bytes_S.reshape(-1, stages).sum(0))

    def activations(self, shards: Shards, n_SK: Numbers) -> tuple[Numbers, Numbers]:
        """[S] bytes that a micro-batch keeps, and that live beside them, by its tokens.

        Args:
            shards, n_SK: as of `stage_bytes`.
        """
        unit = self._groups.recomputed.get(shards.recompute)
        if unit is None or shards.offload != NO_OFFLOAD:
            return np.zeros(len(n_SK)), np.zeros(len(n_SK))
        tokens = shards.mbs / (shards.tp * shards.cp)
        kept_S, forward_S, backward_S = (
            tokens * n_SK @ np.array([unit.parts[part].memory[name] for part in self.model.parts])
            for name in ("activations", "forward_peak", "backward_peak")
        )
        return kept_S, np.maximum(np.maximum(forward_S, backward_S) - kept_S, 0)

    def shares_of_state(self, state: str) -> tuple[float, float]:
        """Bytes of gradients and of the optimizer over those of the job's own state, at least."""
        own, other = self._groups.plain, self._groups.of_state(state)
        shares = []
        for name in ("gradients", "optimizer"):
            shares.append(
                min(
                    other.parts[part].memory[name] / own.parts[part].memory[name]
                    for part in self.model.parts
                    if own.parts[part].memory[name] > _BIG
                )
            )
        return shares[0], shares[1]

    def _of_state(self, state: str) -> _Held:
        if state not in self._held:
            self._held[state] = _Held.of(self._groups.of_state(state), self.model.parts)
        return self._held[state]

    def _share_by_tensor(self) -> Numbers:
        """[K] share of the bytes of what is no expert that tensor parallelism divides."""
        whole = self._of_state(FP32).dense
        if self._groups.over_tensor is None:
            return np.ones_like(whole)  # at most
        halves = _Held.of(self._groups.over_tensor, self.model.parts).dense
        return np.clip(2 * (1 - halves / np.maximum(whole, 1)), 0, 1)
