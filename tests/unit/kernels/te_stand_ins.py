"""Stand-ins on the CPU for what Transformer Engine does on a GPU.

`AlignedLinears` takes only whole multiples of rows, as fp8 GEMMs do. `install` puts modules with
the names, signatures and layouts of TE's grouped GEMM (read in 2.10 and 2.20) where TE would be;
its quantized tensors know which way they may be read, and the GEMM refuses the other way.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


class MatmulLinears:
    """GroupedLinears by one torch.mm for each expert."""

    def __init__(self, counts: list[int]) -> None:
        self.counts = counts

    def rows_by_neurons(self, x_NH, w_EFH, *, gradient=False):
        parts = zip(x_NH.split(self.counts), w_EFH.unbind(), strict=True)
        return torch.cat([x @ w.t() for x, w in parts])

    def rows_by_hidden(self, *products, gradient=False):
        return sum(
            torch.cat([v @ w for v, w in zip(v_NF.split(self.counts), w_EFH.unbind(), strict=True)])
            for v_NF, w_EFH in products
        )

    def weight_grad(self, v_NF, x_NH, out_EFH, adds, gradient):
        parts = zip(v_NF.split(self.counts), x_NH.split(self.counts), strict=True)
        made = torch.stack([v.t() @ x for v, x in parts])
        (out_EFH.add_ if adds else out_EFH.copy_)(made)


class AlignedLinears(MatmulLinears):
    """On counts that are multiples of `alignment`; notes the shapes of the rows."""

    def __init__(self, counts: list[int], alignment: int) -> None:
        assert all(count % alignment == 0 for count in counts), counts
        super().__init__(counts)
        self.shapes: list[tuple[int, ...]] = []

    def _note(self, rows: Tensor) -> None:
        assert rows.shape[0] == sum(self.counts)
        self.shapes.append(tuple(rows.shape))

    def rows_by_neurons(self, x_NH, w_EFH, *, gradient=False):
        self._note(x_NH)
        return super().rows_by_neurons(x_NH, w_EFH, gradient=gradient)

    def rows_by_hidden(self, *products, gradient=False):
        for rows, _ in products:
            self._note(rows)
        return super().rows_by_hidden(*products, gradient=gradient)

    def weight_grad(self, v_NF, x_NH, out_EFH, adds, gradient):
        self._note(v_NF)
        self._note(x_NH)
        super().weight_grad(v_NF, x_NH, out_EFH, adds, gradient)


@dataclass
class Recipe:
    """An fp8 recipe by kind: mxfp8, float8_current_scaling, float8_block_scaling or delayed."""

    kind: str

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda: name == self.kind


@dataclass
class Quantized:
    """Values rounded to a few bits, and how they may be read."""

    data: Tensor
    role: str
    rowwise: bool
    columnwise: bool


@dataclass
class Quantizer:
    """One slot of a recipe; rounding differs by role, so that a wrong role shows."""

    role: str
    rowwise: bool = False
    columnwise: bool = False

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, tensor: Tensor) -> Quantized:
        kind = torch.float8_e5m2 if self.role == "grad_output" else torch.float8_e4m3fn
        return Quantized(tensor.to(kind).to(tensor.dtype), self.role, self.rowwise, self.columnwise)


@dataclass
class Library:
    """The state of the stand-in: the active recipe, and the GEMMs that ran."""

    recipe: Recipe | None = None
    layouts: list[str] = field(default_factory=list)
    device_counts: bool = False
    roles: list[tuple[str, str]] = field(default_factory=list)

    def gemm(self, A, B, out, layout, m_splits, accumulate, single_output) -> None:
        """out = B A^T (TN), B A (NN) or B^T A (NT) for each expert."""
        self.layouts.append(layout)
        ways = (
            ("rowwise" if layout[0] == "T" else "columnwise"),
            ("columnwise" if layout[1] == "T" else "rowwise"),
        )
        if self.recipe is not None:
            self.roles.append((A[0].role, B[0].role))
            for operand, way in zip((A, B), ways, strict=True):
                assert all(getattr(part, way) for part in operand), f"{layout} reads {way}"
            assert all(count % 16 == 0 for count in m_splits)
            A, B = ([part.data for part in operand] for operand in (A, B))
        outs = out[0].split(m_splits) if single_output else out
        assert len(A) == len(B) == len(outs) == len(m_splits)
        for a, b, o in zip(A, B, outs, strict=True):
            made = {"TN": lambda: b @ a.t(), "NN": lambda: b @ a, "NT": lambda: b.t() @ a}[layout]()  # noqa: B023
            o.copy_(o + made if accumulate else made)


@dataclass
class GroupedRows:
    """GroupedTensorStorage as the grouped-tensor GEMM reads it: one buffer and device arrays."""

    shape: tuple[int, int]
    dtype: torch.dtype
    num_tensors: int
    quantizer: Any
    data: Tensor
    first_dims: Tensor
    tensor_offsets: Tensor

    def parts(self) -> list[Tensor]:
        """Those of each expert; asks for the counts, as the GPU does not."""
        width = self.shape[1]
        assert self.first_dims.dtype == self.tensor_offsets.dtype == torch.int64
        assert self.data.dim() == 1
        assert self.data.dtype == self.dtype
        sizes, starts = self.first_dims.tolist(), self.tensor_offsets.tolist()
        assert len(starts) == len(sizes) + 1 == self.num_tensors + 1
        return [
            self.data[start : start + size * width].view(size, width)
            for start, size in zip(starts, sizes, strict=False)
        ]


def install(monkeypatch, *, version: str = "2.20", recipe: Recipe | None = None) -> Library:
    """Put the stand-in where transformer_engine would be, until the test ends."""
    library = Library(recipe)

    def grouped_2_20(
        A, B, out, quantization_params, out_dtype, layout="TN", m_splits=None, gelu=False,
        grad=False, accumulate=False, bias=None, use_bias=False, use_split_accumulator=False,
        D_dtype=None, single_output=False,
    ):  # fmt: skip
        assert quantization_params == [None] * len(A)
        assert use_split_accumulator
        assert out_dtype == out[0].dtype
        library.gemm(A, B, out, layout, m_splits, accumulate, single_output)

    def grouped_2_10(
        A, B, out, out_dtype, layout="TN", m_splits=None, gelu=False, grad=False,
        accumulate=False, bias=None, use_bias=False, use_split_accumulator=False, D_dtype=None,
        single_output=False,
    ):  # fmt: skip
        library.gemm(A, B, out, layout, m_splits, accumulate, single_output)

    def grouped_tensor(
        A, B, out, *, layout="TN", accumulate=False, use_split_accumulator=False, bias=None,
        bias_scale=None, grad=False, alpha=None, beta=None,
    ):  # fmt: skip
        assert use_split_accumulator
        assert isinstance(A, list) is not isinstance(out, list)  # of the two one is discrete
        library.device_counts = True
        if B.data.device.type != "cpu":  # on fake tensors there is nothing to compute
            library.layouts.append(layout)
            return
        left, right, made = (t if isinstance(t, list) else t.parts() for t in (A, B, out))
        library.gemm(left, right, made, layout, B.first_dims.tolist(), accumulate, False)

    class RecipeState:
        @staticmethod
        def create(recipe, *, mode, num_quantizers=1, device=None):
            slots = {
                "forward": ("input", "weight", "output"),
                "backward": ("grad_output", "grad_input"),
            }[mode]
            state = RecipeState()
            state.roles = [slots[i % len(slots)] for i in range(num_quantizers)]
            return state

        def make_quantizers(self):
            return [Quantizer(role) for role in self.roles]

    class FP8GlobalStateManager:
        is_fp8_enabled = staticmethod(lambda: library.recipe is not None)
        get_fp8_recipe = staticmethod(lambda: library.recipe)

    def split_quantize(tensor, splits, quantizers):
        return [q(part) for q, part in zip(quantizers, tensor.split(splits), strict=True)]

    members: dict[str, dict[str, Any]] = {
        "transformer_engine": {},
        "transformer_engine.pytorch": {},
        "transformer_engine.pytorch.cpp_extensions": {
            "general_grouped_gemm": grouped_2_20 if version == "2.20" else grouped_2_10,
            "general_grouped_gemm_for_grouped_tensor": grouped_tensor,
        },
        "transformer_engine.pytorch.module": {},
        "transformer_engine.pytorch.module.grouped_linear": {
            "is_module_grouped_tensor_path_supported": lambda recipe, dtype: (
                dtype == torch.bfloat16 and recipe is None
            ),
        } if version == "2.20" else {},
        "transformer_engine.pytorch.tensor": {},
        "transformer_engine.pytorch.tensor.storage": {},
        "transformer_engine.pytorch.tensor.storage.grouped_tensor_storage": {
            "GroupedTensorStorage": GroupedRows,
        },
        "transformer_engine.pytorch.quantization": {
            "FP8GlobalStateManager": FP8GlobalStateManager, "RecipeState": RecipeState,
        },
        "transformer_engine_torch": {"split_quantize": split_quantize},
    }  # fmt: skip
    for name, content in members.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return library
