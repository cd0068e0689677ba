"""A `deep_ep` module for CPU ranks: the calls Megatron makes of DeepEP and HybridEP, over gloo.

It moves real bytes between ranks, lays received rows by source rank, then token, as the libraries
do, and refuses what they refuse: rows that are not 16-bit, a width their kernels or buffers do not
take, a handle used at another width. It is written from their sources (`Buffer` after
deep_ep/buffer.py, csrc/deep_ep.cpp and csrc/kernels/intranode.cu of DeepEP 1.2, `HybridEPBuffer`
after deep_ep/hybrid_ep_buffer.py and csrc/hybrid_ep of the hybrid-ep branch), and is not them: no
stream, no overlap, no NVLink, no RDMA, no fp8.

Shapes: T tokens of this rank, K experts of a token, R ranks, E_l local experts, M rows received.
"""

import hashlib
import sys
import types

import torch
import torch.distributed as dist

CALLS = []  # (name, cached, digest of what was given), in order; the tests empty it
WIRE = {"cached": 0, "first": 0}  # bytes of rows sent to other ranks by dispatches of either kind


class EventHandle:
    def current_stream_wait(self):
        pass


class EventOverlap:
    def __init__(self, event=None):
        self.event = event

    def current_stream_wait(self):
        self.event.current_stream_wait()


class Config:
    """Sizes grow with the row, and are checked where rows are sent."""

    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 0


