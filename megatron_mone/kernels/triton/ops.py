"""The kernels of the masked expert as functions of tensors: what is allocated and launched.

Plain torch and `launch`; the arithmetic is in device/. Outputs are unwritten past the last row of
an expert. Shapes: N rows at most, E experts, F neurons, H hidden, S kept, W = ceil(F / 32) words.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.triton.launch import launch, programs
from megatron_mone.kernels.triton.row_map import RowMap, power_of_two

NEURONS = 128  # of a tile of K1, K3, K6
MAX_NEURONS = 16_384  # a row of gates must fit the registers of a program
WIDE = 8192  # neurons whose values fit the registers beside their keys
WIDE_STRETCH = 64  # words
LARGE_BLOCK = 64  # neurons; fewer blocks are chosen one by one
SMALL_GROUP = 32  # neurons of a group that are compared with each other
STRIPE_ROWS = 512  # of a block that one program counts, about
STATISTICS = {"TILE": 32, "num_warps": 2}
GATHER = {"TILE": 128, "num_warps": 4}
WEIGH = LOOK = ADD = {"TILE": 1024, "num_warps": 4}


class Entries(NamedTuple):
    """The neurons chosen of each row.

    Attributes:
        words_NW: [N, W] int32; neuron j is bit j % 32 of word j // 32.
        bases_NW: [N, W] int16 bits set before each word.
        a_NS: [N, S] their gate pre-activations.
        total_N: [N] float32 sums of their |sigma(a)|.
        bad_N: [N] int8, 0.
    """

    words_NW: Tensor
    bases_NW: Tensor
    a_NS: Tensor
    total_N: Tensor
    bad_N: Tensor


def product_config(dtype: torch.dtype, tile: int, *sizes: int) -> dict[str, Any]:
    """Launch parameters of a grouped product in tiles of so many rows, whose operands' rows have
    `sizes` elements."""
    whole = all(size * dtype.itemsize % 16 == 0 for size in sizes)
    wide = dtype == torch.float32
    return {
        "TILE_M": tile, "TILE_K": 32 if wide else 64, "TMA": whole, "UPCAST": False,
        "num_warps": 8, "num_stages": 3 if wide else 4,
    }  # fmt: skip


def gate_product(x_NH: Tensor, w_EFH: Tensor, where: RowMap) -> Tensor:
    """K1: [N, F] x W^T."""
    (rows, hidden), (experts, neurons, _) = x_NH.shape, w_EFH.shape
    out_NF = x_NH.new_empty((rows, neurons))
    if rows:
        launch(
            "neuron_products.gate_product", (programs(x_NH.device),),
            (x_NH, w_EFH, out_NF, where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             rows, neurons, hidden, w_EFH.stride(0), experts, where.tiles),
            reads=(x_NH, w_EFH), writes=(out_NF,), flops=2 * rows * neurons * hidden,
            **product_config(x_NH.dtype, where.tile, hidden),
        )  # fmt: skip
    return out_NF


def new_entries(a_NF: Tensor, kept: int, words_NW: Tensor | None = None) -> Entries:
    """Room for the entries of N rows."""
    rows, words = a_NF.shape[0], -(-a_NF.shape[1] // 32)
    if words_NW is None:
        words_NW = a_NF.new_empty((rows, words), dtype=torch.int32)
    return Entries(
        words_NW,
        a_NF.new_empty((rows, words), dtype=torch.int16),
        a_NF.new_empty((rows, kept)),
        a_NF.new_empty(rows, dtype=torch.float32),
        a_NF.new_empty(rows, dtype=torch.int8),
    )


def select(a_NF: Tensor, choose: Selection, activation: str, where: RowMap) -> Entries:
    """K2: the entries of a selection.

    Raises:
        ValueError: more neurons than a program holds.
    """
    rows, neurons = a_NF.shape
    check_width(neurons)
    made = new_entries(a_NF, choose.kept)
    if not rows:
        return made
    kernel, constants = select_config(neurons, a_NF.dtype, choose)
    sizes: tuple[int, ...] = (where.experts, neurons, made.words_NW.shape[1], choose.kept)
    if kernel != "selection.select_wide":
        sizes = (*sizes, choose.groups)
    launch(
        kernel, (rows,), (a_NF, where.offsets_E1, *made, *sizes), reads=(a_NF,), writes=made,
        ACTIVATION=activation, **constants,
    )  # fmt: skip
    return made


def select_config(
    neurons: int, dtype: torch.dtype, choose: Selection
) -> tuple[str, dict[str, Any]]:
    """K2's kernel and its launch parameters."""
    block = choose.block
    if block & (block - 1) or block >= LARGE_BLOCK:
        return "block_selection.select_blocks", _blocks_config(neurons, block)
    units = power_of_two(max(neurons, 32)) // block
    config: dict[str, Any] = {
        "INDEX_BITS": max(1, units.bit_length() - 1),
        "BITS": 15 if dtype == torch.bfloat16 and block == 1 else 31, **row_config(neurons),
    }  # fmt: skip
    if neurons > WIDE and choose.groups == block == 1:
        return "selection.select_wide", {**config, "STRETCH": WIDE_STRETCH}
    ways = {
        "BLOCK": block, "HALVINGS": block.bit_length() - 1, "GROUPS": groups_by(choose, neurons)
    }  # fmt: skip
    if ways["GROUPS"] == "loop":  # holds the choice beside the keys: with half the values a thread
        config["num_warps"] = min(2 * config["num_warps"], 16)
    return "selection.select", {**config, **ways}


