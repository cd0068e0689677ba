"""Stand-in for Transformer Engine's DotProductAttention on tensors without values.

A fused kernel (cuDNN's or FlashAttention): "fused.attention" and "fused.attention_backward", one op
each (a ring's steps together), whose inputs are q [s, b, n, d], k [s, b, g, d], v [s, b, g, e].
Kept for backward: q, k, v, the output, and the softmax statistics in fp32, one a row and head. The
backward pass multiplies the scores again: five products against two. A causal mask halves all; a
sliding window keeps its width.

Under context parallelism each rank holds s of the S = s CP positions, and

- `p2p`: k and v go round the ring in CP - 1 exchanges, CP in backward: k and v, with their
  gradients behind them; what is kept of k and v is the copy that was sent;
- `all_gather`: k and v are gathered forward and again backward, their gradients reduce-scattered;
- `a2a`: q, k, v and the output change from positions split to heads split and back;
- `a2a+p2p`: as `a2a` over the inner of two groups, and k and v of its heads go round a ring of the
  outer one, whose ranks are further apart.

May touch: nothing.

Sources: transformer_engine/pytorch/attention/dot_product_attention/backends.py and
context_parallel.py; FlashAttention-2 (arXiv 2307.08691), section 3.1.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins.linear import gather_rows, scatter_rows
from megatron_mone.planning.tracing.stand_ins.op import note


@dataclass(frozen=True)
class AttentionJob:
    """How attention runs.

    Attributes:
        causal: whether a query sees no later position.
        window: positions up to its own that a query sees under a causal mask; None for all.
        heads: context-parallel group that splits heads while it attends; None where none does.
        positions: one that splits positions, so that k and v are exchanged; None where none does.
        gathers: k and v are gathered in `positions`, and do not go round a ring.
    """

    causal: bool
    window: int | None
    heads: Any = None
    positions: Any = None
    gathers: bool = False

    @property
    def ranks(self) -> int:
        """CP."""
        return _size(self.heads) * _size(self.positions)


def _size(group: Any) -> int:
    return 1 if group is None else group.size()


def score_pairs(positions: int, causal: bool, window: int | None) -> int:
    """(query, key) pairs that a sequence multiplies: its square, halved by a causal mask, less
    what lies before the window.

    Args:
        positions: S of the sequence.
        causal, window: see AttentionJob.
    """
    if not causal:
        return positions * positions
    outside = 0 if window is None else max(0, positions - window)
    return (positions * positions - outside * outside) // 2


def products(q: Tensor, v: Tensor, job: AttentionJob) -> tuple[int, int]:
    """(forward, backward) operations of this rank.

    Args:
        q: [s, b, n, d] as the rank holds it outside of the exchange.
        v: [s, b, g, e].
        job: says mask and ranks.
    """
    s, b, n, d = q.shape
    pairs = b * n * score_pairs(s * job.ranks, job.causal, job.window) // job.ranks
    scores, values = 2 * pairs * d, 2 * pairs * v.shape[3]
    return scores + values, 3 * scores + 2 * values


class _Attention(torch.autograd.Function):
    """[s, b, n, d], [s, b, g, d], [s, b, g, e] -> [s, b, n e]."""

    @staticmethod
    def forward(ctx, q, k, v, job: AttentionJob):
        ctx.job, ctx.products = job, products(q, v, job)
        # v is a part of the projection's result, a layout that no kernel knows: it is copied, as in
        # get_qkv_layout of transformer_engine/pytorch/attention/dot_product_attention/utils.py.
        q, k, v = (tensor.contiguous() for tensor in (q, k, v))
        kept_q, kept_k, kept_v = _exchange(q, k, v, job)
        s, b, n, _ = kept_q.shape
        out = q.new_empty((s, b, n, v.shape[3]))
        statistics = q.new_empty((b, n, s), dtype=torch.float32)
        note("fused.attention", (kept_q, kept_k, kept_v), (out, statistics), flops=ctx.products[0])
        ctx.save_for_backward(kept_q, kept_k, kept_v, out, statistics)
        ctx.shapes = (q.shape, k.shape, v.shape)
        if _size(job.heads) > 1:
            out = _all_to_all(out, job.heads, gathers=False)
        return out.view(q.shape[0], b, -1)

    @staticmethod
    def backward(ctx, *gradients):
        job, saved = ctx.job, ctx.saved_tensors
        q, k, v, out, _ = saved
        dout = gradients[0].view(ctx.shapes[0][0], out.shape[1], -1, out.shape[3])
        if _size(job.heads) > 1:
            dout = _all_to_all(dout, job.heads, gathers=True)
        if _size(job.positions) > 1 and job.gathers:
            k, v = (gather_rows(tensor.contiguous(), job.positions) for tensor in (k, v))
        dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
        note("fused.attention_backward", (*saved, dout), (dq, dk, dv), flops=ctx.products[1])
        dq, dk, dv = _exchange_back(dq, dk, dv, job)
        grads = (t.view(shape) for t, shape in zip((dq, dk, dv), ctx.shapes, strict=True))
        return *grads, None


def _exchange(q: Tensor, k: Tensor, v: Tensor, job: AttentionJob) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept for backward of q, k and v, after the forward pass' collectives."""
    if _size(job.heads) > 1:
        q, k, v = (_all_to_all(tensor, job.heads, gathers=True) for tensor in (q, k, v))
    if _size(job.positions) == 1:
        return q, k, v
    if job.gathers:
        for tensor in (k, v):
            gather_rows(tensor.contiguous(), job.positions)
        return q, k, v
    sent = k.new_empty(k.numel() + v.numel())
    for _ in range(job.positions.size() - 1):
        _pass_on(sent, job.positions)
    return q, sent[: k.numel()].view(k.shape), sent[k.numel() :].view(v.shape)


