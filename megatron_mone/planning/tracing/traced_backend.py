"""The `traced` backend: MoNE's routed experts on tensors without values.

On CPU ranks it has the outputs of the backend asked for, keeps for backward what that keeps
(kernels/cpu/backend.py: x, p, the pre-activation a, u and index of each kept entry, and row
offsets), and takes down its work as one op a phase:
    mone.gate              x [N, H], w_gate [E, F, H] -> a, g, index of the kept entries
    mone.up_down           x [N, H], w_up, w_down [E, F, H], p, g, index -> y [N, H], u
    mone.up_down_backward  dy [N, H], and all that is kept -> dx, dp, dw
On GPUs it is the Triton backend itself (kernels/triton), which has not run on one yet: its own code
runs on tensors without values, and each kernel that it would launch is an op, "mone." and the
kernel's name, with its operands and operations (stand_ins/op.py). So what is planned is what is
launched, kept and held, the balance loss and the check of NaN included. In fp8 the products are
Transformer Engine's (stand_ins/fp8_products.py).
May touch: the kernels' registry, and the config that it makes run on this backend.
Shapes: N routed rows, E local experts, H hidden, F neurons of an expert, S kept of them, K in all.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM, enter
from megatron_mone.config import neurons_per_token
from megatron_mone.kernels.choice import BiasedRule, Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask, index_dtype
from megatron_mone.kernels.registry import Backend, GroupedMLPOutput, register
from megatron_mone.kernels.triton import backend as triton
from megatron_mone.kernels.triton.arguments import ACTIVATIONS
from megatron_mone.kernels.triton.grouped_experts import masked_experts
from megatron_mone.kernels.triton.products import LinearProducts
from megatron_mone.kernels.triton.ragged import ragged_grouped_mlp
from megatron_mone.model.module_flops import LayerShare, RankShare, expert_work
from megatron_mone.moe.experts import backend_of
from megatron_mone.planning.tracing.stand_ins.fp8 import FP8GlobalStateManager
from megatron_mone.planning.tracing.stand_ins.fp8_products import Fp8Products
from megatron_mone.planning.tracing.stand_ins.gate_sums import sums_of
from megatron_mone.planning.tracing.stand_ins.op import note

TRACED = "traced"
META = torch.device("meta")


def install(config: Any) -> str | None:
    """Register the backend in this process, and make it that of a model to be built.

    A model of a GPU job that keeps all neurons is built with Megatron's own experts, whose outputs
    and checkpoint keep-all MoNE has, and without its balance loss: all neurons are used alike.

    Args:
        config: the transformer config; transformer_impl says whether the job runs on GPUs.

    Returns:
        The backend that it stands for; None in a model without MoNE layers.

    Raises:
        ValueError: mone_backend is one that no plan prices.
    """
    if not getattr(config, "mone_enabled", False):
        return None
    gpu = config.transformer_impl == "transformer_engine"
    if config.mone_backend == "sparse24":
        raise ValueError(
            "mone_backend = 'sparse24' is not priced: torch's semi-structured products are no "
            "launches of ours; plan with 'triton'"
        )
    stands_for = "triton" if gpu else backend_of(config)
    run = partial(on_gpu if gpu else on_cpu, copy.copy(config))
    register(
        Backend(
            TRACED, lambda call: None, run, automatic=False, note="computes nothing",
            counts_on_device=gpu,
        )
    )  # fmt: skip
    config.mone_backend = TRACED
    if gpu and keeps_all(config):
        config.mone_layer_freq = [0] * config.num_layers
    return stands_for


def keeps_all(config: Any) -> bool:
    """Whether a MoNE model keeps every neuron of every row: r = 1."""
    enabled = getattr(config, "mone_enabled", False) and config.mone_selection == "topk"
    return enabled and neurons_per_token(config) == config.moe_ffn_hidden_size


def _entries(config: Any, choose: Choose, rows: int, neurons: int) -> int:
    """K; a rule over all gates keeps what the config promises."""
    if isinstance(choose, Selection):
        return rows * choose.kept
    if isinstance(choose, NeuronMask):
        return choose.num_entries
    return round(rows * neurons * neurons_per_token(config) / config.moe_ffn_hidden_size)


def ask(rule: Callable[[Tensor], Tensor], a_NF: Tensor) -> None:
    """Run a rule for its operators; its bias [N, F] is repeated as known counts say."""
    if not isinstance(rule, BiasedRule) or rule.bias_EF is None:
        rule(a_NF)
        return
    bias_NF = rule.bias_EF.new_empty(int(rule.counts_E.sum()), a_NF.shape[1])
    note("aten.repeat_interleave", [rule.bias_EF], [bias_NF])
    rule.select(a_NF, bias_NF)


def _refuse_all_gates(all_gates: bool) -> None:
    if all_gates:
        _refuse("mone_ng_loss_type = 'normalized'", "plan with 'selected'")


def _refuse(field: str, fix: str) -> None:
    raise ValueError(f"{field} cannot be traced: no kernel of a GPU runs it; {fix}")


class _OnCPU(torch.autograd.Function):
    """y [N, H], sigma(a), a of the kept entries, indices and offsets, all without values."""

    @staticmethod
    def forward(ctx: Any, x_NH, probs_N, w_gate, w_up, w_down, kept, backward_flops):
        a_K, u_K, gate_K = (x_NH.new_empty(kept) for _ in range(3))
        indices_K, offsets_N1 = _index((kept,), w_gate.shape[1]), _offsets(x_NH.shape[0])
        ctx.save_for_backward(x_NH, probs_N, w_gate, w_up, w_down, a_K, u_K, indices_K, offsets_N1)
        ctx.flops = backward_flops
        ctx.mark_non_differentiable(a_K, indices_K, offsets_N1)
        ctx.set_materialize_grads(False)
        return torch.empty_like(x_NH), gate_K, a_K, indices_K, offsets_N1

    @staticmethod
    def backward(ctx: Any, dy_NH, *_others):
        saved = ctx.saved_tensors
        gradients = [torch.empty_like(tensor) for tensor in saved[:5]]
        enter(UP_DOWN_GEMM)
        note("mone.up_down_backward", [dy_NH, *saved], gradients, flops=ctx.flops)
        return *gradients, None, None


def on_cpu(
    config: Any, x_NH: Tensor, probs_N: Tensor, _counts: list[int], w_gate: Tensor, w_up: Tensor,
    w_down: Tensor, *, choose: Choose, all_gates: bool = False, **_names: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See kernels.grouped_mlp_with_gates, of a job of CPU ranks."""
    _refuse_all_gates(all_gates)
    rows, neurons = x_NH.shape[0], w_gate.shape[1]
    kept = _entries(config, choose, rows, neurons)
    given = choose if isinstance(choose, NeuronMask) else None
    block = choose.block if isinstance(choose, Selection) else 1
    if given is None and callable(choose):
        enter(SELECTION)
        ask(choose, w_gate.new_empty(rows, neurons))
    first, rest, backward = _products(config, rows, kept, given is not None)
    made = _OnCPU.apply(x_NH, probs_N, w_gate, w_up, w_down, kept, backward)
    y_NH, gate_K, a_K, indices_K, offsets_N1 = made
    chosen = [gate_K, indices_K, offsets_N1]
    if first:
        enter(GATE_GEMM)
        note("mone.gate", [x_NH, w_gate], [a_K, *chosen], flops=first)
    enter(UP_DOWN_GEMM)
    # u is as large as a
    note("mone.up_down", [x_NH, probs_N, w_up, w_down, *chosen], [y_NH, a_K], flops=rest)
    mask = given or NeuronMask.unchecked(indices_K, offsets_N1, neurons, block)
    return GroupedMLPOutput(y_NH, mask, gate_K, a_K=a_K, sums_by=sums_of(gate_K))


