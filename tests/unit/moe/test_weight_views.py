"""Gradients of the experts' parameters through the kernels' views, fused or not."""

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from megatron_mone.benchmarking.memory import measure_peaks
from megatron_mone.kernels.cpu import backend as cpu
from megatron_mone.kernels.weight_views import add_later, halves_of_one, weight_views
from tests.unit.moe.builders import build_experts, build_layer

pytestmark = pytest.mark.usefixtures("one_rank")

COUNTS = torch.tensor([5, 0, 9, 3])
BACKENDS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(
    not cpu.available()[0], reason="the CPU kernels cannot be built here"))]  # fmt: skip


def experts_and_inputs(backend, **changes):
    experts = build_experts(4, **{"moe_ffn_hidden_size": 32, **changes}, mone_backend=backend)
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
        lambda fc1, fc2, fused, later: (fc1[:, 0], fc1[:, 1], fc2),
    )
    backward(experts, x, probs)
    assert torch.equal(ours[0], experts.linear_fc1.grad)
    assert torch.equal(ours[1], experts.linear_fc2.grad)
    assert ours[0].abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_accumulation_adds_to_main_grad(backend, dtype):
    """Two micro-batches into float32 main_grad, with the flag that DDP's hook reads.

    The CPU kernels add their float32 sums: for bfloat16 what is compared with was rounded, once for
    each micro-batch, by at most 2^-9.
    """
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
    rounding = 2**-8 if backend == "cpu" and dtype == torch.bfloat16 else 0
    for total, parameter in zip(wanted, fused.parameters(), strict=True):
        assert (total - parameter.main_grad).norm() <= rounding * total.norm()
        assert total.norm() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["linear_fc1", "linear_fc2"])
def test_fused_with_a_frozen_parameter(backend, frozen):
    """It needs no main_grad; the other one gets its whole gradient."""
    plain, x, probs = experts_and_inputs(backend)
    fused, _, _ = experts_and_inputs(backend)
    fused.load_state_dict(plain.state_dict())
    fused.config.gradient_accumulation_fusion = True
    for experts in (plain, fused):
        getattr(experts, frozen).requires_grad_(False)
    (free,) = (name for name, p in fused.named_parameters() if p.requires_grad)
    parameter = getattr(fused, free)
    parameter.main_grad = torch.ones(parameter.shape)
    backward(plain, x, probs)
    backward(fused, x, probs)
    assert all(p.grad is None for p in fused.parameters())
    assert torch.equal(parameter.main_grad, getattr(plain, free).grad + 1)


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
def test_fused_main_grad_may_be_set_after_the_forward():
    experts, x, probs = experts_and_inputs("cpu")
    experts.config.gradient_accumulation_fusion = True
    y = experts(x, COUNTS, probs).y_NH
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    y.sum().backward()
    assert all(p.main_grad.abs().sum() > 0 for p in experts.parameters())


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
@pytest.mark.parametrize("fused", [True, False])
def test_fused_backward_allocates_no_weight_gradient(fused):
    """Not even one of the three, by the meter; without fusion all three are allocated."""
    experts, x, probs = experts_and_inputs("cpu", moe_ffn_hidden_size=2048)
    experts.config.gradient_accumulation_fusion = fused
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    peaks = measure_peaks(
        lambda: experts(x, COUNTS, probs).y_NH, lambda y: y.backward(torch.ones_like(y))
    )
    size = experts.linear_fc2.numel() * experts.linear_fc2.element_size()
    assert (peaks.backward < size) == fused
    assert fused or peaks.backward >= 3 * size


