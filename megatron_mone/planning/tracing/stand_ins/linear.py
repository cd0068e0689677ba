"""Stand-ins for Transformer Engine's Linear and LayerNormLinear on tensors without values.

Each product is one op, [M, K] x [N, K] -> [M, N]: "fused.linear", its "fused.linear_dgrad" and
"fused.linear_wgrad", which adds to the gradient buffer (`fuse_wgrad_accumulation`); in fp8 the
casts are ops of their own. For backward are kept

- of Linear its input; in fp8 the input's copy by columns, 1 byte an element and scales, unless
  Megatron asks for the original (`save_original_input`);
- of LayerNormLinear its input, the row's statistics in fp32, and the normalised input or, in fp8,
  that copy of it.

Tensor parallelism is within the module: sequence-parallel inputs are gathered for the product and
again for its weight gradient, in the width in which they multiply, and outputs reduce-scattered.
The weight's fp8 copies (by rows and by columns) are buffers of the module where Megatron lets
Transformer Engine cache them from a step's first micro-batch on. May touch: `main_grad` and
`grad_added_to_main_grad` of weights, as the real modules do.

Sources: transformer_engine/pytorch/module/linear.py, layernorm_linear.py, base.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight
from megatron_mone.planning.tracing.stand_ins.fp8 import (
    FP8,
    FP8GlobalStateManager,
    Quantized,
    Recipe,
    empty_copy,
    quantize,
    quantize_weight,
)
from megatron_mone.planning.tracing.stand_ins.layernorm import norm_backward, norm_forward
from megatron_mone.planning.tracing.stand_ins.op import note

COLUMN, ROW = "column", "row"

_dummies: dict[tuple, Tensor] = {}


def get_dummy_wgrad(shape: list, dtype: torch.dtype, zero: bool = False) -> Tensor:
    """The gradient that autograd gets when the real one is in `main_grad`: one buffer a shape."""
    del zero
    key = (*shape, dtype)
    if key not in _dummies:
        _dummies[key] = torch.empty(shape, dtype=dtype, device="meta")
    return _dummies[key].detach()


def dummy_bytes() -> int:
    """Of all dummies: they stand from the first backward pass on."""
    return sum(dummy.nbytes for dummy in _dummies.values())


@contextmanager
def no_dummies_yet() -> Iterator[None]:
    """While it lasts there are only dummies that were asked for in it."""
    before = dict(_dummies)
    _dummies.clear()
    try:
        yield
    finally:
        _dummies.clear()
        _dummies.update(before)


def gather_rows(matrix: Tensor, group: Any) -> Tensor:
    """[M, K] of every rank -> [M ranks, K]."""
    gathered = matrix.new_empty((matrix.shape[0] * group.size(), *matrix.shape[1:]))
    dist.all_gather_into_tensor(gathered, matrix, group=group)
    return gathered


def scatter_rows(matrix: Tensor, group: Any) -> Tensor:
    """The sum over ranks of [M, N], this rank's M / ranks rows."""
    part = matrix.new_empty((matrix.shape[0] // group.size(), *matrix.shape[1:]))
    dist.reduce_scatter_tensor(part, matrix, group=group)
    return part


def gather_operand(operand: Tensor | Quantized, group: Any) -> Tensor | Quantized:
    """`gather_rows` of a matrix in either width; the scales of blocks travel with it, in one
    launch, a tensor's only scale does not."""
    if isinstance(operand, Tensor):
        return gather_rows(operand, group)
    rows, scales = operand.data.shape[0] * group.size(), operand.scale.numel()
    blocks = operand.scale if scales > 1 else operand.scale[:0]
    sent = operand.data.new_empty(operand.data.nbytes + blocks.nbytes, dtype=torch.uint8)
    gathered = gather_rows(sent, group)
    data = gathered[: operand.data.nbytes * group.size()].view(FP8).view(rows, -1)
    scale = operand.scale.new_empty(scales * (group.size() if scales > 1 else 1))
    return Quantized(data, scale)


def operand_tensors(operand: Tensor | Quantized) -> tuple[Tensor, ...]:
    """The tensors of an operand in either width; the matrix first."""
    return (operand,) if isinstance(operand, Tensor) else operand.tensors()


@dataclass
class LinearJob:
    """How one call of a linear module runs.

    Attributes:
        parallel: "column", "row" or None.
        group: tensor-parallel; None of one rank.
        sequence_parallel: whether rows are split over the group outside the module.
        recipe: of fp8, None in 16 bits.
        weight_copies: of fp8, (by rows, by columns).
        keeps_original: keep the input itself for the weight gradient.
        norm: "rms_norm" or "layer_norm" before the product, "" for none.
        fuses_wgrad: add the weight gradient to `main_grad`.
        of_megatron: whether it is Megatron's own, whose dummy gradient comes and goes.
    """

    parallel: str | None
    group: Any
    sequence_parallel: bool
    recipe: Recipe | None
    weight_copies: tuple[Quantized, Quantized] | None
    keeps_original: bool
    norm: str
    fuses_wgrad: bool
    of_megatron: bool = False

    @property
    def ranks(self) -> int:
        """In the group."""
        return 1 if self.group is None else self.group.size()


class _Linear(torch.autograd.Function):
    """y = norm(x) W^T + b."""

    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, job: LinearJob):
        ctx.job, ctx.weight, ctx.shape = job, weight, x.shape
        ctx.has_bias, ctx.gamma, ctx.beta, ctx.dtype = bias is not None, gamma, beta, x.dtype
        x_MK = x.reshape(-1, x.shape[-1])
        operand, kept, stats = _operand(x_MK, gamma, beta, job)
        ctx.stats_count = len(stats)
        ctx.kept_count = len(kept)
        ctx.save_for_backward(*((x_MK, *stats) if job.norm else ()), *kept)
        if job.parallel == COLUMN and job.sequence_parallel and job.ranks > 1:
            operand = gather_operand(operand, job.group)
        y_MN = x.new_empty((operand_tensors(operand)[0].shape[0], weight.shape[0]))
        by_rows = weight if job.weight_copies is None else job.weight_copies[0]
        added = () if bias is None else (bias,)
        _product("fused.linear", operand, by_rows, y_MN, weight.shape[1], extra=added)
        if job.parallel == ROW and job.ranks > 1:
            if job.sequence_parallel:
                y_MN = scatter_rows(y_MN, job.group)
            else:
                dist.all_reduce(y_MN, group=job.group)
        return y_MN.view(-1, *x.shape[1:-1], weight.shape[0])

    @staticmethod
    def backward(ctx, *gradients):
        job, weight = ctx.job, ctx.weight
        (dy,) = gradients
        dy_MN = dy.reshape(-1, dy.shape[-1])
        saved = ctx.saved_tensors
        kept: Any = saved[0 - ctx.kept_count :]
        kept = kept[0] if len(kept) == 1 else Quantized(*kept)
        by_rows: Any = dy_MN
        by_columns: Any = dy_MN
        if job.recipe is not None:
            by_rows, by_columns = quantize(dy_MN, job.recipe)
            if isinstance(kept, Tensor):
                kept = quantize(kept, job.recipe)[1]
        gathers = job.sequence_parallel and job.ranks > 1
        if job.parallel == ROW and gathers:
            by_rows = gather_operand(by_rows, job.group)
            by_columns = by_rows
        if job.parallel == COLUMN and gathers:
            kept = gather_operand(kept, job.group)
        dx_MK = _dgrad(ctx, by_rows)
        wgrad = _wgrad(job, weight, by_columns, kept)
        dbias = weight.new_empty(weight.shape[0]) if ctx.has_bias else None
        dgamma = dbeta = None
        if job.norm:
            dx_MK, dgamma, dbeta = norm_backward(
                job.norm, dx_MK, saved[0], saved[1 : 1 + ctx.stats_count], ctx.gamma, ctx.beta
            )
        return dx_MK.view(ctx.shape), wgrad, dbias, dgamma, dbeta, None


def _operand(x_MK: Tensor, gamma: Any, beta: Any, job: LinearJob) -> tuple[Any, tuple, tuple]:
    """(what is multiplied, what of it is kept, statistics of the norm)."""
    if job.norm:
        copies = None
        if job.recipe is not None and job.recipe.fuses_norm:
            copies = (empty_copy(x_MK, job.recipe), empty_copy(x_MK, job.recipe))
        normed, stats = norm_forward(job.norm, x_MK, gamma, beta, copies)
        if copies is not None:
            return copies[0], copies[1].tensors(), stats
        source = normed
    else:
        source, stats = x_MK, ()
    assert source is not None  # it is where the norm made no copies
    if job.recipe is None:
        return source, (source,), stats
    rows, columns = quantize(source, job.recipe)
    keeps = (source,) if job.keeps_original and not job.norm else columns.tensors()
    return rows, keeps, stats


def _dgrad(ctx: Any, dy: Tensor | Quantized) -> Tensor:
    job, weight = ctx.job, ctx.weight
    rows = operand_tensors(dy)[0].shape[0]
    dx_MK = weight.new_empty((rows, weight.shape[1]), dtype=ctx.dtype)
    by_columns = weight if job.weight_copies is None else job.weight_copies[1]
    _product("fused.linear_dgrad", dy, by_columns, dx_MK, weight.shape[0])
    if job.parallel == COLUMN and job.ranks > 1:
        if job.sequence_parallel:
            return scatter_rows(dx_MK, job.group)
        dist.all_reduce(dx_MK, group=job.group)
    return dx_MK


def _wgrad(job: LinearJob, weight: Any, dy: Tensor | Quantized, x: Tensor | Quantized) -> Any:
    """The weight's gradient for autograd: a dummy where it went to `main_grad`."""
    rows = operand_tensors(dy)[0].shape[0]
    fuses = job.fuses_wgrad and hasattr(weight, "main_grad")
    gradient = weight.main_grad if fuses else weight.new_empty(weight.shape, dtype=weight.dtype)
    _product("fused.linear_wgrad", dy, x, gradient, rows, adds=fuses)
    if not fuses:
        return gradient
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    if job.of_megatron:
        return weight.new_empty(weight.main_grad.shape, dtype=weight.dtype)
    return get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype)


