"""What a tracer has to supply because it follows from values: routing, and MoNE's kernels.

- Routing: the map of tokens to experts, from given rows of each expert; made when the router
  answers, so that every count and split downstream is Megatron's own arithmetic.
- Routed experts of MoNE: kernels read values. Their stand-in has the outputs and keeps for backward
  what the native CPU backend keeps (kernels/cpu/backend.py: x, p, the pre-activation a, u and index
  of each kept entry, row offsets), and counts the products of the backend that the layer asked for.
  Of a GPU job (transformer_impl transformer_engine) grouped_linear.py and dispatch.py have
  these experts, Megatron's own, and what moves rows.
- The micro-batch that each peer holds: peers are copies of this rank, but not in that.
May touch: the names in Megatron's and our modules that it replaces while `installed`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial, partialmethod
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_mone.common.phases import GATE_GEMM, UP_DOWN_GEMM, enter
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.registry import GroupedMLPOutput
from megatron_mone.model.module_flops import LayerShare, RankShare, expert_work
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins import dispatch as fused_dispatch
from megatron_mone.planning.tracing.stand_ins import grouped_linear as fused_experts
from megatron_mone.planning.tracing.stand_ins.grouped_linear import kept_entries


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


def _bias_rows(experts: Any, recorder: Recorder, tokens_per_expert: Tensor) -> Tensor | None:
    """MoNEExperts._bias_rows: [N, F_l] of the bias without values, repeated as known counts say."""
    bias_EF = experts.neuron_bias
    if bias_EF is None:
        return None
    bias_NF = bias_EF.new_empty(int(tokens_per_expert.sum()), bias_EF.shape[1])
    recorder.note("aten.repeat_interleave", [bias_EF], [bias_NF], 0)
    return bias_NF


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

    with patch.object(TopKRouter, "routing", known):
        yield


class _Experts(torch.autograd.Function):
    """y [N, H], sigma(a), a of the kept entries, indices and offsets, all without values."""

    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, kept, backward):
        neurons = w_gate.shape[1]
        a_K, u_K, gate_K = (x_NH.new_empty(kept) for _ in range(3))
        indices_K = torch.empty(kept, dtype=index_dtype(neurons), device=x_NH.device)
        offsets_N1 = torch.empty(x_NH.shape[0] + 1, dtype=torch.int64, device=x_NH.device)
        ctx.save_for_backward(x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K, indices_K, offsets_N1)
        ctx.backward = backward
        ctx.mark_non_differentiable(a_K, indices_K, offsets_N1)
        ctx.set_materialize_grads(False)
        return torch.empty_like(x_NH), gate_K, a_K, indices_K, offsets_N1

    @staticmethod
    def backward(ctx: Any, dy_NH, *_others):
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in saved[:5]]
        ctx.backward([dy_NH, *saved], gradients)
        return *gradients, None, None


class Experts:
    """Stands in for `grouped_mlp_with_gates` in the layers of one model.

    Args:
        config: of the model, with mone_* fields.
        recorder: told of the products.
    """

    def __init__(self, config: Any, recorder: Recorder) -> None:
        self._config = config
        self._recorder = recorder

    def __call__(
        self, x_NH: Tensor, probs_N: Tensor, counts: Sequence[int], w_gate: Tensor, w_up: Tensor,
        w_down: Tensor, *, choose: Any, all_gates: bool = False, **_names: Any,
    ) -> GroupedMLPOutput:  # fmt: skip
        """See kernels.grouped_mlp_with_gates; `counts` must add up to N."""
        if all_gates:
            raise ValueError(
                "mone_ng_loss_type = 'normalized' cannot be traced: only the reference backend "
                "runs it; plan with 'selected'"
            )
        assert sum(counts) == x_NH.shape[0], (counts, x_NH.shape)
        given = isinstance(choose, NeuronMask)
        kept = choose.indices_K.numel() if given else self._kept(x_NH.shape[0], w_gate, choose)
        first, rest, backward = _products(self._config, x_NH.shape[0], kept, given)

        def note_backward(inputs: list[Tensor], outputs: list[Tensor]) -> None:
            enter(UP_DOWN_GEMM)
            self._recorder.note("mone.up_down_backward", inputs, outputs, backward)

        y_NH, gate_K, a_K, indices_K, offsets_N1 = _Experts.apply(
            x_NH, probs_N, w_gate, w_up, w_down, kept, note_backward
        )
        chosen = (a_K, gate_K, indices_K, offsets_N1)
        if first:
            enter(GATE_GEMM)
            self._recorder.note("mone.gate", (x_NH, w_gate), chosen, first)
        enter(UP_DOWN_GEMM)
        read = (x_NH, probs_N, w_up, w_down, *chosen[1:])
        self._recorder.note("mone.up_down", read, (y_NH, a_K), rest)  # u is as large as a
        if given:
            return GroupedMLPOutput(y_NH, choose, gate_K, a_K=a_K)
        block = choose.block if isinstance(choose, Selection) else 1
        mask = NeuronMask.unchecked(indices_K, offsets_N1, w_gate.shape[1], block)
        return GroupedMLPOutput(y_NH, mask, gate_K, a_K=a_K)

    def _kept(self, rows: int, w_gate: Tensor, choose: Any) -> int:
        """K: a selection says it; a rule keeps what the config promises of this rank's neurons."""
        if isinstance(choose, Selection):
            return rows * choose.kept
        choose(torch.empty(rows, w_gate.shape[1], dtype=w_gate.dtype, device=w_gate.device))
        return kept_entries(self._config, rows, w_gate.shape[1])


