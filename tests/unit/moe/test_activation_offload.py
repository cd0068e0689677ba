"""What the experts keep for their backward pass goes to the groups of Megatron's offloading that
--offload-modules names, and comes back as it was."""

import pytest
import torch
from torch import Tensor

from tests.unit.moe.builders import build_experts

pytestmark = pytest.mark.usefixtures("one_rank")

ROWS, HIDDEN = 12, 16
NAMES = ("expert_fc1", "moe_act")


@pytest.fixture
def manager():
    """Megatron's, with nothing of other models."""
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )

    PipelineOffloadManager.reset_instance()
    yield PipelineOffloadManager.get_instance()
    PipelineOffloadManager.OFFLOAD_MGR = None


def experts_of(names=(), **changes):
    offloaded = {"fine_grained_activation_offloading": True, "offload_modules": list(names)}
    experts = build_experts(2, **changes, **(offloaded if names else {}))
    torch.manual_seed(5)
    for parameter in experts.parameters():
        parameter.data.normal_()
    return experts


def begin_micro_batch(manager):
    manager.init_model_chunk_offload_handler(0, 1, None, min_offloaded_tensor_size=1)
    return manager.cur_forward_chunk()


def run(experts):
    """(y, the gradient of the input, those of the weights)."""
    torch.manual_seed(7)
    x_NH = torch.randn(ROWS, HIDDEN, requires_grad=True)
    probs_N = torch.rand(ROWS, requires_grad=True)
    y_NH = experts(x_NH * 1, torch.tensor([5, 7]), probs_N).y_NH
    yield y_NH
    y_NH.square().sum().backward()
    yield [y_NH, x_NH.grad, probs_N.grad, *(p.grad for p in experts.parameters())]


def held(handler):
    """{group: shapes of what it was handed}; on the host all of it."""
    found = {}
    for group in handler.offload_groups:
        states = list(group._tensors.values())
        assert not any(isinstance(state, Tensor) for state in states), group._name
        found[group._name] = [tuple(copy.shape) for _device, copy, _pool in states]
    return found


@pytest.mark.parametrize("names", [NAMES, NAMES[:1], NAMES[1:]])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_is_handed_over_comes_back_to_the_bit(manager, backend, names):
    [_, wanted] = run(experts_of(mone_backend=backend))
    experts = experts_of(names, mone_backend=backend)
    handler = begin_micro_batch(manager)
    steps = run(experts)
    next(steps)
    there = held(handler)
    assert list(there) == list(names)
    kept = ROWS * experts.select.min_neurons
    if "expert_fc1" in names:
        rows = sum(shape[0] for shape in there["expert_fc1"])
        assert {shape[1:] for shape in there["expert_fc1"]} == {(HIDDEN,)}
        assert rows == ROWS if backend == "cpu" else rows >= ROWS
    if "moe_act" in names and backend == "cpu":
        # Gate, up and index of each kept neuron, where rows begin, the router's probabilities.
        assert sorted(there["moe_act"]) == sorted([(kept,)] * 3 + [(ROWS + 1,), (ROWS,)])
    got = next(steps)
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


def test_nothing_is_handed_over_where_nothing_is_asked(manager):
    handler = begin_micro_batch(manager)
    [_, _gradients] = run(experts_of())
    assert handler.offload_groups == []
    assert experts_of(("attn_norm",)).offloaded == ()


def test_weights_and_small_tensors_stay(manager):
    manager.init_model_chunk_offload_handler(0, 1, None, min_offloaded_tensor_size=10**6)
    steps = run(experts_of(NAMES))
    next(steps)
    groups = manager.cur_forward_chunk().offload_groups
    tensors = [state for group in groups for state in group._tensors.values()]
    assert tensors
    assert all(isinstance(state, Tensor) for state in tensors)
    hidden = [state for state in tensors if state.dim() == 2]
    assert [tuple(state.shape) for state in hidden] == [(ROWS, HIDDEN)]
    next(steps)


def test_a_chunk_that_offloads_nothing_leaves_the_experts_alone(manager):
    begin_micro_batch(manager)
    manager.disable_offload()
    [_, got] = run(experts_of(NAMES))
    [_, wanted] = run(experts_of())
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))