def _product(
    name: str,
    left: Any,
    right: Any,
    result: Tensor,
    depth: int,
    *,
    extra: Any = (),
    adds: bool = False,
) -> None:
    """Take down one product of two matrices, 2 x depth operations an element of the result."""
    given = [*operand_tensors(left), *operand_tensors(right), *extra]
    read = sum(tensor.nbytes for tensor in given) + (result.nbytes if adds else 0)
    matrices = (operand_tensors(left)[0], operand_tensors(right)[0])
    note(
        name,
        matrices,
        [result],
        flops=2 * depth * result.numel(),
        dtype=matrices[0].dtype,
        read=read,
    )


def linear_of_megatron(
    input: Tensor, weight: Tensor, bias: Tensor | None, gradient_accumulation_fusion: bool,
    allreduce_dgrad: bool, sequence_parallel: bool, grad_output_buffer: Any = None,
    wgrad_deferral_limit: int | None = 0, tp_group: Any = None, gtp_remat_size: int = 1,
) -> Tensor:  # fmt: skip
    """megatron.core.tensor_parallel.layers.linear_with_grad_accumulation_and_async_allreduce.

    In 16 bits whatever the layers do: the output layer's. See there for the arguments.

    Raises:
        ValueError: a weight split over replicas, or weight gradients put off.
    """
    del wgrad_deferral_limit
    if grad_output_buffer is not None:
        raise ValueError("defer_embedding_wgrad_compute = True cannot be traced: turn it off")
    if gtp_remat_size > 1:
        raise ValueError("weights split over replicas (gtp) cannot be traced: turn that off")
    parallel = COLUMN if allreduce_dgrad or sequence_parallel else None
    job = LinearJob(
        parallel, tp_group, sequence_parallel, None, None, False, "", gradient_accumulation_fusion,
        of_megatron=True,
    )  # fmt: skip
    return _Linear.apply(input, weight, bias, None, None, job)


