"""The balance loss inside the Triton kernels, against moe/gate_shares.py in float64.

Cases of triton_interpreter_cases.py, which runs them.
"""

import torch

from megatron_mone.kernels import Selection, grouped_mlp_with_gates
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.triton import masked_experts, ops
from megatron_mone.moe.balance_loss import BlockStatistics, gate_shares, row_weights
from tests.unit.kernels.triton_case_tools import case, close, inputs

COUNTS = [[3, 1, 2], [0, 0, 0], [1, 0, 4]]  # by source; the first and the last are one micro-batch
BLOCK_OF_CHUNK = [0, 1, 0, 2, 3, 2, 4, 5, 4]
SCALE, LOSS_SCALE = 0.25, 3.0


@case("selected", torch.float32, False)
@case("raw", torch.float32, True)
@case("entropy", torch.float32, True)
@case("selected", torch.bfloat16, False)
@case("selected", torch.float32, True, 5)
def balance(loss_type: str, dtype: torch.dtype, padded: bool, block: int = 1) -> None:
    """Sums, weights, loss, counters, and the loss's gradient together with y's; with blocks by
    segments."""
    counts = torch.tensor(COUNTS)
    rows, neurons, kept = int(counts.sum()), 40, 10
    leaves = inputs(counts.sum(dim=1).tolist(), 16, neurons, dtype, spare=2)
    real_N = torch.rand(rows + 2) < 0.7 if padded else None
    blocks = ops.Blocks(torch.tensor(BLOCK_OF_CHUNK, dtype=torch.int32), 2, 6, real_N)
    counters = ops.Counters(torch.ones(3, neurons, dtype=torch.int64), torch.ones(3).long())
    y, mask, entries = masked_experts(
        *leaves[:2], counts, *leaves[2:], choose=Selection(kept, block=block), activation="silu"
    )
    free = loss_type != "raw"
    rule = ops.Weighing(loss_type, neurons, kept, 1 / 3)
    sums = entries.block_sums(
        blocks, shares=True, scale_free=free, counters=counters, weighing=rule
    )
    _, _, weight_BF, loss = sums
    slope = ops.Slope(weight_BF, blocks, free, SCALE, lambda: torch.tensor(LOSS_SCALE))
    dy = torch.randn_like(y)
    dy[rows:] = torch.nan
    grads = torch.autograd.grad(entries.attach(y, slope), leaves, dy)

    twins = [leaf.detach().double() for leaf in leaves]
    twins = [t.requires_grad_() for t in (*(twin[:rows] for twin in twins[:2]), *twins[2:])]
    only = NeuronMask.from_bool(mask.to_bool()[:rows])
    want = grouped_mlp_with_gates(
        *twins[:2], counts.sum(dim=1).tolist(), *twins[2:], choose=only, activation="silu",
        backend="reference",
    )  # fmt: skip
    block_N = torch.tensor(BLOCK_OF_CHUNK).repeat_interleave(counts.flatten())
    if real_N is not None:
        index = real_N[:rows].nonzero().flatten()
        entry = real_N[:rows][only.rows_K]
        want = want._replace(mask=only.rows(index), gate_K=want.gate_K[entry])
        block_N = block_N[index]
    shares = gate_shares(want, block_N, 6, loss_type=loss_type)
    share_BF, counts_BF, total_N = shares.sums()
    rows_B = torch.bincount(block_N, minlength=6)
    whole = BlockStatistics(rows_B, counts_BF.double(), share_BF)
    right_BF = row_weights(
        whole, loss_type=loss_type, num_experts=3, num_neurons=neurons, neurons_per_token=kept
    )
    right = shares.loss(right_BF, share_BF, total_N)

    made = sums.sums_BX
    assert torch.equal(made[:, 0].long(), rows_B)
    assert torch.equal(made[:, 1 : 1 + neurons].long(), counts_BF)
    close(made[:, 1 + neurons :], share_BF, dtype)
    used = rows_B > 0
    close(weight_BF[used], right_BF[used], dtype)
    close(loss, right.detach(), dtype)
    assert torch.equal(counters.counts_EF - 1, counts_BF.view(3, 2, -1).sum(dim=1))
    assert torch.equal(counters.rows_E - 1, rows_B.view(3, 2).sum(dim=1))
    assert int(sums.ticket) == 0
    log = torch.tensor([1.0, 2.0])
    given = rule._replace(ready_BF=2 * weight_BF, tally=log[1], tally_scale=0.5)
    ready = entries.block_sums(blocks, shares=True, scale_free=free, weighing=given)
    assert ready.weight_BF is given.ready_BF
    close(ready.loss, 2 * loss, torch.float32)
    close(log, torch.stack((log.new_ones(()), 2.0 + loss)), torch.float32)
    alone = entries.block_sums(blocks, shares=True, scale_free=free)
    assert torch.equal(alone.sums_BX, made)
    twice = alone.sums_BX * 2  # with another rank, whose rows are as these
    log[:] = 0
    again_BF, again = ops.weigh(alone, twice, rule._replace(tally=log[0]))
    close(log, torch.stack((again, log.new_zeros(()))), torch.float32)
    assert int(alone.ticket) == 0
    close(again_BF[used], row_weights(
        BlockStatistics(2 * rows_B, 2 * counts_BF.double(), 2 * share_BF), loss_type=loss_type,
        num_experts=3, num_neurons=neurons, neurons_per_token=kept,
    )[used], dtype)  # fmt: skip
    close(again, (again_BF.double() * share_BF).sum(), dtype)
    total = (want.y_NH * dy[:rows].double()).sum() + right * (SCALE * LOSS_SCALE)
    wants = torch.autograd.grad(total, twins)
    for grad, wanted in zip(grads, wants, strict=True):
        close(grad[:rows] if grad.dim() < 3 else grad, wanted, dtype)


