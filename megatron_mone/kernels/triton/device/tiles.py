"""Device functions that the grouped products share: order of tiles, operands, halves of a tile.

Operands come through TMA descriptors made in the kernel, or by pointers where rows are no multiple
of 16 bytes. A descriptor reads zeros past its tensor; rows of the next expert that a tile reaches
are read and never stored. Offsets are int64.
"""

import triton
import triton.language as tl

GROUP: tl.constexpr = tl.constexpr(8)  # row tiles that share their weight tiles in L2


@triton.jit
def tile_of(index, row_tiles, column_tiles):
    """(row tile, column tile) of a linear index: GROUP row tiles at a time, columns around them."""
    size = GROUP * column_tiles
    first = index // size * GROUP
    height = tl.minimum(row_tiles - first, GROUP)
    return first + index % size % height, index % size // height


@triton.jit
def matrix(
    ptr, rows, columns, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """A [rows, columns] operand whose tiles `load` reads: its descriptor, or its address."""
    if TMA:
        return tl.make_tensor_descriptor(ptr, [rows, columns], [stride, 1], [ROWS, COLUMNS])
    else:
        return ptr


@triton.jit
def load(
    operand, row, column, rows, columns, stride,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """The [ROWS, COLUMNS] tile at (row, column); zeros past the operand's end."""
    if TMA:
        return operand.load([row, column])
    else:
        i = row + tl.arange(0, ROWS)
        j = column + tl.arange(0, COLUMNS)
        at = i.to(tl.int64)[:, None] * stride + j[None, :]
        return tl.load(operand + at, mask=(i < rows)[:, None] & (j < columns)[None, :], other=0.0)


@triton.jit
def segment_of(ptr, segment, units, neurons, hidden, stride):
    """Address of a segment's neurons in weights [E, F, H], experts `stride` apart: of an expert in
    `units` segments of `neurons` each; 1 is the whole expert."""
    first = (segment % units).to(tl.int64) * neurons
    return ptr + (segment // units).to(tl.int64) * stride + first * hidden


@triton.jit
def dot(left, right, total, UPCAST: tl.constexpr):
    """total + left right in float32; of float32 operands in three TF32 products, which keep its
    precision. UPCAST for the interpreter, whose bfloat16 product is wrong."""
    if UPCAST:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def halves(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of a [ROWS, COLUMNS] tile."""
    return tile.reshape(ROWS, 2, COLUMNS // 2).permute(0, 2, 1).split()


@triton.jit
def quarters(tile, ROWS: tl.constexpr):
    """A [ROWS, 128] tile as four of 32 columns: a word of the mask each."""
    left, right = halves(tile, ROWS, 128)
    a, b = halves(left, ROWS, 64)
    c, d = halves(right, ROWS, 64)
    return a, b, c, d


@triton.jit
def eighths(tile, ROWS: tl.constexpr):
    """A [ROWS, 128] tile as eight of 16 columns."""
    a, b, c, d = quarters(tile, ROWS)
    a0, a1 = halves(a, ROWS, 32)
    b0, b1 = halves(b, ROWS, 32)
    c0, c1 = halves(c, ROWS, 32)
    d0, d1 = halves(d, ROWS, 32)
    return a0, a1, b0, b1, c0, c1, d0, d1
