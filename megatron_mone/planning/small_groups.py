"""Units traced with small groups, from which any layout of the model is scaled (scaled_memory.py,
scaled_time.py): one without more, one a list of recomputed modules, one a state, one at TP 2.

May touch: the tracer's processes and cache, by way of the Composer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from megatron_mone.planning.composed import Composer, Unit
from megatron_mone.planning.job import FP32, NO_RECOMPUTE
from megatron_mone.planning.layout_axes import Shards, divisors
from megatron_mone.planning.layout_model import Model, unit_of


class SmallGroups:
    """The units.

    Args:
        composer: of the planner.
        model: of the job.
        recomputes: that layouts may have, "none" first.

    Attributes:
        model: of the job.
        base: the sharding of the smallest groups.
        recomputed: what is recomputed -> its unit; without those that Megatron refuses.
        over_tensor: at TP 2; None where Megatron refuses it.

    Raises:
        ValueError: one line; Megatron refuses the model in the smallest groups.
        RuntimeError: one line; a trace failed.
    """

    def __init__(self, composer: Composer, model: Model, recomputes: Sequence[str]) -> None:
        self.model = model
        self._composer = composer
        experts = model.facts.num_experts
        # At ep = 1 Megatron keeps experts among the rest (`_set_expert_parameter_attributes`).
        ep = next((ep for ep in divisors(experts) if ep > 1), 1) if experts else 1
        self.base = Shards(1, 1, ep, 1, 1)
        self.recomputed: dict[str, Unit] = {NO_RECOMPUTE: self._unit(self.base)}
        for recompute in recomputes[1:]:
            with suppress(ValueError):  # refused in small groups, and perhaps not in others
                self.recomputed[recompute] = self._unit(replace(self.base, recompute=recompute))
        self._states: dict[str, Unit | None] = {FP32: self.plain}
        self.over_tensor: Unit | None = None
        with suppress(ValueError):
            self.over_tensor = self._unit(replace(self.base, tp=2, etp=1))

    @property
    def plain(self) -> Unit:
        """Without recomputation, its state as the job has it."""
        return self.recomputed[NO_RECOMPUTE]

    def takes(self, state: str) -> bool:
        """Whether Megatron takes the model with such a state.

        Args:
            state: of STATES.

        Raises:
            RuntimeError: one line; a trace failed.
        """
        if state not in self._states:
            self._states[state] = None
            with suppress(ValueError):
                self._states[state] = self._unit(replace(self.base, state=state))
        return self._states[state] is not None

    def of_state(self, state: str) -> Unit:
        """The unit with a state that Megatron takes.

        Args:
            state: of STATES.
        """
        unit = self._states[state] if self.takes(state) else None
        assert unit is not None, state
        return unit

    def _unit(self, shards: Shards) -> Unit:
        return unit_of(self._composer, self.model, shards)
