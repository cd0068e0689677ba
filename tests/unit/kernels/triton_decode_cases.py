"""Few rows without gradients (D1 to D3), against the reference in float64.

Cases of triton_interpreter_cases.py, which runs them.
"""

import torch
from torch import Tensor

from megatron_mone.kernels import Selection, grouped_mlp_with_gates
from megatron_mone.kernels.activations import gate_activation
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.triton import masked_experts, ops
from megatron_mone.kernels.triton.decode import DecodeProducts, union_of
from megatron_mone.kernels.triton.grouped_experts import KeptEntries
from megatron_mone.kernels.triton.row_map import row_map
from tests.unit.kernels.triton_case_tools import case, close, inputs

Made = tuple[Tensor, NeuronMask, KeptEntries]


def decoded(operands, counts: list[int], choose, activation: str = "silu") -> Made:
    """Leaves that want gradients, where nobody takes any."""
    x, p, *w = operands
    with torch.no_grad():
        made = masked_experts(x, p, torch.tensor(counts), *w, choose=choose, activation=activation)
    assert isinstance(made[2].call.products, DecodeProducts)
    return made


def chosen(operands, counts: list[int], choose: Selection, activation: str) -> Tensor:
    """[N, F] by the rule, of float32 operands; N real rows."""
    parts = zip(
        operands[0].detach()[: sum(counts)].split(counts), operands[2].detach(), strict=True
    )
    gate_NF = gate_activation(activation, torch.cat([x @ w.t() for x, w in parts]))
    rule = NeuronSelector("topk", choose.kept, choose.kept, 0.0, choose.groups, choose.block)
    return rule(gate_NF)


@case([1], 21, 33, Selection(1), "gelu", torch.float32, 0)
@case([1, 0, 1, 1], 16, 40, Selection(10), "silu", torch.float32, 2)
@case([2, 0, 4], 24, 48, Selection(12, groups=2), "sigmoid", torch.float32, 1)
@case([8], 16, 32, Selection(32), "silu", torch.float32, 0)
@case([18, 0, 1], 8, 20, Selection(5), "relu", torch.float32, 1)
@case([2, 1], 16, 40, Selection(10), "squared_relu", torch.float32, 0)
@case([2, 1], 16, 88, Selection(22, block=11), "silu", torch.float32, 0)
@case([0, 0], 8, 12, Selection(4), "silu", torch.float32, 0)
@case([0, 0], 8, 12, Selection(4), "silu", torch.float32, 2)
@case([1, 0, 3], 32, 288, Selection(144), "silu", torch.bfloat16, 2)
@case([2, 1], 300, 64, Selection(16, block=16), "silu", torch.bfloat16, 0)
def decode(counts, hidden, neurons, choose, activation, dtype, spare) -> None:
    """Values and mask, with rows of no expert. The mask given back makes the same bits; counters
    count the mask."""
    operands, real = inputs(counts, hidden, neurons, dtype, spare), sum(counts)
    y, mask, kept = decoded(operands, counts, choose, activation)
    assert y.shape == (real + spare, hidden)
    only = NeuronMask.from_bool(mask.to_bool()[:real])
    assert not mask.to_bool()[real:].any()
    assert set(only.to_bool().sum(dim=1).tolist()) <= {choose.kept}
    if dtype == torch.float32 and real:
        assert torch.equal(only.to_bool(), chosen(operands, counts, choose, activation))
    x, p, *w = (t.detach().double() for t in operands)
    want = grouped_mlp_with_gates(
        x[:real], p[:real], counts, *w, choose=only, activation=activation, backend="reference"
    )
    close(y[:real], want.y_NH, dtype)
    assert not kept.bad_N[:real].any()
    again, given, _ = decoded(operands, counts, mask, activation)
    assert given is mask
    assert torch.equal(again[:real], y[:real])

    counters = ops.Counters(
        torch.zeros(len(counts), neurons, dtype=torch.int64),
        torch.zeros(len(counts), dtype=torch.int64),
    )
    blocks = ops.Blocks(torch.arange(len(counts), dtype=torch.int32), 1, len(counts))
    kept.block_sums(blocks, shares=True, scale_free=True, counters=counters)
    rows_EF = [part.sum(dim=0) for part in only.to_bool().split(counts)]
    assert torch.equal(counters.counts_EF, torch.stack(rows_EF))
    assert counters.rows_E.tolist() == counts


@case([3, 0, 4])
def decode_of_ties_and_nan(counts: list[int]) -> None:
    """Small integers, most of whose gates are equal; a NaN is kept, and its rows are marked."""
    operands = [t.detach() for t in inputs(counts, 4, 40, torch.float32)]
    for t in (operands[0], *operands[2:]):
        t.copy_(torch.randint(-1, 2, t.shape))
    operands[2][2, 7] = torch.nan
    _, mask, kept = decoded(operands, counts, Selection(9), "relu")
    assert torch.equal(mask.to_bool(), chosen(operands, counts, Selection(9), "relu"))
    assert mask.to_bool()[3:, 7].all()
    assert kept.bad_N.tolist() == [0, 0, 0, 1, 1, 1, 1]


@case(torch.float32, 1)
@case(torch.bfloat16, 8)
def only_the_union_is_read(dtype: torch.dtype, block: int) -> None:
    """Rows of W_up and W_down of all other neurons are NaN, and the whole of an expert without
    rows. Nothing of it reaches y."""
    counts, neurons = [2, 0, 1], 80
    operands = [t.detach() for t in inputs(counts, 16, neurons, dtype, 1)]
    y, mask, _ = decoded(operands, counts, Selection(16, block=block))
    where = row_map(torch.tensor(counts), 4, 16)
    neurons_EF, number_E = union_of(mask.words(), neurons, where)
    wants = [kept_NF.any(dim=0) for kept_NF in mask.to_bool()[:3].split(counts)]
    for want_F, found_F, number in zip(wants, neurons_EF, number_E, strict=True):
        assert found_F[:number].tolist() == want_F.nonzero().flatten().tolist()
    gate, *others = operands[2:]
    gate[1] = torch.nan
    for w in others:
        w[~torch.stack(wants)] = torch.nan
    again, _, kept = decoded(operands, counts, Selection(16, block=block))
    assert torch.equal(again[:3], y[:3])
    assert not kept.bad_N[:3].any()
