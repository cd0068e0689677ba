"""NeuronMask: which neurons each routed row keeps, as data that travels with the tokens.

Held as indices, ragged (CSR) because a mask cut over expert-tensor ranks has rows of unequal
length, or as bits in 32-bit words, as GPU kernels make and read them; each is made from the other
when it is asked for. May touch: torch, neuron_bits.
Shapes: N rows, F neurons of an expert, K kept in all, S kept of a row, B = ceil(F / 8) bytes and
W = ceil(F / 32) words of a packed row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_mone.kernels.neuron_bits import (
    check_width,
    count_bits,
    pack_bits,
    spread_bits,
    words_of,
)


class NeuronMask:
    """Kept neurons of N rows.

    Args:
        indices_K: [K] int16 while F <= 32,767, else int32; ascending within each row.
        offsets_N1: [N + 1] int64; row n holds indices_K[offsets_N1[n] : offsets_N1[n + 1]].
        num_neurons: F, the neurons a row chooses from.
        block: B where the entries are known to be whole aligned blocks of B adjacent neurons, which
            kernels may use; not part of what the mask says.

    Attributes:
        num_neurons, block: as given.
        kept: S where every row is known to keep S neurons, else None.

    Raises:
        ValueError: offsets or indices that are not such rows.
    """

    num_neurons: int
    block: int
    kept: int | None
    _csr: tuple[Tensor, Tensor] | None
    _words_NW: Tensor | None
    _entries: int | None

    def __init__(
        self, indices_K: Tensor, offsets_N1: Tensor, num_neurons: int, block: int = 1
    ) -> None:
        _check(indices_K, offsets_N1, num_neurons)
        self._hold(num_neurons, block, csr=(indices_K, offsets_N1))

    def _hold(
        self,
        num_neurons: int,
        block: int,
        kept: int | None = None,
        *,
        csr: tuple[Tensor, Tensor] | None = None,
        words_NW: Tensor | None = None,
        entries: int | None = None,
    ) -> NeuronMask:
        self.num_neurons, self.block, self.kept = num_neurons, block, kept
        self._csr, self._words_NW = csr, words_NW
        if csr is not None:
            entries = csr[0].numel()
        self._entries = entries if kept is None else self.num_rows * kept
        return self

    @classmethod
    def of_words(
        cls, words_NW: Tensor, num_neurons: int, block: int = 1, kept: int | None = None
    ) -> NeuronMask:
        """From bits: neuron j of row n is bit j % 32 of words_NW[n, j // 32].

        Args:
            words_NW: [N, ceil(F / 32)] int32; bits beyond neuron F - 1 are 0, which is checked
                where looking does not wait for a device.
            num_neurons: F.
            block: B, as for indices.
            kept: S where every row keeps S, which is not checked; else None.

        Raises:
            ValueError: other words, or on the CPU a bit set beyond neuron F - 1.
        """
        width = (num_neurons + 31) // 32
        if words_NW.dtype != torch.int32 or words_NW.dim() != 2 or words_NW.shape[1] != width:
            raise ValueError(
                f"words are {words_NW.dtype} of shape {tuple(words_NW.shape)}: masks over "
                f"{num_neurons} neurons are [N, {width}] torch.int32"
            )
        used = num_neurons % 32
        if used and words_NW.device.type == "cpu" and bool((words_NW[:, -1] >> used).any()):
            raise ValueError(f"packed mask has a bit set beyond its {num_neurons} neurons")
        return object.__new__(cls)._hold(num_neurons, block, kept, words_NW=words_NW)

    @classmethod
    def from_bool(
        cls, mask_NF: Tensor, block: int = 1, kept: int | None = None, entries: int | None = None
    ) -> NeuronMask:
        """From a dense mask, as indices on the CPU and as words, without a wait, on a GPU.

        Args:
            mask_NF: [N, F] bool, of whole blocks.
            block: B.
            kept: S where every row keeps S, which is not checked; else None.
            entries: K, which a mask without values does not say, and one on a GPU not for nothing.
        """
        rows, neurons = mask_NF.shape
        mask = object.__new__(cls)
        if mask_NF.device.type == "cuda":
            words_NW = words_of(pack_bits(mask_NF))
            return mask._hold(neurons, block, kept, words_NW=words_NW, entries=entries)
        if mask_NF.is_meta:
            known = entries if kept is None else rows * kept
            assert known is not None
            return cls.without_values(rows, neurons, known, block, kept)
        if kept is None:
            offsets_N1 = _offsets(count_bits(words_of(pack_bits(mask_NF))))
        else:
            offsets_N1 = _even_offsets(rows, kept, mask_NF.device)
        flat_K = mask_NF.flatten().nonzero().flatten()
        return mask._hold(
            neurons, block, kept, csr=(_within_rows(flat_K, offsets_N1, neurons, kept), offsets_N1)
        )

    @classmethod
    def without_values(
        cls, rows: int, neurons: int, entries: int, block: int = 1, kept: int | None = None
    ) -> NeuronMask:
        """Of N rows that keep K of F neurons each, nobody knows which: on torch's meta device."""
        return cls.unchecked(*_csr_without_values(rows, neurons, entries), neurons, block, kept)

    @classmethod
    def unchecked(
        cls,
        indices_K: Tensor,
        offsets_N1: Tensor,
        num_neurons: int,
        block: int = 1,
        kept: int | None = None,
    ) -> NeuronMask:
        """For rows that are right by construction: checking costs as much as building them."""
        mask = object.__new__(cls)
        return mask._hold(num_neurons, block, kept, csr=(indices_K, offsets_N1))

    @property
    def indices_K(self) -> Tensor:
        """[K] neurons; made from words at the first use, which waits for a GPU if K is unknown."""
        return self._indices()[0]

    @property
    def offsets_N1(self) -> Tensor:
        """[N + 1] int64 first entries of rows; made with `indices_K`."""
        return self._indices()[1]

    def words(self) -> Tensor:
        """[N, W] int32 bits as `of_words` takes them; made at the first use, never with a wait."""
        if self._words_NW is None:
            self._words_NW = words_of(self.pack())
        return self._words_NW

    @property
    def device(self) -> torch.device:
        """Where the rows are."""
        return (self.indices_K if self._words_NW is None else self._words_NW).device

    @property
    def num_rows(self) -> int:
        """N."""
        held = self._words_NW
        return self.offsets_N1.numel() - 1 if held is None else held.shape[0]

    @property
    def row_lengths_N(self) -> Tensor:
        """[N] int64 neurons kept by each row."""
        if self.kept is not None:
            return torch.full((self.num_rows,), self.kept, device=self.device)
        return count_bits(self.words()) if self._csr is None else self._csr[1].diff()

    @property
    def known_entries(self) -> int | None:
        """K; None for words on a GPU whose rows are not known to keep S each."""
        if self._entries is None and self.device.type == "cpu":
            self._entries = int(self.row_lengths_N.sum())
        return self._entries

    @property
    def num_entries(self) -> int:
        """K; waits for the device where it is not known."""
        known = self.known_entries
        if known is None:
            known = self._entries = int(self.row_lengths_N.sum())
        return known

    @property
    def density(self) -> float:
        """Kept share of all N * F entries; 0 without rows. Waits as `num_entries` does."""
        return self.num_entries / max(1, self.num_rows * self.num_neurons)

    def neuron_counts(self) -> Tensor:
        """[F] int64 rows that keep each neuron."""
        if self._csr is None or self.device.type == "cuda":  # where bincount waits
            return self.to_bool().sum(dim=0)
        return torch.bincount(self.indices_K.long(), minlength=self.num_neurons)

    def __eq__(self, other: object) -> bool:
        """The same rows over the same number of neurons, however they are held."""
        if not isinstance(other, NeuronMask) or self.num_neurons != other.num_neurons:
            return False
        if self._csr is None or other._csr is None:
            return torch.equal(self.words(), other.words())
        return all(torch.equal(a, b) for a, b in zip(self._csr, other._csr, strict=True))

    def to_bool(self) -> Tensor:
        """Dense [N, F] bool mask."""
        if self._words_NW is None:
            return self._spread(self.num_neurons)
        return spread_bits(self.pack())[:, : self.num_neurons]

    def pack(self) -> Tensor:
        """[N, B] uint8; neuron j is bit j % 8 of byte j // 8. This is the wire format.

        Of words it is a view: their bytes, lowest first, as every machine of this project has them.
        """
        width = (self.num_neurons + 7) // 8
        if self._words_NW is None:
            return pack_bits(self._spread(8 * width))
        return self._words_NW.view(torch.uint8)[:, :width]

    @classmethod
    def unpack(
        cls,
        bits_NB: Tensor,
        num_neurons: int,
        block: int = 1,
        kept: int | None = None,
        entries: int | None = None,
    ) -> NeuronMask:
        """Inverse of `pack`, as words, which are a view of the bits where W 32 = F.

        Args:
            bits_NB: of `pack`.
            num_neurons: F.
            block: B; bits do not say that a mask is of whole blocks.
            kept: S where every row keeps S, which is not checked; else None.
            entries: K where it is known.

        Raises:
            ValueError: a width that is not ceil(F / 8), or a bit set beyond neuron F - 1. On a GPU
                looking for such bits would wait: there it is for who brings them (moe/masks does,
                of files).
        """
        check_width(bits_NB, num_neurons)
        mask = cls.of_words(words_of(bits_NB), num_neurons, block, kept)
        if entries is not None:
            mask._entries = entries
        return mask

    def shard(self, rank: int, size: int) -> NeuronMask:
        """The part of one of `size` ranks that hold F / size neurons each, indices from 0.

        Raises:
            ValueError: `size` does not divide F.
        """
        if self.num_neurons % size:
            raise ValueError(f"{size} ranks do not divide {self.num_neurons} neurons")
        if size == 1:
            return self
        width = self.num_neurons // size
        first = rank * width
        if self._by_indices():
            mine_K = self.indices_K.long().div(width, rounding_mode="floor") == rank
            lengths_N = torch.zeros_like(self.offsets_N1[1:])
            lengths_N.index_add_(0, self.rows_K, mine_K.long())
            indices = (self.indices_K[mine_K].long() - first).to(index_dtype(width))
            return NeuronMask.unchecked(indices, _offsets(lengths_N), width)
        if width % 8 == 0:
            return NeuronMask.unpack(self.pack()[:, first // 8 :][:, : width // 8], width)
        return NeuronMask.from_bool(self.to_bool()[:, first:][:, :width])

    @classmethod
    def join(cls, shards: list[NeuronMask]) -> NeuronMask:
        """Inverse of `shard` over all ranks in order."""
        return cls.from_bool(torch.cat([shard.to_bool() for shard in shards], dim=1))

    def rows(self, index_M: Tensor) -> NeuronMask:
        """The rows `index_M` ([M] int64), in that order; rows may repeat."""
        mask, facts = object.__new__(NeuronMask), (self.num_neurons, self.block, self.kept)
        if self._csr is not None and self.kept is not None:
            index_NS = self._csr[0].view(self.num_rows, self.kept)
            offsets_M1 = _even_offsets(index_M.numel(), self.kept, index_M.device)
            return mask._hold(*facts, csr=(index_NS.index_select(0, index_M).flatten(), offsets_M1))
        if not self._by_indices():
            return mask._hold(*facts, words_NW=self.words().index_select(0, index_M))
        lengths_M = self.row_lengths_N[index_M]
        offsets_M1 = _offsets(lengths_M)
        within_K = torch.arange(int(offsets_M1[-1]), device=index_M.device)
        within_K = within_K - offsets_M1[:-1].repeat_interleave(lengths_M)
        source_K = self.offsets_N1[:-1][index_M].repeat_interleave(lengths_M) + within_K
        return mask._hold(*facts, csr=(self.indices_K[source_K], offsets_M1))

    @property
    def rows_K(self) -> Tensor:
        """[K] int64, the row of each entry; made anew each time, it is larger than the mask."""
        return _rows_of(self.offsets_N1, self.num_entries, self.kept)

    def _by_indices(self) -> bool:
        """Whether to work on indices: they are held, and asking for their number does not wait."""
        return self._csr is not None and self.device.type != "cuda"

    def _indices(self) -> tuple[Tensor, Tensor]:
        """Indices and offsets, made once."""
        if self._csr is None:
            self._csr = self._indices_of_words()
        return self._csr

    def _indices_of_words(self) -> tuple[Tensor, Tensor]:
        rows, neurons, device = self.num_rows, self.num_neurons, self.device
        flat = self.to_bool().flatten()
        if flat.is_meta:
            return _csr_without_values(rows, neurons, self.num_entries)
        if self.kept is None:
            offsets_N1 = _offsets(self.row_lengths_N)
        else:
            offsets_N1 = _even_offsets(rows, self.kept, device)
        if device.type == "cuda":
            flat_K = torch.nonzero_static(flat, size=self.num_entries).flatten()
        else:
            flat_K = flat.nonzero().flatten()
        return _within_rows(flat_K, offsets_N1, neurons, self.kept), offsets_N1

    def _spread(self, width: int) -> Tensor:
        """[N, width] bool of held indices, 0 beyond neuron F - 1."""
        at_K = self.rows_K * width + self.indices_K
        wide = torch.zeros(self.num_rows * width, dtype=torch.bool, device=at_K.device)
        return wide.index_fill_(0, at_K, True).view(self.num_rows, width)


def index_dtype(num_neurons: int) -> torch.dtype:
    """The index type of masks over F neurons."""
    return torch.int16 if num_neurons <= torch.iinfo(torch.int16).max else torch.int32


def _even_offsets(rows: int, kept: int, device: torch.device) -> Tensor:
    return torch.arange(rows + 1, device=device) * kept


def _rows_of(offsets_N1: Tensor, entries: int, kept: int | None) -> Tensor:
    """[K] int64 row of each entry."""
    rows_N = torch.arange(offsets_N1.numel() - 1, device=offsets_N1.device)
    if kept is not None:
        return rows_N.unsqueeze(1).expand(-1, kept).flatten()
    return rows_N.repeat_interleave(offsets_N1.diff(), output_size=entries)


def _within_rows(flat_K: Tensor, offsets_N1: Tensor, neurons: int, kept: int | None) -> Tensor:
    """[K] neurons of positions in [N, F], in the type of indices."""
    rows_K = _rows_of(offsets_N1, flat_K.numel(), kept)
    return (flat_K - rows_K * neurons).to(index_dtype(neurons))


def _csr_without_values(rows: int, neurons: int, entries: int) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(entries, dtype=index_dtype(neurons), device="meta"),
        torch.empty(rows + 1, dtype=torch.int64, device="meta"),
    )


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
