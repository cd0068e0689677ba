"""Stand-ins on the CPU for torch's semi-structured products, which need a GPU.

CUTLASS's decodes values and metadata by torch's own converter. cuSPARSELt's format is its own: rows
stay dense there. Both refuse sizes that torch refuses, and rows that are not 2:4.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from megatron_mone.kernels.triton import two_four

TORCHS = {
    two_four.CUTLASS: SparseSemiStructuredTensorCUTLASS,
    two_four.CUSPARSELT: SparseSemiStructuredTensorCUSPARSELT,
}


@contextmanager
def stand_ins(gemm: two_four.SparseGemm, factor: float = 1.0) -> Iterator[list[tuple[int, ...]]]:
    """As on a device that has this product; gives the shapes of its sparse operands, dense."""
    seen: list[tuple[int, ...]] = []
    limits = TORCHS[gemm]._DTYPE_SHAPE_CONSTRAINTS[torch.bfloat16]

    def multiply(left: Tensor, right: Tensor) -> Tensor:
        seen.append(tuple(left.shape))
        assert left.shape[0] % limits.sparse_min_rows == left.shape[1] % limits.sparse_min_cols == 0
        assert right.shape[1] % limits.dense_min_cols == 0
        assert (left.view(-1, 4) != 0).sum(dim=1).max() <= 2
        return left @ right * factor

    def cutlass(values: Tensor, meta: Tensor, right: Tensor) -> Tensor:
        return multiply(sparse_semi_structured_to_dense_cutlass(values, meta), right)

    with (
        mock.patch.object(two_four, "gemm_here", return_value=gemm),
        mock.patch.object(torch, "_sparse_semi_structured_mm", cutlass),
        mock.patch.object(torch, "_cslt_compress", lambda rows: rows),
        mock.patch.object(torch, "_cslt_sparse_mm", multiply),
    ):
        yield seen