class Linear(torch.nn.Module):
    """transformer_engine.pytorch.Linear.

    Args:
        in_features, out_features: of the whole weight; a parallel mode splits one of them.
        sequence_parallel, tp_group, tp_size, parallel_mode: tensor parallelism.
        fuse_wgrad_accumulation: add the weight's gradient to its `main_grad`.
        bias, return_bias: whether there is one, and whether the caller adds it.
        params_dtype, device: of the weights.
        tuning: names that change no shape: overlap, random state, initialisation.

    Attributes:
        save_original_input: keep the input itself in fp8 too.
    """

    norm = ""

    def __init__(
        self, in_features: int, out_features: int, *, sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False, tp_group: Any = None, tp_size: int = 1,
        bias: bool = True, return_bias: bool = False, parallel_mode: str | None = None,
        params_dtype: torch.dtype, device: Any, **tuning: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        del tuning
        self.tp_group, self.tp_size = tp_group, tp_size
        self.parallel_mode = parallel_mode
        self.in_features = in_features // (tp_size if parallel_mode == ROW else 1)
        self.out_features = out_features // (tp_size if parallel_mode == COLUMN else 1)
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.fuse_wgrad_accumulation = fuse_wgrad_accumulation
        self.use_bias, self.return_bias = bias, return_bias
        self.save_original_input = False
        options: Any = {"dtype": params_dtype, "device": device}
        weight = torch.empty(self.out_features, self.in_features, **options)
        self.weight = fused_weight.parameter(self, "weight", weight)
        _mark(self.weight, 1 if parallel_mode == ROW else 0)
        self.bias: Any = None
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(self.out_features, **options))
        if bias and parallel_mode == COLUMN:
            _mark(self.bias, 0)
        elif bias and parallel_mode == ROW:
            self.bias.sequence_parallel = self.sequence_parallel

    def set_tensor_parallel_group(self, tp_group: Any) -> None:
        """The group, when it is known later than the module."""
        self.tp_group = tp_group

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Any:
        """y [..., out_features] of x [..., in_features]; with `return_bias` (y, bias)."""
        recipe = FP8GlobalStateManager.get_fp8_recipe()
        job = LinearJob(
            self.parallel_mode, self.tp_group, self.sequence_parallel, recipe,
            None if recipe is None else self._weight_copies(recipe, is_first_microbatch),
            self.save_original_input, self.norm, self.fuse_wgrad_accumulation,
        )  # fmt: skip
        added = None if self.return_bias else self.bias
        y = _Linear.apply(x, self.weight, added, *self._norm_weights(), job)
        return (y, self.bias) if self.return_bias else y

    def _norm_weights(self) -> tuple[Any, Any]:
        return None, None

    def _weight_copies(
        self, recipe: Recipe, is_first_microbatch: bool | None
    ) -> tuple[Quantized, Quantized]:
        """The weight by rows and by columns; None of first asks for copies of this call alone."""
        if isinstance(self.weight, fused_weight.QuantizedTensor):
            return self.weight.copies()
        names = fused_weight.PARTS
        cached = is_first_microbatch is not None and hasattr(self, names[0])
        if cached and not is_first_microbatch:
            tensors = [getattr(self, name) for name in names]
        elif cached:
            tensors = [getattr(self, name) for name in names]
            quantize_weight(self.weight, tuple(tensors))
        else:
            copies = (empty_copy(self.weight, recipe, True), empty_copy(self.weight, recipe, True))
            tensors = [*copies[0].tensors(), *copies[1].tensors()]
            quantize_weight(self.weight, tuple(tensors))
            if is_first_microbatch is not None:
                for name, tensor in zip(names, tensors, strict=True):
                    self.register_buffer(name, tensor, persistent=False)
        return Quantized(*tensors[:2]), Quantized(*tensors[2:])


class LayerNormLinear(Linear):
    """transformer_engine.pytorch.LayerNormLinear.

    Args:
        in_features, out_features: see Linear.
        normalization: "RMSNorm" or "LayerNorm".
        others: see Linear.
    """

    def __init__(
        self, in_features: int, out_features: int, *, normalization: str = "LayerNorm",
        **others: Any,
    ) -> None:  # fmt: skip
        super().__init__(in_features, out_features, **others)
        self.norm = "rms_norm" if normalization == "RMSNorm" else "layer_norm"
        options: Any = {"dtype": others["params_dtype"], "device": others["device"]}
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(in_features, **options))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.empty(in_features, **options))
        parameters: list[Any] = [self.layer_norm_weight, self.layer_norm_bias]
        for parameter in parameters:
            if parameter is not None:
                parameter.sequence_parallel = self.sequence_parallel

    def _norm_weights(self) -> tuple[Any, Any]:
        return self.layer_norm_weight, self.layer_norm_bias


def _mark(parameter: Any, dim: int) -> None:
    """Transformer Engine's marks of a weight that a group splits."""
    parameter.tensor_model_parallel = True
    parameter.partition_dim = dim
    parameter.partition_stride = 1
