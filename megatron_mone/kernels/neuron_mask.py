"""NeuronMask: which neurons each routed row keeps, as data that travels with the tokens.

Ragged (CSR) rows of ascending neuron indices, because a mask cut over expert-tensor ranks has rows
of unequal length. May touch: torch only. Shapes: N rows, F neurons of an expert, K kept in all.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class NeuronMask:
    """Kept neurons of N rows.

    Attributes:
        indices_K: [K] int16 while F <= 32,767, else int32; ascending within each row.
        offsets_N1: [N + 1] int64; row n holds indices_K[offsets_N1[n] : offsets_N1[n + 1]].
        num_neurons: F, the neurons a row chooses from.
        block: B where the entries are known to be whole aligned blocks of B adjacent neurons, which
            kernels may use; not part of what the mask says.

    Raises:
        ValueError: offsets or indices that are not such rows.
    """

    indices_K: Tensor
    offsets_N1: Tensor
    num_neurons: int
    block: int = 1

    def __post_init__(self) -> None:
        _check(self.indices_K, self.offsets_N1, self.num_neurons)

    @property
    def num_rows(self) -> int:
        """N."""
        return self.offsets_N1.numel() - 1

    @property
    def row_lengths_N(self) -> Tensor:
        """[N] int64 neurons kept by each row."""
        return self.offsets_N1.diff()

    @property
    def density(self) -> float:
        """Kept share of all N * F entries; 0 without rows."""
        return self.indices_K.numel() / max(1, self.num_rows * self.num_neurons)

    def neuron_counts(self) -> Tensor:
        """[F] int64 rows that keep each neuron."""
        return torch.bincount(self.indices_K.long(), minlength=self.num_neurons)

    def __eq__(self, other: object) -> bool:
        """The same rows over the same number of neurons."""
        return (
            isinstance(other, NeuronMask)
            and self.num_neurons == other.num_neurons
            and torch.equal(self.offsets_N1, other.offsets_N1)
            and torch.equal(self.indices_K, other.indices_K)
        )

    __hash__ = None  # type: ignore[assignment]

    @classmethod
    def from_bool(cls, mask_NF: Tensor, block: int = 1, kept: int | None = None) -> NeuronMask:
        """From a dense [N, F] bool mask of whole blocks; one without values needs K, `kept`."""
        rows, neurons = mask_NF.shape
        if mask_NF.is_meta:
            assert kept is not None
            return cls.without_values(rows, neurons, kept, block)
        flat_K = mask_NF.flatten().nonzero().flatten()
        indices_K = (flat_K % neurons).to(index_dtype(neurons))
        return cls.unchecked(indices_K, _offsets(_count_bits(pack_bits(mask_NF))), neurons, block)

    @classmethod
    def without_values(cls, rows: int, neurons: int, kept: int, block: int = 1) -> NeuronMask:
        """Of N rows that keep K of F neurons each, nobody knows which: on torch's meta device."""
        indices_K = torch.empty(kept, dtype=index_dtype(neurons), device="meta")
        offsets_N1 = torch.empty(rows + 1, dtype=torch.int64, device="meta")
        return cls.unchecked(indices_K, offsets_N1, neurons, block)

    @classmethod
    def unchecked(
        cls, indices_K: Tensor, offsets_N1: Tensor, num_neurons: int, block: int = 1
    ) -> NeuronMask:
        """For rows that are right by construction: checking costs as much as building them."""
        mask = object.__new__(cls)
        for name, value in (
            ("indices_K", indices_K), ("offsets_N1", offsets_N1), ("num_neurons", num_neurons),
            ("block", block),
        ):  # fmt: skip
            object.__setattr__(mask, name, value)
        return mask

    def to_bool(self) -> Tensor:
        """Dense [N, F] bool mask."""
        size = self.num_rows * self.num_neurons
        mask = self.indices_K.new_zeros(size, dtype=torch.bool)
        mask[self.rows_K * self.num_neurons + self.indices_K] = True
        return mask.view(self.num_rows, self.num_neurons)

    def pack(self) -> Tensor:
        """[N, ceil(F / 8)] uint8; neuron j is bit j % 8 of byte j // 8. This is the wire format."""
        return pack_bits(self.to_bool())

    @classmethod
    def unpack(
        cls, bits_NB: Tensor, num_neurons: int, block: int = 1, kept: int | None = None
    ) -> NeuronMask:
        """Inverse of `pack`; bits do not say that a mask is of whole blocks, `block` does.

        Args:
            bits_NB: of `pack`.
            num_neurons: F.
            block: B.
            kept: K, where bits without values do not say it.

        Raises:
            ValueError: a width that is not ceil(F / 8), or a bit set beyond neuron F - 1.
        """
        return cls.from_bool(unpack_bits(bits_NB, num_neurons), block, kept)

    def shard(self, rank: int, size: int) -> NeuronMask:
        """The part of one of `size` ranks that hold F / size neurons each, indices from 0.

        Raises:
            ValueError: `size` does not divide F.
        """
        if self.num_neurons % size:
            raise ValueError(f"{size} ranks do not divide {self.num_neurons} neurons")
        width = self.num_neurons // size
        mine_K = self.indices_K.long().div(width, rounding_mode="floor") == rank
        lengths_N = torch.zeros_like(self.offsets_N1[1:])
        lengths_N.index_add_(0, self.rows_K, mine_K.long())
        indices = (self.indices_K[mine_K].long() - rank * width).to(index_dtype(width))
        return NeuronMask.unchecked(indices, _offsets(lengths_N), width)

    @classmethod
    def join(cls, shards: list[NeuronMask]) -> NeuronMask:
        """Inverse of `shard` over all ranks in order."""
        return cls.from_bool(torch.cat([shard.to_bool() for shard in shards], dim=1))

    def rows(self, index_M: Tensor) -> NeuronMask:
        """The rows `index_M` ([M] int64), in that order; rows may repeat."""
        lengths_M = self.row_lengths_N[index_M]
        offsets_M1 = _offsets(lengths_M)
        within_K = torch.arange(int(offsets_M1[-1]), device=index_M.device)
        within_K = within_K - offsets_M1[:-1].repeat_interleave(lengths_M)
        source_K = self.offsets_N1[:-1][index_M].repeat_interleave(lengths_M) + within_K
        return NeuronMask.unchecked(
            self.indices_K[source_K], offsets_M1, self.num_neurons, self.block
        )

    @property
    def rows_K(self) -> Tensor:
        """[K] int64, the row of each entry; made anew each time, it is larger than the mask."""
        rows_N = torch.arange(self.num_rows, device=self.offsets_N1.device)
        return rows_N.repeat_interleave(self.row_lengths_N, output_size=self.indices_K.numel())


