"""Delayed scaling of the experts' operands: scales from the largest values of past optimizer steps.

Transformer Engine's own modules keep such a history each and renew scales after every forward
pass, from maxima over all ranks of an amax group, whose local experts are mixed by number. Here an
expert's operands have one history whatever the layout: maxima are taken over the whole step, and
over the ranks that hold a part or a replica of the expert, and scales are renewed after the step.
So no number depends on the order of micro-batches, on a recompute, or on evaluation.
An operand without history (before the first step) is scaled by its own maximum; an expert that
never had rows, by that of the others.
Not run on a GPU yet. Shapes: E experts, O operands (OPERANDS), L steps of history.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels.te.operand_names import BACKWARD, FORWARD, OPERANDS, Operand


class DelayedScales:
    """The scales of one layer's experts on this rank.

    Args:
        history: gives [E, O, L] float32, the largest |value| of each operand in the last L steps,
            the newest first, 0 where none is known. Asked for anew in each step; `end_step` writes
            to it.
    """

    def __init__(self, history: Callable[[], Tensor]) -> None:
        self._history = history
        self._states: dict[str, Any] = {}  # Transformer Engine's, of the forward and backward pass
        self._is_new = True  # scales are to be made from the history
        self._is_cold: bool | None = None  # whether there is no history; None: to be looked up

    def quantizers(
        self, recipe: Any, operand: Operand, parts: Sequence[Tensor], records: bool = True
    ) -> list[Any]:
        """Float8Quantizers of each expert's part of an operand.

        Args:
            recipe: a DelayedScaling.
            operand: its name.
            parts: E tensors; looked at where nothing is known of any operand yet.
            records: whether their maxima become part of the history.
        """
        if self._is_new:
            self._make_states(recipe, len(parts))
            self._is_new = False
        own = FORWARD if operand in FORWARD else BACKWARD
        state = self._states["forward" if operand in FORWARD else "backward"]
        first = own.index(operand) * len(parts)
        here = slice(first, first + len(parts))
        if self._is_cold:
            maxima_E = torch.stack([
                part.abs().amax().float() if part.numel() else state.scale.new_zeros(())
                for part in parts
            ])  # fmt: skip
            state.scale[here] = _scales(recipe, own is FORWARD, maxima_E)
        quantizers = state.make_quantizers()[here]
        if not records:
            for quantizer in quantizers:
                quantizer.amax = torch.zeros_like(quantizer.amax)
        return quantizers

    @torch.no_grad()
    def end_step(self, groups: Iterable[ProcessGroup]) -> None:
        """Collective over the groups: the step's maxima go into the history.

        Args:
            groups: of the ranks that hold other parts, and other replicas, of the same experts.
        """
        history_EOL = self._history()
        now_EO = history_EOL.new_zeros(history_EOL.shape[:2])
        if self._states:
            self._is_cold = False
            maxima = [self._states[mode].amax_history[0] for mode in ("forward", "backward")]
            now_EO = torch.cat(maxima).view(len(OPERANDS), -1).t().contiguous()
            for part in maxima:
                part.zero_()
        for group in groups:
            if group.size() > 1:
                torch.distributed.all_reduce(now_EO, torch.distributed.ReduceOp.MAX, group)
        known_EO = torch.isfinite(now_EO) & (now_EO > 0)
        newest_EO = torch.where(known_EO, now_EO, history_EOL[..., 0])
        history_EOL.copy_(torch.cat([newest_EO[..., None], history_EOL[..., :-1]], dim=-1))
        self._is_new = True

    def forget(self) -> None:
        """The history was replaced, by a checkpoint's."""
        self._is_new, self._is_cold = True, None

    def _make_states(self, recipe: Any, experts: int) -> None:
        """Once a step; the first time it asks the device whether there is a history."""
        from transformer_engine.pytorch.quantization import RecipeState

        history_EOL = self._history()
        latest = recipe.amax_compute_algo == "most_recent"
        maxima_EO = history_EOL[..., 0] if latest else history_EOL.amax(dim=-1)
        if self._is_cold is None:
            self._is_cold = not bool(maxima_EO.any())
        maxima_EO = torch.where(maxima_EO > 0, maxima_EO, maxima_EO.amax(dim=0))
        for mode, own in (("forward", FORWARD), ("backward", BACKWARD)):
            if mode not in self._states:
                self._states[mode] = RecipeState.create(
                    recipe, mode=mode, num_quantizers=len(own) * experts
                )
            at = [OPERANDS.index(operand) for operand in own]
            maxima = maxima_EO[:, at].t().reshape(-1)
            self._states[mode].scale.copy_(_scales(recipe, mode == "forward", maxima))


def _scales(recipe: Any, forward: bool, maxima: Tensor) -> Tensor:
    """Transformer Engine's _default_sf_compute; 1 where nothing is known."""
    limits = recipe.fp8_format.value
    scale = (limits.max_fwd if forward else limits.max_bwd) / maxima / 2.0**recipe.margin
    scale = torch.where((maxima > 0) & torch.isfinite(maxima), scale, 1.0)
    return scale.clamp(max=torch.finfo(torch.float32).max)