def test_fused_without_ddp_leaves_no_gradient():
    """As in Megatron's linears: without the flag of DDP there is nobody to hand a placeholder."""
    experts, x, probs = experts_and_inputs("reference")
    experts.config.gradient_accumulation_fusion = True
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    backward(experts, x, probs)
    assert all(p.grad is None and p.main_grad.abs().sum() > 0 for p in experts.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_megatron_fsdp_has_a_gradient_to_take(backend):
    """It makes a main_grad when it takes a gradient, so that there is none to add to."""
    plain, x, probs = experts_and_inputs(backend)
    fused, _, _ = experts_and_inputs(backend)
    fused.load_state_dict(plain.state_dict())
    fused.config.gradient_accumulation_fusion = True
    for parameter in fused.parameters():
        parameter.get_main_grad = pytest.fail
    backward(plain, x, probs)
    backward(fused, x, probs)
    for one, other in zip(plain.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)


def test_zeroed_placeholder_where_megatron_asks():
    experts, x, probs = experts_and_inputs("reference")
    experts.config.gradient_accumulation_fusion = True
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad, parameter.zero_out_wgrad = False, True
    backward(experts, x, probs)
    assert all((p.grad == 0).all() for p in experts.parameters())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_frozen_parameter_gets_no_gradient(backend):
    experts, x, probs = experts_and_inputs(backend)
    experts.linear_fc1.requires_grad_(False)
    backward(experts, x, probs)
    assert experts.linear_fc1.grad is None
    assert experts.linear_fc2.grad.abs().sum() > 0


def test_halves_are_recognised():
    whole = torch.zeros(3, 2, 5, 4)
    assert halves_of_one(whole[:, 0], whole[:, 1])
    assert not halves_of_one(whole[:, 1], whole[:, 0])
    assert not halves_of_one(whole[:, 0].clone(), whole[:, 1])
    assert not halves_of_one(torch.zeros(3, 5, 4), torch.zeros(3, 5, 4))
    strided = torch.zeros(3, 2, 5, 8)[..., ::2]
    assert not halves_of_one(strided[:, 0], strided[:, 1])


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
def test_native_gradients_of_gate_and_up_are_made_in_place():
    """The parameter's gradient is the tensor that the kernels wrote: no third copy of it."""
    experts, x, probs = experts_and_inputs("cpu")
    y = experts(x, COUNTS, probs).y_NH
    peaks = measure_peaks(lambda: y, lambda y: backward_of(experts, y))
    gradients = sum(p.numel() * 4 for p in experts.parameters())
    assert gradients <= peaks.backward < gradients + experts.linear_fc1.numel() * 4


def backward_of(experts, y):
    return torch.autograd.grad(y, list(experts.parameters()), torch.ones_like(y))


@pytest.mark.parametrize("backend", BACKENDS)
def test_freed_weights_are_read_again_where_they_are_by_then(backend):
    """As ZeRO 3 does between the passes: `data` is let go of, and gathered at another place."""
    experts, x, probs = experts_and_inputs(backend)
    backward(experts, x, probs)
    wanted = [p.grad.clone() for p in experts.parameters()]
    experts.zero_grad()
    for parameter in experts.parameters():
        parameter.ds_id = 0
    y = experts(x, COUNTS, probs).y_NH
    gathered = []
    for parameter in experts.parameters():
        storage = StorageWeakRef(parameter.untyped_storage())
        gathered.append(torch.cat([torch.full((5,), torch.nan), parameter.data.flatten()]))
        parameter.data = torch.empty(0)
        assert storage.expired()
    for parameter, flat, gradient in zip(experts.parameters(), gathered, wanted, strict=True):
        parameter.data = flat[5:].view_as(gradient)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y))
    for parameter, gradient in zip(experts.parameters(), wanted, strict=True):
        assert torch.equal(parameter.grad, gradient)


PUT_OFF = ["delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"]


