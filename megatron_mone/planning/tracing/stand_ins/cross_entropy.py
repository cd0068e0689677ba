"""Stand-in for Megatron's fused vocabulary-parallel cross entropy on tensors without values.

"fused.cross_entropy" three times forward, around an all-reduce of the largest logit and one of two
numbers a token, and "fused.cross_entropy_backward". The softmax in fp32, the mask of targets and
the targets are kept. Transformer Engine's cross entropy is refused by Megatron 0.19. May touch:
nothing.

Source: megatron/core/fusions/fused_cross_entropy.py.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.op import note


class _Native(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, group):
        tokens = target.numel()
        largest = logits.new_empty(target.shape, dtype=torch.float32)
        softmax = logits.new_empty(logits.shape, dtype=torch.float32)
        note("fused.cross_entropy", [logits], [softmax, largest])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
        mask = logits.new_empty(target.shape, dtype=torch.bool)
        masked_target = logits.new_empty(tokens, dtype=torch.int64)
        sums = logits.new_empty(2 * tokens, dtype=torch.float32)
        note(
            "fused.cross_entropy", [softmax, target, largest], [softmax, mask, masked_target, sums]
        )
        dist.all_reduce(sums, group=group)
        loss = logits.new_empty(target.shape, dtype=torch.float32)
        note("fused.cross_entropy", [softmax, sums], [softmax, loss])
        ctx.save_for_backward(softmax, mask, masked_target)
        return loss

    @staticmethod
    def backward(ctx, *gradients):
        saved = ctx.saved_tensors
        dlogits = torch.empty_like(saved[0], dtype=torch.bfloat16)
        note("fused.cross_entropy_backward", [*saved, gradients[0]], [dlogits])
        return dlogits, None, None


def native_cross_entropy(logits: Tensor, target: Tensor, tp_group: Any) -> Tensor:
    """megatron.core.fusions.fused_cross_entropy.fused_vocab_parallel_cross_entropy.

    Args:
        logits: [s, b, V / TP].
        target: [s, b].
        tp_group: tensor-parallel.

    Returns:
        [s, b] fp32.
    """
    return _Native.apply(logits, target, tp_group)
