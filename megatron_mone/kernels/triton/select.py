"""Selection and compaction: rows of gates -> the indices and values of the exact top-S by |g|.

Contract: value_NF is contiguous [N, F], float32 or bfloat16, F = G groups of at most MAX_WIDTH
neurons. g = value, or sigma(value) rounded to value's dtype when an activation is fused. Of every
group the S / G largest |g| are kept: exactly that many, ties to the lower index, NaN ranked as
infinity (as kernels/neuron_selection.py does). Outputs are ascending in each row:
    index_NS int16 while F <= 32,767, else int32       kept_NS = value_NF at those indices
Each row is read once (a group wider than ON_CHIP again, from cache). The S-th largest is found
by bisecting the ordered bits on chip, the slots by a prefix sum: the same bits on every run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_mone.kernels.neuron_mask import index_dtype
from megatron_mone.kernels.triton.activations import sigma

ON_CHIP = 8192
MAX_WIDTH = 16_384  # twice that spills registers; 32,767 is the counters' own limit


@triton.jit
def _ordered_bits(g, BITS: tl.constexpr):
    """|g| as integers of BITS bits in the same order; NaN becomes infinity."""
    bits = g.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.minimum(bits, 0x7F800000) >> (31 - BITS)


@triton.jit
def _kth_largest(key, kept, BITS: tl.constexpr):
    """The largest t with at least `kept` keys >= t: the kept-th largest key, bit by bit."""
    kth = tl.full((), 0, tl.int32)
    step = tl.full((), 1 << (BITS - 1), tl.int32)
    for _ in range(BITS):
        trial = kth | step
        count = tl.sum((key >= trial).to(tl.int32), axis=0)
        kth = tl.where(count >= kept, trial, kth)
        step = step >> 1
    return kth


@triton.jit
def _load_keys(value_ptr, lane, width, ACTIVATION: tl.constexpr, BITS: tl.constexpr):
    """(values, their keys); lanes past the row get a key below every other."""
    value = tl.load(value_ptr + lane, mask=lane < width, other=0.0)
    g = value
    if ACTIVATION != "none":
        g = sigma(value.to(tl.float32), ACTIVATION).to(value_ptr.dtype.element_ty)
    return value, tl.where(lane < width, _ordered_bits(g, BITS), -1)


@triton.jit
def _store_kept(index_ptr, kept_ptr, value, key, neuron, kth, room, before):
    """Write the kept lanes of a stretch at their ranks; before = #above | #equal << 16 so far."""
    above = (key > kth).to(tl.int32)
    equal = (key == kth).to(tl.int32)
    packed = above + (equal << 16)
    counts = before + tl.cumsum(packed, axis=0)
    equals = counts >> 16
    keep = (above + equal * (equals <= room).to(tl.int32)) > 0
    slot = (counts & 0xFFFF) + tl.minimum(equals, room) - 1
    tl.store(index_ptr + slot, neuron, mask=keep)
    tl.store(kept_ptr + slot, value, mask=keep)
    return before + tl.sum(packed, axis=0)


@triton.jit
def select_kernel(
    value_ptr,
    index_ptr,
    kept_ptr,
    width,
    kept,
    ACTIVATION: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    STRETCH: tl.constexpr,
):
    """One group of one row: grid (N, G). BLOCK lanes hold the group, compacted by STRETCH."""
    group = tl.program_id(1)
    part = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + group
    value_ptr += part * width
    index_ptr += part * kept
    kept_ptr += part * kept
    lane = tl.arange(0, BLOCK)
    value, key = _load_keys(value_ptr, lane, width, ACTIVATION, BITS)
    kth = _kth_largest(key, kept, BITS)
    room = kept - tl.sum((key > kth).to(tl.int32), axis=0)
    before = tl.full((), 0, tl.int32)
    if STRETCH == BLOCK:
        _store_kept(index_ptr, kept_ptr, value, key, group * width + lane, kth, room, before)
    else:
        for start in range(0, width, STRETCH):
            some = start + tl.arange(0, STRETCH)
            again, bits = _load_keys(value_ptr, some, width, ACTIVATION, BITS)
            neuron = group * width + some
            before = _store_kept(index_ptr, kept_ptr, again, bits, neuron, kth, room, before)


def config(width: int) -> dict[str, int]:
    """Launch parameters for groups of `width` neurons.

    16 values a thread up to 8,192 neurons, all on chip. Wider rows do not fit the registers beside
    their prefix sum (it spilled): they keep their keys alone and are read again, from cache.
    """
    block = triton.next_power_of_2(width)
    stretch = block if block <= ON_CHIP else 2048
    return {"BLOCK": block, "STRETCH": stretch, "num_warps": min(max(block // 512, 1), 16)}


def select_neurons(
    value_NF: Tensor, kept: int, groups: int = 1, activation: str = "none"
) -> tuple[Tensor, Tensor]:
    """(index_NS, kept_NS) of the `kept` largest |g| of each row; see the contract above.

    Raises:
        ValueError: a dtype, layout or count that the kernel does not take.
    """
    rows, neurons = value_NF.shape
    if value_NF.dtype not in (torch.float32, torch.bfloat16) or not value_NF.is_contiguous():
        raise ValueError(
            f"gates are {value_NF.dtype}, strides {value_NF.stride()}: they must be contiguous "
            "torch.float32 or torch.bfloat16"
        )
    if groups < 1 or neurons % groups or kept % groups or not groups <= kept <= neurons:
        raise ValueError(
            f"kept = {kept} of {neurons} neurons in {groups} groups: groups must divide both, and "
            f"kept must be {max(groups, 1)} to {neurons}"
        )
    width = neurons // groups
    if width > MAX_WIDTH:
        raise ValueError(f"{width} neurons in a group: the kernel takes at most {MAX_WIDTH}")
    index_NS = value_NF.new_empty((rows, kept), dtype=index_dtype(neurons))
    kept_NS = value_NF.new_empty((rows, kept))
    if rows:
        bits = 31 if value_NF.dtype == torch.float32 else 15
        select_kernel[(rows, groups)](
            value_NF, index_NS, kept_NS, width, kept // groups,
            ACTIVATION=activation, BITS=bits, **config(width),
        )  # fmt: skip
    return index_NS, kept_NS