def ended_backwards(experts, keep):
    """{name: passes that reached the parameter}, counted where DDP's hooks hang; these move each
    gradient to `main_grad` as DDP's do. `keep` holds the nodes."""
    reached = {}
    for name, parameter in experts.named_parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
        parameter.grad_added_to_main_grad = False
        reached[name] = 0

        def hook(*_unused, name=name, parameter=parameter):
            reached[name] += 1
            if not parameter.grad_added_to_main_grad:
                parameter.main_grad.add_(parameter.grad)
            parameter.grad = None

        keep.append(parameter.expand_as(parameter).grad_fn.next_functions[0][0])
        keep[-1].register_hook(hook)
    return reached


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flag", PUT_OFF)
def test_gradients_that_wait_are_the_same_bits(backend, fused, dtype, flag):
    """Of two micro-batches: none before `backward_dw`, then the same where DDP takes them."""
    nodes, made, y = [], [], []
    for put_off in (False, True):
        experts, x, probs = experts_and_inputs(
            backend, params_dtype=dtype, bf16=dtype == torch.bfloat16
        )
        if made:
            experts.load_state_dict(made[0].state_dict())
        made.append(experts)
        experts.config.gradient_accumulation_fusion = fused
        setattr(experts.config, flag, put_off)
        reached = ended_backwards(experts, nodes)
        for micro_batch in (1, 2):
            rows = (x / micro_batch).requires_grad_()
            backward(experts, rows, probs)
            y.append(rows.grad)
            with torch.no_grad():
                experts(x * 3, COUNTS, probs)  # as another micro-batch's forward comes between
            if put_off:
                assert list(reached.values()) == [micro_batch - 1] * 2
                assert all(p.grad is None for p in experts.parameters())
            experts.backward_dw()
            assert list(reached.values()) == [micro_batch] * 2
        experts.backward_dw()  # nothing is left
        assert list(reached.values()) == [2, 2]
    assert all(torch.equal(first, then) for first, then in zip(y[:2], y[2:], strict=True))
    for first, then in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(first.main_grad, then.main_grad)
        assert first.main_grad.abs().sum() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("frozen", ["linear_fc1", "linear_fc2"])
def test_a_frozen_parameter_waits_for_no_gradient(backend, frozen):
    experts, x, probs = experts_and_inputs(backend)
    getattr(experts, frozen).requires_grad_(False)
    (free,) = (p for p in experts.parameters() if p.requires_grad)
    backward(experts, x, probs)
    wanted, free.grad = free.grad, None
    experts.config.delay_wgrad_compute = True
    backward(experts, x.requires_grad_(), probs)
    assert free.grad is None
    experts.backward_dw()
    assert torch.equal(free.grad, wanted)
    assert getattr(experts, frozen).grad is None


def test_a_gradient_that_was_made_at_once_waits_too():
    """Of a backend that puts nothing off: it gets what autograd gives the views."""
    experts, _, _ = experts_and_inputs("reference")
    weights = experts.linear_fc1, experts.linear_fc2
    later = []
    gate, up, down = weight_views(*weights, False, later)
    (gate * up * down).sum().backward()
    assert all(weight.grad is None for weight in weights)
    add_later(*weights, False, later)
    waited = [weight.grad for weight in weights]
    experts.zero_grad()
    (weights[0][:, 0] * weights[0][:, 1] * weights[1]).sum().backward()
    assert all(torch.equal(*pair) for pair in zip(waited, (w.grad for w in weights), strict=True))


def test_nothing_waits_below_rows_that_need_no_gradient():
    """No backward pass of a dispatch would come for it."""
    experts, x, probs = experts_and_inputs("reference")
    experts.config.overlap_dispatch_backward_with_experts_wgrad = True
    backward(experts, x, probs)
    assert all(p.grad.abs().sum() > 0 for p in experts.parameters())


def test_weight_gradients_are_told_when_the_input_gradients_are_made():
    """A stream of their own waits for that alone: Megatron's event, before and after them."""
    layer = build_layer(overlap_dispatch_backward_with_experts_wgrad=True, mone_backend="reference")
    told = []

    class Event:
        def record(self, stream=None):
            told.append(("recorded", len(layer.experts._delayed)))

        wait = synchronize = record

    layer._delayed_wgrad_event = Event()
    hidden = torch.randn(4, 2, layer.config.hidden_size, requires_grad=True)
    layer(hidden)[0].sum().backward()
    assert told == [("recorded", 1), ("recorded", 0)]
    assert all(p.grad.abs().sum() > 0 for p in layer.experts.parameters())
