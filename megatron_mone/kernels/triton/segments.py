"""K9: the products of rows that keep few blocks of neurons, over those blocks alone.

Pairs (row, slot) sorted by segment (expert, block) make plain grouped products of Z = E F / B
segments. With one block a row each product is stored to its row; with Q of them float32 parts
[N, Q, H] are written, and added in the order of the slots: no atomics. Compact tensors stay [N, S]:
blocks ascend, so that they are [pairs, B] too, pair = row Q + slot.
Shapes: N rows at most, E experts, F neurons, H hidden, S kept, Q = S / B slots, P = N Q pairs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.triton import ops
from megatron_mone.kernels.triton.launch import launch, programs
from megatron_mone.kernels.triton.ops import Kept
from megatron_mone.kernels.triton.row_map import RowMap

SEGMENTS_UP_TO = 4
"""Blocks of a row whose products are made over segments. An estimate: each costs float32 parts of a
row of H, written and read, in y and dx (about 0.8 of a dense layer's time at 4 of 16 blocks on an
H100, H 2048, F 1408; more reach what the dense route takes). Not run on a GPU yet."""
MAP = {"ROWS": 1024, "TILES": 128, "num_warps": 4}


def takes_segments(block: int, kept: int) -> bool:
    """Whether rows of S kept neurons in blocks of B are computed by segments."""
    return block > 1 and kept <= SEGMENTS_UP_TO * block


class Segments(NamedTuple):
    """Pairs sorted by segment.

    Attributes:
        order_P: [P] int32, the pair of each place.
        where: of the places, segments in the place of experts.
        slots: Q.
    """

    order_P: Tensor
    where: RowMap
    slots: int


class Values(NamedTuple):
    """Kept entries, one for each neuron of a pair's block: [P, B] in sorted order."""

    of_PB: Tensor
    segments: Segments


def segments_of(
    words_NW: Tensor, bases_NW: Tensor, block: int, slots: int, neurons: int, where: RowMap
) -> Segments:
    """One launch.

    Args:
        words_NW, bases_NW: whole blocks, as many of each row.
        block, slots: B, Q.
        neurons: F.
        where: of the rows.
    """
    pairs, units, tile = where.rows * slots, neurons // block, where.tile
    number = where.experts * units
    tiles = pairs // tile + number
    made = [
        words_NW.new_empty(size, dtype=torch.int32) for size in (pairs, number + 1, tiles, tiles)
    ]
    if pairs:
        launch(
            "segment_map.segment_map", (number,),
            (words_NW, bases_NW, where.offsets_E1, *made, words_NW.shape[1], units, slots, block,
             tiles),
            reads=(words_NW, bases_NW), writes=made, TILE=tile, **MAP,
        )  # fmt: skip
    order_P, offsets_Z1, segment_T, place_T = made
    where = RowMap(offsets_Z1, offsets_Z1, segment_T, place_T, pairs, 1, tile)
    return Segments(order_P, where, slots)


def up_product(
    x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, a_NS: Tensor, segments: Segments, activation: str
) -> tuple[Tensor, Values]:
    """K3: (u [N, S], h)."""
    block = a_NS.shape[1] // segments.slots
    u_NS, h_PB = torch.empty_like(a_NS), a_NS.new_empty((segments.where.rows, block))
    _by_segment(
        "up_segments", x_NH, w_EFH, segments, h_PB, (a_NS, p_N), (a_NS, p_N), (u_NS, h_PB),
        ACTIVATION=activation,
    )  # fmt: skip
    return u_NS, Values(h_PB, segments)


def dh_product(
    dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: Kept, dg_NS: Tensor | None,
    segments: Segments, activation: str, where: RowMap,
) -> tuple[Values, Values, Values, Tensor]:  # fmt: skip
    """K6 and the sum of dp, two launches: (da, du, h, dp [N] in p's dtype)."""
    a_NS, u_NS = kept.a_NS, kept.u_NS
    rows, block = a_NS.shape[0], a_NS.shape[1] // segments.slots
    da_PB, du_PB, h_PB = (a_NS.new_empty((segments.where.rows, block)) for _ in range(3))
    part_NX = a_NS.new_empty((rows, segments.slots * -(-block // ops.NEURONS)), dtype=torch.float32)
    read = (a_NS, u_NS, p_N)
    _by_segment(
        "dh_segments", dy_NH, w_EFH, segments, h_PB,
        (*read, a_NS if dg_NS is None else dg_NS), (*read, *(() if dg_NS is None else (dg_NS,))),
        (da_PB, du_PB, h_PB, part_NX), ACTIVATION=activation, BALANCED=dg_NS is not None,
    )  # fmt: skip
    dp_N = ops.probability_grad(part_NX, p_N, where)
    da, du, h = (Values(value_PB, segments) for value_PB in (da_PB, du_PB, h_PB))
    return da, du, h, dp_N


def _by_segment(
    kernel: str, x_NH: Tensor, w_EFH: Tensor, segments: Segments, value_PB: Tensor,
    arguments: tuple[Tensor, ...], read: tuple[Tensor, ...], made: tuple[Tensor, ...],
    **constants: object,
) -> None:  # fmt: skip
    """One launch of K3 or K6."""
    order_P, where, slots = segments
    (pairs, block), (_, neurons, hidden) = value_PB.shape, w_EFH.shape
    if pairs:
        launch(
            f"segment_products.{kernel}", (programs(x_NH.device),),
            (x_NH, w_EFH, *arguments, *made, order_P,
             where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             block, hidden, neurons // block, slots, w_EFH.stride(0), where.experts, where.tiles),
            reads=(x_NH, w_EFH, *read, order_P), writes=made, flops=2 * pairs * block * hidden,
            **constants, **ops.product_config(x_NH.dtype, where.tile, hidden),
        )  # fmt: skip


def hidden_product(
    where: RowMap, *terms: tuple[Values, Tensor], bad_N: Tensor | None = None
) -> Tensor:
    """K4, K7: [N, H] sum of v W over one or two (v, W [E, F, H]); marks rows in bad_N. A second
    launch where a row has several slots."""
    segments = terms[0][0].segments
    values = [(value.of_PB, w_EFH) for value, w_EFH in terms]
    order_P, of_pairs, slots = segments
    if slots == 1:
        return ops.hidden_product(of_pairs, *values, bad_N=bad_N, order_P=order_P)
    part_PH = ops.hidden_product(of_pairs, *values, order_P=order_P, dtype=torch.float32)
    return ops.add_slots(part_PH, slots, values[0][0].dtype, where, bad_N)


def weight_grad(values: Values, x_NH: Tensor, out_EFH: Tensor, adds: bool) -> None:
    """K8: out [E, F, H] (+)= v^T x over the rows of each segment."""
    order_P, where, slots = values.segments
    ops.weight_grad(values.of_PB, x_NH, out_EFH, adds, where, order_P=order_P, slots=slots)
