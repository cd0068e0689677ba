"""The meters of memory on functions whose allocations are known."""

import gc

import pytest
import torch

from megatron_mone.benchmarking.memory import measure_peaks, saved_bytes

N = 1 << 20
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts the CPU's allocator")


class Known(torch.autograd.Function):
    """Forward: 3 N bytes at most, keeps N saved and N on the context. Backward: 5 N more."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(torch.empty(N, dtype=torch.uint8))
        ctx.rides = {"along": [torch.empty(N, dtype=torch.uint8)]}
        work = torch.empty(N, dtype=torch.uint8)
        del work
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        (saved,) = ctx.saved_tensors
        work = torch.empty(5 * N, dtype=torch.uint8)
        del work, saved
        return dy.clone()


def _known():
    x = torch.ones(1, requires_grad=True)
    return Known.apply(x)


def test_saved_bytes_counts_saved_tensors_and_those_on_the_context():
    assert saved_bytes(_known, set()) == 2 * N


def test_saved_bytes_leaves_out_what_is_given_and_counts_a_storage_once():
    x = torch.ones(N, requires_grad=True)
    weight = torch.ones(N, requires_grad=True)

    def forward():
        both = x * weight  # keeps x and weight
        return both.exp().view(2, -1).sin().sum()  # keeps exp's output, used twice

    given = {t.untyped_storage().data_ptr() for t in (x, weight)}
    assert saved_bytes(forward, given) == 4 * N
    assert saved_bytes(forward, set()) == 3 * 4 * N


def test_saved_bytes_lets_go_of_the_graph():
    """The meter held tensors of the graph, and the graph the meter."""
    shape = (3, 1234)

    def forward():
        return torch.ones(shape, requires_grad=True).exp().sin().sum()  # exp keeps its result

    assert saved_bytes(forward, set()) == 4 * 3 * 1234
    gc.collect()
    assert not [t for t in gc.get_objects() if type(t) is torch.Tensor and t.shape == shape]


def test_peaks_of_forward_and_backward():
    # warm-up: the first call of an operator may allocate for itself
    peaks = [measure_peaks(_known, lambda y: torch.autograd.grad(y, _leaf(y), torch.ones(1)))
             for _ in range(2)][1]  # fmt: skip
    assert peaks.forward == pytest.approx(3 * N, abs=64)
    assert peaks.backward == pytest.approx(2 * N + 5 * N, abs=64)
    assert peaks.total == peaks.backward


def _leaf(y):
    return y.grad_fn.next_functions[0][0].variable
