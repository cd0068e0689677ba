"""What a tracer has to supply because it follows from values.

- Routing: the map of tokens to experts, from given rows of each expert; made when the router
  answers, so that every count and split downstream is Megatron's own arithmetic.
- The micro-batch that each peer holds: peers are copies of this rank, but not in that.
MoNE's kernels are in traced_backend.py; of a GPU job Megatron's own experts in grouped_linear.py,
and what moves rows in permutation.py and deep_ep.py.
May touch: the names in Megatron and torch that it replaces while `installed`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_mone.common.patch import Replaced
from megatron_mone.moe.dispatch.row_sources import Known, Shard
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins import deep_ep, grouped_linear


def balanced_rows(tokens: int, topk: int, experts: int) -> list[int]:
    """Rows of each expert, as equal as whole numbers are; they add up to tokens x topk."""
    least, more = divmod(tokens * topk, experts)
    return [least + (expert < more) for expert in range(experts)]


def routing_map(rows: Sequence[int], tokens: int, topk: int) -> Tensor:
    """[tokens, E] bool with `rows` ones in each column and topk in each row.

    Args:
        rows: of each expert.
        tokens: routed.
        topk: experts of a token.

    Raises:
        ValueError: no such map.
    """
    if sum(rows) != tokens * topk or max(rows) > tokens or min(rows) < 0:
        raise ValueError(
            f"rows_per_expert = {list(rows)}: each must be 0 to the {tokens} tokens, and together "
            f"{tokens * topk} for {topk} experts a token"
        )
    # Experts in order take tokens in order: at most `tokens` in a run, so never one twice. It is
    # no work of the job's, so nobody sees it made.
    with _disable_current_modes():
        expert_P = torch.arange(len(rows)).repeat_interleave(torch.tensor(rows))
        found_TE = torch.zeros(tokens, len(rows), dtype=torch.bool)
        found_TE[torch.arange(len(expert_P)) % tokens, expert_P] = True
    return found_TE


@contextmanager
def known_routing(rows: Sequence[int] | None = None) -> Iterator[None]:
    """While it lasts routers send tokens as `rows` says; their probabilities stay what they are.

    Args:
        rows: of each expert, for the tokens that one router call takes; None: balanced.
    """
    from megatron.core.transformer.moe.router import TopKRouter

    routing = TopKRouter.routing

    def known(self: Any, logits: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        probs, routed_TE = routing(self, logits, *args, **kwargs)
        tokens, experts = routed_TE.shape
        given = balanced_rows(tokens, self.topk, experts) if rows is None else rows
        return probs, routing_map(given, tokens, self.topk)

    with Replaced(TopKRouter, "routing", known):
        yield


def peers_micro_batches(args: Any) -> Callable[..., None]:
    """`all_gather_object` with what peers answer to moe/dispatch/row_sources.py.

    Args:
        args: Megatron's, validated: the micro-batches of the peers are those of the layout.
    """
    from megatron.core.parallel_state import RankGenerator

    tp, cp, pp = (args.tensor_model_parallel_size, args.context_parallel_size,
                  args.pipeline_model_parallel_size)  # fmt: skip
    etp, ep = args.expert_tensor_parallel_size, args.expert_model_parallel_size
    order = "tp-cp-ep-dp-pp" if not args.use_tp_pp_dp_mapping else "tp-cp-ep-pp-dp"
    world = args.world_size
    dense = RankGenerator(tp=tp, ep=1, dp=world // (tp * cp * pp), pp=pp, cp=cp, order=order)
    expert = RankGenerator(tp=etp, ep=ep, dp=world // (etp * ep * pp), pp=pp, cp=1, order=order)
    shards = {rank: group for group in dense.get_ranks("tp-cp") for rank in group}
    experts = {rank: group for group in expert.get_ranks("tp-ep") for rank in group}
    exchange = torch.distributed.all_gather_object

    def answer(rank: int, own: Shard | Known) -> Shard | Known:
        if isinstance(own, Known):
            return Known(min(shards[peer]) for peer in experts[rank])
        return Shard(min(shards[rank]), set(shards[rank]) <= set(experts[rank]))

    def all_gather_object(found: list, own: Any, group: Any = None) -> None:
        if not isinstance(own, Shard | Known):
            exchange(found, own, group=group)
            return
        for place, rank in enumerate(torch.distributed.get_process_group_ranks(group)):
            found[place] = answer(rank, own)

    return all_gather_object


def _l2_norm(_chunk: int, _flag: Tensor, lists: list[list[Tensor]], *_: Any) -> tuple[Tensor, None]:
    """local_multi_tensor_l2_norm of megatron/core/utils.py without its `torch.tensor(norms)`."""
    norms = [torch.norm(tensor) for tensor in lists[0]]
    return torch.norm(torch.stack(norms)).reshape(1), None


def _type_of(original: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type` by which a tensor without values is on the GPU, as optimizers assert."""

    def type_(self: Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None and self.is_meta:
            return f"torch.cuda.{_TYPE_NAMES[self.dtype]}Tensor"
        return original(self, dtype, *args, **kwargs)

    return type_


_TYPE_NAMES = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}


def _leave_freed(_freed: Tensor, _again: Tensor) -> None:
    """In place of share_storage of megatron/core/tensor_parallel/random.py."""


@contextmanager
def installed(args: Any, config: Any, recorder: Recorder, rows: Sequence[int] | None) -> Iterator:
    """All stand-ins, those of the optimizer too, which reads types and norms of gradients.

    Args:
        args: Megatron's, validated.
        config: the transformer config; transformer_impl says whether the job runs on GPUs.
        recorder: told of a GPU job's exchanges.
        rows: of each expert for one router call; None: balanced.

    Raises:
        ValueError: a part of a GPU job that is not traced.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    answered = peers_micro_batches(args)
    with ExitStack() as stack:
        stack.enter_context(Replaced(clip_grads, "l2_norm_impl", _l2_norm))
        stack.enter_context(Replaced(Tensor, "type", _type_of(Tensor.type)))
        stack.enter_context(known_routing(rows))
        stack.enter_context(Replaced(torch.distributed, "all_gather_object", answered))
        if config.transformer_impl == "transformer_engine":
            # An output freed by CheckpointWithoutOutput stays so: nobody reads values, and what
            # the backward pass makes again is counted there.
            stack.enter_context(Replaced(random, "_get_share_storage", lambda: _leave_freed))
            stack.enter_context(grouped_linear.installed(config))
            stack.enter_context(deep_ep.installed(config, recorder))
        yield
