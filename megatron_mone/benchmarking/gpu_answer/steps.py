"""The kernels of a layer one by one, in data-flow order, each with its check against float64.

A step's inputs are what the kernels before it made, so that each is checked on what it got. Checks
look at real rows alone: those past the last expert's row are nobody's. Activation: silu.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mone.benchmarking.gpu_answer import float64 as exact
from megatron_mone.benchmarking.gpu_answer.float64 import off, same, spread
from megatron_mone.benchmarking.gpu_answer.given import Given
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.operands import apply_rule
from megatron_mone.kernels.triton import ops
from megatron_mone.kernels.triton.row_map import RowMap, row_map

SILU, LOSS_SCALE, SCALE = "silu", 3.0, 0.25
BEFORE = 0.5  # in main_grad
Outputs = Sequence[Tensor | None]


class Step(NamedTuple):
    """One call of ops.py.

    Attributes:
        name: K number and what it is.
        run: makes its outputs; the same each time.
        errors: of the outputs, relative; NaN where integers differ.
        timed: its kernels without what `run` does to make the same each time; None where that is
            nothing.
    """

    name: str
    run: Callable[[], Outputs]
    errors: Callable[[Outputs], list[float]]
    timed: Callable[[], object] | None = None


class Steps:
    """Of one layer.

    Args:
        given: its inputs.

    Attributes:
        all: the steps, in order.
    """

    def __init__(self, given: Given) -> None:
        self.given, self.shape, self.real = given, given.shape, given.real
        self.counts, self.F = given.shape.counts, given.shape.neurons
        self.where = row_map(given.counts_ER, given.shape.rows)
        self.choose = Selection(given.shape.kept)
        gate, up, down = given.weights
        self.a_NF = ops.gate_product(given.x_NH, gate, self.where)
        self.entries = ops.select(self.a_NF, self.choose, SILU, self.where)
        self.u_NS, self.h_NF = ops.up_product(
            given.x_NH, up, given.p_N, self.entries, SILU, self.where
        )
        self.sums = self._block_sums()
        assert self.sums.weight_BF is not None
        loss_scale = torch.tensor(LOSS_SCALE, device=given.x_NH.device)
        self.slope = ops.Slope(self.sums.weight_BF, given.blocks, True, SCALE, lambda: loss_scale)
        self.bases_NW, self.dg_NS = self._rebuild(self.slope)
        self.kept = ops.Kept(self.entries.a_NS, self.u_NS, self.entries.words_NW, self.bases_NW)
        self.da_NF, self.du_NF, _, _ = self._dh()
        self.wide_NF = ops.gate_product(given.x_NH, up, self.where)
        self.dwide_NF = ops.gate_product(given.dy_NH, down, self.where)
        self.bad_y_NH = given.dy_NH.clone()
        self.bad_y_NH[:1, -1:] = torch.inf
        self.bad_N, self.marked_N = (torch.zeros_like(self.entries.bad_N) for _ in range(2))
        self.bad_N[:1] = 1
        self.first_EX = given.counts_ER.new_zeros((given.shape.experts, 3))
        self.dw_EFH, self.main_EFH = torch.empty_like(gate), torch.zeros_like(gate).float()
        self.all = [
            Step("K0 row map", self._row_map, self._row_map_errors),
            Step("K1 gate", lambda: (ops.gate_product(given.x_NH, gate, self.where),),
                 lambda out: [off(self.of(out[0]), self._wide(given.x_NH, gate))]),
            Step("K2 select", lambda: ops.select(self.a_NF, self.choose, SILU, self.where),
                 self._select_errors),
            Step("K2 select of relu", lambda: ops.select(
                 self.a_NF, self.choose, "relu", self.where), self._relu_errors),
            Step("K2 compact", lambda: ops.compact(
                 self.a_NF, self.entries.words_NW, given.shape.kept, SILU, self.where),
                 self._entries_errors),
            Step("K3 up", lambda: ops.up_product(
                 given.x_NH, up, given.p_N, self.entries, SILU, self.where), self._up_errors),
            Step("K3 up behind another GEMM", self._up_entries, self._up_errors),
            Step("K4 down", self._down, self._down_errors),
            Step("K4 marks of another GEMM", self._mark_bad, self._mark_bad_errors),
            Step("K5 block sums", self._sums_and_weights, self._sums_errors),
            Step("K5 weigh", lambda: ops.weigh(self.sums, self.sums.sums_BX, self._weighing),
                 self._weigh_errors),
            Step("K5 note bad rows", self._note_bad, self._note_bad_errors, self._note),
            Step("K2 rebuild", lambda: self._rebuild(None)[:1], self._bases_errors),
            Step("K2 rebuild with slope", lambda: self._rebuild(self.slope), self._rebuild_errors),
            Step("K6 dh", self._dh, self._dh_errors),
            Step("K6 dh behind another GEMM", self._dh_entries, self._dh_errors),
            Step("K7 dx", lambda: (ops.hidden_product(
                 self.where, (self.da_NF, gate), (self.du_NF, up)),), self._dx_errors),
            Step("K8 weight gradient", lambda: (self._dw(self.dw_EFH, False),), self._dw_errors),
            Step("K8 into main_grad", self._into_main, self._main_errors,
                 lambda: self._dw(self.main_EFH, True)),
        ]  # fmt: skip

    def of(self, tensor: Tensor | None) -> Tensor:
        """The real rows."""
        assert tensor is not None
        return tensor[: self.real] if tensor.shape[:1] == (self.shape.rows,) else tensor

    def _wide(self, x_NH: Tensor, w_EFH: Tensor) -> Tensor:
        return exact.rows_by_neurons(self.of(x_NH), w_EFH, self.counts)

    @property
    def _kept_NF(self) -> Tensor:
        return exact.kept_of(self.of(self.entries.words_NW), self.F)

    # K0

    def _row_map(self) -> Outputs:
        made = row_map(self.given.counts_ER, self.shape.rows)
        return made.offsets_E1, made.chunk_offsets_C1, made.tile_expert_T, made.tile_row_T

    def _row_map_errors(self, out: Outputs) -> list[float]:
        totals = self.given.counts_ER.sum(dim=1)
        wanted = _tiles(totals.tolist(), self.where)
        return [
            same(_there(out[0])[1:], totals.cumsum(0)),
            same(_there(out[1])[1:], self.given.counts_ER.flatten().cumsum(0)),
            *(same(_there(got).cpu()[: len(want)], want) for got, want in
              zip(out[2:], wanted, strict=True)),
        ]  # fmt: skip

    # K2

    def _select_errors(self, out: Outputs) -> list[float]:
        """S of each row, none of which is smaller than one left out but for rounding."""
        kept_NF = exact.kept_of(self.of(out[0]), self.F)
        size_NF = exact.sigma(self.of(self.a_NF).double()).abs()
        least_N = size_NF.masked_fill(~kept_NF, torch.inf).amin(dim=1)
        most_N = size_NF.masked_fill(kept_NF, 0.0).amax(dim=1)
        counts_N = kept_NF.sum(dim=1)
        above = ((most_N - least_N) / most_N.clamp(min=1e-30)).clamp(min=0.0)
        count = same(counts_N, torch.full_like(counts_N, self.choose.kept))
        return [count, float(above.max()), *self._entries_errors(out, kept_NF)]

    def _relu_errors(self, out: Outputs) -> list[float]:
        """The same bits as torch's choice: relu is exact, and its zeros are ties."""
        kept_NF = apply_rule(self.choose, torch.relu(self.of(self.a_NF)))
        return [same(exact.kept_of(self.of(out[0]), self.F), kept_NF)]

    def _entries_errors(self, out: Outputs, kept_NF: Tensor | None = None) -> list[float]:
        kept_NF = self._kept_NF if kept_NF is None else kept_NF
        a_NF = self.of(self.a_NF)
        total_N = spread(a_NF[kept_NF], kept_NF)
        return [
            same(self.of(out[1]), _bases(kept_NF)),
            same(self.of(out[2]).flatten(), a_NF[kept_NF]),
            off(self.of(out[3]), exact.sigma(total_N).abs().sum(dim=1)),
            same(self.of(out[4]), torch.zeros_like(self.of(out[4]))),
        ]

    # K3

    def _up_entries(self) -> Outputs:
        return ops.up_entries(self.wide_NF, self.given.p_N, self.entries, SILU, self.where)

    def _up_errors(self, out: Outputs) -> list[float]:
        kept_NF = self._kept_NF
        u_NF = self._wide(self.given.x_NH, self.given.weights[1])
        g_NF = exact.sigma(spread(self.of(self.entries.a_NS), kept_NF))
        h_NF = self.of(self.given.p_N).double()[:, None] * g_NF * u_NF * kept_NF
        return [off(self.of(out[0]).flatten(), u_NF[kept_NF]), off(self.of(out[1]), h_NF)]

    # K4

    def _down(self) -> Outputs:
        bad_N = self.entries.bad_N
        y_NH = ops.hidden_product(self.where, (self.h_NF, self.given.weights[2]), bad_N=bad_N)
        return y_NH, bad_N

    def _down_errors(self, out: Outputs) -> list[float]:
        y_NH = exact.rows_by_hidden(self.of(self.h_NF), self.given.weights[2], self.counts)
        return [off(self.of(out[0]), y_NH), same(self.of(out[1]), self.of(self.bad_N) * 0)]

    def _mark_bad(self) -> Outputs:
        ops.mark_bad(self.bad_y_NH, self.marked_N, self.where)
        return (self.marked_N,)

    def _mark_bad_errors(self, out: Outputs) -> list[float]:
        bad_N = self.of(out[0])
        return [same(bad_N, torch.arange(len(bad_N), device=bad_N.device) == 0)]

    # K5

    @property
    def _weighing(self) -> ops.Weighing:
        return ops.Weighing("selected", self.F, self.choose.kept, 1 / self.shape.experts)

    def _block_sums(self) -> ops.BlockSums:
        return ops.block_sums(
            self.entries, self.given.blocks, self.where, neurons=self.F, activation=SILU,
            shares=True, scale_free=True, weighing=self._weighing,
        )  # fmt: skip

    def _sums_and_weights(self) -> Outputs:
        made = self._block_sums()
        return made.sums_BX, made.weight_BF, made.loss

    def _sums_errors(self, out: Outputs) -> list[float]:
        kept_NF = self._kept_NF
        g_NF = exact.sigma(spread(self.of(self.entries.a_NS), kept_NF)).abs()
        share_NF = g_NF / g_NF.sum(dim=1, keepdim=True)
        counts = list(self.counts)
        count_BF = torch.stack([part.sum(dim=0) for part in kept_NF.split(counts)])
        share_BF = torch.stack([part.sum(dim=0) for part in share_NF.split(counts)])
        sums = _there(out[0])
        rows = torch.tensor(counts, device=sums.device)
        return [
            same(sums[:, 0], rows),
            same(sums[:, 1 : 1 + self.F], count_BF),
            off(sums[:, 1 + self.F :], share_BF),
            *self._weigh_errors(out[1:]),
        ]

    def _weigh_errors(self, out: Outputs) -> list[float]:
        sums = self.sums.sums_BX.double()
        rows_B1 = sums[:, :1].clamp(min=1.0)
        count_BF, share_BF = sums[:, 1 : 1 + self.F], sums[:, 1 + self.F :]
        slope_BF = count_BF * (self.F / self.choose.kept) / rows_B1
        weight_BF = slope_BF / self.shape.experts / rows_B1
        return [off(_there(out[0]), weight_BF), off(_there(out[1]), (weight_BF * share_BF).sum())]

    def _note(self) -> None:
        ops.note_bad(self.bad_N, self.given.p_N, self.first_EX, 7, self.where)

    def _note_bad(self) -> Outputs:
        self.first_EX.zero_()
        self._note()
        return (self.first_EX,)

    def _note_bad_errors(self, out: Outputs) -> list[float]:
        want_EX = torch.zeros(self.shape.experts, 3, dtype=torch.int64)
        first = next(e for e, count in enumerate(self.counts) if count)
        want_EX[first] = torch.tensor([7, 1, self.counts[first]])
        return [same(_there(out[0]).cpu(), want_EX)]

    # Backward pass

    def _rebuild(self, slope: ops.Slope | None) -> tuple[Tensor, Tensor | None]:
        chosen = self.entries
        return ops.rebuild(chosen.words_NW, chosen.a_NS, slope, SILU, self.where)

    def _bases_errors(self, out: Outputs) -> list[float]:
        return [same(self.of(out[0]), _bases(self._kept_NF))]

    def _rebuild_errors(self, out: Outputs) -> list[float]:
        kept_NF = self._kept_NF
        g_NF = exact.sigma(spread(self.of(self.entries.a_NS), kept_NF))
        counts = self.given.counts_ER.sum(dim=1)
        weight_NF = self.slope.weight_BF.double().repeat_interleave(counts, dim=0)
        total_N1 = g_NF.abs().sum(dim=1, keepdim=True)
        level_N1 = (g_NF.abs() * weight_NF).sum(dim=1, keepdim=True)
        dg_NF = g_NF.sign() * (weight_NF - level_N1 / total_N1) / total_N1 * SCALE * LOSS_SCALE
        return [*self._bases_errors(out), off(self.of(out[1]).flatten(), dg_NF[kept_NF])]

    def _dh(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        given = self.given
        return ops.dh_product(
            given.dy_NH, given.weights[2], given.p_N, self.kept, self.dg_NS, SILU, self.where
        )

    def _dh_entries(self) -> Outputs:
        return ops.dh_entries(
            self.dwide_NF, self.given.p_N, self.kept, self.dg_NS, SILU, self.where
        )

    def _dh_errors(self, out: Outputs) -> list[float]:
        kept_NF, p_N1 = self._kept_NF, self.of(self.given.p_N).double()[:, None]
        a_NF, u_NF, dg_NF = (
            spread(self.of(t), kept_NF) for t in (self.entries.a_NS, self.u_NS, self.dg_NS)
        )
        g_NF = exact.sigma(a_NF)
        dh_NF = self._wide(self.given.dy_NH, self.given.weights[2]) * kept_NF
        da_NF = (dh_NF * p_N1 * u_NF + dg_NF) * exact.sigma_prime(a_NF)
        wants = (da_NF, dh_NF * p_N1 * g_NF, p_N1 * g_NF * u_NF, (dh_NF * g_NF * u_NF).sum(dim=1))
        return [off(self.of(got), want) for got, want in zip(out, wants, strict=True)]

    def _dx_errors(self, out: Outputs) -> list[float]:
        terms = zip((self.da_NF, self.du_NF), self.given.weights[:2], strict=True)
        dx_NH = sum(exact.rows_by_hidden(self.of(v), w, self.counts) for v, w in terms)
        assert isinstance(dx_NH, Tensor)
        return [off(self.of(out[0]), dx_NH)]

    def _dw(self, into_EFH: Tensor, adds: bool) -> Tensor:
        ops.weight_grad(self.da_NF, self.given.x_NH, into_EFH, adds, self.where)
        return into_EFH

    def _dw_errors(self, out: Outputs, before: float = 0.0) -> list[float]:
        dw_EFH = exact.weight_grad(self.of(self.da_NF), self.of(self.given.x_NH), self.counts)
        return [off(_there(out[0]).double() - before, dw_EFH)]

    def _into_main(self) -> Outputs:
        return (self._dw(self.main_EFH.fill_(BEFORE), True),)

    def _main_errors(self, out: Outputs) -> list[float]:
        return self._dw_errors(out, BEFORE)


def _there(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _bases(kept_NF: Tensor) -> Tensor:
    """[N, W] bits set before each word."""
    padded = torch.nn.functional.pad(kept_NF.long(), (0, -kept_NF.shape[1] % 32))
    counts_NW = padded.view(len(kept_NF), -1, 32).sum(dim=2)
    return counts_NW.cumsum(dim=1) - counts_NW


def _tiles(totals: list[int], where: RowMap) -> tuple[Tensor, Tensor]:
    """Expert and first row of each tile that has rows."""
    experts, rows, start = [], [], 0
    for expert, count in enumerate(totals):
        for row in range(start, start + count, where.tile):
            experts.append(expert)
            rows.append(row)
        start += count
    return torch.tensor(experts), torch.tensor(rows)