@case()
def counts_alone() -> None:
    """Without a loss: counts and rows, no shares, no gradient of their own."""
    x, p, *w = inputs([2, 1], 16, 40, torch.float32)
    _, mask, entries = masked_experts(
        x, p, torch.tensor([2, 1]), *w, choose=Selection(10), activation="silu"
    )
    blocks = ops.Blocks(torch.arange(2, dtype=torch.int32), 1, 2)
    counters = ops.Counters(torch.zeros(2, 40, dtype=torch.int64), torch.zeros(2).long())
    entries.block_sums(blocks, shares=False, scale_free=False, counters=counters)
    kept_NF = mask.to_bool()
    assert torch.equal(counters.counts_EF[0], kept_NF[:2].sum(dim=0))
    assert torch.equal(counters.counts_EF[1], kept_NF[2:].sum(dim=0))
    assert counters.rows_E.tolist() == [2, 1]


@case()
def sums_of_several_ranks_in_two_launches() -> None:
    """With T_n and L_n summed elsewhere between two launches: as in one, where nothing is added."""
    x, p, *w = inputs([3, 2], 16, 40, torch.float32)
    _, _, entries = masked_experts(
        x, p, torch.tensor([3, 2]), *w, choose=Selection(10), activation="silu"
    )
    blocks = ops.Blocks(torch.arange(2, dtype=torch.int32), 1, 2)
    slope = ops.Slope(torch.rand(2, 40), blocks, True, 1.0, lambda: torch.tensor(2.0))
    chosen, where = entries.entries, entries.where
    seen: list[torch.Tensor] = []
    one = ops.rebuild(chosen.words_NW, chosen.a_NS, slope, "silu", where)
    two = ops.rebuild(
        chosen.words_NW, chosen.a_NS, slope, "silu", where, lambda *parts: seen.extend(parts)
    )
    for first, second in zip(one, two, strict=True):
        assert torch.equal(first, second)
    close(seen[1], chosen.total_N, torch.float32)
