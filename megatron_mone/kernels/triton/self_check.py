"""Every kernel against torch on the device at hand, before `auto` trusts them there; those of
segments where neurons are chosen in blocks; torch's own product of two of every four neurons before
the sparse24 backend runs there.

Small random shapes with an empty expert and rows of no expert; one line for the first kernel that
differs, with its shape and error. Under a second beside compiling. A CUDA device that passed is
remembered in the user's cache folder by its name and capability, torch, Triton, CUDA, cuSPARSELt
and the source of this folder; one that failed for as long as the process lives. Not run on a GPU
yet; run in Triton's interpreter.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatron_mone.common.files import write_json
from megatron_mone.common.places import user_cache
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.triton import decode, ops, segments, two_four
from megatron_mone.kernels.triton.row_map import row_map

COUNTS, SPARE = [[5, 4], [0, 0], [2, 9]], 4  # rows by expert and source, and of no expert
HIDDEN, NEURONS, KEPT = 64, 160, 40
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


class Compared(NamedTuple):
    """A kernel's result and what it should be."""

    kernel: str
    got: Tensor
    want: Tensor


def fault(device: torch.device, dtype: torch.dtype, blocks: bool = False) -> str | None:
    """One line of the first kernel that is wrong on this device; None where all are right. With
    `blocks` of those for blocks of neurons, too."""
    found = _fault(device, dtype, comparisons)
    if found is None and blocks:
        found = _fault(device, dtype, block_comparisons)
    return found


def two_four_fault(device: torch.device) -> str | None:
    """Likewise of torch's product of two of every four neurons, in bfloat16; where it raises, its
    words."""
    try:
        return _fault(device, torch.bfloat16, two_four_comparisons)
    except RuntimeError as error:
        words = str(error).partition("\n")[0]
        return f"torch's semi-structured product does not run on {device}: {words}"


@cache
def _fault(
    device: torch.device, dtype: torch.dtype,
    compare: Callable[[torch.device, torch.dtype], Iterator[Compared]],
) -> str | None:  # fmt: skip
    if device.type != "cuda":
        return _first_wrong("cpu", device, dtype, compare)
    facts = {**_facts(device), "dtype": str(dtype), "checked": compare.__name__}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    passed = user_cache("self_check") / f"{digest}.json"
    if passed.is_file():
        return None
    found = _first_wrong(facts["device"], device, dtype, compare)
    if found is None:
        with contextlib.suppress(OSError):  # then the next process checks again
            passed.parent.mkdir(parents=True, exist_ok=True)
            write_json(passed, facts)
    return found


def _facts(device: torch.device) -> dict[str, Any]:
    """What the answers of a check depend on."""
    import triton

    libraries = torch.version.cuda, torch.backends.cusparselt.version()
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.name.encode() + b"\0" + path.read_bytes())
    return {
        "device": torch.cuda.get_device_name(device),
        "capability": torch.cuda.get_device_capability(device),
        "versions": [torch.__version__, triton.__version__, *libraries],
        "kernels": source.hexdigest(),
    }


def _first_wrong(
    name: str, device: torch.device, dtype: torch.dtype,
    compare: Callable[[torch.device, torch.dtype], Iterator[Compared]],
) -> str | None:  # fmt: skip
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        torch.manual_seed(0)
        for one in compare(device, dtype):
            error = (one.got.double() - one.want.double()).norm()
            share = float(error / one.want.double().norm().clamp(min=1e-12))
            if not share <= TOLERANCE[dtype]:  # NaN too
                return (
                    f"kernel {one.kernel} is wrong on {name} in {dtype}: shape "
                    f"{tuple(one.got.shape)}, relative error {share:.2g}"
                )
    return None


