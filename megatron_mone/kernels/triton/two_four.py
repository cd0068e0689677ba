"""Products of rows that keep two of every four neurons, by torch's semi-structured GEMM.

The sparse operand must be the first and sparse along the sum: h in y = h W_down, da and du in
dx = da W_gate + du W_up, three of a layer's nine products. Four bits say which two of four
neighbours are kept, low index | high index << 2, so a mask's words turn into hardware metadata word
by word. torch has no grouped form: one product an expert, whose rows are counted on the host.
    CUTLASS      compute capability 8.x, in torch alone: kept values in order, metadata in its order
    cuSPARSELt   later ones: it compresses dense rows itself, and makes a plan for each product
Not run on a GPU yet. Plain torch. Shapes: N rows, E experts, F neurons, H hidden, W = F / 32 words,
M rows of an expert as the product takes them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.triton import ops
from megatron_mone.kernels.triton.row_map import RowMap

ONES = 0x11111111  # the first of every four bits


class TwoFour(NamedTuple):
    """Values [N, F] that are zero outside a mask of two of every four, and its words [N, W]."""

    wide_NF: Tensor
    words_NW: Tensor


def keeps_two_of_four(words_NW: Tensor) -> bool:
    """Whether every row does; waits for the words' device."""
    pairs = words_NW - (words_NW >> 1 & 0x55555555)
    counts = (pairs & 0x33333333) + (pairs >> 2 & 0x33333333)
    return bool((counts == 2 * ONES).all())


def metadata(words_NW: Tensor) -> Tensor:
    """[N, W] int32 words -> [N, 2 W] int16, four bits for each four neurons, lowest first.

    As torch codes them; other numbers of kept neurons get a valid code too, as it does.
    """
    first, second, fourth = (words_NW >> bit & ONES for bit in (0, 1, 3))
    both, neither = first & second, ~(first | second) & ONES
    low = second & ~first | neither << 1
    high = both | neither | fourth | (~both & ONES) << 1
    return (low | high << 2).view(torch.int16)


def cutlass_order(meta_MC: Tensor) -> Tensor:
    """Metadata of one product in CUTLASS's order of bytes; M a multiple of 32, C of 2.

    Rows 8 i + r of 32 stand at 4 r + i, odd and even of rows and columns change places in each two
    by two, and columns go in pairs (torch/sparse/_semi_structured_conversions.py).
    """
    rows, columns = meta_MC.shape
    parts = meta_MC.reshape(rows // 32, 2, 2, 8, columns // 2, 2)
    return parts.permute(4, 0, 3, 1, 5, 2).reshape(rows, columns)


@dataclass(frozen=True)
class SparseGemm:
    """One of torch's semi-structured products, for bfloat16.

    Attributes:
        name: of the library.
        rows, neurons, hidden: M, F and H must be multiples of these.
        prepare: of all rows at once, tensors whose rows `multiply` takes an expert's of.
        multiply: ([M, ...] of `prepare`, W [F, H]) -> [M, H].
    """

    name: str
    rows: int
    neurons: int
    hidden: int
    prepare: Callable[[TwoFour, RowMap], tuple[Tensor, ...]]
    multiply: Callable[[Sequence[Tensor], Tensor], Tensor]


def _kept_values(v: TwoFour, where: RowMap) -> tuple[Tensor, ...]:
    kept = v.wide_NF.shape[1] // 2
    return ops.compact(v.wide_NF, v.words_NW, kept, "relu", where).a_NS, metadata(v.words_NW)


def _cutlass(parts: Sequence[Tensor], w_FH: Tensor) -> Tensor:
    values_MS, meta_MC = parts
    return torch._sparse_semi_structured_mm(values_MS, cutlass_order(meta_MC), w_FH)


def _cusparselt(parts: Sequence[Tensor], w_FH: Tensor) -> Tensor:
    return torch._cslt_sparse_mm(torch._cslt_compress(parts[0]), w_FH)


CUTLASS = SparseGemm("CUTLASS", 32, 64, 8, _kept_values, _cutlass)
CUSPARSELT = SparseGemm("cuSPARSELt", 16, 32, 8, lambda v, where: (v.wide_NF,), _cusparselt)
"""Multiples as torch/sparse/semi_structured.py has them, but 32 neurons, a whole word, for 16."""


def gemm_here() -> SparseGemm | str:
    """Of the current CUDA device; in words why it has none."""
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        return f"compute capability {major}.{minor} has no sparse tensor cores: use 8.0 or later"
    if major == 8:
        return CUTLASS
    if torch.backends.cusparselt.is_available():
        return CUSPARSELT
    return (
        f"compute capability {major}.{minor} needs cuSPARSELt (torch's CUTLASS product takes 8.x "
        f"alone), which torch {torch.__version__} is built without: use a build that has it"
    )


def hidden_product(
    gemm: SparseGemm, counts: list[int], where: RowMap, *terms: tuple[TwoFour, Tensor]
) -> Tensor:
    """[N, H] sum of v W over one or two (v, W [E, F, H]), each product rounded to v's type.

    Args:
        gemm: of the device.
        counts: rows of each expert.
        where: of the same rows.
        terms: v zero outside its mask.
    """
    prepared = [(gemm.prepare(v, where), w_EFH) for v, w_EFH in terms]
    wide_NF, w_EFH = terms[0][0].wide_NF, terms[0][1]
    y_NH = wide_NF.new_empty((wide_NF.shape[0], w_EFH.shape[2]))
    start = 0
    for expert, count in enumerate(counts):
        size = count + -count % gemm.rows
        for term, (parts, w_EFH) in enumerate(prepared if count else ()):
            rows = [_rows(part, start, size) for part in parts]
            made_NH = gemm.multiply(rows, w_EFH[expert])[:count]
            into_NH = y_NH[start : start + count]
            (into_NH.add_ if term else into_NH.copy_)(made_NH)
        start += count
    return y_NH


def _rows(part: Tensor, start: int, size: int) -> Tensor:
    """`size` rows from `start`; past the end the first of them again. Each row of a product is made
    of its own row alone: which ones fill up does not matter."""
    rows = part[start : start + size]
    missing = size - rows.shape[0]
    return torch.cat((rows, rows[:1].expand(missing, -1))) if missing else rows