def unpacked_mask(config: Any, mask_NF: Tensor, block: int = 1) -> NeuronMask:
    """NeuronMask.from_bool of a mask without values: of a recompute, which unpacks its bits."""
    rows, neurons = mask_NF.shape
    kept = kept_entries(config, rows, neurons)
    indices_K = torch.empty(kept, dtype=index_dtype(neurons), device=mask_NF.device)
    offsets_N1 = torch.empty(rows + 1, dtype=torch.int64, device=mask_NF.device)
    return NeuronMask.unchecked(indices_K, offsets_N1, neurons, block)


def _products(config: Any, rows: int, kept: int, given: bool) -> tuple[int, int, int]:
    """(choosing gate, other forward, backward) operations of one layer's experts.

    Args:
        config: of the model.
        rows: N.
        kept: K.
        given: whether the mask was: a recompute's forward.
    """
    share = RankShare(
        layers=(), output_uses=0, micro_batches=1, tokens=0, sequence_length=0, vocabulary=0,
        tp=config.tensor_model_parallel_size,
        etp=config.expert_tensor_parallel_size or config.tensor_model_parallel_size,
        local_experts=config.num_moe_experts // config.expert_model_parallel_size,
    )  # fmt: skip
    once = expert_work(config, share, LayerShare("mone", rows, kept))
    twice = expert_work(config, share, LayerShare("mone", rows, kept, frozenset(("moe",))))
    repeated = {phase: twice[phase].executed - once[phase].executed for phase in twice}
    gate_again, rest_again = repeated.get(GATE_GEMM, 0.0), repeated[UP_DOWN_GEMM]
    # A repeated forward has two products at the computed entries beside a gate of all, else three;
    # a backward pass has six.
    backward = rest_again * (3 if gate_again else 2)
    if given:
        return int(gate_again), int(rest_again), int(backward)
    gate = once[GATE_GEMM].executed if GATE_GEMM in once else 0.0
    return int(gate), int(once[UP_DOWN_GEMM].executed - backward), int(backward)


def _peers_micro_batches(args: Any) -> Callable[..., None]:
    """`all_gather_object` with what peers answer to token_dispatcher.build_source_map.

    A rank's micro-batch is named by the lowest rank of its TP x CP group; the answers are the name
    and whether its expert group holds all of that group, or all names in its expert group.
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

    def answer(rank: int, own: Any) -> Any:
        if isinstance(own, set):
            return {min(shards[peer]) for peer in experts[rank]}
        return min(shards[rank]), set(shards[rank]) <= set(experts[rank])

    def all_gather_object(found: list, own: Any, group: Any = None) -> None:
        for place, rank in enumerate(torch.distributed.get_process_group_ranks(group)):
            found[place] = answer(rank, own)

    return all_gather_object


@contextmanager
def peers_micro_batches(args: Any) -> Iterator[None]:
    """While a model is built: the micro-batches of the peers are those of the layout.

    Args:
        args: Megatron's, validated.
    """
    from megatron_mone.moe import neuron_balancer

    build, answers = neuron_balancer.build_source_map, _peers_micro_batches(args)

    def build_source_map(**groups: Any) -> Any:
        with patch.object(torch.distributed, "all_gather_object", answers):
            return build(**groups)

    with patch.object(neuron_balancer, "build_source_map", build_source_map):
        yield


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
        recorder: told of the experts' products.
        rows: of each expert for one router call; None: balanced.

    Raises:
        ValueError: a part of a GPU job that is not traced.
    """
    from megatron.core.optimizer import clip_grads
    from megatron.core.tensor_parallel import random

    from megatron_mone.moe import experts

    with ExitStack() as stack:
        stack.enter_context(patch.object(clip_grads, "l2_norm_impl", _l2_norm))
        stack.enter_context(patch.object(Tensor, "type", _type_of(Tensor.type)))
        stack.enter_context(known_routing(rows))
        stack.enter_context(peers_micro_batches(args))
        stack.enter_context(patch.object(NeuronMask, "from_bool", partial(unpacked_mask, config)))
        stack.enter_context(
            patch.object(experts.MoNEExperts, "_bias_rows", partialmethod(_bias_rows, recorder))
        )
        if config.transformer_impl == "transformer_engine":
            # An output freed by CheckpointWithoutOutput stays so: nobody reads values, and what
            # the backward pass makes again is counted there.
            stack.enter_context(patch.object(random, "_get_share_storage", lambda: _leave_freed))
            stack.enter_context(fused_experts.installed(config))
            stack.enter_context(fused_dispatch.installed(config, recorder))
        else:
            stand_in = Experts(config, recorder)
            stack.enter_context(patch.object(experts, "grouped_mlp_with_gates", stand_in))
        yield
