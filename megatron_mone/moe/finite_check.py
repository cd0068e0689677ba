"""Stops a run at the expert that first gives a NaN or an infinity, and says which.

Megatron checks the loss and the gradients, where the number has reached every rank of the expert
group and nothing tells where it began. On a GPU what was found waits for the end of the step
(faults.py). May touch: torch, the rank's number.

Shapes: N routed rows, E_l experts of this rank.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_mone.kernels.triton import KeptEntries
from megatron_mone.moe.faults import FaultWatch, NonFiniteExpertError, deferred

_MARKED = 1 << 32  # of a row or of an expert: how many are marked, above how many are bad


class FiniteCheck:
    """The check of one layer's experts.

    Args:
        first_expert: number of the first local expert in the model.
        layer_number: 1-based, for the message; None where the layer has no number.
        lasting: as of FaultWatch, which the layer also empties by `forget`.
    """

    def __init__(
        self, first_expert: int, layer_number: Callable[[], int | None], lasting: bool = False
    ) -> None:
        self._first_expert, self._layer_number = first_expert, layer_number
        self._watch = FaultWatch(self._error, lambda: layer_number() or 0, lasting)
        self.forget = self._watch.forget

    @torch.no_grad()
    def __call__(
        self, y_NH: Tensor, row_probs: Tensor, rows_E: Tensor, entries: KeptEntries | None = None
    ) -> None:
        """Look at every row of every local expert.

        Args:
            y_NH: [N, H] outputs grouped by local expert.
            row_probs: [N] router probabilities.
            rows_E: [E_l] rows per local expert; on the device of y where faults are deferred.
            entries: of kernels that looked at y themselves.

        Raises:
            NonFiniteExpertError: names rank, layer, expert and rows.
            ValueError: rows that another rank marked as padding (padding.py) and this one did not
                read.
        """
        if entries is not None and y_NH.is_meta:  # planned: made, and looked at by nobody
            entries.note_bad(row_probs, rows_E.new_empty((entries.where.experts, 3)), 0)
            return
        if entries is not None and deferred(y_NH):
            self._watch.keep_by(partial(entries.note_bad, row_probs), entries.where.experts, y_NH)
            return
        # A row's sum is not finite when an entry is not, and needs no tensor of y's size.
        wide = torch.promote_types(y_NH.dtype, torch.float32)
        marked_N = row_probs.detach() < 0
        bad_N = ~y_NH.detach().sum(dim=1, dtype=wide).isfinite() | marked_N
        later = deferred(y_NH)
        if not later and not bool(bad_N.any()):
            return
        rows_E = rows_E.to(device=bad_N.device, dtype=torch.int64)
        # Rows past the counted ones are no expert's.
        so_far = (bad_N + marked_N * _MARKED).cumsum(0)
        ends = torch.nn.functional.pad(rows_E.cumsum(0), (1, 0))
        found_E = torch.nn.functional.pad(so_far, (1, 0))[ends].diff()
        if later:
            self._watch.keep(found_E, rows_E)
        elif any(found := found_E.tolist()):
            raise self._error(found, rows_E.tolist())

    def _error(self, found: Sequence[int], rows: Sequence[int]) -> Exception:
        rank, layer = torch.distributed.get_rank(), self._layer_number()
        if any(number >= _MARKED for number in found):
            return ValueError(
                f"rank {rank}: padding_mask = None here, and another rank of the expert group has "
                "one: give every rank a mask, of False where nothing is padded"
            )
        expert = next(e for e, number in enumerate(found) if number)
        place = "a layer without a number" if layer is None else f"layer {layer}"
        return NonFiniteExpertError(
            f"rank {rank}: {place}, expert {self._first_expert + expert} gave NaN or infinity in "
            f"{found[expert]} of its {rows[expert]} rows: resume from the last checkpoint with a "
            "lower learning rate or gradient clipping, or pass --no-mone-check-for-nan to go on"
        )
