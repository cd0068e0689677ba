"""DeepEP, HybridEP and NCCL EP without values: exchanges that bring tokens to the ranks of their
experts.

They bring a token once to each rank that holds one of its experts. Their exchanges are collectives
of the TP x EP group, "dispatch" (also the backward of combine) and "combine" (also the backward of
dispatch), with the bytes of this rank's T tokens: hidden states, and with a first dispatch and its
backward a float32 probability for each pair. How often a token travels is for the cost model; how
many rows arrive is said by `arriving_tokens`.
May touch: the names in Megatron's modules that it replaces while `installed`.
Shapes: T tokens of this rank, R ranks of the group, K experts of a token, M tokens that arrive, N
routed rows of them, E experts, H hidden.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins.op import run, unknown
from megatron_mone.planning.tracing.stand_ins.permutation import unpermute

INT, LONG, FLOAT, BOOL = torch.int32, torch.int64, torch.float32, torch.bool


def arriving_tokens(
    rows: Sequence[int], tokens: int, topk: int, experts: int, groups: int = 1, group_topk: int = 1
) -> float:
    """Tokens of one source that choose at least one expert of a rank.

    Balanced choices of different experts hit a rank as hypergeometric draws do, within `group_topk`
    of `groups` equal groups drawn alike. An uneven load is an expert's probability to be missed
    that differs: the same formula for independent draws, to the power by which the two differ when
    balanced.

    Args:
        rows: that the source sends to each expert of the rank.
        tokens: T of the source.
        topk: K.
        experts: E, of which equally many are on each rank.
        groups, group_topk: moe_router_num_groups, moe_router_group_topk; a rank lies in one group,
            or holds whole ones.
    """
    held, q = len(rows), topk / experts
    if max(rows) >= tokens or topk == experts:
        return float(tokens)
    missed = _missed(held, topk, experts, groups, group_topk)
    shares = [math.log1p(-count / tokens) for count in rows]
    return tokens * (1.0 - missed ** (sum(shares) / (held * math.log1p(-q))))


def _missed(held: int, topk: int, experts: int, groups: int, group_topk: int) -> float:
    """Probability that balanced choices miss a rank's experts."""
    size = experts // groups
    pool = group_topk * size
    whole = max(1, held // size)  # groups that the rank has a part in
    chosen = range(max(0, whole + group_topk - groups), min(whole, group_topk) + 1)
    return sum(
        math.comb(whole, hit) * math.comb(groups - whole, group_topk - hit)
        * math.comb(max(0, pool - hit * min(held, size)), topk)
        for hit in chosen
    ) / (math.comb(groups, group_topk) * math.comb(pool, topk))  # fmt: skip


@dataclass(frozen=True)
class Handle:
    """What a dispatch leaves for its combine.

    Attributes:
        tokens: T.
        arrived: M.
        pairs: of these tokens and their experts.
        routed: [M, E_l] bool, experts of this rank that each arrived token has, with values.
        kept: tensors that both passes hold.
        group: of the exchange.
    """

    tokens: int
    arrived: int
    pairs: int
    routed: Tensor
    kept: tuple[Tensor, ...]
    group: Any

    @property
    def row_map(self) -> Tensor:
        """Of the permutation that HybridEP makes itself."""
        return self.kept[-1]

    def __getitem__(self, _place: int) -> Tensor:
        """HybridEP's last entry, the flag of an overflow: there is none."""
        return torch.zeros(1, dtype=INT)


class Slots:
    """NCCL EP's buffer of one dispatch and its combine, te_ep.EpBuffer.

    Attributes:
        capacity: C, rows that a rank has room for.
        handle: what the first dispatch leaves.
    """

    def __init__(self, *, recv_capacity_per_rank: int, **_sizes: int) -> None:
        self.capacity = recv_capacity_per_rank
        self.handle: Handle | None = None


class Exchange:
    """DeepEP, HybridEP and NCCL EP of one model.

    As megatron/core/transformer/moe/fused_a2a.py calls them.

    Args:
        config: of the model.
        recorder: told of the exchanges.
    """

    def __init__(self, config: Any, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder
        self._context: tuple[Any, int] | None = None  # NCCL EP's group and its experts

    def fused_dispatch(
        self, x: Tensor, token_indices: Tensor, token_probs: Tensor, num_experts: int, group: Any,
        **_flags: Any,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Handle]:  # fmt: skip
        """Rows [M, H], their local experts [M, K] (-1: none), probabilities, counts, handle."""
        mine = num_experts // group.size()
        first = mine * group.rank()
        sent = torch.bincount(token_indices.flatten(), minlength=num_experts)
        rows = [int(count) for count in sent[first : first + mine]]
        tokens, topk = token_indices.shape
        handle = self._handle(rows, tokens, topk, num_experts, group)
        indices = _indices(handle.routed, topk)
        hidden, probs = _Dispatch.apply(x, token_probs, topk, self._recorder, handle)
        return hidden, indices, probs, torch.tensor(rows) * group.size(), handle

    def fused_combine(
        self, x: Tensor, group: Any, handle: Handle, **_flags: Any
    ) -> tuple[Tensor, None]:
        """[M, H] -> [T, H], summed."""
        return _Combine.apply(x, self._recorder, handle), None

    def hybrid_dispatch(
        self, x: Tensor, routing_map: Tensor, probs: Tensor, group: Any, num_local_experts: int,
        num_permuted_tokens: Any = None, pad_multiple: int | None = None, **_options: Any,
    ) -> tuple[Tensor, Tensor, None, Tensor, Handle]:  # fmt: skip
        """Rows [N, H] by expert, their probabilities, counts and handle."""
        first, experts = num_local_experts * group.rank(), routing_map.shape[1]
        sent = routing_map.sum(dim=0)[first : first + num_local_experts]
        topk = -(-int(routing_map.sum()) // max(1, x.shape[0]))
        handle = self._handle(sent.tolist(), x.shape[0], topk, experts, group)
        self._recorder.saw_collective("all_gather", routing_map.nbytes, group)
        counts = sent * group.size()
        if pad_multiple:
            counts = (counts + pad_multiple - 1) // pad_multiple * pad_multiple
        rows = counts.sum() if num_permuted_tokens is None else num_permuted_tokens
        hidden, weights = _Dispatch.apply(x, probs, num_local_experts, self._recorder, handle)
        outputs = (((int(rows), x.shape[1]), x.dtype), ((int(rows),), FLOAT))
        permuted = run("fused.permute", (hidden, weights), outputs, (handle.row_map,))
        return *permuted, None, counts, handle

    def hybrid_combine(self, x: Tensor, handle: Handle, **_options: Any) -> Tensor:
        """[N, H] by expert -> [T, H], summed."""
        summed = unpermute(x, handle.row_map, restore_shape=(handle.arrived, x.shape[1]))
        return _Combine.apply(summed, self._recorder, handle)

    def bootstrap(self, ep_group: Any, num_experts: int, **_sizes: Any) -> None:
        """NCCL EP's context, of which a process has one."""
        self._context = ep_group, num_experts

    def nccl_dispatch(
        self, buffer: Slots, tokens: Tensor, topk_idx: Tensor, topk_weights: Tensor,
        **_given: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Rows [C, H] by expert, counts, and probabilities [C]. NCCL EP is HybridEP's way, whose
        rows lie in a buffer of a rank's capacity; it is read and written whole.

        Raises:
            ValueError: more rows arrive than the buffer has, where the kernel ends the job.
        """
        assert self._context is not None
        group, experts = self._context
        mine = experts // group.size()
        sent = torch.bincount(topk_idx.flatten(), minlength=experts)
        sent = sent[mine * group.rank() : mine * (group.rank() + 1)]
        counts = sent * group.size()
        if int(counts.sum()) > buffer.capacity:
            factor = self._config.moe_expert_rank_capacity_factor
            raise ValueError(
                f"moe_expert_rank_capacity_factor = {factor} holds {buffer.capacity} rows, and "
                f"{int(counts.sum())} arrive at the fullest rank, where NCCL EP ends the job: "
                f"give at least {int(counts.sum()) / buffer.capacity * factor:.3g}"
            )
        if buffer.handle is None:
            buffer.handle = self._handle(
                sent.tolist(), tokens.shape[0], topk_idx.shape[1], experts, group
            )
        arrived = _Dispatch.apply(tokens, topk_weights, mine, self._recorder, buffer.handle)
        outputs = (((buffer.capacity, tokens.shape[1]), tokens.dtype), ((buffer.capacity,), FLOAT))
        rows, weights = run("fused.permute", arrived, outputs, (buffer.handle.row_map,))
        return rows, counts.to(INT), weights

    def nccl_combine(self, buffer: Slots, expert_out: Tensor, **_given: Any) -> Tensor:
        """[C, H] by expert -> [T, H], summed."""
        assert buffer.handle is not None
        return self.hybrid_combine(expert_out, buffer.handle)

    def _handle(self, rows: list[int], tokens: int, topk: int, experts: int, group: Any) -> Handle:
        config, ranks = self._config, group.size()
        groups = config.moe_router_num_groups or 1
        # With expert tensor parallelism `experts` and `topk` count each of its ranks.
        copies = experts // config.num_moe_experts
        found = arriving_tokens(
            rows, tokens, topk // copies, config.num_moe_experts, groups,
            config.moe_router_group_topk or 1,
        )  # fmt: skip
        total = sum(rows) * ranks
        least = max(-(-total // topk), max(rows) * ranks)
        arrived = min(max(round(found * ranks), least), total)
        # As DeepEP's handle within a node: is_token_in_rank, send_head, recv_src_idx. HybridEP's
        # has a place for each rank and token too, and its row map.
        shapes = [((tokens, ranks), BOOL), ((tokens, ranks), INT), ((arrived,), INT)]
        if config.moe_flex_dispatcher_backend != "deepep":
            shapes.append(((arrived, 2 * len(rows) + 1), INT))
        kept = tuple(unknown(*shape) for shape in shapes)
        with _disable_current_modes():
            routed = _routed([count * ranks for count in rows], arrived)
        return Handle(tokens, arrived, tokens * topk, routed, kept, group)


def _routed(rows: Sequence[int], tokens: int) -> Tensor:
    """[M, E_l] bool with `rows` ones in each column: experts in order take tokens in order."""
    found_ME = torch.zeros(tokens, len(rows), dtype=BOOL)
    expert_N = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
    found_ME[torch.arange(len(expert_N)) % max(1, tokens), expert_N] = True
    return found_ME


def _indices(routed_ME: Tensor, columns: int) -> Tensor:
    """[M, K]: the experts of each row in order, then -1."""
    with _disable_current_modes():
        found = torch.full((routed_ME.shape[0], columns), -1, dtype=LONG)
        row_N, expert_N = routed_ME.nonzero(as_tuple=True)
        found[row_N, (routed_ME.cumsum(dim=1) - 1)[row_N, expert_N]] = expert_N
    return found


def indices_to_multihot(indices: Tensor, probs: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """fused_indices_to_multihot, whose one kernel is also assumed for the operators that Megatron
    runs without --enable-experimental: (map, probabilities), both [M, E_l], of [M, K]."""
    with _disable_current_modes():
        routed = torch.zeros(indices.shape[0], experts + 1, dtype=BOOL)
        routed = routed.scatter_(1, indices % (experts + 1), True)[:, :experts].contiguous()
    kept = (unknown(routed.shape, INT),)
    outputs = ((routed.shape, probs.dtype),)
    (spread,) = run("fused.indices_to_multihot", (indices, probs), outputs, kept)
    return routed, spread


class _Dispatch(torch.autograd.Function):
    """x [T, H] and probabilities -> [M, H] and [M, columns] on the ranks of their experts."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, probs: Tensor, columns: int, recorder: Recorder, handle: Handle
    ) -> tuple[Tensor, Tensor]:
        size = x.nbytes + handle.pairs * FLOAT.itemsize
        recorder.saw_collective("dispatch", size, handle.group)
        recorder.saw_wait()  # for the number of tokens that arrive
        ctx.save_for_backward(*handle.kept)
        ctx.back = lambda: recorder.saw_collective("combine", size, handle.group)
        ctx.like = (x.shape, x.dtype), (probs.shape, probs.dtype)
        return x.new_empty(handle.arrived, x.shape[1]), unknown((handle.arrived, columns), FLOAT)

    @staticmethod
    def backward(ctx: Any, dx: Tensor, dprobs: Tensor):
        ctx.back()
        return *(unknown(*like) for like in ctx.like), None, None, None


class _Combine(torch.autograd.Function):
    """[M, H] -> [T, H] on the ranks that the tokens came from."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, recorder: Recorder, handle: Handle) -> Tensor:
        y = rows.new_empty(handle.tokens, rows.shape[1])
        recorder.saw_collective("combine", y.nbytes, handle.group)
        ctx.save_for_backward(*handle.kept)
        ctx.back = lambda size: recorder.saw_collective("dispatch", size, handle.group)
        ctx.like = rows.shape, rows.dtype
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor):
        ctx.back(dy.nbytes)
        return unknown(*ctx.like), None, None


def _known_experts(original: Callable[..., None]) -> Callable[..., None]:
    """`setup_metadata` of DeepEP's or NCCL EP's manager whose indices have values: those of the
    routing map."""

    def setup_metadata(manager: Any, routing_map: Tensor, probs: Tensor) -> None:
        original(manager, routing_map, probs)
        with _disable_current_modes():
            routed_TE = routing_map.reshape(routing_map.shape[0], -1)
            manager.token_indices = _indices(routed_TE, manager.router_topk)

    return setup_metadata


def _waiting(original: Callable[..., Any], recorder: Recorder) -> Callable[..., Any]:
    """`MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize` whose wait for counts is told."""

    def synchronize(dispatcher: Any, point: str, tokens_per_expert: Any = None) -> Any:
        if not dispatcher.drop_and_pad and point == dispatcher.cuda_sync_point:
            recorder.saw_wait()
        return original(dispatcher, point, tokens_per_expert)

    return synchronize


@contextmanager
def installed(config: Any, recorder: Recorder) -> Iterator[None]:
    """While it lasts models run on these exchanges.

    Args:
        config: the transformer config.
        recorder: told of the exchanges.
    """
    from megatron.core.fusions import fused_pad_routing_map
    from megatron.core.transformer.moe import fused_a2a, moe_utils, token_dispatcher

    exchange, deepep = Exchange(config, recorder), token_dispatcher._DeepepManager
    nccl_ep = token_dispatcher._NCCLEPManager
    alltoall = token_dispatcher.MoEAlltoAllTokenDispatcher
    synchronize = "_maybe_dtoh_and_synchronize"
    replaced: list[tuple[Any, str, Any]] = [
        (token_dispatcher, "fused_dispatch", exchange.fused_dispatch),
        (token_dispatcher, "fused_combine", exchange.fused_combine),
        (token_dispatcher, "hybrid_ep_dispatch", exchange.hybrid_dispatch),
        (token_dispatcher, "hybrid_ep_combine", exchange.hybrid_combine),
        (token_dispatcher, "set_deepep_num_sms", lambda _number: None),
        (token_dispatcher, "fused_indices_to_multihot", indices_to_multihot),
        (token_dispatcher, "fused_pad_routing_map", moe_utils.pad_routing_map),
        (fused_pad_routing_map, "fused_pad_routing_map", moe_utils.pad_routing_map),
        (token_dispatcher, "ensure_nccl_ep_bootstrapped", exchange.bootstrap),
        *((module, name, value) for module in (token_dispatcher, fused_a2a) for name, value in (
            ("new_nccl_ep_buffer", Slots),
            ("nccl_ep_dispatch", exchange.nccl_dispatch),
            ("nccl_ep_combine", exchange.nccl_combine))),
        (deepep, "setup_metadata", _known_experts(deepep.setup_metadata)),
        (nccl_ep, "setup_metadata", _known_experts(nccl_ep.setup_metadata)),
        (deepep, "_indices_to_multihot", lambda manager, indices, probs: indices_to_multihot(
            indices, probs, manager.num_local_experts)),
        (alltoall, synchronize, _waiting(getattr(alltoall, synchronize), recorder)),
        # The job's packages need not be here.
        (fused_a2a, "HAVE_DEEP_EP", True),
        (fused_a2a, "HAVE_HYBRIDEP", True),
        (fused_a2a, "HAVE_TE_EP", True),
    ]  # fmt: skip
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(Replaced(owner, name, value))
        yield
