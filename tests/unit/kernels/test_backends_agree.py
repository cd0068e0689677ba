"""Every backend that runs on this machine equals the reference over random shapes, layouts in
memory and choices: outputs, masks and all gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.kernels import BACKENDS, Call, mone_grouped_mlp
from megatron_mone.kernels.cpu import products

OPERANDS = ("x", "probs", "w_gate", "w_up", "w_down")
OTHERS = [name for name, backend in BACKENDS.items()
          if name != "reference" and backend.why_not(Call()) is None]  # fmt: skip


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that a backend did not write is NaN."""
    monkeypatch.setattr(products, "POISON", True)


@st.composite
def cases(draw):
    block = draw(st.sampled_from([1, 1, 2, 3, 11, 16, 32, 48]))
    groups = draw(st.sampled_from([1, 1, 2]))
    blocks = draw(st.integers(1, 6 if block > 1 else 80))
    kept = draw(st.sampled_from(sorted({1, max(1, blocks // 4), max(1, blocks - 1), blocks})))
    return dict(
        seed=draw(st.integers(0, 2**31)),
        counts=draw(st.lists(st.sampled_from([0, 0, 1, 2, 7, 33, 130]), min_size=1, max_size=4)),
        hidden=draw(st.sampled_from([1, 8, 24, 129])),
        neurons=groups * blocks * block,
        choice=dict(
            neurons_per_token=groups * kept * block, neuron_groups=groups, neuron_block=block
        ),
        activation=draw(st.sampled_from(["silu", "sigmoid", "gelu", "relu", "squared_relu"])),
        dtype=draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16])),
        strided=draw(st.booleans()),
        ready_mask=draw(st.booleans()),
    )


def stretched(tensor):
    """The same values with gaps between rows and elements."""
    space = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), torch.nan).to(tensor.dtype)
    return space[..., 1::2].copy_(tensor)


def operands(case):
    generator = torch.Generator().manual_seed(case["seed"])
    rows, hidden = sum(case["counts"]), case["hidden"]
    shape = (len(case["counts"]), case["neurons"], hidden)
    x, probs = torch.randn(rows, hidden, generator=generator), torch.rand(rows, generator=generator)
    weights = [torch.randn(shape, generator=generator) * hidden**-0.5 for _ in range(3)]
    tensors = [t.to(case["dtype"]) for t in (x, *weights)]
    tensors.insert(1, probs)
    if case["strided"]:
        tensors = [stretched(t) for t in tensors]
    return [t.requires_grad_() for t in tensors]


def run(tensors, case, backend, choice):
    """y, its mask and the five gradients."""
    x, probs, *weights = tensors
    y, mask = mone_grouped_mlp(
        x, probs, case["counts"], *weights, activation=case["activation"], backend=backend, **choice
    )
    dy = torch.sin(torch.arange(y.numel())).view_as(y).to(y.dtype)
    return y, mask, torch.autograd.grad(y, tensors, dy, materialize_grads=True)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


def rounding_of_the_reference(tensors, case, mask, results):
    """Relative error of the reference's own output and gradients: few terms may cancel."""
    wide = [t.detach().double().requires_grad_() for t in tensors]
    y, _, grads = run(wide, case, "reference", dict(neuron_mask=mask))
    return [relative(a, b) for a, b in zip(results, (y, *grads), strict=True)]


@pytest.mark.parametrize("backend", OTHERS)
@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_equal_to_the_reference(backend, case):
    """float32 to 1e-5 with the same mask, bfloat16 to 2e-2 on the reference's mask."""
    tensors = operands(case)
    wide = case["dtype"] == torch.float32
    wanted_y, mask, wanted_grads = run(tensors, case, "reference", case["choice"])
    given_mask = case["ready_mask"] or not wide
    choice = dict(neuron_mask=mask) if given_mask else case["choice"]
    y, chosen, grads = run(tensors, case, backend, choice)
    assert chosen == mask
    wanted = (wanted_y, *wanted_grads)
    rounding = rounding_of_the_reference(tensors, case, mask, wanted)
    for name, ours, theirs, noise in zip(
        ("y", *OPERANDS), (y, *grads), wanted, rounding, strict=True
    ):
        assert ours.dtype == theirs.dtype
        assert relative(ours, theirs) <= (1e-5 if wide else 2e-2) + 2 * noise, name


@pytest.mark.parametrize("backend", ["reference", *OTHERS])
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_choice_keeps_whole_blocks_of_each_group(backend, case):
    """Exactly S neurons a row, S / G in each group, in blocks; said by the mask."""
    x, probs, *weights = operands(case)
    choice = case["choice"]
    _, mask = mone_grouped_mlp(
        x, probs, case["counts"], *weights, backend=backend, **choice
    )  # fmt: skip
    groups, block = choice["neuron_groups"], choice["neuron_block"]
    kept = mask.to_bool().view(-1, groups, case["neurons"] // groups // block, block)
    assert (kept.sum(dim=(2, 3)) == choice["neurons_per_token"] // groups).all()
    assert (kept.all(dim=3) == kept.any(dim=3)).all()
    assert mask.block == block
