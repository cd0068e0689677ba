"""Megatron's own routed experts of a GPU job without values, on grouped linears.

Stock experts are Megatron's own TEGroupedMLP around `GroupedLinear`, which has the parameters of
Transformer Engine's, keeps what that keeps for backward, and takes down one op for each kernel:
    fused.grouped_gemm        [N, K] x [E, K, C] -> [N, C]        fc1, fc2
    fused.grouped_gemm_dgrad  [N, C] x [E, C, K] -> [N, K]
    fused.grouped_gemm_wgrad  [N, K], [N, C] -> [E, K, C]
    fused.weighted_swiglu, fused.weighted_swiglu_backward, fused.cast_fp8, fused.pad, fused.unpad
fp8 as linear.py has it: of an input the copy by columns is kept, unless Megatron asks for the
original; weights are cast once a step into copies that the module holds.

May touch: the names in Megatron's modules that it replaces while `installed`.
Shapes: N routed rows, E local experts, K and C columns of a linear's input and output.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from megatron_mone.common.patch import Replaced
from megatron_mone.common.phases import UP_DOWN_GEMM
from megatron_mone.moe.recompute import in_recompute
from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight
from megatron_mone.planning.tracing.stand_ins.fp8 import (
    FP8,
    FP8GlobalStateManager,
    Recipe,
    empty_copy,
    quantize,
    quantize_weight,
)
from megatron_mone.planning.tracing.stand_ins.linear import get_dummy_wgrad
from megatron_mone.planning.tracing.stand_ins.op import note

META = torch.device("meta")


class GroupedLinear(torch.nn.Module):
    """TEGroupedLinear of megatron/core/extensions/transformer_engine.py, without values.

    Args:
        num_gemms: E.
        input_size, output_size: of one expert, over all expert-tensor ranks.
        parallel_mode: "column" or "row", over expert-tensor ranks.
        config: the transformer config.
        pg_collection: its `expt_tp` is used.
        bias: refused.
        _rest: what Megatron hands on to Transformer Engine.

    Raises:
        ValueError: experts with a bias.
    """

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, parallel_mode: str,
        config: Any, pg_collection: Any, bias: bool, **_rest: Any,
    ) -> None:  # fmt: skip
        from megatron.core.extensions.transformer_engine import _set_expert_parameter_attributes

        super().__init__()
        if bias:
            raise ValueError(
                "add_bias_linear = True: experts with a bias are not traced; set "
                "--disable-bias-linear"
            )
        split = pg_collection.expt_tp.size()
        rows = output_size // split if parallel_mode == "column" else output_size
        columns = input_size // split if parallel_mode == "row" else input_size
        self.num_gemms, self.config = num_gemms, config
        self.weight0: Tensor
        self.fp8_rows: Tensor
        self.fp8_columns: Tensor
        self.save_original_input = False  # fp8: keep the input as it came; set by Megatron
        for expert in range(num_gemms):
            weight = torch.empty(rows, columns, dtype=config.params_dtype)
            name = f"weight{expert}"
            self.register_parameter(name, fused_weight.parameter(self, name, weight))
        own_groups = config.expert_model_parallel_size > 1 or (
            config.expert_tensor_parallel_size != config.tensor_model_parallel_size
        )
        _set_expert_parameter_attributes(self, parallel_mode, own_groups)
        self.is_first_microbatch = True  # set by Megatron at the start of a step

    def forward(self, x: Tensor, m_splits: Sequence[int]) -> tuple[Tensor, None]:
        """(x [N, K] times each expert's weight, no bias)."""
        assert sum(m_splits) == x.shape[0], (m_splits, x.shape)
        weights = [getattr(self, f"weight{expert}") for expert in range(self.num_gemms)]
        y = _GroupedProduct.apply(x, self, *weights)
        self.is_first_microbatch = False
        return y, None

    def quantized(self, recipe: Recipe) -> Tensor:
        """[E, C, K] in fp8; cast in a step's first micro-batch, and by columns too.

        Weights in fp8 alone (--fp8-param-gather) have their copies: see quantized_weight.py.
        """
        shape = (self.num_gemms, *self.weight0.shape)
        if isinstance(self.weight0, fused_weight.QuantizedTensor):
            return self.weight0.copies()[0].data.view(FP8).unsqueeze(0).expand(shape)
        if not hasattr(self, "fp8_rows"):
            with _disable_current_modes():  # held from step to step: nothing that a step makes
                like = torch.empty(shape[0] * shape[1], shape[2], device=META)
                copies = [empty_copy(like, recipe, is_weight=True) for _ in range(2)]
            for name, copy in zip(("fp8_rows", "fp8_columns"), copies, strict=True):
                self.register_buffer(name, copy.data.view(shape), persistent=False)
                self.register_buffer(f"{name}_scale", copy.scale, persistent=False)
        if self.is_first_microbatch and not in_recompute():
            weights = _stacked([self.weight0] * self.num_gemms)
            quantize_weight(weights, (self.fp8_rows, self.fp8_columns))
        return self.fp8_rows

    def backward_dw(self) -> None:
        """Nothing is left to do: weight gradients are made in the backward pass itself."""


class _GroupedProduct(torch.autograd.Function):
    """One grouped GEMM forward, two backward; weights of an expert are [C, K]."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, linear: GroupedLinear, *weights: Tensor) -> Tensor:
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        factors = x_NK, _stacked(weights).transpose(1, 2)
        kept: tuple[Tensor, ...] = (x_NK,)
        if recipe is not None:
            by_rows, by_columns = quantize(x_NK, recipe)
            factors = by_rows.data, linear.quantized(recipe).transpose(1, 2)
            kept = kept if linear.save_original_input else by_columns.tensors()
        y_NC = x_NK.new_empty(x_NK.shape[0], weights[0].shape[0])
        ctx.flops = 2 * x_NK.shape[0] * weights[0].numel()
        _gemm("", factors, y_NC, ctx.flops)
        ctx.save_for_backward(*kept)
        ctx.weights = weights  # as they are: a saved parameter comes back without its attributes
        ctx.recipe, ctx.linear, ctx.like = recipe, linear, (x_NK.shape, x_NK.dtype)
        return y_NC

    @staticmethod
    def backward(ctx: Any, dy_NC: Tensor) -> tuple:
        recipe, linear = ctx.recipe, ctx.linear
        x_NK, stacked_ECK = ctx.saved_tensors[0], _stacked(ctx.weights)
        by_rows = by_columns = dy_NC.contiguous()
        if recipe is not None:
            if linear.save_original_input:
                x_NK = quantize(x_NK, recipe)[1].data
            copies = quantize(by_rows, recipe)
            by_rows, by_columns = copies[0].data, copies[1].data
            stacked_ECK = linear.quantized(recipe)
        dx_NK = None
        if ctx.needs_input_grad[0]:
            dx_NK = torch.empty(ctx.like[0], dtype=ctx.like[1], device=dy_NC.device)
            _gemm("_dgrad", (by_rows, stacked_ECK), dx_NK, ctx.flops)
        return dx_NK, None, *_weight_gradients(ctx, x_NK, by_columns)


def _weight_gradients(ctx: Any, x_NK: Tensor, dy_NC: Tensor) -> list[Tensor | None]:
    """dW of each expert; with fused accumulation it is added to `main_grad` in the same kernel and
    a dummy is returned, as Transformer Engine's handle_custom_ddp_from_mcore does."""
    weights = ctx.weights
    if not weights[0].requires_grad:
        return [None for _ in weights]
    adds = ctx.linear.config.gradient_accumulation_fusion and hasattr(weights[0], "main_grad")
    sums = [weight.main_grad if adds else torch.empty_like(weight) for weight in weights]
    grad_EKC = _stacked(sums).transpose(1, 2)
    read = x_NK.nbytes + dy_NC.nbytes + (grad_EKC.nbytes if adds else 0)
    _gemm("_wgrad", (x_NK, dy_NC), grad_EKC, ctx.flops, read)
    if not adds:
        return sums
    for weight in weights:
        weight.grad_added_to_main_grad = True
    return [get_dummy_wgrad(list(weight.shape), weight.dtype) for weight in weights]


def _gemm(
    kind: str, factors: tuple[Tensor, Tensor], result: Tensor, flops: int, read: int | None = None
) -> None:
    # The op's type is that of the factors: sums come out in 16 or 32 bits.
    dtype = factors[0].dtype
    note(f"fused.grouped_gemm{kind}", factors, [result], flops=flops, dtype=dtype, read=read)


def _stacked(weights: Sequence[Tensor]) -> Tensor:
    """[E, C, K]: the shape and bytes of all experts' weights, which lie apart."""
    return weights[0].detach().unsqueeze(0).expand(len(weights), -1, -1)


def weighted_swiglu(y_NG: Tensor, probs_N1: Tensor) -> Tensor:
    """Of megatron/core/fusions/fused_bias_swiglu.py, one compiled kernel: [N, 2F] -> [N, F]."""
    h_NF = y_NG.new_empty(*y_NG.shape[:-1], y_NG.shape[-1] // 2)
    # Made again (`moe_act`) it is before the experts' own backward pass begins.
    phase = UP_DOWN_GEMM if in_recompute() else None
    note("fused.weighted_swiglu", [y_NG, probs_N1], [h_NF], phase=phase)
    return h_NF


def weighted_swiglu_back(dh_NF: Tensor, y_NG: Tensor, probs_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Its gradients, of the products [N, 2F] and the probabilities [N, 1]."""
    dy_NG, dprobs_N1 = torch.empty_like(y_NG), torch.empty_like(probs_N1)
    note("fused.weighted_swiglu_backward", [dh_NF, y_NG, probs_N1], [dy_NG, dprobs_N1])
    return dy_NG, dprobs_N1


class _Resize(torch.autograd.Function):
    """Rows copied into more or fewer rows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: int, name: str, back: str) -> Tensor:
        resized = x.new_empty(rows, *x.shape[1:])
        note(name, [x], [resized])
        ctx.shape, ctx.back = x.shape, back
        return resized

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple:
        dx = gradient.new_empty(ctx.shape)
        note(ctx.back, [gradient], [dx])
        return dx, None, None, None


class RowPadding(torch.nn.Module):
    """Transformer Engine's Fp8Padding: rows of each expert up to what an fp8 GEMM takes."""

    def __init__(self, align: int) -> None:
        super().__init__()
        self.align = align

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        """(padded rows, their number for each expert); x itself where nothing is missing."""
        padded = [-(-rows // self.align) * self.align for rows in m_splits]
        if padded == list(m_splits):
            return x, m_splits
        return _Resize.apply(x, sum(padded), "fused.pad", "fused.unpad"), padded


class RowUnpadding(torch.nn.Module):
    """Transformer Engine's Fp8Unpadding."""

    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:
        """The rows without padding."""
        rows = sum(m_splits)
        return x if rows == x.shape[0] else _Resize.apply(x, rows, "fused.unpad", "fused.pad")


def _no_sequential_experts(*_args: Any, **_kwargs: Any) -> NoReturn:
    raise ValueError(
        "moe_grouped_gemm = False: with transformer_impl = transformer_engine only grouped experts "
        "are traced; add --moe-grouped-gemm"
    )


_NOT_TRACED = (
    "use_transformer_engine_op_fuser", "use_grouped_gemm_for_shared_expert", "mone_record_masks",
    "mone_replay_masks", "moe_input_jitter_eps",
)  # fmt: skip


@contextmanager
def installed(config: Any) -> Iterator[None]:
    """While it lasts models are built with these experts.

    Args:
        config: the transformer config.

    Raises:
        ValueError: experts that are not traced; also while the model is built.
    """
    from megatron.core.extensions import transformer_engine_spec_provider as provider
    from megatron.core.fusions import fused_bias_swiglu
    from megatron.core.models.hybrid import hybrid_layer_specs
    from megatron.core.transformer.moe import experts as stock
    from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization

    for name in _NOT_TRACED:
        if getattr(config, name, None):
            raise ValueError(
                f"{name} = {getattr(config, name)!r} cannot be traced: unset it to plan"
            )
    align = get_align_size_for_quantization(config)
    column, row = (partial(GroupedLinear, parallel_mode=mode) for mode in ("column", "row"))
    # hybrid models' spec is made where its module is imported, once
    moe: Any = hybrid_layer_specs.moe
    hybrid = moe.keywords["submodules"].experts.keywords["submodules"]
    replaced: list[tuple[Any, str, Any]] = [
        (provider, "TEColumnParallelGroupedLinear", column),
        (provider, "TERowParallelGroupedLinear", row),
        (hybrid, "linear_fc1", column),
        (hybrid, "linear_fc2", row),
        (provider, "SequentialMLP", _no_sequential_experts),
        (stock, "Fp8Padding", lambda _experts, align_size: RowPadding(align_size or align)),
        (stock, "Fp8Unpadding", lambda _experts, align_size: RowUnpadding()),
        (fused_bias_swiglu, "weighted_swiglu", weighted_swiglu),
        (fused_bias_swiglu, "weighted_swiglu_back", weighted_swiglu_back),
    ]
    with ExitStack() as stack:
        for owner, name, value in replaced:
            stack.enter_context(Replaced(owner, name, value))
        yield
