"""Transformer Engine's `ep` (NCCL EP) for CPU ranks: the calls Megatron makes of it, over gloo.

Written from its sources (transformer_engine/pytorch/ep.py; NCCL's contrib/nccl_ep, whose
em_scan_kernel lays an expert's rows by the number of their token in the whole group: by source
rank, then token), and is not it: no stream, no symmetric memory, no quantised rows. What it leaves
unwritten of a receive buffer is NaN here. A buffer that is dispatched into a second time, as for
masks, has the same layout again.

Shapes: as in stand_in_deep_ep.py, and X experts of the group, C rows of the receive buffer.
"""

import torch

from tests.unit.moe.stand_in_deep_ep import HybridEPBuffer

_group = None


class EpBuffer:
    """Sizes, and what the first dispatch knows of the routing."""

    def __init__(
        self, top_k, max_tokens_per_rank, recv_capacity_per_rank, hidden_dim, num_local_experts,
        alignment=0,
    ):  # fmt: skip
        assert _group is not None, "bootstrap first"
        assert max_tokens_per_rank % 64 == 0
        assert alignment == 0
        self.top_k, self.hidden_dim, self.capacity = top_k, hidden_dim, recv_capacity_per_rank
        self.max_tokens, self.num_local_experts = max_tokens_per_rank, num_local_experts
        self.handle = None


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, tokens, index_TK, weights_TK):
        assert tokens.dtype == torch.bfloat16
        assert tokens.shape[1] == buffer.hidden_dim
        assert tokens.shape[0] <= buffer.max_tokens
        assert index_TK.dtype == torch.int64
        assert weights_TK.dtype == torch.float32
        assert index_TK.shape[1] == buffer.top_k
        experts = _group.size() * buffer.num_local_experts
        probs_TX = torch.zeros(tokens.shape[0], experts).scatter_(1, index_TK, weights_TK)
        map_TX = torch.zeros_like(probs_TX, dtype=torch.bool).scatter_(1, index_TK, True)
        library = HybridEPBuffer(_group, buffer.hidden_dim, buffer.max_tokens, None)
        rows = None if buffer.handle is None else int(buffer.handle[1].sum())
        given = {} if rows is not None else {"routing_map": map_TX}
        got, probs_N, _, per_expert, buffer.handle = library.dispatch_with_permute(
            hidden=tokens.contiguous(), probs=probs_TX, handle=buffer.handle,
            num_of_experts_per_rank=buffer.num_local_experts, num_permuted_tokens=rows, **given,
        )  # fmt: skip
        assert got.shape[0] <= buffer.capacity, "overflow: the kernel traps"
        ctx.library, ctx.handle, ctx.rows = library, buffer.handle, got.shape[0]
        ctx.save_for_backward(index_TK)
        beyond = buffer.capacity - got.shape[0]
        got_CH = torch.cat([got, got.new_full((beyond, got.shape[1]), torch.nan)])
        probs_C = torch.cat([probs_N, probs_N.new_full((beyond,), torch.nan)])
        ctx.mark_non_differentiable(per_expert)
        return got_CH, probs_C, per_expert

    @staticmethod
    def backward(ctx, grad_CH, grad_probs_C, _counts):
        (index_TK,) = ctx.saved_tensors
        grad_TH, grad_TX = ctx.library.combine_with_unpermute(
            hidden=grad_CH[: ctx.rows], probs=grad_probs_C[: ctx.rows], handle=ctx.handle
        )
        return None, grad_TH, None, grad_TX.gather(1, index_TK)


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, buffer, rows_CH):
        assert rows_CH.shape == (buffer.capacity, buffer.hidden_dim)
        ctx.library = HybridEPBuffer(_group, buffer.hidden_dim, buffer.max_tokens, None)
        ctx.handle, ctx.capacity = buffer.handle, buffer.capacity
        rows = int(buffer.handle[1].sum())
        return ctx.library.combine_with_unpermute(hidden=rows_CH[:rows], handle=ctx.handle)[0]

    @staticmethod
    def backward(ctx, grad_TH):
        rows = int(ctx.handle[1].sum())
        grad_NH, *_ = ctx.library.dispatch_with_permute(
            hidden=grad_TH.contiguous(), handle=ctx.handle, num_permuted_tokens=rows
        )
        beyond = grad_NH.new_full((ctx.capacity - rows, grad_NH.shape[1]), torch.nan)
        return None, torch.cat([grad_NH, beyond])


def _bootstrap(ep_group, **_sizes):
    global _group
    _group = ep_group


def _dispatch(buffer, tokens, topk_idx, topk_weights, recv_tokens=None, recv_topk_weights=None):
    assert recv_tokens is None
    assert recv_topk_weights is None
    rows, probs, per_expert = _Dispatch.apply(buffer, tokens, topk_idx, topk_weights)
    return rows, per_expert, probs


def _combine(buffer, expert_out, num_local_tokens=None, grad_out=None):
    assert grad_out is None
    combined = _Combine.apply(buffer, expert_out)
    assert combined.shape[0] == num_local_tokens
    return combined


def install():
    """Put it in the place of Megatron's wrappers (fused_a2a.py), which are None without TE's."""
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    fused_a2a.HAVE_TE_EP = True
    for module in (fused_a2a, token_dispatcher):
        module.nccl_ep_dispatch, module.nccl_ep_combine = _dispatch, _combine
        module.new_nccl_ep_buffer, module.ensure_nccl_ep_bootstrapped = EpBuffer, _bootstrap
