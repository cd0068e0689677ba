"""Gradients of the experts' parameters through the kernels' views, fused or not."""

import pytest
import torch

from megatron_mone.kernels.cpu import backend as cpu
from tests.unit.moe.builders import build_experts

pytestmark = pytest.mark.usefixtures("one_rank")

COUNTS = torch.tensor([5, 0, 9, 3])
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(
    not cpu.available()[0], reason="the CPU kernels cannot be built here"))]  # fmt: skip


def experts_and_inputs(backend, **changes):
    experts = build_experts(4, moe_ffn_hidden_size=32, mone_backend=backend, **changes)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(17, experts.config.hidden_size, generator=generator)
    return experts, x.to(experts.linear_fc1.dtype), torch.rand(17, generator=generator)


def backward(experts, x, probs):
    y = experts(x, COUNTS, probs).y_NH
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_are_those_of_plain_slices(backend, monkeypatch):
    experts, x, probs = experts_and_inputs(backend)
    backward(experts, x, probs)
    ours = [experts.linear_fc1.grad.clone(), experts.linear_fc2.grad.clone()]
    experts.zero_grad()
    monkeypatch.setattr(
        "megatron_mone.moe.experts.weight_views",
        lambda fc1, fc2, fused: (fc1[:, 0], fc1[:, 1], fc2),
    )
    backward(experts, x, probs)
    assert torch.equal(ours[0], experts.linear_fc1.grad)
    assert torch.equal(ours[1], experts.linear_fc2.grad)
    assert ours[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_accumulation_adds_to_main_grad(backend, dtype):
    """Two micro-batches into float32 main_grad, with the flag that DDP's hook reads."""
    changes = dict(params_dtype=dtype, bf16=dtype == torch.bfloat16)
    plain, x, probs = experts_and_inputs(backend, **changes)
    fused, _, _ = experts_and_inputs(backend, **changes)
    fused.load_state_dict(plain.state_dict())
    fused.config.gradient_accumulation_fusion = True
    for parameter in fused.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad = False
    wanted = [torch.zeros(p.shape) for p in plain.parameters()]
    for scale in (1.0, 0.5):
        backward(plain, x * scale, probs)
        for total, parameter in zip(wanted, plain.parameters(), strict=True):
            total += parameter.grad
        plain.zero_grad()
        backward(fused, x * scale, probs)
        assert all(p.grad is not None and p.grad_added_to_main_grad for p in fused.parameters())
        fused.zero_grad()
    for total, parameter in zip(wanted, fused.parameters(), strict=True):
        assert torch.equal(total, parameter.main_grad)


def test_fused_without_ddp_leaves_no_gradient():
    """As in Megatron's linears: without the flag of DDP there is nobody to hand a placeholder."""
    experts, x, probs = experts_and_inputs("reference")
    experts.config.gradient_accumulation_fusion = True
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    backward(experts, x, probs)
    assert all(p.grad is None and p.main_grad.abs().sum() > 0 for p in experts.parameters())


def test_zeroed_placeholder_where_megatron_asks():
    experts, x, probs = experts_and_inputs("reference")
    experts.config.gradient_accumulation_fusion = True
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, True
    backward(experts, x, probs)
    assert all((p.grad == 0).all() for p in experts.parameters())


def test_a_frozen_parameter_gets_no_gradient():
    experts, x, probs = experts_and_inputs("reference")
    experts.linear_fc1.requires_grad_(False)
    backward(experts, x, probs)
    assert experts.linear_fc1.grad is None
    assert experts.linear_fc2.grad.abs().sum() > 0