def _blocks_config(neurons: int, block: int) -> dict[str, Any]:
    """Of the kernel for blocks of any size: 16 values a thread or more."""
    units, half = power_of_two(neurons // block), power_of_two(block) // 2
    row = row_config(neurons)
    return {
        "INDEX_BITS": max(1, units.bit_length() - 1), "BLOCK": block, "UNITS": units, "HALF": half,
        "HALVINGS": half.bit_length() - 1, "WORDS": row["WORDS"],
        "num_warps": min(max(units * half // 512, 1), 16),
    }  # fmt: skip


def groups_by(choose: Selection, neurons: int) -> str:
    """How K2 goes through the groups of a row."""
    if choose.groups == 1:
        return "one"
    small = choose.block == 1 and neurons // choose.groups <= SMALL_GROUP
    return "small" if small else "loop"


def row_config(neurons: int) -> dict[str, int]:
    """Launch parameters of the kernels that hold a row of F neurons: 16 values a thread or more."""
    words = power_of_two(max(1, -(-neurons // 32)))
    return {"WORDS": words, "num_warps": min(max(words // 16, 1), 16)}


def check_width(neurons: int) -> None:
    """Refuse rows that no program holds.

    Raises:
        ValueError: names the number and the limit.
    """
    if neurons > MAX_NEURONS:
        raise ValueError(
            f"moe_ffn_hidden_size = {neurons} neurons on this rank: the triton kernels hold rows "
            f"of at most {MAX_NEURONS}; split experts over expert_tensor_parallel_size ranks"
        )


def compact(a_NF: Tensor, words_NW: Tensor, kept: int, activation: str, where: RowMap) -> Entries:
    """K2 for words that are ready: every row has `kept` bits."""
    rows, neurons = a_NF.shape
    check_width(neurons)
    made = new_entries(a_NF, kept, words_NW)
    if rows:
        launch(
            "selection.compact", (rows,),
            (a_NF, where.offsets_E1, *made, where.experts, neurons, words_NW.shape[1], kept),
            reads=(a_NF, words_NW), writes=made[1:], ACTIVATION=activation, **row_config(neurons),
        )  # fmt: skip
    return made


def up_product(
    x_NH: Tensor, w_EFH: Tensor, p_N: Tensor, entries: Entries, activation: str, where: RowMap
) -> tuple[Tensor, Tensor]:
    """K3: (u [N, S], h [N, F])."""
    (rows, hidden), (experts, neurons, _) = x_NH.shape, w_EFH.shape
    kept, words = entries.a_NS.shape[1], entries.words_NW.shape[1]
    u_NS, h_NF = x_NH.new_empty((rows, kept)), x_NH.new_empty((rows, neurons))
    if rows:
        read = (entries.a_NS, p_N, entries.words_NW, entries.bases_NW)
        launch(
            "neuron_products.up_product", (programs(x_NH.device),),
            (x_NH, w_EFH, *read, u_NS, h_NF,
             where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             rows, neurons, hidden, w_EFH.stride(0), experts, where.tiles, words, kept),
            reads=(x_NH, w_EFH, *read), writes=(u_NS, h_NF), flops=2 * rows * neurons * hidden,
            ACTIVATION=activation, **product_config(x_NH.dtype, where.tile, hidden),
        )  # fmt: skip
    return u_NS, h_NF


def up_entries(
    wide_NF: Tensor, p_N: Tensor, entries: Entries, activation: str, where: RowMap
) -> tuple[Tensor, Tensor]:
    """As `up_product`, from x W_up^T [N, F]."""
    (rows, neurons), kept = wide_NF.shape, entries.a_NS.shape[1]
    u_NS, h_NF = wide_NF.new_empty((rows, kept)), torch.empty_like(wide_NF)
    if rows:
        read = (entries.a_NS, p_N, entries.words_NW, entries.bases_NW)
        launch(
            "neuron_products.up_entries", (where.tiles, -(-neurons // NEURONS)),
            (wide_NF, *read, u_NS, h_NF, where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             neurons, where.experts, entries.words_NW.shape[1], kept),
            reads=(wide_NF, *read), writes=(u_NS, h_NF), ACTIVATION=activation, TILE_M=where.tile,
            num_warps=8,
        )  # fmt: skip
    return u_NS, h_NF


def mark_bad(y_NH: Tensor, bad_N: Tensor, where: RowMap) -> None:
    """Mark rows of y [N, H] that are not finite, as K4 does for its own."""
    rows, hidden = y_NH.shape
    if rows:
        launch(
            "hidden_products.mark_bad", (rows,),
            (y_NH, bad_N, where.offsets_E1, where.experts, hidden),
            reads=(y_NH,), writes=(bad_N,), **LOOK,
        )  # fmt: skip


def hidden_product(
    where: RowMap, *terms: tuple[Tensor, Tensor], bad_N: Tensor | None = None,
    order_P: Tensor | None = None, dtype: torch.dtype | None = None,
) -> Tensor:  # fmt: skip
    """K4, K7: [N, H] sum of v W over one or two (v [N, F], W [E, F, H]); marks rows in bad_N.

    Args:
        where: of the rows; or by segments, of places of pairs.
        terms: with segments v is [P, B].
        bad_N: None where nothing is marked.
        order_P: of segments, the row of out for each place: out is [P, H].
        dtype: of out; of v when None.
    """
    (v_NF, w_EFH), (v2_NF, w2_EFH) = terms[0], terms[-1]
    (rows, neurons), hidden = v_NF.shape, w_EFH.shape[2]
    out_NH = v_NF.new_empty((rows, hidden), dtype=dtype)
    if rows:
        bad = () if bad_N is None else (bad_N,)
        order = () if order_P is None else (order_P,)
        launch(
            "hidden_products.hidden_product", (programs(v_NF.device),),
            (v_NF, w_EFH, v2_NF, w2_EFH, out_NH, v_NF if bad_N is None else bad_N,
             where.offsets_E1 if order_P is None else order_P,
             where.offsets_E1, where.tile_expert_T, where.tile_row_T,
             rows, neurons, hidden, w_EFH.shape[1] // neurons, w_EFH.stride(0), w2_EFH.stride(0),
             where.experts, where.tiles),
            reads=[*(t for term in terms for t in term), *order], writes=(out_NH, *bad),
            flops=2 * len(terms) * rows * neurons * hidden,
            TWO=len(terms) == 2, CHECKED=bad_N is not None, ORDERED=order_P is not None, TILE_N=128,
            **product_config(v_NF.dtype, where.tile, neurons, hidden),
        )  # fmt: skip
    return out_NH


def add_slots(
    part_PH: Tensor, slots: int, dtype: torch.dtype, where: RowMap, bad_N: Tensor | None
) -> Tensor:
    """[N, H] sums of each row's `slots` float32 parts, in order; marks rows in bad_N."""
    rows, hidden = where.rows, part_PH.shape[1]
    out_NH = part_PH.new_empty((rows, hidden), dtype=dtype)
    if rows:
        bad = () if bad_N is None else (bad_N,)
        launch(
            "hidden_products.add_slots", (rows, -(-hidden // ADD["TILE"])),
            (part_PH, out_NH, out_NH if bad_N is None else bad_N, where.offsets_E1, where.experts,
             hidden),
            reads=(part_PH,), writes=(out_NH, *bad), SLOTS=slots, CHECKED=bad_N is not None, **ADD,
        )  # fmt: skip
    return out_NH


def weight_grad(
    v_NF: Tensor, x_NH: Tensor, out_EFH: Tensor, adds: bool, where: RowMap,
    order_P: Tensor | None = None, slots: int = 1,
) -> None:  # fmt: skip
    """K8: out [E, F, H] (+)= v^T x over each expert's rows; each [F, H] of `out` contiguous.

    By segments v is [P, B], `where` is of the places of pairs, and `order_P` has the pair of each:
    row order_P // slots of x.
    """
    (rows, neurons), (_, width, hidden) = v_NF.shape, out_EFH.shape
    if not rows:
        if not adds:
            out_EFH.zero_()
        return
    order = () if order_P is None else (order_P,)
    launch(
        "weight_grads.weight_grad", (programs(x_NH.device),),
        (v_NF, x_NH, out_EFH, where.offsets_E1 if order_P is None else order_P, where.offsets_E1,
         rows, neurons, hidden, width // neurons, slots, out_EFH.stride(0), where.experts),
        reads=(v_NF, x_NH, *order, *((out_EFH,) if adds else ())), writes=(out_EFH,),
        flops=2 * rows * neurons * hidden, ADDS=adds,
        **grad_config(x_NH.dtype, where.tile, neurons, hidden, order_P is not None),
    )  # fmt: skip


def grad_config(
    dtype: torch.dtype, tile: int, neurons: int, hidden: int, ordered: bool
) -> dict[str, Any]:
    """Launch parameters of K8. A row's number is read before the row: twice the stages keep as many
    tiles in flight."""
    config = product_config(dtype, tile, neurons, hidden)
    stages = config["num_stages"]
    return {
        **config, "ORDERED": ordered, "TILE_N": 128,
        "num_stages": 2 * stages - 1 if ordered else stages,
    }  # fmt: skip


class Blocks(NamedTuple):
    """Which rows a balance loss takes together.

    Attributes:
        of_chunk_C: [E * R] int32, block of the rows of each expert and source; B at most.
        per_expert: blocks of an expert, which follow each other: block // per_expert is the expert.
        number: B.
        real_N: [N] bool or int8, 0 for rows that are not counted; None where all are.
    """

    of_chunk_C: Tensor
    per_expert: int
    number: int
    real_N: Tensor | None = None


class Counters(NamedTuple):
    """Load counters that a count of entries is added to: int64 [E, F] and [E]."""

    counts_EF: Tensor
    rows_E: Tensor


class Weighing(NamedTuple):
    """What a row's share of each neuron weighs in a balance loss.

    Attributes:
        loss_type: entropy weighs by the slope of the entropy, every other by the load.
        neurons, kept: F and S over all ranks.
        over_experts: each weight is multiplied by it.
        tally_scale: see `tally`.
        tally: float32 scalar that the loss, scaled, is added to, for a log; None: no log.
        ready_BF: [B, F_l] float32 weights that are there already; made when None.
    """

    loss_type: str
    neurons: int
    kept: int
    over_experts: float
    tally_scale: float = 1.0
    tally: Tensor | None = None
    ready_BF: Tensor | None = None

    @property
    def numbers(self) -> tuple[int, int, float, float]:
        """For the kernels."""
        return self.neurons, self.kept, self.over_experts, self.tally_scale

    @property
    def logged(self) -> tuple[Tensor, ...]:
        """What the loss is added to."""
        return () if self.tally is None else (self.tally,)


class BlockSums(NamedTuple):
    """What `block_sums` makes.

    Attributes:
        sums_BX: [B, 1 + 2F] float32: rows, counts [F] and sums of shares [F].
        ticket: one number, 0; the last launch counts its finished programs there.
        weight_BF: [B, F] float32 weights, where they were asked for.
        loss: the scalar sum of weight times share, float32, where weights were asked for.
    """

    sums_BX: Tensor
    ticket: Tensor
    weight_BF: Tensor | None = None
    loss: Tensor | None = None


def block_sums(
    entries: Entries, blocks: Blocks, where: RowMap, *, neurons: int, activation: str,
    shares: bool, scale_free: bool, counters: Counters | None = None,
    weighing: Weighing | None = None,
) -> BlockSums:  # fmt: skip
    """K5, two launches: rows, counts and shares of each block, and what they weigh.

    Args:
        entries, blocks, where: of the rows.
        neurons: F.
        activation: of the gates.
        shares: also sum |g| / T_n (scale_free) or |g|; else these columns are 0.
        scale_free: see `shares`.
        counters: counts and rows are added to.
        weighing: also make weights and loss, of blocks that are whole on this rank.
    """
    rows, (kept, words) = where.rows, (entries.a_NS.shape[1], entries.words_NW.shape[1])
    number, device = blocks.number, entries.a_NS.device
    stripes = max(1, min(16, rows // (STRIPE_ROWS * number)))
    found = torch.empty((stripes, number), dtype=torch.int32, device=device)
    counts = torch.empty((stripes, number, neurons), dtype=torch.int32, device=device)
    share = torch.empty((stripes, number, neurons) if shares else 0, device=device)
    space = torch.empty(number * (1 + 2 * neurons) + 1, device=device)
    sums_BX, ticket = space[:-1].view(number, -1), space[-1:].view(torch.int32)
    real = entries.bad_N if blocks.real_N is None else blocks.real_N
    read = (*entries[:4], real)
    launch(
        "statistics.statistics", (number, words, stripes),
        (*read, where.chunk_offsets_C1, blocks.of_chunk_C, found, counts, share, ticket,
         neurons, words, kept, where.sources, number, blocks.per_expert),
        reads=(*entries[: 4 if shares else 1], *(() if blocks.real_N is None else (real,))),
        writes=(found, counts, share), ACTIVATION=activation, SHARES=shares, SCALE_FREE=scale_free,
        HAS_REAL=blocks.real_N is not None, **STATISTICS,
    )  # fmt: skip
    into = (sums_BX, sums_BX) if counters is None else tuple(counters)
    pieces = -(-neurons // GATHER["TILE"])
    weight_BF, loss, weights, numbers = None, None, "none", (1, 1, 0.0, 0.0)
    weighed: tuple[Tensor, ...] = (sums_BX, sums_BX, sums_BX)
    logged: tuple[Tensor, ...] = ()
    if weighing is not None:
        weights = "make" if weighing.ready_BF is None else "ready"
        weight_BF = weighing.ready_BF
        if weight_BF is None:
            weight_BF = sums_BX.new_empty((number, neurons))
        loss, numbers, logged = sums_BX.new_empty(()), weighing.numbers, weighing.logged
        weighed = (weight_BF, sums_BX.new_empty(where.experts * pieces), loss)
    launch(
        "statistics.gather", (where.experts, pieces),
        (found, counts, share, sums_BX, ticket, *into, *weighed, *(logged or weighed[-1:]),
         neurons, stripes, number, blocks.per_expert, *numbers),
        reads=(found, counts, share, *(counters or ()), *weighed[: weights == "ready"], *logged),
        writes=(sums_BX, *(counters or ()), *logged,
                *(weighed[weights == "ready" :] if weighing else ())),
        SHARES=shares, LOADS=counters is not None, WEIGHTS=weights,
        ENTROPY=weighing is not None and weighing.loss_type == "entropy",
        PARTS=power_of_two(where.experts * pieces), TALLY=bool(logged), **GATHER,
    )  # fmt: skip
    return BlockSums(sums_BX, ticket, weight_BF, loss)


def weigh(sums: BlockSums, whole_BX: Tensor, weighing: Weighing) -> tuple[Tensor, Tensor]:
    """K5, a third launch where blocks lie on several ranks: their weights, and this rank's loss.

    Args:
        sums: of this rank.
        whole_BX: [B, 1 + 2F] sums of all ranks.
        weighing: how.

    Returns:
        weight_BF, and the scalar sum of weight times this rank's share, float32.
    """
    number, local = whole_BX.shape[0], (whole_BX.shape[1] - 1) // 2
    weight_BF = whole_BX.new_empty((number, local))
    part_B, loss = whole_BX.new_empty(number), whole_BX.new_empty(())
    launch(
        "statistics.weigh", (number,),
        (whole_BX, sums.sums_BX, weight_BF, part_B, sums.ticket, loss,
         loss if weighing.tally is None else weighing.tally, local, number, *weighing.numbers),
        reads=(whole_BX, sums.sums_BX, *weighing.logged),
        writes=(weight_BF, part_B, loss, *weighing.logged),
        ENTROPY=weighing.loss_type == "entropy", TALLY=weighing.tally is not None,
        PARTS=power_of_two(number), **WEIGH,
    )  # fmt: skip
    return weight_BF, loss


def note_bad(bad_N: Tensor, probs_N: Tensor, first_EX: Tensor, call: int, where: RowMap) -> None:
    """Note each expert's first forward pass with bad rows.

    Args:
        bad_N: [N] int8 of the experts' y.
        probs_N: [N] router probabilities; negative ones are marked rows (moe/padding.py).
        first_EX: [E, 3] int64: `call`, bad and marked rows plus 2^32 times the marked ones, and all
            rows, written where the second is 0 so far.
        call: number of the forward pass.
        where: of the rows.
    """
    launch(
        "statistics.note_bad", (where.experts,), (bad_N, probs_N, where.offsets_E1, first_EX, call),
        reads=(bad_N, probs_N, first_EX), writes=(first_EX,), **LOOK,
    )  # fmt: skip


class Slope(NamedTuple):
    """What a balance loss adds to the gates' gradient: of |g_nj| / T_n the weight of its block.

    Attributes:
        weight_BF: [B, F] float32.
        blocks: of the rows.
        scale_free: whether shares are divided by T_n.
        scale: of the loss.
        loss_scale: gives, in the backward pass, one number on the device that multiplies it too.
    """

    weight_BF: Tensor
    blocks: Blocks
    scale_free: bool
    scale: float
    loss_scale: Callable[[], Tensor]


def rebuild(
    words_NW: Tensor, a_NS: Tensor, slope: Slope | None, activation: str, where: RowMap,
    sum_over: Callable[..., None] | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """K2 of the backward pass: (bases [N, W], gradient of the kept gates [N, S] or None).

    Args:
        words_NW, a_NS, activation, where: of the forward pass.
        slope: of a balance loss.
        sum_over: adds [N] tensors up over the ranks that hold the rest of the rows, in place; a
            second launch then reads the sums.
    """
    rows, words = words_NW.shape
    bases_NW = words_NW.new_empty((rows, words), dtype=torch.int16)
    dg_NS = None if slope is None else torch.empty_like(a_NS)
    if not rows:
        return bases_NW, dg_NS
    if slope is None:
        _rebuild("none", words_NW, a_NS, None, (bases_NW,), activation, where)
    elif sum_over is None or not slope.scale_free:
        _rebuild("whole", words_NW, a_NS, slope, (bases_NW, dg_NS), activation, where)
    else:
        level_N, total_N = (a_NS.new_empty(rows, dtype=torch.float32) for _ in range(2))
        sums = (bases_NW, dg_NS, level_N, total_N)
        _rebuild("sums", words_NW, a_NS, slope, sums, activation, where)
        sum_over(level_N, total_N)
        _rebuild("rest", words_NW, a_NS, slope, sums, activation, where)
    return bases_NW, dg_NS


def _rebuild(
    kind: str, words_NW: Tensor, a_NS: Tensor, slope: Slope | None, out: tuple[Any, ...],
    activation: str, where: RowMap,
) -> None:  # fmt: skip
    """One launch; `out` is bases, dg, level, total as far as they are needed."""
    chunks, (rows, words) = where.chunk_offsets_C1.numel() - 1, words_NW.shape
    read: tuple[Tensor, ...] = (words_NW,)
    table, weight, real, loss_scale, scale, neurons = words_NW, a_NS, None, a_NS, 0.0, words * 32
    if slope is not None:
        table, real, weight = slope.blocks.of_chunk_C, slope.blocks.real_N, slope.weight_BF
        loss_scale, scale, neurons = slope.loss_scale(), slope.scale, weight.shape[1]
        read = (words_NW, a_NS, weight, loss_scale)
    bases, dg, level, total = *out, *(out[:1] * (4 - len(out)))
    launch(
        "selection.rebuild", (rows,),
        (words_NW, a_NS, where.offsets_E1, where.chunk_offsets_C1, table, weight,
         a_NS if real is None else real, loss_scale, bases, dg, level, total,
         where.experts, neurons, words, a_NS.shape[1], chunks, scale),
        reads=read, writes=out[:2], ACTIVATION=activation, SLOPE=kind,
        SCALE_FREE=slope is not None and slope.scale_free, HAS_REAL=real is not None,
        CHUNKS=power_of_two(chunks), **row_config(neurons),
    )  # fmt: skip


class Kept(NamedTuple):
    """What the backward pass has of the kept entries: a, u [N, S], words and bases [N, W]."""

    a_NS: Tensor
    u_NS: Tensor
    words_NW: Tensor
    bases_NW: Tensor


def dh_product(
    dy_NH: Tensor, w_EFH: Tensor, p_N: Tensor, kept: Kept, dg_NS: Tensor | None, activation: str,
    where: RowMap,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """K6 and the sum of dp, two launches: (da, du, h [N, F], dp [N] in p's dtype)."""
    (rows, hidden), neurons = dy_NH.shape, w_EFH.shape[1]
    return _dh(
        "neuron_products.dh_product", (programs(dy_NH.device),), (dy_NH, w_EFH),
        (hidden, w_EFH.stride(0)), neurons, p_N, kept, dg_NS, activation, where,
        flops=2 * rows * neurons * hidden, **product_config(dy_NH.dtype, where.tile, hidden),
    )  # fmt: skip


def dh_entries(
    wide_NF: Tensor, p_N: Tensor, kept: Kept, dg_NS: Tensor | None, activation: str, where: RowMap
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `dh_product`, from dy W_down^T [N, F]."""
    neurons = wide_NF.shape[1]
    return _dh(
        "neuron_products.dh_entries", (where.tiles, -(-neurons // NEURONS)), (wide_NF,), (),
        neurons, p_N, kept, dg_NS, activation, where, TILE_M=where.tile, num_warps=8,
    )  # fmt: skip


def _dh(
    kernel: str, grid: tuple[int, ...], operands: tuple[Tensor, ...], sizes: tuple[int, ...],
    neurons: int, p_N: Tensor, kept: Kept, dg_NS: Tensor | None, activation: str, where: RowMap,
    **launched: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    a_NS, u_NS, words_NW, bases_NW = kept
    rows, experts = a_NS.shape[0], where.experts
    da_NF, du_NF, h_NF = (a_NS.new_empty((rows, neurons)) for _ in range(3))
    parts = -(-neurons // NEURONS)
    part_NX = a_NS.new_empty((rows, parts), dtype=torch.float32)
    if not rows:
        return da_NF, du_NF, h_NF, torch.empty_like(p_N)
    read = (a_NS, u_NS, p_N, words_NW, bases_NW)
    ends = (words_NW.shape[1], a_NS.shape[1])
    of_rows = (rows, neurons, *sizes, experts, where.tiles, *ends) if sizes else (
        neurons, experts, *ends
    )  # fmt: skip
    launch(
        kernel, grid,
        (*operands, *read, a_NS if dg_NS is None else dg_NS, da_NF, du_NF, h_NF, part_NX,
         where.offsets_E1, where.tile_expert_T, where.tile_row_T, *of_rows),
        reads=(*operands, *read, *(() if dg_NS is None else (dg_NS,))),
        writes=(da_NF, du_NF, h_NF, part_NX),
        ACTIVATION=activation, BALANCED=dg_NS is not None, **launched,
    )  # fmt: skip
    return da_NF, du_NF, h_NF, probability_grad(part_NX, p_N, where)


def probability_grad(part_NX: Tensor, p_N: Tensor, where: RowMap) -> Tensor:
    """dp [N] in p's dtype: the sums of the rows of float32 parts."""
    (rows, parts), dp_N = part_NX.shape, torch.empty_like(p_N)
    if rows:
        launch(
            "selection.probability_grad", (-(-rows // 64),),
            (part_NX, dp_N, where.offsets_E1, where.experts, rows, parts),
            reads=(part_NX,), writes=(dp_N,), ROWS=64, PARTS=power_of_two(parts), num_warps=4,
        )  # fmt: skip
    return dp_N