def _record(name, cached, *tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    CALLS.append((name, cached, digest.hexdigest()))


def _exchange(rows, rows_out_R, rows_in_R, group):
    """Rows by destination rank -> rows by source rank; any type, as bytes."""
    rows = rows.contiguous()
    as_bytes = rows.view(torch.uint8) if rows.numel() else rows.new_zeros(0, 1, dtype=torch.uint8)
    width = rows.shape[1] * rows.element_size()
    out = torch.empty(sum(rows_in_R) * width, dtype=torch.uint8)
    dist.all_to_all_single(
        out,
        as_bytes.reshape(-1),
        [n * width for n in rows_in_R],
        [n * width for n in rows_out_R],
        group=group,
    )
    return out.view(rows.dtype).view(-1, rows.shape[1])


class _Layout:
    """Which token goes to which rank; made once, kept in the handle."""

    def __init__(self, goes_TR, group):
        self.group, self.tokens = group, goes_TR.shape[0]
        self.token_of_sent = goes_TR.T.nonzero()[:, 1]  # by destination, then token
        out_R = goes_TR.sum(dim=0)
        in_R = torch.empty_like(out_R)
        dist.all_to_all_single(in_R, out_R, group=group)
        self.out_R, self.in_R = out_R.tolist(), in_R.tolist()

    def send(self, x):
        return _exchange(x[self.token_of_sent], self.out_R, self.in_R, self.group)

    def give_back(self, rows):
        """The sum over ranks of each token's rows, in fp32."""
        returned = _exchange(rows, self.in_R, self.out_R, self.group)
        total = torch.zeros(self.tokens, rows.shape[1])
        return total.index_add_(0, self.token_of_sent, returned.float()).to(rows.dtype)

    def count(self, x, cached):
        away = sum(self.out_R) - self.out_R[self.group.rank()]
        WIRE["cached" if cached else "first"] += away * x.shape[1] * x.element_size()


def _check_events(previous_event, async_finish, allocate_on_comm_stream):
    if allocate_on_comm_stream:
        assert previous_event is not None
        assert async_finish


class Buffer:
    num_sms = 20

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.group = group
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        CALLS.append(("Buffer", num_nvl_bytes, ""))

    @staticmethod
    def set_num_sms(num_sms):
        assert num_sms % 2 == 0
        Buffer.num_sms = num_sms

    @staticmethod
    def get_dispatch_config(num_ranks):
        return Config()

    @staticmethod
    def get_combine_config(num_ranks):
        return Config()

    def _check_rows(self, x):
        row_bytes = x.shape[1] * x.element_size()
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert row_bytes % 32 == 0  # two halves of int4, intranode.cu
        assert row_bytes // 2 + 8 <= 8192  # a half and its barrier in a warp's TMA buffer
        assert row_bytes * self.group.size() <= self.num_nvl_bytes

    def get_dispatch_layout(
        self,
        topk_idx,
        num_experts,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        assert topk_idx.dtype == torch.int64
        _record("get_dispatch_layout", False, topk_idx)
        ranks = self.group.size()
        goes_TE = torch.zeros(topk_idx.shape[0], num_experts + 1, dtype=torch.bool)
        goes_TE.scatter_(1, torch.where(topk_idx < 0, num_experts, topk_idx), True)
        goes_TE = goes_TE[:, :num_experts]
        goes_TR = goes_TE.view(-1, ranks, num_experts // ranks).any(dim=2)
        return goes_TR.sum(dim=0), None, goes_TE.sum(dim=0), goes_TR, EventOverlap(EventHandle())

    def dispatch(
        self,
        x,
        handle=None,
        num_tokens_per_rank=None,
        num_tokens_per_rdma_rank=None,
        is_token_in_rank=None,
        num_tokens_per_expert=None,
        topk_idx=None,
        topk_weights=None,
        expert_alignment=1,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x)
        _record("dispatch", handle is not None, x, topk_idx, topk_weights)
        event = EventOverlap(EventHandle())
        if handle is not None:
            assert topk_idx is None
            assert topk_weights is None
            (layout,) = handle
            assert x.shape[0] == layout.tokens
            layout.count(x, cached=True)
            return layout.send(x), None, None, None, None, event
        assert topk_weights.dtype == torch.float32
        layout = _Layout(is_token_in_rank, self.group)
        layout.count(x, cached=False)
        local = num_tokens_per_expert.numel() // self.group.size()
        index_MK = layout.send(topk_idx) - self.group.rank() * local
        mine_MK = (index_MK >= 0) & (index_MK < local)
        index_MK = torch.where(mine_MK, index_MK, -1)
        weights_MK = layout.send(topk_weights) * mine_MK
        per_expert = torch.bincount(index_MK[mine_MK], minlength=local).tolist()
        return layout.send(x), index_MK, weights_MK, per_expert, (layout,), event

    def combine(
        self,
        x,
        handle,
        topk_weights=None,
        config=None,
        previous_event=None,
        async_finish=False,
        allocate_on_comm_stream=False,
    ):
        _check_events(previous_event, async_finish, allocate_on_comm_stream)
        self._check_rows(x)
        _record("combine", True, x, topk_weights)
        (layout,) = handle
        weights = None if topk_weights is None else layout.give_back(topk_weights)
        return layout.give_back(x), weights, EventOverlap(EventHandle())


class HybridEPBuffer:
    def __init__(
        self,
        group,
        hidden_dim,
        max_num_of_tokens_per_rank,
        num_local_experts,
        use_fp8=False,
        num_sms_dispatch_api=None,
        num_sms_combine_api=None,
        num_sms_preprocessing_api=None,
    ):
        assert group.size() > 1
        assert not use_fp8
        self.group = group
        CALLS.append(("HybridEPBuffer", hidden_dim, ""))

    def dispatch_with_permute(
        self,
        *,
        hidden,
        routing_map=None,
        probs=None,
        scaling_factor=None,
        num_of_experts_per_rank=None,
        num_permuted_tokens=None,
        pad_multiple=None,
        handle=None,
        non_blocking=False,
        fuse_permute_dispatch=False,
    ):
        assert hidden.element_size() == 2  # UINT16
        assert hidden.is_contiguous()
        assert scaling_factor is None
        assert pad_multiple is None
        _record("dispatch_with_permute", handle is not None, hidden, routing_map, probs)
        cached = handle is not None
        if cached:
            layout, local_ME, tokens, width, fused, overflow = handle
            assert num_permuted_tokens >= int(local_ME.sum())
            assert fuse_permute_dispatch == fused
        else:
            assert routing_map.dtype == torch.bool
            assert probs.dtype == torch.float32
            assert non_blocking == (num_permuted_tokens is not None)
            tokens, width = hidden.shape
            longest = torch.tensor([tokens, -tokens])
            dist.all_reduce(longest, op=dist.ReduceOp.MAX, group=self.group)
            assert longest.tolist() == [tokens, -tokens]  # every rank gives as many tokens
            map_TRE = routing_map.view(tokens, self.group.size(), num_of_experts_per_rank)
            layout = _Layout(map_TRE.any(dim=2), self.group)
            local_ME = self._mine(layout.send(routing_map), num_of_experts_per_rank)
            overflow = torch.zeros(1, dtype=torch.int32)
            if num_permuted_tokens is not None and int(local_ME.sum()) > num_permuted_tokens:
                overflow += 1  # the last rows, in their order, are dropped
                kept = torch.arange(int(local_ME.sum())) < num_permuted_tokens
                local_EM = local_ME.T.contiguous()
                local_EM[local_EM.clone()] = kept
                local_ME = local_EM.T
        assert hidden.shape == (tokens, width)  # the handle's template config has the width
        layout.count(hidden, cached)
        row_N = local_ME.T.nonzero()[:, 1]
        permuted_probs = None
        if probs is not None:
            permuted_probs = self._mine(layout.send(probs), local_ME.shape[1]).T[local_ME.T]
        handle = (layout, local_ME, tokens, width, fuse_permute_dispatch, overflow)
        per_expert = local_ME.sum(dim=0).int()
        rows = layout.send(hidden)[row_N]
        if num_permuted_tokens is not None:  # of a rank's capacity; the rest is as it was
            rest = num_permuted_tokens - rows.shape[0]
            rows = torch.nn.functional.pad(rows, (0, 0, 0, rest), value=torch.nan)
            if permuted_probs is not None:
                permuted_probs = torch.nn.functional.pad(permuted_probs, (0, rest))
        return rows, permuted_probs, None, per_expert, handle

    def combine_with_unpermute(
        self, *, hidden, probs=None, handle=None, pad_multiple=None, fuse_unpermute_combine=False
    ):  # fmt: skip
        _record("combine_with_unpermute", True, hidden, probs)
        layout, local_ME, _, width, fused, _ = handle
        assert fuse_unpermute_combine == fused
        assert hidden.shape[1] == width
        hidden = hidden[: int(local_ME.sum())]
        probs = None if probs is None else probs[: hidden.shape[0]]
        rows_MH = torch.zeros(local_ME.shape[0], width)
        rows_MH.index_add_(0, local_ME.T.nonzero()[:, 1], hidden.float())
        combined_probs = None
        if probs is not None:
            experts = local_ME.shape[1]
            probs_MX = torch.zeros(local_ME.shape[0], experts * self.group.size())
            self._mine(probs_MX, experts).T[local_ME.T] = probs  # a view: writes through
            combined_probs = layout.give_back(probs_MX)
        return layout.give_back(rows_MH.to(hidden.dtype)), combined_probs

    def _mine(self, x_MX, experts):
        first = self.group.rank() * experts
        return x_MX[:, first : first + experts]


def install():
    """Put the stand-in into `sys.modules`; before Megatron's fused_a2a is imported."""
    assert "megatron.core.transformer.moe.fused_a2a" not in sys.modules
    module, utils = types.ModuleType("deep_ep"), types.ModuleType("deep_ep.utils")
    module.Buffer, module.HybridEPBuffer = Buffer, HybridEPBuffer
    module.EventOverlap = utils.EventOverlap = EventOverlap
    utils.EventHandle = EventHandle
    module.utils = utils
    sys.modules["deep_ep"], sys.modules["deep_ep.utils"] = module, utils


def forget():
    """Empty the records, and let Megatron make its buffers anew."""
    from megatron.core.transformer.moe import fused_a2a

    CALLS.clear()
    WIRE.update(cached=0, first=0)
    fused_a2a._buffer = None
    fused_a2a.reset_hybrid_ep_buffer()
