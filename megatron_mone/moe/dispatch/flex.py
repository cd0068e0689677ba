"""Megatron's flex token dispatcher (DeepEP, HybridEP, NCCL EP), carrying a neuron mask with each
pair.

The same contract as in carrier.py. The libraries move whole rows of 16-bit numbers and
change no bit of them on dispatch, so a second dispatch with the handle of the tokens' dispatch
brings the masks to where the tokens went. A token reaches a rank once, however many of its experts
live there; so its row holds a slot for each expert it is routed to, [expert + 1 | packed mask], and
the receiver picks the slot of its own expert. Slots are cut to the width of a token's row, which
the handle of HybridEP and the group of NCCL EP fix and the buffers of DeepEP hold.
Not run on a GPU, nor with the real libraries: tested on CPU ranks, where stand-ins for deep_ep and
for Transformer Engine's ep move the bytes. May touch: Megatron's flex dispatcher and its libraries'
buffers, NeuronMask.

Shapes: as in carrier.py, and K experts of a token (`moe_router_topk`), S = 2 + B bytes of a
slot, W = K * S bytes of a token's row, M rows that arrived, H the tokens' width.
"""

import inspect
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe import fused_a2a
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher
from torch import Tensor

from megatron_mone.config import MoNEConfig, expert_hidden
from megatron_mone.config_checks import captures_experts
from megatron_mone.moe.dispatch.carrier import MaskCarrier, check_rows, predicted_mask_bytes
from megatron_mone.moe.faults import FaultWatch, deferred
from megatron_mone.moe.padding import mark_padding

TAG_BYTES = 2  # expert + 1, low byte first; 0 is an empty slot
DEEPEP_ALIGNMENT = 32  # bytes: intranode.cu moves each half of a row as int4

INSTALL = {
    "deepep": ("HAVE_DEEP_EP", "deep_ep, from https://github.com/deepseek-ai/DeepEP"),
    "hybridep": ("HAVE_HYBRIDEP", "deep_ep, from the hybrid-ep branch of "
                 "https://github.com/deepseek-ai/DeepEP"),
    "ncclep": ("HAVE_TE_EP", "transformer-engine, built with NVTE_BUILD_WITH_NCCL_EP=1"),
}  # fmt: skip


def check_flex_packages(config: MoNEConfig) -> None:
    """That the library which a flex dispatcher needs can be imported, and has what is asked of it;
    cheap, no process group.

    Raises:
        ValueError: it cannot; names the field, its value and what to install. One line.
    """
    if config.moe_token_dispatcher_type != "flex":
        return
    _check_backend(config.moe_flex_dispatcher_backend)
    if config.moe_flex_dispatcher_backend == "hybridep":
        _check_fused(config)
    if config.moe_flex_dispatcher_backend == "ncclep":
        _check_ncclep()


def predicted_flex_mask_bytes(copies: int, config: MoNEConfig) -> int:
    """What `bytes_carried` grows by for `copies` token rows sent to other ranks.

    A token counts once for each other rank that holds an expert of it, and all its slots travel:
    K * (2 + ceil(F / 8)) bytes, rounded up to 32 (deepep) or to whole token rows of 2 * H bytes
    (hybridep, ncclep).
    """
    return copies * sum(_wire_widths(config, expert_hidden(config)))