def index_dtype(num_neurons: int) -> torch.dtype:
    """The index type of masks over F neurons."""
    return torch.int16 if num_neurons <= torch.iinfo(torch.int16).max else torch.int32


def pack_bits(mask_NF: Tensor) -> Tensor:
    """[N, F] bool -> [N, ceil(F / 8)] uint8, lowest bit first."""
    padded = torch.nn.functional.pad(mask_NF, (0, -mask_NF.shape[1] % 8)).contiguous()
    # Eight bytes of 0 or 1 as one number, lowest first; the product's top byte has bit k where byte
    # k was 1 (each 1 meets 2^(56 + k) / 2^(8 k) once, and no sum carries).
    eight = padded.view(torch.uint8).view(torch.int64)
    return ((eight * 0x0102040810204080) >> 56 & 0xFF).to(torch.uint8)


def unpack_bits(bits_NB: Tensor, num_neurons: int) -> Tensor:
    """[N, ceil(F / 8)] uint8 -> [N, F] bool.

    Raises:
        ValueError: a width that is not ceil(F / 8), or a bit set beyond neuron F - 1.
    """
    rows, width = bits_NB.shape
    if width != (num_neurons + 7) // 8:
        raise ValueError(
            f"packed mask has {width} bytes a row: {num_neurons} neurons need "
            f"{(num_neurons + 7) // 8}"
        )
    spread = _spread_bytes(bits_NB.device).index_select(0, bits_NB.flatten().int())
    mask = spread.view(torch.bool).view(rows, width * 8)
    if bool(mask[:, num_neurons:].any()):
        raise ValueError(f"packed mask has a bit set beyond its {num_neurons} neurons")
    return mask[:, :num_neurons]


@functools.cache
def _spread_bytes(device: torch.device) -> Tensor:
    """[256] int64: the eight bits of a byte as eight bytes of 0 or 1, lowest first."""
    bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return bits.to(torch.uint8).view(torch.int64).flatten().to(device)


@functools.cache
def _set_bits(device: torch.device) -> Tensor:
    """[256] uint8: how many bits of a byte are set."""
    return (torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1).sum(dim=1).byte().to(device)


def _count_bits(bits_NB: Tensor) -> Tensor:
    """[N] int64 set bits of each row."""
    counts = _set_bits(bits_NB.device).index_select(0, bits_NB.flatten().int())
    return counts.view(bits_NB.shape).sum(dim=1)


def _offsets(lengths_N: Tensor) -> Tensor:
    offsets = lengths_N.new_zeros(lengths_N.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths_N, dim=0, out=offsets[1:])
    return offsets


def _check(indices_K: Tensor, offsets_N1: Tensor, num_neurons: int) -> None:
    if indices_K.dim() != 1 or indices_K.dtype != index_dtype(num_neurons):
        raise ValueError(
            f"indices are {indices_K.dtype} of shape {tuple(indices_K.shape)}: masks over "
            f"{num_neurons} neurons hold [K] {index_dtype(num_neurons)}"
        )
    if offsets_N1.dim() != 1 or offsets_N1.dtype != torch.int64 or not offsets_N1.numel():
        raise ValueError(
            f"offsets are {offsets_N1.dtype} of shape {tuple(offsets_N1.shape)}: they must be "
            "[N + 1] int64"
        )
    lengths = offsets_N1.diff()
    if int(offsets_N1[0]) != 0 or int(offsets_N1[-1]) != indices_K.numel() or (lengths < 0).any():
        raise ValueError(
            f"offsets must rise from 0 to the {indices_K.numel()} indices; they run from "
            f"{int(offsets_N1[0])} to {int(offsets_N1[-1])}"
        )
    if indices_K.numel() == 0:
        return
    low, high = int(indices_K.min()), int(indices_K.max())
    if low < 0 or high >= num_neurons:
        raise ValueError(f"indices run from {low} to {high}: they must be 0 to {num_neurons - 1}")
    rows_K = torch.arange(lengths.numel(), device=lengths.device).repeat_interleave(lengths)
    falls_K = (indices_K[1:] <= indices_K[:-1]) & (rows_K[1:] == rows_K[:-1])
    if bool(falls_K.any()):
        row = int(rows_K[1:][falls_K][0])
        raise ValueError(f"row {row} is not strictly ascending")
