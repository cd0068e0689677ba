"""The Triton backend through the public op, against the reference, in Triton's interpreter.

Cases of triton_interpreter_cases.py, which runs them.
"""

from functools import partial
from unittest import mock

import pytest
import torch
from torch import Tensor

from megatron_mone.kernels import (
    Choose,
    Selection,
    grouped_mlp_with_gates,
    mone_grouped_mlp,
    resolve_backend,
)
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.te import backend as te
from megatron_mone.kernels.te.padding import PaddedLinears
from megatron_mone.kernels.triton import backend, ops, self_check
from tests.unit.kernels.te_stand_ins import AlignedLinears
from tests.unit.kernels.triton_case_tools import against_reference, case, close, inputs


def public_op(
    leaves: list[Tensor], counts: list[int], choose: Choose, activation: str = "silu"
) -> NeuronMask:
    """Values and all gradients of y, against the reference in float64; in float32 the mask is the
    reference's own choice."""

    def run(x, p, n, *w):
        out = grouped_mlp_with_gates(
            x, p, n, *w, choose=choose, activation=activation, backend="triton"
        )
        return out.y_NH, out.mask

    mask = against_reference(run, leaves, counts, activation)
    if leaves[0].dtype == torch.float32:
        x, p, *w = (leaf.detach() for leaf in leaves)
        want = grouped_mlp_with_gates(
            x, p, counts, *w, choose=choose, activation=activation, backend="reference"
        )
        assert mask == want.mask
    return mask


@case([3, 0, 4], 24, 64, Selection(16), "silu", torch.float32)
@case([3, 4], 24, 64, Selection(16, groups=4), "gelu", torch.float32)
@case([3, 4], 24, 48, Selection(12, groups=2, block=2), "relu", torch.float32)
@case([3, 4], 24, 88, Selection(22, block=11), "silu", torch.float32)
@case([2, 2], 16, 512, Selection(256, block=256), "silu", torch.float32)
@case([3, 4], 32, 128, Selection(64, block=32), "silu", torch.bfloat16)
def public_selection(counts, hidden, neurons, choose, activation, dtype) -> None:
    """Chosen here: neurons, groups, blocks. The mask given back, as recompute does, makes the same
    output, and so do counts as a tensor by source."""
    leaves = inputs(counts, hidden, neurons, dtype)
    mask = public_op(leaves, counts, choose, activation)
    assert mask.block == choose.block
    rest = dict(activation=activation, backend="triton")
    parted = torch.tensor([[0, count] for count in counts])
    y, same = mone_grouped_mlp(
        *leaves[:2], parted, *leaves[2:], neurons_per_token=choose.kept,
        neuron_groups=choose.groups, neuron_block=choose.block, **rest,
    )  # fmt: skip
    assert same == mask
    again, given = mone_grouped_mlp(*leaves[:2], counts, *leaves[2:], neuron_mask=mask, **rest)
    assert given is mask
    close(again, y, dtype)


@case(torch.float32)
@case(torch.bfloat16)
def public_ready_mask(dtype: torch.dtype) -> None:
    """Rows of one length, of several, all empty and none: the same answers."""
    counts, neurons = [3, 0, 2], 40
    uniform = torch.rand(5, neurons).argsort(1) < 9
    ragged_NF = torch.rand(5, neurons) < 0.3
    ragged_NF[1] = False
    for mask_NF, kept, counts_ in (
        (uniform, 9, counts),
        (ragged_NF, None, counts),
        (torch.zeros_like(uniform), None, counts),
        (uniform[:0], 9, [0, 0, 0]),
    ):
        mask = NeuronMask.from_bool(mask_NF, kept=kept)
        leaves = inputs(counts_, 16, neurons, dtype)
        for activation in ("silu", "relu"):
            assert public_op(leaves, counts_, mask, activation) is mask


@case()
def no_copy_of_a_shared_parameter_is_kept() -> None:
    """Gate and up are slices of one parameter in a model: no copy of them outlives a call."""
    gate_up = torch.randn(2, 2, 32, 8, requires_grad=True)
    x, p, _, _, w_down = inputs([1, 2], 8, 32, torch.float32)
    operands = (x, p, [1, 2], gate_up[:, 0], gate_up[:, 1], w_down)
    for choose in (
        Selection(8),
        Selection(16, block=16),
        NeuronMask.from_bool(torch.eye(3, 32) > 0),
    ):
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: (saved.append(t), t)[1], lambda t: t
        ):
            backend.run(*operands, choose=choose, activation="silu")
        weights = {t.data_ptr() for t in saved if t.dim() == 3}
        assert weights == {t.data_ptr() for t in operands[3:]}


@case()
def operands_laid_out_otherwise() -> None:
    """Weights with neurons last, rows and weights that begin at no multiple of 16 bytes: copied."""
    x, p, *w = (t.detach() for t in inputs([2, 1], 16, 32, torch.float32))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in w]
    shifted = [torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in (x, *w)]
    choose = dict(neurons_per_token=8, backend="triton")
    p.requires_grad_()  # without gradients, few rows go by kernels that read no TMA
    want, _ = mone_grouped_mlp(x, p, [2, 1], *w, **choose)
    for rows, weights in ((x, turned), (shifted[0], shifted[1:])):
        got, _ = mone_grouped_mlp(rows, p, [2, 1], *weights, **choose)
        assert torch.equal(got, want)