def _exchange_back(
    dq: Tensor, dk: Tensor, dv: Tensor, job: AttentionJob
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of what this rank put in, after the backward pass' collectives."""
    if _size(job.positions) > 1 and job.gathers:
        dk, dv = (scatter_rows(tensor, job.positions) for tensor in (dk, dv))
    elif _size(job.positions) > 1:
        half = dk.new_empty(dk.numel() + dv.numel())
        _pass_on(half, job.positions)  # keys and values
        for _ in range(job.positions.size() - 2):
            _pass_on(half.new_empty(2 * half.numel()), job.positions)  # and gradients behind them
        _pass_on(half, job.positions)  # gradients to where they belong
    if _size(job.heads) > 1:
        dq, dk, dv = (_all_to_all(tensor, job.heads, gathers=False) for tensor in (dq, dk, dv))
    return dq, dk, dv


def _pass_on(tensor: Tensor, group: Any) -> None:
    """Send to the next rank of the ring, receive from the one before."""
    place, ranks = group.rank(), dist.get_process_group_ranks(group)
    arrives = torch.empty_like(tensor)
    dist.isend(tensor, ranks[(place + 1) % len(ranks)], group)
    dist.irecv(arrives, ranks[place - 1], group)


def _all_to_all(tensor: Tensor, group: Any, *, gathers: bool) -> Tensor:
    """Positions gathered and heads split over the group, or back."""
    s, b, n, d = tensor.shape
    ranks = group.size()
    shape = (s * ranks, b, n // ranks, d) if gathers else (s // ranks, b, n * ranks, d)
    changed = tensor.new_empty(shape)
    dist.all_to_all_single(changed.view(-1), tensor.reshape(-1), group=group)
    return changed


class DotProductAttention(torch.nn.Module):
    """transformer_engine.pytorch.DotProductAttention.

    Args:
        num_attention_heads: n of all tensor-parallel ranks.
        kv_channels: head size, or (of keys, of values).
        attn_mask_type: "causal", "no_mask", ...
        cp_group, cp_comm_type: context parallelism; of a2a+p2p two groups, inner and outer.
        window_size: (before, after) a position; None or -1 for all.
        softmax_type: "vanilla", the only one traced.
        settings: names that change neither shapes nor what is kept.

    Raises:
        ValueError: a setting whose kernels are not modelled.
    """

    def __init__(
        self, num_attention_heads: int, kv_channels: Any, *, attn_mask_type: str,
        cp_group: Any = None, cp_comm_type: str = "p2p", window_size: Any = None,
        softmax_type: str = "vanilla", **settings: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        del num_attention_heads, kv_channels, settings
        if softmax_type != "vanilla":
            raise ValueError(f"softmax_type = {softmax_type!r} cannot be traced: use 'vanilla'")
        before = -1 if window_size is None else window_size[0]
        self.window = None if before < 0 else before + 1
        if self.window is not None and "causal" not in attn_mask_type:
            raise ValueError(f"window_size = {window_size} cannot be traced without a causal mask")
        self.mask_type = attn_mask_type
        inner, outer = cp_group if cp_comm_type == "a2a+p2p" else (cp_group, cp_group)
        self.heads = inner if cp_comm_type.startswith("a2a") else None
        self.positions = None if cp_comm_type == "a2a" else outer
        self.gathers = cp_comm_type == "all_gather"

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None,
        attn_mask_type: str | None = None, **settings: Any,
    ) -> Tensor:  # fmt: skip
        """[s, b, n, d], [s, b, g, d], [s, b, g, e] -> [s, b, n e].

        Of packed documents (`qkv_format` thd) [t, n, d], [t, g, d], [t, g, e] -> [t, n e], one op
        as of one document of t tokens: how long they are is the planner's (cost/documents.py).
        """
        del attention_mask
        causal = "causal" in (attn_mask_type or self.mask_type)
        job = AttentionJob(causal, self.window, self.heads, self.positions, self.gathers)
        if settings.get("qkv_format", "sbhd") == "thd":
            parts = (tensor.unsqueeze(1) for tensor in (query, key, value))
            return _Attention.apply(*parts, job).squeeze(1)
        return _Attention.apply(query, key, value, job)