def _products(config: Any, rows: int, kept: int, given: bool) -> tuple[int, int, int]:
    """(choosing gate, other forward, backward) operations of one layer's experts.

    Args:
        config: of the model, with the backend that was asked for.
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


def _index(shape: tuple[int, ...], neurons: int) -> Tensor:
    return torch.empty(shape, dtype=index_dtype(neurons), device=META)


def _offsets(rows: int) -> Tensor:
    return torch.empty(rows + 1, dtype=torch.int64, device=META)


def on_gpu(
    config: Any, x_NH: Tensor, probs_N: Tensor, counts: list[int] | Tensor, *weights: Tensor,
    choose: Choose, all_gates: bool = False, activation: str = "silu", etp_group: Any = None,
    **_names: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """See kernels.grouped_mlp_with_gates, of a GPU job.

    Raises:
        ValueError: what no kernel of a GPU runs, only the reference.
    """
    _refuse_all_gates(all_gates)
    if activation not in ACTIVATIONS:
        _refuse(f"mone_activation = {activation!r}", f"plan with one of {', '.join(ACTIVATIONS)}")
    shape = counts.shape if isinstance(counts, Tensor) else (len(counts),)
    rows, neurons = x_NH.shape[0], weights[0].shape[1]
    if not isinstance(choose, Selection | NeuronMask):
        enter(SELECTION)
        ask(choose, x_NH.new_empty(rows, neurons))
        entries = _entries(config, choose, rows, neurons)
        choose = NeuronMask.without_values(rows, neurons, entries)
    recipe = FP8GlobalStateManager.get_fp8_recipe()
    run = triton.run
    if recipe is not None:
        aligned = bool(config.moe_router_padding_for_quantization)
        run = partial(_in_fp8, Fp8Products(recipe, rows, weights[0].shape[0], aligned))
    return run(
        x_NH, probs_N, torch.empty(shape, dtype=torch.int64, device=META), *weights,
        choose=choose, activation=activation, etp_group=etp_group,
    )  # fmt: skip


def _in_fp8(
    linears: Fp8Products, x_NH: Tensor, probs_N: Tensor, counts: Tensor, *weights: Tensor,
    choose: Selection | NeuronMask, activation: str, etp_group: Any,
) -> GroupedMLPOutput:  # fmt: skip
    """As kernels/te/backend.py with our kernels between its products."""
    if choose.kept is None:
        return GroupedMLPOutput(*ragged_grouped_mlp(
            x_NH, probs_N, *weights, choose=choose, activation=activation, linears=linears
        ))  # fmt: skip
    y_NH, mask, entries = masked_experts(
        x_NH, probs_N, counts, *weights, choose=choose, activation=activation,
        etp_group=etp_group, products=partial(LinearProducts, linears),
    )  # fmt: skip
    return GroupedMLPOutput(y_NH, mask, entries=entries)
