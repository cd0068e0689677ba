"""Transformer Engine's grouped GEMM on neuron-major weights, in bf16, fp32 or under an fp8 recipe.

`general_grouped_gemm(A, B, out, layout)` is what TE's own GroupedLinear calls; read in 2.10, 2.14
and 2.20. For a linear with weight W [out, in] it uses
    TN   y = x W^T     (W, x)      NN   dx = dy W     (W, dy)      NT   dW = dy^T x     (x, dy)
and W_gate, W_up, W_down are all [F, H], so down is the NN product and needs no transposed copy.
TE's module is not used: it owns its weights, wants down as [H, F], and saves h at full width.

fp8: rows and weights are quantized as the active recipe says, afresh in each product: an operand
of two products (x, h, dy) is quantized for each, which costs time and saves the memory. Quantizers
have no state but under delayed scaling, whose history is the caller's (delayed.py). Rows must be
multiples of `alignment` (see PaddedLinears).
Not run on a GPU yet.
"""

import inspect
from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from megatron_mone.kernels.te.delayed import DelayedScales
from megatron_mone.kernels.te.operand_names import FORWARD, WEIGHTS, Operand


@cache
def available() -> tuple[bool, str]:
    """Whether Transformer Engine runs here, and the reason when it does not."""
    try:
        import transformer_engine.pytorch  # noqa: F401
        import transformer_engine_torch  # noqa: F401
    except (ImportError, OSError):  # the meta package alone, or its library cannot be loaded
        return False, (
            "the transformer_engine package is missing: pip install 'megatron-mone[te]' on a CUDA "
            "machine"
        )
    if not torch.cuda.is_available():
        return False, "transformer_engine needs a CUDA device"
    return True, ""


def active_recipe() -> Any:
    """The recipe of the fp8 autocast that this call is inside, or None."""
    from transformer_engine.pytorch.quantization import FP8GlobalStateManager

    enabled = FP8GlobalStateManager.is_fp8_enabled()
    return FP8GlobalStateManager.get_fp8_recipe() if enabled else None


def why_not_recipe(recipe: Any) -> str | None:
    """The reason that a recipe cannot be used, or None."""
    if recipe is None or recipe.mxfp8() or recipe.delayed():
        return None
    if recipe.float8_current_scaling() or recipe.float8_block_scaling():
        return None
    return (
        f"the fp8 recipe {type(recipe).__name__}: use current scaling (tensorwise), delayed "
        "scaling, block scaling (blockwise) or mxfp8"
    )


def alignment(recipe: Any) -> int:
    """Rows of an expert, F and H must be multiples of this, as Megatron's get_fp8_align_size."""
    if recipe is None:
        return 1
    return 32 if recipe.mxfp8() else 16


