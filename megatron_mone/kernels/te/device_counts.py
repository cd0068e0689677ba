"""Transformer Engine's grouped GEMM with row counts on the device: one launch of cuBLASLt for all
experts, and the host waits for nobody.

`general_grouped_gemm_for_grouped_tensor(A, B, out, layout)`, read in 2.20, where TE's own
GroupedLinear calls it: rows are a GroupedTensorStorage, one buffer with device arrays of first
dimensions and offsets, and weights and their gradients a list of [F, H]. Layouts as in linears.py.
Only in 16 bits without an fp8 recipe, whose rows are padded by counts on the host (padding.py), and
only where TE says that this device and cuBLASLt have it (Hopper from cuBLASLt 13.4, Blackwell).
Not run on a GPU yet.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_mone.kernels.te.linears import TransformerEngineLinears
from megatron_mone.kernels.te.operand_names import Operand

MAX_EXPERTS = 64  # kMaxGroups of TE's setup kernel, whose arguments hold a pointer for each


def takes_device_counts(dtype: torch.dtype, experts: int) -> bool:
    """Whether the version of TE, cuBLASLt and the device here have it for a call."""
    try:
        from transformer_engine.pytorch.module.grouped_linear import (
            is_module_grouped_tensor_path_supported,
        )
    except ImportError:  # before 2.20
        return False
    return experts <= MAX_EXPERTS and is_module_grouped_tensor_path_supported(None, dtype)


class DeviceCountLinears(TransformerEngineLinears):
    """The same products, of counts on the device and in the operands' own dtype.

    Args:
        counts_E: [E] integers on the operands' device: rows of each expert; rows past their sum are
            of nobody.
    """

    def __init__(self, counts_E: Tensor) -> None:
        super().__init__(None, [])  # no recipe, and no counts on the host
        self.counts_E = counts_E.long().contiguous()
        zero_1 = self.counts_E.new_zeros(1)
        self._rows_before_E1 = torch.cat([zero_1, self.counts_E.cumsum(0)])
        self._offsets: dict[int, Tensor] = {}

    def _gemm(
        self, left: Any, right: Any, out: Tensor | list[Tensor], layout: str,
        accumulate: bool = False,
    ) -> None:  # fmt: skip
        from transformer_engine.pytorch.cpp_extensions import (
            general_grouped_gemm_for_grouped_tensor,
        )

        general_grouped_gemm_for_grouped_tensor(
            left, right, self._rows(out, "x") if isinstance(out, Tensor) else out,
            layout=layout, accumulate=accumulate, use_split_accumulator=True,
        )  # fmt: skip

    def _rows(self, rows: Tensor, operand: Operand, columnwise: bool = False) -> Any:
        """[N, width] as TE's grouped tensor of E."""
        from transformer_engine.pytorch.tensor.storage.grouped_tensor_storage import (
            GroupedTensorStorage,
        )

        width = rows.shape[1]
        if width not in self._offsets:
            self._offsets[width] = self._rows_before_E1 * width
        return GroupedTensorStorage(
            shape=tuple(rows.shape), dtype=rows.dtype, num_tensors=self.counts_E.numel(),
            quantizer=None, data=rows.contiguous().view(-1), first_dims=self.counts_E,
            tensor_offsets=self._offsets[width],
        )  # fmt: skip
