"""How long the packed documents of measured steps are, as their tokens find them.

Megatron adds up lengths and their squares, micro-batch by micro-batch, where the model is told of
the documents (training.py: update_seqlen_stats_from_cu_seqlens); here those sums are looked at
before and after a step. Touches nothing; on a device they are read once, at the end.
"""

import torch
from torch import Tensor


class DocumentLengths:
    """Sums over the documents of a rank's measured micro-batches."""

    def __init__(self) -> None:
        self._before: Tensor | None = None
        self._sums: Tensor | None = None

    def begin(self) -> None:
        """A step that is measured begins."""
        self._before = _megatrons()

    def end(self) -> None:
        """It has ended; one that failed does not end."""
        after = _megatrons()
        if after is None:
            return
        found = after if self._before is None else after - self._before
        self._sums = found if self._sums is None else self._sums + found

    def mean(self) -> float | None:
        """Tokens of its own document that a token finds on average: the sum of squares of lengths
        over their sum; None where nothing is packed."""
        if self._sums is None:
            return None
        tokens, squares = self._sums.tolist()
        return squares / tokens if tokens else None


def _megatrons() -> Tensor | None:
    """[sum of lengths, sum of their squares] since Megatron last read them; None before any."""
    from megatron.training import training

    sums: torch.Tensor | None = training._seqlen_stats_in_iteration
    return None if sums is None else sums.clone()
