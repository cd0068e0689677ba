"""The Triton backend of the masked grouped expert MLP. Not run on a GPU yet.

Its kernels are checked in Triton's interpreter and compiled for sm_80, sm_90 and sm_100, no more.
Importing this package needs no triton; using an op without it is an error that says so.
"""

from megatron_mone.kernels.triton.availability import available
from megatron_mone.kernels.triton.grouped_experts import KeptEntries, masked_experts

__all__ = ["KeptEntries", "available", "masked_experts"]
