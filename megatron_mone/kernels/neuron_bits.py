"""Rows of truth values as bits: bytes on the wire, 32-bit words in kernels, lowest bit first.

Bit j of a row is bit j % 8 of byte j // 8, and bit j % 32 of word j // 32: the same memory, since
every machine of this project stores the low byte first. Only CPU tensors are looked at; nothing
here waits for a GPU. May touch: torch only.
Shapes: N rows, F bits used of a row, B = ceil(F / 8) bytes, W = ceil(F / 32) words.
"""

import functools

import torch
from torch import Tensor


def pack_bits(mask_NF: Tensor) -> Tensor:
    """[N, F] bool -> [N, B] uint8."""
    missing = -mask_NF.shape[1] % 8
    padded = torch.nn.functional.pad(mask_NF, (0, missing)) if missing else mask_NF.contiguous()
    # Eight bytes of 0 or 1 as one number, lowest first; the product's top byte has bit k where byte
    # k was 1 (each 1 meets 2^(56 + k) / 2^(8 k) once, and no sum carries).
    eight = padded.view(torch.uint8).view(torch.int64)
    return ((eight * 0x0102040810204080) >> 56 & 0xFF).to(torch.uint8)


def unpack_bits(bits_NB: Tensor, num_bits: int) -> Tensor:
    """[N, B] uint8 -> [N, F] bool.

    Args:
        bits_NB: of `pack_bits`.
        num_bits: F.

    Raises:
        ValueError: a width that is not ceil(F / 8), or on the CPU a bit set beyond bit F - 1.
    """
    check_width(bits_NB, num_bits)
    mask = spread_bits(bits_NB)
    if mask.device.type == "cpu" and bool(mask[:, num_bits:].any()):
        raise ValueError(f"packed mask has a bit set beyond its {num_bits} neurons")
    return mask[:, :num_bits]


def check_width(bits_NB: Tensor, num_bits: int) -> None:
    """Raise a ValueError unless rows of bytes hold ceil(F / 8)."""
    width = (num_bits + 7) // 8
    if bits_NB.shape[1] != width:
        raise ValueError(
            f"packed mask has {bits_NB.shape[1]} bytes a row: {num_bits} neurons need {width}"
        )


def spread_bits(bits_NB: Tensor) -> Tensor:
    """[N, B] uint8 -> [N, 8 B] bool."""
    if bits_NB.device.type == "cuda":
        bit_8 = torch.arange(8, dtype=torch.uint8, device=bits_NB.device)
        return (bits_NB.unsqueeze(2) >> bit_8 & 1).bool().flatten(1)
    spread = _spread_bytes(bits_NB.device).index_select(0, bits_NB.flatten().int())
    return spread.view(torch.bool).view(bits_NB.shape[0], bits_NB.shape[1] * 8)


@functools.cache
def _spread_bytes(device: torch.device) -> Tensor:
    """[256] int64: the eight bits of a byte as eight bytes of 0 or 1, lowest first."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


def words_of(bits_NB: Tensor) -> Tensor:
    """[N, B] uint8 -> [N, W] int32: a view of whole words that lie together, else a copy."""
    missing = -bits_NB.shape[1] % 4
    if missing:
        bits_NB = torch.nn.functional.pad(bits_NB, (0, missing))
    elif not bits_NB.is_contiguous() or bits_NB.storage_offset() % 4:
        bits_NB = bits_NB.clone(memory_format=torch.contiguous_format)
    return bits_NB.view(torch.int32)


def count_bits(words_NW: Tensor) -> Tensor:
    """[N] int64 set bits of each row of int32 words."""
    # Sums of two bits, then of four, then of eight in place; a shift repeats the sign, which the
    # masks cut off.
    twos = words_NW - (words_NW >> 1 & 0x55555555)
    fours = (twos & 0x33333333) + (twos >> 2 & 0x33333333)
    eights = fours + (fours >> 4) & 0x0F0F0F0F
    return (eights * 0x01010101 >> 24).sum(dim=1)