def comparisons(device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Every kernel of a layer's forward and backward pass, one after another, on the same rows."""
    counts = torch.tensor(COUNTS, device=device)
    rows_E = counts.sum(dim=1)
    real = int(rows_E.sum())
    rows, experts = real + SPARE, len(COUNTS)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x, dy, p = made(rows, HIDDEN), made(rows, HIDDEN), torch.rand(rows, device=device)
    w_gate, w_up, w_down = (made(experts, NEURONS, HIDDEN) / 8 for _ in range(3))
    expert_N = torch.arange(experts, device=device).repeat_interleave(rows_E)
    wide = torch.float32

    def by_neurons(v: Tensor, w: Tensor) -> Tensor:
        """[real, F] v W^T, in float32."""
        return torch.einsum("nh,nfh->nf", v[:real].to(wide), w.to(wide)[expert_N])

    def by_hidden(v: Tensor, w: Tensor) -> Tensor:
        """[real, H] v W, in float32."""
        return torch.einsum("nf,nfh->nh", v[:real].to(wide), w.to(wide)[expert_N])

    where = row_map(counts, rows)
    ends = torch.nn.functional.pad(rows_E.cumsum(0), (1, 0))
    yield Compared("row_map", where.offsets_E1, ends)
    a = ops.gate_product(x, w_gate, where)
    yield Compared("gate_product", a[:real], by_neurons(x, w_gate))
    exact = ops.select(a, Selection(KEPT), "relu", where)  # of silu the last bit may differ
    chosen = NeuronSelector("topk", KEPT, KEPT)(gate_activation("relu", a[:real]))
    yield Compared("select", _bits(exact, real), chosen)
    entries = ops.select(a, Selection(KEPT), "silu", where)
    mask, gate = _bits(entries, real), gate_activation("silu", a[:real])
    yield Compared("select", entries.a_NS[:real], a[:real][mask].view(real, KEPT))
    size = gate.to(wide).abs().masked_fill(~mask, 0)
    yield Compared("select", entries.total_N[:real], size.sum(dim=1))
    again = ops.compact(a, entries.words_NW, KEPT, "silu", where)
    yield Compared("compact", again.a_NS[:real], entries.a_NS[:real])
    u, h = ops.up_product(x, w_up, p, entries, "silu", where)
    wide_u = by_neurons(x, w_up)
    yield Compared("up_product", u[:real], wide_u[mask].view(real, KEPT))
    wide_h = (p[:real, None] * gate.to(wide) * wide_u.to(dtype).to(wide)).masked_fill(~mask, 0)
    yield Compared("up_product", h[:real], wide_h)
    y = ops.hidden_product(where, (h, w_down), bad_N=entries.bad_N)
    yield Compared("hidden_product", y[:real], by_hidden(h, w_down))
    yield Compared("hidden_product", entries.bad_N[:real], torch.zeros(real, device=device))

    few = decode.DecodeProducts(row_map(counts, rows, decode.TILE), "silu")
    yield Compared("decode_gate", few.gate(x, w_gate)[:real], by_neurons(x, w_gate))
    _, (h_few, union) = few.up(x, w_up, p, entries)
    some_EF = torch.zeros(experts, NEURONS, device=device).index_add(0, expert_N, mask.to(wide)) > 0
    yield Compared("union", union.number_E, some_EF.sum(dim=1))
    there_EF = torch.arange(NEURONS, device=device) < union.number_E[:, None]
    yield Compared("union", union.neurons_EF[there_EF], some_EF.nonzero()[:, 1])
    got, want = h_few[:real, :NEURONS][there_EF[expert_N]], wide_h[some_EF[expert_N]]
    yield Compared("decode_up", got, want)
    y_few = few.down(decode.UnionValues(h_few, union), w_down, entries.bad_N)
    yield Compared("decode_down", y_few[:real], by_hidden(wide_h, w_down))
    yield Compared("decode_down", entries.bad_N[:real], torch.zeros(real, device=device))

    cells = torch.arange(counts.numel(), dtype=torch.int32, device=device)
    blocks = ops.Blocks(cells, counts.shape[1], counts.numel())
    counters = ops.Counters(
        torch.zeros(experts, NEURONS, dtype=torch.int64, device=device),
        torch.zeros(experts, dtype=torch.int64, device=device),
    )
    rule = ops.Weighing("selected", NEURONS, KEPT, 1 / experts)
    sums = ops.block_sums(
        entries, blocks, where, neurons=NEURONS, activation="silu", shares=True, scale_free=True,
        counters=counters, weighing=rule,
    )  # fmt: skip
    block_N = torch.arange(counts.numel(), device=device).repeat_interleave(counts.flatten())
    share = size / size.sum(dim=1, keepdim=True)
    per_block = torch.zeros(counts.numel(), NEURONS, device=device)
    kept_BF, share_BF = (per_block.index_add(0, block_N, v) for v in (mask.to(wide), share))
    want = torch.cat((counts.flatten().to(wide)[:, None], kept_BF, share_BF), dim=1)
    yield Compared("statistics", sums.sums_BX, want)
    yield Compared("gather", counters.counts_EF, kept_BF.view(experts, -1, NEURONS).sum(dim=1))
    rows_B1 = counts.flatten()[:, None].clamp(min=1)
    slope_BF = kept_BF * (NEURONS / KEPT) / rows_B1 / rows_B1 / experts
    weight_BF, want_loss = slope_BF.float(), (slope_BF * share_BF).sum()
    ready = ops.block_sums(
        entries, blocks, where, neurons=NEURONS, activation="silu", shares=True, scale_free=True,
        weighing=rule._replace(ready_BF=weight_BF),
    )  # fmt: skip
    assert sums.weight_BF is not None
    yield Compared("gather", sums.weight_BF, slope_BF)
    for loss in (sums.loss, ready.loss):
        assert loss is not None
        yield Compared("gather", loss, want_loss)
    for got, want in zip(ops.weigh(sums, sums.sums_BX, rule), (slope_BF, want_loss), strict=True):
        yield Compared("weigh", got, want)

    one = torch.ones((), device=device)
    slope = ops.Slope(weight_BF, blocks, True, 1.0, lambda: one)
    bases, dg = ops.rebuild(entries.words_NW, entries.a_NS, slope, "silu", where)
    yield Compared("rebuild", bases[:real], entries.bases_NW[:real])
    assert dg is not None
    level = (slope_BF[block_N] * share).sum(dim=1, keepdim=True)
    wide_dg = gate.to(wide).sign() * (slope_BF[block_N] - level) / size.sum(dim=1, keepdim=True)
    yield Compared("rebuild", dg[:real], wide_dg[mask].view(real, KEPT))
    kept = ops.Kept(entries.a_NS, u, entries.words_NW, bases)
    da, du, h_again, dp = ops.dh_product(dy, w_down, p, kept, dg, "silu", where)
    dh = by_neurons(dy, w_down)
    wide_a = a[:real].to(wide)
    s = wide_a.sigmoid()
    u_of = wide_u.to(dtype).to(wide)
    d_gate = p[:real, None] * u_of * dh + dg.new_zeros(real, NEURONS).to(wide).masked_scatter(
        mask, dg[:real].to(wide)
    )
    want_da = (d_gate * s * (1 + wide_a * (1 - s))).masked_fill(~mask, 0)
    yield Compared("dh_product", da[:real], want_da)
    want_du = (p[:real, None] * gate.to(wide) * dh).masked_fill(~mask, 0)
    yield Compared("dh_product", du[:real], want_du)
    yield Compared("dh_product", h_again[:real], h[:real])
    want_dp = (gate.to(wide) * u_of * dh).masked_fill(~mask, 0).sum(dim=1)
    yield Compared("probability_grad", dp[:real], want_dp)
    dx = ops.hidden_product(where, (da, w_gate), (du, w_up))
    yield Compared("hidden_product", dx[:real], by_hidden(da, w_gate) + by_hidden(du, w_up))
    main_grad = torch.ones(experts, NEURONS, HIDDEN, device=device)
    ops.weight_grad(da, x, main_grad, True, where)
    parts = zip(da[:real].split(rows_E.tolist()), x[:real].split(rows_E.tolist()), strict=True)
    want_dw = torch.stack([v.to(wide).t() @ rows.to(wide) for v, rows in parts])
    yield Compared("weight_grad", main_grad - 1, want_dw)


def block_comparisons(device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """The kernels of K9, of rows that keep one block and of rows that keep two."""
    for slots in (1, 2):
        yield from _by_segments(device, dtype, KEPT // slots, slots)


def _by_segments(
    device: torch.device, dtype: torch.dtype, block: int, slots: int
) -> Iterator[Compared]:
    rows_E = torch.tensor(COUNTS, device=device).sum(dim=1)
    experts, real = len(COUNTS), int(rows_E.sum())
    rows, wide = real + SPARE, torch.float32
    where = row_map(rows_E, rows)
    expert_N = torch.arange(experts, device=device).repeat_interleave(rows_E)

    def made(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    def product(v: Tensor, w: Tensor) -> Tensor:
        """[real, ...] v W of each row's expert, in float32."""
        return torch.einsum("nf,nfh->nh", v[:real].to(wide), w.to(wide)[expert_N])

    x, dy, a, p = made(rows, HIDDEN), made(rows, HIDDEN), made(rows, NEURONS), torch.rand(rows)
    w_gate, w_up, w_down = (made(experts, NEURONS, HIDDEN) / 8 for _ in range(3))
    p = p.to(device)
    p_N1, a_NF = p[:real, None], a[:real].to(wide)
    choose = Selection(KEPT, block=block)
    entries = ops.select(a, choose, "relu", where)
    mask = _bits(entries, real)
    rule = NeuronSelector("topk", KEPT, KEPT, block=block)
    yield Compared("select_blocks", mask, rule(gate_activation("relu", a[:real])))
    yield Compared("select_blocks", entries.a_NS[:real], a[:real][mask].view(real, KEPT))
    found = segments.segments_of(entries.words_NW, entries.bases_NW, block, slots, NEURONS, where)
    unit_P = mask[:, ::block].nonzero()[:, 1]
    segment_P = expert_N.repeat_interleave(slots) * (NEURONS // block) + unit_P
    order_P = segment_P.argsort(stable=True)
    yield Compared("segment_map", found.order_P[: real * slots], order_P)

    def spread(values: segments.Values) -> Tensor:
        """[real, F] of values in sorted order."""
        of_PB = torch.empty_like(values.of_PB[: real * slots])
        of_PB[order_P] = values.of_PB[: real * slots]
        return torch.zeros_like(a[:real]).masked_scatter(mask, of_PB).to(wide)

    u, h = segments.up_product(x, w_up, p, entries.a_NS, found, "relu")
    u_NF = product(x, w_up.mT).masked_fill(~mask, 0)
    yield Compared("up_segments", u[:real], u_NF[mask].view(real, KEPT))
    u_NF, g_NF = u_NF.to(dtype).to(wide), a_NF.relu()
    yield Compared("up_segments", spread(h), p_N1 * g_NF * u_NF)
    y = segments.hidden_product(where, (h, w_down), bad_N=entries.bad_N)
    down = "hidden_product" if slots == 1 else "add_slots"
    yield Compared(down, y[:real], product(spread(h), w_down))
    yield Compared(down, entries.bad_N[:real], torch.zeros(real, device=device))
    kept = ops.Kept(entries.a_NS, u, entries.words_NW, entries.bases_NW)
    da, du, _, dp = segments.dh_product(dy, w_down, p, kept, None, found, "relu", where)
    dh_NF = product(dy, w_down.mT).masked_fill(~mask, 0)
    yield Compared("dh_segments", spread(da), p_N1 * u_NF * dh_NF * (a_NF > 0))
    yield Compared("dh_segments", spread(du), p_N1 * g_NF * dh_NF)
    yield Compared("dh_segments", dp[:real], (g_NF * u_NF * dh_NF).sum(dim=1))
    dx = segments.hidden_product(where, (da, w_gate), (du, w_up))
    yield Compared(down, dx[:real], product(spread(da), w_gate) + product(spread(du), w_up))
    main_grad = torch.ones(experts, NEURONS, HIDDEN, device=device)
    segments.weight_grad(da, x, main_grad, True)
    parts = zip(*(v[:real].split(rows_E.tolist()) for v in (spread(da), x)), strict=True)
    want = torch.stack([v.t() @ of.to(wide) for v, of in parts])
    yield Compared("weight_grad", main_grad - 1, want)


def two_four_comparisons(device: torch.device, dtype: torch.dtype) -> Iterator[Compared]:
    """Torch's product of two of every four neurons as the backend calls it, of one term and of two;
    a row map of rows past the last expert's."""
    gemm = two_four.gemm_here()
    assert not isinstance(gemm, str)
    counts, rows, neurons = [33, 0, 7], 44, 128
    where = row_map(torch.tensor(counts, device=device), rows)
    expert_N = torch.arange(len(counts), device=device).repeat_interleave(
        torch.tensor(counts, device=device)
    )
    mask = torch.rand(rows, neurons // 4, 4, device=device).argsort(dim=2).view(rows, neurons) < 2
    words = NeuronMask.from_bool(mask).words()

    def term() -> tuple[two_four.TwoFour, Tensor]:
        v = torch.randn(rows, neurons, device=device).masked_fill(~mask, 0).to(dtype)
        w = torch.randn(len(counts), neurons, HIDDEN, device=device).to(dtype) / 8
        return two_four.TwoFour(v, words), w

    def product(v: two_four.TwoFour, w: Tensor) -> Tensor:
        real = v.wide_NF[: sum(counts)].to(torch.float32)
        return torch.einsum("nf,nfh->nh", real, w.to(torch.float32)[expert_N])

    for terms in ([term()], [term(), term()]):
        got = two_four.hidden_product(gemm, counts, where, *terms)
        want = torch.stack([product(*one) for one in terms]).sum(dim=0)
        yield Compared(f"2:4 of {gemm.name}", got[: sum(counts)], want)


def _bits(entries: ops.Entries, rows: int) -> Tensor:
    """[rows, F] bool."""
    return NeuronMask.of_words(entries.words_NW[:rows], NEURONS, kept=KEPT).to_bool()
