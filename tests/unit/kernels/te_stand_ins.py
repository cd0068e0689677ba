"""Stand-ins on the CPU for what Transformer Engine does on a GPU.

`AlignedLinears` takes only whole multiples of rows, as fp8 GEMMs do. `install` puts modules with
the names, signatures and layouts of TE's grouped GEMM (read in 2.10 and 2.20) where TE would be;
its tensors are quantized to torch's float8 types with a recipe's scales, know which way they may be
read, and the GEMM refuses the other way.
"""

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
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
    """An fp8 recipe by kind: mxfp8, float8_current_scaling, float8_block_scaling or delayed; the
    hybrid formats, e4m3 forward and e5m2 for gradients."""

    kind: str
    margin: int = 0
    amax_compute_algo: str = "most_recent"
    fp8_format: Any = field(
        default_factory=lambda: SimpleNamespace(value=SimpleNamespace(max_fwd=448, max_bwd=57344))
    )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda: name == self.kind


@dataclass
class Quantized:
    """Values rounded to 8 bits along rows and along columns, and how they may be read."""

    by_rows: Tensor
    by_columns: Tensor
    role: str
    rowwise: bool
    columnwise: bool


@dataclass
class Quantizer:
    """One slot of a recipe: scales as it says, and rounds by torch's float8 types.

    Attributes:
        role: input, weight or grad_output; of delayed scaling the pass alone is known.
        kind: of the recipe.
        scale, amax: of delayed scaling: used, and raised to what is seen.
    """

    role: str
    kind: str
    scale: Tensor | None = None
    amax: Tensor | None = None
    rowwise: bool = False
    columnwise: bool = False

    def set_usage(self, *, rowwise: bool, columnwise: bool) -> None:
        self.rowwise, self.columnwise = rowwise, columnwise

    def __call__(self, tensor: Tensor) -> Quantized:
        if self.kind == "delayed":
            if tensor.numel():
                self.amax.copy_(torch.maximum(self.amax, tensor.abs().amax().float()))
            rounded = [self._round(tensor.float(), self.scale)] * 2
        elif self.kind == "float8_current_scaling":
            rounded = [self._tiles(tensor, max(1, tensor.shape[0]), tensor.shape[1])] * 2
        elif self.kind == "mxfp8":
            rounded = [self._tiles(tensor, 1, 32), self._tiles(tensor, 32, 1)]
        elif self.role == "weight":
            rounded = [self._tiles(tensor, 128, 128)] * 2
        else:
            rounded = [self._tiles(tensor, 1, 128), self._tiles(tensor, 128, 1)]
        return Quantized(*rounded, self.role, self.rowwise, self.columnwise)

    def _tiles(self, tensor: Tensor, rows: int, columns: int) -> Tensor:
        """Each tile of [rows, columns] with a scale of its own; mxfp8's are powers of two."""
        made, tensor = torch.zeros(tensor.shape), tensor.float()
        for top in range(0, tensor.shape[0], rows):
            for left in range(0, tensor.shape[1], columns):
                at = slice(top, top + rows), slice(left, left + columns)
                scale = self._largest / tensor[at].abs().amax().clamp(min=1e-30)
                if self.kind == "mxfp8":
                    scale = scale.log2().floor().exp2()
                made[at] = self._round(tensor[at], scale)
        return made

    @property
    def _type(self) -> torch.dtype:
        return torch.float8_e5m2 if self.role == "grad_output" else torch.float8_e4m3fn

    @property
    def _largest(self) -> float:
        return torch.finfo(self._type).max

    def _round(self, tensor: Tensor, scale: Tensor) -> Tensor:
        scaled = (tensor * scale).clamp(-self._largest, self._largest)
        return scaled.to(self._type).float() / scale


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
            A, B = (
                [
                    getattr(part, f"by_{'rows' if way == 'rowwise' else 'columns'}")
                    for part in operand
                ]
                for operand, way in zip((A, B), ways, strict=True)
            )
        outs = out[0].split(m_splits) if single_output else out
        assert len(A) == len(B) == len(outs) == len(m_splits)
        for a, b, o in zip(A, B, outs, strict=True):
            left, right = (a, b) if self.recipe is None else (a.double(), b.double())
            made = {
                "TN": lambda: right @ left.t(),  # noqa: B023
                "NN": lambda: right @ left,  # noqa: B023
                "NT": lambda: right.t() @ left,  # noqa: B023
            }[layout]()
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
            if recipe.delayed():
                slots = slots[:1]
            state = RecipeState()
            state.kind = recipe.kind
            state.roles = [slots[i % len(slots)] for i in range(num_quantizers)]
            state.scale, state.amax_history = (
                torch.ones(num_quantizers), torch.zeros(1, num_quantizers)
            )  # fmt: skip
            return state

        def make_quantizers(self):
            return [
                Quantizer(role, self.kind, self.scale[i], self.amax_history[0][i].reshape(1))
                for i, role in enumerate(self.roles)
            ]

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