class TransformerEngineLinears:
    """See GroupedLinears.

    Args:
        recipe: the fp8 recipe, or None for the operands' own dtype.
        counts: rows of each expert.
        scales: of delayed scaling.
    """

    def __init__(
        self, recipe: Any, counts: list[int], scales: DelayedScales | None = None
    ) -> None:  # fmt: skip
        self.recipe, self.counts, self.scales = recipe, counts, scales
        # A first pass that is recomputed, and evaluation, leave nothing in the history.
        self._records = torch.is_grad_enabled()

    def rows_by_neurons(self, x_NH: Tensor, w_EFH: Tensor, *, gradient: bool = False) -> Tensor:
        """[N, F] x W^T."""
        out_NF = x_NH.new_empty((x_NH.shape[0], w_EFH.shape[1]))
        if x_NH.shape[0]:
            rows = self._rows(x_NH, "dy" if gradient else "x")
            self._gemm(self._weights(w_EFH, "fc2" if gradient else "fc1"), rows, out_NF, "TN")
        return out_NF

    def rows_by_hidden(self, *products: tuple[Tensor, Tensor], gradient: bool = False) -> Tensor:
        """[N, H] sum of v W."""
        first_NF, first_EFH = products[0]
        y_NH = first_NF.new_empty((first_NF.shape[0], first_EFH.shape[2]))
        for order, (v_NF, w_EFH) in enumerate(products if y_NH.shape[0] else ()):
            rows = self._rows(v_NF, "dfc1" if gradient else "h")
            weights = self._weights(w_EFH, "fc1" if gradient else "fc2", columnwise=True)
            self._gemm(weights, rows, y_NH, "NN", accumulate=order > 0)
        return y_NH

    def weight_grad(
        self, v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, gradient: Literal["v", "x"]
    ) -> None:
        """out [E, F, H] (+)= v^T x."""
        if not x_NH.shape[0]:
            if not adds:
                out_EFH.zero_()
            return
        operands: tuple[Operand, Operand] = ("dfc1", "x") if gradient == "v" else ("h", "dy")
        v = self._rows(v_NF, operands[0], columnwise=True)
        x = self._rows(x_NH, operands[1], columnwise=True)
        self._gemm(x, v, list(out_EFH.unbind()), "NT", accumulate=adds)

    def _gemm(
        self, left: Any, right: Any, out: Tensor | list[Tensor], layout: str,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        """TE's grouped GEMM into rows [N, width], or a matrix for each expert; experts without rows
        give zero weight gradients."""
        from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

        rest: dict[str, Any] = {}
        if "quantization_params" in inspect.signature(general_grouped_gemm).parameters:
            rest["quantization_params"] = [None] * len(left)  # of the output; not there in 2.10
        whole = isinstance(out, Tensor)
        outs = [out] if isinstance(out, Tensor) else out
        general_grouped_gemm(
            left, right, outs, out_dtype=outs[0].dtype, layout=layout, m_splits=self.counts,
            single_output=whole, accumulate=accumulate,
            use_split_accumulator=True, **rest,  # fp8 sums in float32 in every pass
        )  # fmt: skip

    def _rows(self, rows: Tensor, operand: Operand, columnwise: bool = False) -> Any:
        """The rows of each expert, quantized under a recipe; `columnwise` for sums over rows."""
        if self.recipe is None:
            return list(rows.split(self.counts))
        import transformer_engine_torch as tex

        self._check(rows)
        quantizers = self._quantizers(rows.split(self.counts), operand, columnwise)
        return tex.split_quantize(rows.contiguous(), self.counts, quantizers)

    def _weights(self, w_EFH: Tensor, operand: Operand, columnwise: bool = False) -> list[Any]:
        """Each expert's [F, H], quantized under a recipe; `columnwise` for sums over neurons."""
        if self.recipe is None:
            return list(w_EFH.unbind())
        self._check(w_EFH)
        quantizers = self._quantizers(w_EFH.unbind(), operand, columnwise)
        return [quantize(w) for quantize, w in zip(quantizers, w_EFH.unbind(), strict=True)]

    def _quantizers(
        self, parts: Sequence[Tensor], operand: Operand, columnwise: bool
    ) -> list[Any]:  # fmt: skip
        """One for each expert's part."""
        if self.scales is not None:
            quantizers = self.scales.quantizers(self.recipe, operand, parts, self._records)
        else:
            quantizers = _stateless(self.recipe, operand, len(parts))
        for quantizer in quantizers:
            quantizer.set_usage(rowwise=True, columnwise=columnwise)
        return quantizers

    def _check(self, operand: Tensor) -> None:
        """F and H: quantized blocks run along them.

        Raises:
            ValueError: names the multiple.
        """
        multiple = alignment(self.recipe)
        if any(size % multiple for size in operand.shape[1:]):
            raise ValueError(
                f"neurons and hidden size must be multiples of {multiple} for this fp8 recipe: an "
                f"operand has shape {tuple(operand.shape)}"
            )


def _stateless(recipe: Any, operand: Operand, number: int) -> list[Any]:
    """A recipe's forward slots are input, weight and output in turn, its backward ones gradients of
    output and input."""
    from transformer_engine.pytorch.quantization import RecipeState

    mode, slots = ("forward", 3) if operand in FORWARD else ("backward", 2)
    state = RecipeState.create(recipe, mode=mode, num_quantizers=slots * number)
    return state.make_quantizers()[int(operand in WEIGHTS) :: slots]
