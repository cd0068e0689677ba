"""Stops a run at the expert that first gives a NaN or an infinity, and says which.

Megatron checks the loss and the gradients, where the number has reached every rank of the expert
group and nothing tells where it began. May touch: torch, the rank's number.
"""

import torch
from torch import Tensor


class NonFiniteExpertError(FloatingPointError):
    """An expert gave a NaN or an infinity; the message names rank, layer and expert."""


def check_finite(
    y_NH: Tensor,
    row_probs: Tensor,
    tokens_per_expert: Tensor,
    first_expert: int,
    layer: int | None,
) -> None:
    """Look at every row of every local expert; waits for the device once.

    Args:
        y_NH: [N, H] outputs grouped by local expert.
        row_probs: [N] router probabilities.
        tokens_per_expert: [E_l] rows per local expert.
        first_expert: number of the first local expert in the model.
        layer: 1-based, for the message; None where the layer has no number.

    Raises:
        NonFiniteExpertError: names rank, layer, expert and rows.
        ValueError: rows that another rank marked as padding (padding.py) and this one did not read.
    """
    # A row's sum is not finite when an entry is not, and needs no tensor of y's size.
    wide = torch.promote_types(y_NH.dtype, torch.float32)
    marked_N = row_probs.detach() < 0
    bad_N = ~y_NH.detach().sum(dim=1, dtype=wide).isfinite() | marked_N
    if not bool(bad_N.any()):
        return
    if bool(marked_N.any()):
        raise ValueError(
            f"rank {torch.distributed.get_rank()}: padding_mask = None here, and another rank of "
            "the expert group has one: give every rank a mask, of False where nothing is padded"
        )
    expert_N = torch.arange(tokens_per_expert.numel()).repeat_interleave(tokens_per_expert.cpu())
    bad_E = torch.bincount(expert_N[bad_N.cpu()], minlength=tokens_per_expert.numel())
    expert = int(bad_E.nonzero()[0])
    place = "a layer without a number" if layer is None else f"layer {layer}"
    raise NonFiniteExpertError(
        f"rank {torch.distributed.get_rank()}: {place}, expert {first_expert + expert} gave "
        f"NaN or infinity in {int(bad_E[expert])} of its {int(tokens_per_expert[expert])} rows: "
        "resume from the last checkpoint with a lower learning rate or gradient clipping, or pass "
        "--no-mone-check-for-nan to go on"
    )