class MaskFlexTokenDispatcher(MaskCarrier, MoEFlexTokenDispatcher):
    """The flex dispatcher with masks; each stage moves the mask after the tokens.

    1. dispatch_preprocess: put each token's masks into the slots of one row
    2. token_dispatch: send these rows with the handle of the tokens
    3. dispatch_postprocess: of each row, in expert order, pick the slot of its expert

    The way back (`return_mask`) is not there: the libraries add rows up on combine, in bf16.

    Attributes:
        bytes_carried: see MaskCarrier; a token's row counts once for each rank that gets it.

    Raises:
        ValueError: the library of `moe_flex_dispatcher_backend` is not installed.
    """

    _slots_TW: Tensor | None = None  # from dispatch_preprocess to token_dispatch
    _slots_MW: Tensor | None = None  # from token_dispatch to dispatch_postprocess
    _padding_T: Tensor | None = None  # from mark_padding to dispatch_preprocess

    def __init__(
        self,
        num_local_experts: int,
        local_expert_indices: list[int],
        config: MoNEConfig,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        _check_backend(config.moe_flex_dispatcher_backend)
        super().__init__(num_local_experts, local_expert_indices, config, pg_collection)
        self._rows_differ = FaultWatch(self._rows_error, lasting=captures_experts(config))

    def set_mask(self, bits_NB: Tensor | None) -> None:
        """See MaskCarrier.

        Raises:
            ValueError: also where rows are padded for quantization.
        """
        if bits_NB is not None:
            _check_carried(self.config)
        super().set_mask(bits_NB)

    def mark_padding(self, probs: Tensor, padding_T: Tensor) -> Tensor:
        """See MaskCarrier; all but hybridep take the largest probabilities for the routed ones."""
        if self.config.moe_flex_dispatcher_backend == "hybridep":
            return super().mark_padding(probs, padding_T)
        self._padding_T = padding_T
        return probs

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Stage 1; see MoEFlexTokenDispatcher.

        Raises:
            ValueError: a mask whose rows are not the routed pairs, or a token routed to more than
                `moe_router_topk` experts.
        """
        bits_NB = self._start()
        self._slots_TW = self._slots_MW = None
        if bits_NB is not None:
            self._slots_TW = _fill_slots(bits_NB, routing_map.bool(), self.config.moe_router_topk)
        tokens, token_probs = super().dispatch_preprocess(hidden_states, routing_map, probs)
        padding_T, self._padding_T = self._padding_T, None
        if padding_T is not None:
            token_probs = mark_padding(token_probs, padding_T)
            self._comm_manager.token_probs = token_probs
        return tokens, token_probs

    def token_dispatch(
        self,
        hidden_states: Tensor,
        probs: Tensor | None = None,
        async_finish: bool = True,
        allocate_on_comm_stream: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Stage 2; see MoEFlexTokenDispatcher."""
        # First, since it makes the handle.
        dispatched = super().token_dispatch(
            hidden_states, probs, async_finish, allocate_on_comm_stream
        )
        slots_TW, self._slots_TW = self._slots_TW, None
        if slots_TW is not None:
            self._slots_MW = self._send(slots_TW)
        return dispatched

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Stage 3; see MoEFlexTokenDispatcher.

        Raises:
            ValueError: rows that a fused kernel padded: their order is not known here.
        """
        # Rows of a rank's capacity beyond its routed ones keep no neuron.
        processed = super().dispatch_postprocess(hidden_states, probs)
        slots_MW, self._slots_MW = self._slots_MW, None
        if slots_MW is None:
            return processed
        rows, tokens_per_expert, _ = processed
        if self._is_deepep:
            # The order of Megatron's `permute`; its map also names rows of no routed pair.
            map_ME = self._comm_manager.dispatched_routing_map
            expert_N, row_N = map_ME.T.nonzero(as_tuple=True)
        else:  # permuted by the library, the slots as the tokens
            row_N = torch.arange(rows.shape[0], device=slots_MW.device)
            end_E = self.rows_on_device(tokens_per_expert).cumsum(0)
            expert_N = torch.searchsorted(end_E, row_N, right=True)
        if expert_N.numel() != rows.shape[0]:
            raise ValueError(
                f"the experts got {rows.shape[0]} rows for {expert_N.numel()} routed ones: rows "
                "padded for quantization carry no masks; unset fp8, fp4 and "
                "use_transformer_engine_op_fuser"
            )
        beyond_N = expert_N >= self.num_local_experts
        expert_N = torch.where(beyond_N, -1, expert_N + self.local_expert_indices[0])
        self._arrived_NB = _pick_slots(slots_MW, row_N, expert_N, self.config)
        return processed

    @torch.no_grad()
    def rows_by_source(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier; from the row counts of every rank, which the libraries do not give.

        All lay an expert's rows by source rank of the ETP x EP group, then by token: DeepEP by the
        prefix sums of its handle, HybridEP and NCCL EP by a scan of the gathered routing map.

        Raises:
            ValueError: rows padded or dropped there, on a GPU at the end of the step
                (moe/faults.py).
        """
        manager: Any = self._comm_manager
        experts = self.num_local_experts
        ranks, me = manager.group.size(), manager.group.rank()
        sent_X = _rows_sent(manager, ranks * experts)
        parts = [torch.empty_like(sent_X) for _ in range(ranks)]
        torch.distributed.all_gather(parts, sent_X, group=manager.group)
        rows_ER = torch.stack(parts).view(ranks, ranks, experts)[:, me].t()
        got_E, routed_E = self.rows_on_device(tokens_per_expert), rows_ER.sum(dim=1)
        if deferred(got_E):
            self._rows_differ.keep((got_E != routed_E).long(), got_E, routed_E)
        elif not torch.equal(got_E, routed_E):
            raise self._rows_error([], got_E.tolist(), routed_E.tolist())
        return rows_ER

    def rows_on_device(self, tokens_per_expert: Tensor) -> Tensor:
        """See MaskCarrier."""
        manager: Any = self._comm_manager
        device = manager.token_probs.device
        nccl_ep = self.config.moe_flex_dispatcher_backend == "ncclep"  # counts on the device
        if nccl_ep or tokens_per_expert.device == device:
            return tokens_per_expert.long()
        if self._is_deepep:  # its counts are on the host, and a map of what arrived is here
            return manager.dispatched_routing_map.sum(dim=0)
        each = manager.capacity * manager.group.size()  # else HybridEP's are on the device
        return torch.full((self.num_local_experts,), each, device=device)

    def _rows_error(self, _found: list[int], got: list[int], routed: list[int]) -> ValueError:
        return ValueError(
            f"moe_flex_dispatcher_backend = {self.config.moe_flex_dispatcher_backend!r}: the "
            f"experts got {got} rows for {routed} routed ones: with rows padded or dropped there, "
            "use alltoall with a neuron-granular balance loss"
        )

    @property
    def _is_deepep(self) -> bool:
        return self.config.moe_flex_dispatcher_backend == "deepep"

    @property
    def _is_hybridep(self) -> bool:
        return self.config.moe_flex_dispatcher_backend == "hybridep"

    @torch.no_grad()
    def _send(self, slots_TW: Tensor) -> Tensor:
        """[M, W] (all but deepep: [N, W], permuted): rows where the tokens went, piece by piece."""
        manager: Any = self._comm_manager
        widths = _wire_widths(self.config, self.hidden_shape[-1])
        self.bytes_carried += self._copies_to_others() * sum(widths)
        pad_T = 0
        if self._is_hybridep:  # as the manager pads tokens to the longest rank
            pad_T = manager.routing_map.shape[0] - slots_TW.shape[0]
        row_bytes = slots_TW.shape[1]
        slots_TW = torch.nn.functional.pad(slots_TW, (0, sum(widths) - row_bytes, 0, pad_T))
        send = _SEND[self.config.moe_flex_dispatcher_backend]
        arrived = [
            send(piece.contiguous().view(torch.bfloat16), manager).contiguous().view(torch.uint8)
            for piece in slots_TW.split(widths, dim=1)
        ]
        return torch.cat(arrived, dim=1)[:, :row_bytes]

    def _copies_to_others(self) -> int:
        """Rows that leave this rank: tokens, each once for every other rank it goes to."""
        manager: Any = self._comm_manager
        ranks = self.tp_size * self.ep_size
        if not self._is_hybridep:
            # The others route by indices: their topk may name experts beyond the routing map.
            index_TK = manager.token_indices
            rank_TK = torch.where(index_TK < 0, ranks, index_TK // self.num_local_experts)
            goes_TR = torch.zeros(
                (index_TK.shape[0], ranks + 1), dtype=torch.bool, device=index_TK.device
            ).scatter_(1, rank_TK, True)[:, :ranks]
        else:
            goes_TR = manager.routing_map.view(-1, ranks, self.num_local_experts).any(dim=2)
        return int(goes_TR.sum() - goes_TR[:, manager.group.rank()].sum())


def _rows_sent(manager: Any, experts: int) -> Tensor:
    """[experts] int64 rows that this rank's tokens have at each expert of the group."""
    if manager.config.moe_flex_dispatcher_backend == "hybridep":
        return manager.routing_map.sum(dim=0)
    index_X = manager.token_indices.flatten()
    index_X = torch.where(index_X < 0, experts, index_X)  # dropped
    sent = index_X.new_zeros(experts + 1)
    return sent.index_add_(0, index_X, torch.ones_like(index_X))[:experts]


def _send_deepep(rows: Tensor, manager: Any) -> Tensor:
    """Buffer.dispatch in cached mode: the layout of the tokens' dispatch, any row width."""
    buffer = fused_a2a.get_buffer(manager.group, fused_a2a.get_hidden_bytes(rows))
    return buffer.dispatch(rows, handle=manager.handle)[0]


def _send_hybridep(rows: Tensor, manager: Any) -> Tensor:
    """The call by which HybridEPCombine.backward reuses a handle; it fixes the row width."""
    fused = manager.config.moe_permute_fusion_into_hybridep
    buffer: Any = fused_a2a._hybrid_ep_buffer
    return buffer.dispatch_with_permute(
        hidden=rows,
        scaling_factor=None,
        handle=manager.handle,
        pad_multiple=manager.pad_multiple,
        num_permuted_tokens=manager.num_permuted_tokens,
        **({"fuse_permute_dispatch": fused} if fused else {}),
    )[0]


def _send_ncclep(rows: Tensor, manager: Any) -> Tensor:
    """A dispatch like that of the tokens: the same routing has the same slots again, which a scan
    assigns (em_scan_kernel of NCCL's contrib/nccl_ep). A group has one row width."""
    probs_TK = manager.token_probs.detach().float()
    return fused_a2a.nccl_ep_dispatch(manager._buffer, rows, manager.token_indices, probs_TK)[0]  # type: ignore[misc]


_SEND = {"deepep": _send_deepep, "hybridep": _send_hybridep, "ncclep": _send_ncclep}


def _wire_widths(config: MoNEConfig, hidden: int) -> list[int]:
    """Bytes of the pieces of a token's slots, none wider than a token of `hidden` 16-bit numbers.

    A width at which the library already moved the tokens is one that its kernels and its buffers
    take. A handle of HybridEP and a group of NCCL EP hold that width: there all pieces have it.
    """
    row_bytes = config.moe_router_topk * _slot_bytes(config)
    whole, rest = divmod(row_bytes, 2 * hidden)
    widths = [2 * hidden] * whole
    if rest:
        deepep = config.moe_flex_dispatcher_backend == "deepep"
        widths.append(rest + -rest % DEEPEP_ALIGNMENT if deepep else 2 * hidden)
    return widths


def _slot_bytes(config: MoNEConfig) -> int:
    return TAG_BYTES + predicted_mask_bytes(1, config.moe_ffn_hidden_size)


def _fill_slots(bits_NB: Tensor, map_TE: Tensor, topk: int) -> Tensor:
    """[T, W]: the masks of each token's experts, in ascending order of expert, then empty slots."""
    expert_N, token_N = map_TE.T.nonzero(as_tuple=True)
    check_rows(bits_NB, expert_N.numel())
    most = int(map_TE.sum(dim=1).max()) if map_TE.shape[0] else 0
    if most > topk:
        raise ValueError(
            f"moe_router_topk = {topk}: a token is routed to {most} experts, and its row has a "
            "slot for each of moe_router_topk"
        )
    slot_N = (map_TE.cumsum(dim=1) - 1)[token_N, expert_N]
    slots_TKS = bits_NB.new_zeros((map_TE.shape[0], topk, TAG_BYTES + bits_NB.shape[1]))
    tag_N = expert_N + 1
    tag_N2 = torch.stack([tag_N % 256, tag_N // 256], dim=1).to(torch.uint8)
    slots_TKS[token_N, slot_N] = torch.cat([tag_N2, bits_NB], dim=1)
    return slots_TKS.flatten(1)


def _pick_slots(slots_MW: Tensor, row_N: Tensor, expert_N: Tensor, config: MoNEConfig) -> Tensor:
    """[N, B]: of each row `row_N` the slot of expert `expert_N`; zeros where there is none.

    There is none where a topk filled up with an expert of probability 0; -1 is no expert.
    """
    slots_MKS = slots_MW.view(-1, config.moe_router_topk, _slot_bytes(config))
    tag_MK = slots_MKS[:, :, 0].long() + 256 * slots_MKS[:, :, 1].long()
    is_it_NK = (tag_MK[row_N] == (expert_N + 1).unsqueeze(1)) & (expert_N >= 0).unsqueeze(1)
    bits_NB = slots_MKS[row_N, is_it_NK.to(torch.uint8).argmax(dim=1), TAG_BYTES:]
    return bits_NB * is_it_NK.any(dim=1, keepdim=True)


def _check_backend(backend: str) -> None:
    flag, package = INSTALL.get(backend, ("", ""))
    if flag and not getattr(fused_a2a, flag):
        raise ValueError(
            f"moe_flex_dispatcher_backend = {backend!r} needs a package that is not installed or "
            f"does not import: install {package}; or set moe_token_dispatcher_type to 'alltoall'"
        )


def _check_fused(config: MoNEConfig) -> None:
    """Megatron permutes apart, with a warning, where the library has no fused permutation."""
    asked = ("moe_permute_fusion_into_hybridep", "moe_hybridep_num_blocks_permute",
             "moe_hybridep_num_blocks_unpermute")  # fmt: skip
    name = next((name for name in asked if getattr(config, name)), None)
    if name is None:
        return
    known = inspect.signature(fused_a2a.HybridEPBuffer.dispatch_with_permute).parameters
    if "fuse_permute_dispatch" not in known:
        raise ValueError(
            f"{name} = {getattr(config, name)!r} needs a HybridEP that permutes while it sends, "
            f"which the installed one does not: install a newer {INSTALL['hybridep'][1]}; or "
            "leave it out"
        )


def _check_ncclep() -> None:
    """Later releases of Transformer Engine ask for more than Megatron 0.19 gives."""
    library = getattr(fused_a2a, "te_ep", None)
    asked = inspect.signature(library.ep_bootstrap).parameters if library is not None else {}
    if "num_topk" in asked and asked["num_topk"].default is inspect.Parameter.empty:
        raise ValueError(
            "moe_flex_dispatcher_backend = 'ncclep': the installed transformer-engine asks for "
            "num_topk, which this Megatron does not give: install an older one, or set "
            "moe_flex_dispatcher_backend to 'hybridep'"
        )


def _check_carried(config: MoNEConfig) -> None:
    for name in ("fp8", "fp4", "moe_router_padding_for_quantization"):
        if getattr(config, name):
            raise ValueError(
                f"{name} = {getattr(config, name)!r}: the flex dispatcher carries no neuron masks "
                "with rows padded for quantization; unset it, or set moe_token_dispatcher_type to "
                "'alltoall'"
            )
