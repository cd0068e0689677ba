"""D1 to D3: few rows that need no gradients. Bytes decide there, and most bytes are weights.

    D1  a = x W_gate^T [N, F], of experts that have rows
    D2  the choice: K2 as it is
    D3  the union of the neurons that an expert's rows keep; h over it from x W_up^T; parts
        [N, 4, H] of h W_down over it, then added in order, rows that are not finite marked
Tiles are of 16 rows, so that each weight is read once an expert where it has no more. Blocks of any
size are taken: adjacent neurons of a union. The same values as the training kernels' but for the
order of sums. Not run on a GPU yet.
Shapes: N rows at most, E experts, F neurons, H hidden, S kept.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.triton import ops
from megatron_mone.kernels.triton.launch import launch, programs
from megatron_mone.kernels.triton.ops import Entries
from megatron_mone.kernels.triton.row_map import RowMap

ROWS_UP_TO = 8
"""Rows of an expert, on average, that are few. n rows that keep r of the neurons each keep about
1 - (1 - r)^n of them in all, and the gate reads all: (3 - 2 (1 - r)^n) / 3 of a dense expert's
bytes, 0.93 at n = 8 and r = 1/4. Beyond, there is nothing left to skip, and tiles of 128 rows win.
An estimate."""
TILE = 16  # rows: the fewest that a tensor core's instruction takes
PARTS = 4  # of y, by the union's tiles: programs enough at one row, and few float32 bytes
PROGRAMS = 4  # of `decode_up` for each multiprocessor


def takes_decode(rows: int, experts: int) -> bool:
    """Whether a call of N rows at most, without gradients, is computed by these."""
    return rows <= ROWS_UP_TO * experts


class NeuronUnion(NamedTuple):
    """The neurons that some row of an expert keeps.

    Attributes:
        neurons_EF: [E, F] int32, ascending; unwritten past their number.
        number_E: [E] int32.
    """

    neurons_EF: Tensor
    number_E: Tensor


class UnionValues(NamedTuple):
    """h by places of the union of each row's expert: [N, X], X = F in whole tiles; zeros from its
    number to the end of the tile, unwritten past that."""

    of_NX: Tensor
    union: NeuronUnion


class DecodeProducts:
    """The products of a forward pass alone (products.py).

    Of W_up and W_down a launch lists the whole as read, and operations of all neurons: bounds, as
    the host does not know the union.
    """

    def __init__(self, where: RowMap, activation: str) -> None:
        self.where, self.activation = where, activation

    def gate(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        """D1: a [N, F]."""
        rows, neurons = x_NH.shape[0], w_EFH.shape[1]
        out_NF = x_NH.new_empty((rows, neurons))
        if rows:
            config = neuron_config(x_NH.dtype)
            self._launch(
                "decode_gate", (-(-neurons // config["TILE_N"]),), (x_NH, w_EFH), (out_NF,),
                w_EFH, (), **config,
            )  # fmt: skip
        return out_NF

    def up(
        self, x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries
    ) -> tuple[None, UnionValues]:
        """D3, two launches: (None in the place of u, which a backward pass would need, h)."""
        rows, neurons = x_NH.shape[0], w_EFH.shape[1]
        union = union_of(entries.words_NW, neurons, self.where)
        config = neuron_config(x_NH.dtype)
        tiles = -(-neurons // config["TILE_N"])
        h_NX = x_NH.new_empty((rows, tiles * config["TILE_N"]))
        if rows:
            many = -(-PROGRAMS * programs(x_NH.device) // self.where.tiles)
            read = (entries.a_NS, p_N, entries.words_NW, entries.bases_NW, *union)
            self._launch(
                "decode_up", (min(tiles, many),), (x_NH, w_EFH, *read), (h_NX,), w_EFH,
                (entries.words_NW.shape[1], entries.a_NS.shape[1], h_NX.shape[1]),
                ACTIVATION=self.activation, **config,
            )  # fmt: skip
        return None, UnionValues(h_NX, union)

    def down(self, h: UnionValues, w_EFH: Tensor, bad_N: Tensor) -> Tensor:
        """D3, two launches: y [N, H]."""
        rows, hidden = h.of_NX.shape[0], w_EFH.shape[2]
        part_NPH = h.of_NX.new_empty((rows, PARTS, hidden), dtype=torch.float32)
        if rows:
            config = hidden_config(h.of_NX.dtype)
            self._launch(
                "decode_down", (-(-hidden // config["TILE_N"]), PARTS),
                (h.of_NX, w_EFH, *h.union), (part_NPH,), w_EFH,
                (h.of_NX.shape[1],), **config,
            )  # fmt: skip
        return ops.add_slots(part_NPH.view(-1, hidden), PARTS, h.of_NX.dtype, self.where, bad_N)

    def _launch(
        self, kernel: str, grid: tuple[int, ...], reads: tuple[Tensor, ...],
        writes: tuple[Tensor, ...], w_EFH: Tensor, sizes: tuple[int, ...], **constants: Any,
    ) -> None:  # fmt: skip
        """One product, of all tiles of rows."""
        where, (_, neurons, hidden) = self.where, w_EFH.shape
        launch(
            f"decode_products.{kernel}", (where.tiles, *grid),
            (*reads, *writes, where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             neurons, hidden, w_EFH.stride(0), where.experts, *sizes),
            reads=reads, writes=writes, flops=2 * where.rows * neurons * hidden, **constants,
        )  # fmt: skip


def union_of(words_NW: Tensor, neurons: int, where: RowMap) -> NeuronUnion:
    """One launch, of bits [N, W]."""
    experts = where.experts
    made = NeuronUnion(words_NW.new_empty((experts, neurons)), words_NW.new_empty(experts))
    if where.rows:
        launch(
            "decode_products.union", (experts,),
            (words_NW, where.offsets_E1, *made, neurons, words_NW.shape[1]),
            reads=(words_NW,), writes=made, **ops.row_config(neurons),
        )  # fmt: skip
    return made


def neuron_config(dtype: torch.dtype) -> dict[str, Any]:
    """Launch parameters of D1's and D3's products over neurons: 512 bytes of each of 16 rows of
    weights a step, three steps on their way; less in float32, which would spill."""
    return {
        "TILE_M": TILE, "TILE_N": 16, "TILE_K": 32 if dtype == torch.float32 else 256,
        "UPCAST": False, "num_warps": 4, "num_stages": 4,
    }  # fmt: skip


def hidden_config(dtype: torch.dtype) -> dict[str, Any]:
    """Of D3's product over the hidden size: 256 bytes of each of 32 rows of W_down a step. A row's
    number is read before the row: twice the stages keep as many on their way."""
    return {
        "TILE_M": TILE, "TILE_N": 256 // dtype.itemsize, "TILE_K": 32, "UPCAST": False,
        "FILLED": neuron_config(dtype)["TILE_N"], "num_warps": 4, "num_stages": 7,
    }  # fmt: skip