@case(Selection(12, groups=2))
@case(Selection(12, block=2))
@case("mask")
def around_other_products(choose) -> None:
    """The Transformer Engine backend's route: these kernels around products that take only whole
    multiples of 16 rows, here torch's."""
    counts = [2, 0, 1]
    leaves = inputs(counts, 16, 48, torch.float32)
    if choose == "mask":
        choose = NeuronMask.from_bool(torch.rand(3, 48).argsort(1) < 9, kept=9)
    linears = PaddedLinears(partial(AlignedLinears, alignment=16), counts, 16)

    def run(x, p, n, *w):
        made = te.grouped_mlp_on(linears, x, p, n, *w, choose=choose, activation="silu")
        assert not made.entries.bad_N.any()
        return made.y_NH, made.mask

    against_reference(run, leaves, counts, "silu")
    assert len(linears.inner.shapes) == 12


@case(torch.float32)
@case(torch.bfloat16)
def the_kernels_pass_their_own_check(dtype: torch.dtype) -> None:
    """Every kernel of device/ is in it but those of other libraries' products and of wide rows."""
    comparisons, seen = self_check.comparisons, set()

    def noted(device: torch.device, dtype: torch.dtype):
        for one in comparisons(device, dtype):
            seen.add(one.kernel)
            yield one

    self_check._fault.cache_clear()
    with mock.patch.object(self_check, "comparisons", noted):
        assert self_check.fault(torch.device("cpu"), dtype) is None
    assert seen == {
        "row_map", "gate_product", "select", "compact", "up_product", "hidden_product",
        "statistics", "gather", "weigh", "rebuild", "dh_product", "probability_grad", "weight_grad",
        "decode_gate", "union", "decode_up", "decode_down",
    }  # fmt: skip


@case()
def the_kernels_of_blocks_pass_their_own_check() -> None:
    """Those of segments, and the choice of blocks of any size; one that is wrong is found."""
    compare, device = self_check.block_comparisons, torch.device("cpu")
    compared = list(compare(device, torch.bfloat16))
    wrong = compared[-1]._replace(got=compared[-1].got * 1.03)
    for found, fault in (
        (compared, None),
        ([*compared[:-1], wrong], "kernel weight_grad is wrong"),
    ):
        made = self_check._first_wrong(
            "cpu", device, torch.bfloat16, lambda *_, found=found: iter(found)
        )
        assert made is fault if fault is None else made.startswith(fault)
    assert {one.kernel for one in compared} == {
        "select_blocks", "segment_map", "up_segments", "dh_segments", "hidden_product",
        "add_slots", "weight_grad",
    }  # fmt: skip


@case()
def a_wrong_kernel_is_one_line() -> None:
    right = ops.hidden_product
    self_check._fault.cache_clear()
    try:
        ops.hidden_product = lambda *args, **kwargs: right(*args, **kwargs) * 1.01
        words = self_check.fault(torch.device("cpu"), torch.float32)
    finally:
        ops.hidden_product = right
        self_check._fault.cache_clear()
    assert words == (
        "kernel hidden_product is wrong on cpu in torch.float32: shape (20, 64), "
        "relative error 0.01"
    )


@case()
def refusals() -> None:
    """What the kernels do not take is refused by name, with what to change."""
    wrong: list[tuple[str, dict]] = [
        ("use float32 or bfloat16", {"dtype": torch.float64}),
        ("'softmax': the kernels have silu", {"activation": "softmax"}),
        ("mone_ng_loss_type", {"all_gates": True}),
    ]
    for part, facts in wrong:
        with pytest.raises(ValueError) as caught:
            resolve_backend("triton", **facts)
        assert part in str(caught.value)
    assert resolve_backend("triton", device="cpu") == "triton"  # interpreted
    assert resolve_backend("auto", device="cuda") == "reference"
    big = torch.zeros(1, 16_385, 1)
    operands = (torch.zeros(3, 1), torch.ones(3), [3], big, big, big)
    with pytest.raises(ValueError, match="moe_ffn_hidden_size = 16385 neurons"):
        mone_grouped_mlp(*operands, neurons_per_token=16_384, backend="triton")
    x, p, *w = (t.detach() for t in inputs([2, 1], 8, 32, torch.float32))
    for counts, part in (
        (torch.tensor([2.0, 1.0]), r"must be integers of shape \[2\]"),
        (torch.tensor([2, 1, 0]), r"must be integers of shape \[2\]"),
        (torch.tensor([2, 2]), "counts that sum to at most the 3 rows"),
    ):
        with pytest.raises(ValueError, match=part):
            mone_grouped_mlp(x, p, counts, *w, neurons_per_token=8, backend="triton")
