"""One forward pass of a model in any layout, and what is read from its logits.

Legend: B rows of a micro-batch, S tokens, V vocabulary rows of this tensor-parallel rank.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from torch import Tensor

from megatron_mone.evaluation.loading import Loaded

Read = Callable[[Tensor, Tensor], Any]
"""Given (logits_BSV, tokens_BS), on ranks of the last pipeline stage."""


class Forward:
    """The model of `loaded`, asked for logits."""

    def __init__(self, loaded: Loaded) -> None:
        self._chunks = loaded.chunks
        self._masked = loaded.args.create_attention_mask_in_dataloader
        self.micro = loaded.args.pipeline_model_parallel_size
        split = loaded.args.sequence_parallel
        self.multiple = loaded.args.tensor_model_parallel_size if split else 1

    @torch.no_grad()
    def __call__(self, tokens: Tensor, read: Read) -> list[Any]:
        """Run some rows. Collective over the model-parallel ranks, and over EP's.

        Args:
            tokens: [rows, s] int64; rows a multiple of `micro`, s of `multiple`.
            read: what is kept of a micro-batch.

        Returns:
            What `read` returned, by micro-batch; empty where this rank is not of the last stage.
        """
        batches = tokens.cuda().chunk(self.micro)
        iterators = [iter(batches) for _ in self._chunks]
        return get_forward_backward_func()(
            forward_step_func=partial(self._step, read),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self._chunks if len(self._chunks) > 1 else self._chunks[0],
            num_microbatches=self.micro,
            seq_length=tokens.shape[1],
            micro_batch_size=len(batches[0]),
            forward_only=True,
            collect_non_loss_data=True,
        )

    def _step(
        self, read: Read, batches: Iterator[Tensor], model: torch.nn.Module
    ) -> tuple[Tensor, Callable[..., Any]]:
        tokens = next(batches)
        length = tokens.shape[1]
        positions = torch.arange(length, device=tokens.device).expand_as(tokens)
        mask = None
        if self._masked:  # as the training data's: True where a token may not look
            ones = torch.ones(1, 1, length, length, dtype=torch.bool, device=tokens.device)
            mask = ones.triu(1)
        output = model(tokens, positions, mask)

        def keep(logits: Tensor, non_loss_data: bool = True) -> Any:
            del non_loss_data
            return read(logits, tokens)

        return output, keep


def log_probabilities(logits: Tensor, targets: Tensor) -> Tensor:
    """Of given tokens, with the softmax over all rows of the embedding, as in training's loss.

    Args:
        logits: [b, s, V] of this tensor-parallel rank.
        targets: [b, s] ids.

    Returns:
        [b, s] fp32, in nats.
    """
    group = mpu.get_tensor_model_parallel_group()
    logits = logits.float()
    peak = _reduced(logits.amax(-1), torch.distributed.ReduceOp.MAX, group)
    total = _reduced(
        (logits - peak[..., None]).exp().sum(-1), torch.distributed.ReduceOp.SUM, group
    )
    local = targets - mpu.get_tensor_model_parallel_rank() * logits.shape[-1]
    here = (local >= 0) & (local < logits.shape[-1])
    own = logits.gather(-1, local.clamp(0, logits.shape[-1] - 1)[..., None])[..., 0]
    own = _reduced(own.where(here, 0.0), torch.distributed.ReduceOp.SUM, group)
    return own - peak - total.log()


def most_likely(logits: Tensor, vocabulary: int) -> Tensor:
    """The token that greedy decoding takes: of the tokenizer's ids, padding rows left out.

    Args:
        logits: [b, s, V] of this tensor-parallel rank.
        vocabulary: the tokenizer's size.

    Returns:
        [b, s] int64.
    """
    rank, width = mpu.get_tensor_model_parallel_rank(), logits.shape[-1]
    seen = max(0, min(width, vocabulary - rank * width))
    if seen:
        value, index = logits[..., :seen].float().max(-1)
    else:
        value = logits.new_full(logits.shape[:-1], float("-inf"), dtype=torch.float32)
        index = torch.zeros_like(value, dtype=torch.int64)
    index = index + rank * width
    group = mpu.get_tensor_model_parallel_group()
    if group.size() == 1:
        return index
    values = [torch.empty_like(value) for _ in range(group.size())]
    indices = [torch.empty_like(index) for _ in range(group.size())]
    torch.distributed.all_gather(values, value, group=group)
    torch.distributed.all_gather(indices, index, group=group)
    best = torch.stack(values).argmax(0, keepdim=True)
    return torch.stack(indices).gather(0, best)[0]


def _reduced(value: Tensor, operation: Any, group: Any) -> Tensor:
    if group.size() > 1:
        torch.distributed.all_reduce(value, operation, group=group)
    return value
