"""Tensors without values that lie on the host, and Megatron's optimizer cut between both."""

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from megatron_mone import cpu_emulation
from megatron_mone.common.patch import Replaced
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins import host, op
from megatron_mone.planning.tracing.stand_ins.host import HostAdam
from megatron_mone.planning.tracing.trace import TO_DEVICE, TO_HOST, merged
from megatron_mone.planning.tracing.unknown_values import UnknownValues
from megatron_mone.profiling.clock import HostStamps, PhaseClock

SIZES = (6, 10, 4, 12)


@pytest.fixture
def recorder():
    """That watches what runs without values."""
    cpu_emulation.install()
    recorder = Recorder(PhaseClock(HostStamps()))
    with host.installed(recorder), op.recording(recorder):
        with UnknownValues(recorder.saw_operator):
            yield recorder


def ops(recorder):
    return [
        (one.name, one.bytes_read, one.bytes_written, one.count) for one in merged(recorder.ops)
    ]


def test_what_is_made_of_the_hosts_tensors_is_the_hosts(recorder):
    pinned = torch.ones(4).cpu().pin_memory()
    here = torch.ones(4)
    made = pinned.to(torch.bfloat16)
    assert recorder.host.holds(made)
    assert recorder.host.holds(pinned[1:])  # a view
    assert not recorder.host.holds(here)
    assert not recorder.host.holds(here + pinned)
    assert recorder.host.holds(torch.empty(3, device="cpu"))
    assert not recorder.host.holds(torch.empty(3, device=torch.cuda.current_device()))


@pytest.mark.parametrize(("pinned", "staged"), [(True, []), (False, [("host.stage", 16, 16, 1)])])
def test_a_copy_between_both_crosses(recorder, pinned, staged):
    there = torch.empty(4, device="cpu", pin_memory=pinned)
    here = torch.ones(4)
    recorder.clock.begin()
    there.copy_(here, non_blocking=True)
    here.copy_(there)
    recorder.clock.end()
    assert ops(recorder) == [(TO_HOST, 16, 16, 1), *staged, (TO_DEVICE, 16, 16, 1), *staged]


def test_types_are_converted_on_the_host_in_memory_that_is_not_pinned(recorder):
    there, here = torch.ones(4).cpu().pin_memory(), torch.ones(4, dtype=torch.bfloat16)
    recorder.clock.begin()
    here.copy_(there)
    there.copy_(here)
    recorder.clock.end()
    assert ops(recorder) == [
        (TO_DEVICE, 8, 8, 1), ("host.convert", 16, 8, 1), ("host.stage", 8, 8, 1),
        (TO_HOST, 8, 8, 1), ("host.convert", 8, 16, 1), ("host.stage", 8, 8, 1),
    ]  # fmt: skip


def hybrid(parameters, adam, fraction):
    """Megatron's optimizer after two steps."""
    from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

    made = HybridDeviceOptimizer(
        parameters, offload_fraction=fraction, cpu_optimizer_cls=adam,
        gpu_optimizer_cls=torch.optim.AdamW, param_update_in_fp32=True,
        overlap_cpu_optimizer_d2h_h2d=True,
    )  # fmt: skip
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        made.step()
    return made


def held(optimizer, on_host):
    """(bytes of moments on the device, bytes of all on the host)."""
    moments = [s[name] for s in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    masters = optimizer.gpu_params_map_cpu_copy.values()
    there = [*masters, *optimizer.cpu_copy_map_grad.values(), *filter(on_host, moments)]
    return sum(t.nbytes for t in moments if not on_host(t)), sum(t.nbytes for t in there)


@pytest.mark.parametrize("fraction", [0.25, 0.5, 1.0])
def test_megatrons_hybrid_optimizer_holds_what_it_holds_on_tensors_with_values(fraction):
    cpu_emulation.install()
    pinned = []

    def pin(tensor, device=None):
        pinned.append(tensor)
        return tensor

    on_device = property(lambda tensor: all(tensor is not one for one in pinned))
    with Replaced(Tensor, "pin_memory", pin), Replaced(Tensor, "is_cuda", on_device):
        real = hybrid([Parameter(torch.ones(n)) for n in SIZES], torch.optim.AdamW, fraction)
    masters = list(real.gpu_params_map_cpu_copy.values())
    of_host = [m for s in real.cpu_optimizers for p in s.state for m in s.state[p].values()]
    expected = held(real, lambda tensor: any(tensor is one for one in [*masters, *of_host]))

    recorder = Recorder(PhaseClock(HostStamps()))
    with host.installed(recorder), op.recording(recorder):
        with UnknownValues(recorder.saw_operator):
            recorder.clock.begin()
            traced = hybrid([Parameter(torch.ones(n)) for n in SIZES], HostAdam, fraction)
            recorder.clock.end()
            assert held(traced, recorder.host.holds) == expected
    there = sum(master.nbytes for master in masters)
    assert expected == (8 * sum(SIZES) - 2 * there, 4 * there)
    assert there >= 4 * fraction * sum(SIZES)
    found = {name: 0 for name, *_ in ops(recorder)}
    for name, read, _, count in ops(recorder):
        found[name] += read * count
    assert (found[TO_HOST], found[TO_DEVICE], found["host.adam"]) == (
        2 * there,
        2 * there,
        8 * there,
    )
