"""A step in which two micro-batches take turns goes through the phases of the plain one."""

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.common.patch import Replaced
from megatron_mone.profiling.clock import HostStamps, PhaseClock
from megatron_mone.profiling.instrument import Instruments
from megatron_mone.profiling.schedule_plan import watch_schedule_plans
from tests.unit.profiling.test_instrument import TOKENS, build, fresh_tracker  # noqa: F401

LAYERS, MICRO_BATCHES = 3, 3
PARTS = ("embedding", "attention", "router", "permute", "dispatch", "combine", "gate GEMM",
         "selection", "up/down GEMM", "balance loss", "shared experts", "dense MLP")  # fmt: skip
OVERLAP = {"overlap_moe_expert_parallel_comm": True}
DELAY = {**OVERLAP, "delay_wgrad_compute": True}
BESIDE_DISPATCH = {"overlap_dispatch_backward_with_experts_wgrad": True}


class CountingClock(PhaseClock):
    """Counts how often modules, hooks and kernels say a phase, by pass."""

    def __init__(self):
        super().__init__(HostStamps())
        self.said = Counter()

    def enter(self, phase):
        super().enter(phase)
        self.said[phase, self.pass_] += 1

    def enter_forward(self, phase):
        super().enter_forward(phase)
        self.said[phase, self.pass_] += 1

    def enter_backward(self, phase):
        super().enter_backward(phase)
        self.said[phase, self.pass_] += 1


def forward_step(_data, model, return_schedule_plan=False):
    ids = torch.arange(TOKENS).unsqueeze(0)
    forward = model.build_schedule_plan if return_schedule_plan else model
    output = forward(ids, ids, None, labels=ids, loss_mask=torch.ones(ids.shape))
    return output, lambda losses: (losses.sum(), {})


def step(flags):
    """(clock, gradients) of a step by Megatron's schedule with these flags."""
    from megatron.core.pipeline_parallel.schedules import forward_backward_no_pipelining
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    destroy_moe_metrics_tracker()  # it has the layers of another test's model
    model_parallel_cuda_manual_seed(5)
    model = build(
        num_layers=LAYERS, moe_layer_freq=[0, 1, 1], moe_shared_expert_intermediate_size=16,
        **{name: value for name, value in flags.items() if name in BESIDE_DISPATCH},
    )  # fmt: skip
    for name, value in flags.items():  # Megatron's config wants more than one rank
        setattr(model.config, name, value)
    model.config.finalize_model_grads_func = lambda *ignored, **named: None
    model.zero_grad_buffer = lambda: None
    clock = CountingClock()
    instruments = Instruments(clock, whole_optimizer=True)
    instruments.attach([model], SimpleNamespace(zero_grad=lambda: None, step=lambda: None))
    with Replaced(MoEAuxLossAutoScaler, "main_loss_backward_scale", None):
        clock.begin()
        forward_backward_no_pipelining(
            forward_step_func=forward_step, data_iterator=None, model=model,
            num_microbatches=MICRO_BATCHES, seq_length=TOKENS, micro_batch_size=1,
        )  # fmt: skip
    clock.end()
    instruments.detach()
    return clock, {name: p.grad for name, p in model.named_parameters()}


@pytest.fixture(scope="module", autouse=True)
def inputs_are_kept():
    """The plan frees what an exchange has sent, which one rank alone hands on."""
    from megatron.core.models.common import utils

    with Replaced(utils, "should_free_input", lambda *ignored: False):
        yield


@pytest.fixture(scope="module")
def plain(one_rank):
    return step({})


@pytest.mark.parametrize("flags", [OVERLAP, DELAY, BESIDE_DISPATCH])
def test_parts_are_said_as_often_as_in_the_plain_step(plain, flags):
    """Of the plain step's pass each; weight gradients that wait are once more in a backward."""
    said = step(flags)[0].said
    waits = {("up/down GEMM", "backward"): 2} if flags is not OVERLAP else {}
    if flags is DELAY:
        waits |= {("attention", "backward"): 3, ("dense MLP", "backward"): 1}
        waits |= {("shared experts", "backward"): 2}
    for pass_ in ("forward", "backward", "recompute"):
        for phase in PARTS:
            more = MICRO_BATCHES * waits.get((phase, pass_), 0)
            assert said[phase, pass_] == plain[0].said[phase, pass_] + more, (phase, pass_)
    # twice in a forward: before the gate's product and after the choice
    assert said["up/down GEMM", "forward"] == 2 * 2 * MICRO_BATCHES


@pytest.mark.parametrize("flags", [OVERLAP, DELAY, BESIDE_DISPATCH])
def test_the_step_is_the_plain_one(plain, flags):
    """The same phases of the same passes fill it, and nothing of it is a recompute; the same
    gradients to the bit."""
    clock, gradients = step(flags)
    of_plain, found = (spans_by_phase(one) for one in (plain[0], clock))
    assert found.keys() == of_plain.keys()
    assert sum(found.values()) == clock.host_spans()[-1][1] - clock.host_spans()[0][0]
    assert all(torch.equal(gradients[name], value) for name, value in plain[1].items())


def spans_by_phase(clock):
    """{(phase, pass): ns}."""
    found = Counter()
    for start, end, phase, pass_ in clock.host_spans():
        found[phase, pass_] += end - start
    return found


def test_micro_batches_take_turns():
    """A forward of one lies between the parts of the other's backward, and the clock says which."""
    clock, _ = step(DELAY)
    passes = [pass_ for _, _, phase, pass_ in clock.host_spans() if phase in PARTS]
    turns = sum(first != then for first, then in pairwise(passes))
    assert turns > 4 * LAYERS * (MICRO_BATCHES - 1)
    plain_passes = [pass_ for _, _, phase, pass_ in step({})[0].host_spans() if phase in PARTS]
    assert sum(first != then for first, then in pairwise(plain_passes)) == 2 * MICRO_BATCHES - 1


@pytest.mark.parametrize(
    ("name", "begins", "leaves"),
    [
        ("pre_dispatch_computation", "layer norm", "other"),
        ("moe_dispatch", "dispatch", "dispatch"),
        ("mlp", "layer norm", "other"),
        ("moe_combine", "layer norm", "combine"),
        ("post_process", "loss", "other"),
    ],
)
def test_a_node_begins_in_its_phase_and_pass(one_rank, name, begins, leaves):
    """And an exchange goes on until the stream that waits for it has: where a GPU's clock reads."""
    from megatron.core.pipeline_parallel.utils import ScheduleNode

    clock, seen = PhaseClock(HostStamps()), []

    def noted(value):
        seen.append((clock.phase, clock.pass_))
        return value

    node = ScheduleNode(
        lambda x: noted(x * 2), torch.cuda.current_stream(), torch.cuda.Event(),
        backward_func=lambda _outputs, gradients: noted(gradients), name=name,
    )  # fmt: skip
    undo = watch_schedule_plans(clock)
    y = node.forward(torch.ones(2, requires_grad=True))
    left = [(clock.phase, clock.pass_)]
    node.backward(torch.ones_like(y))
    left.append((clock.phase, clock.pass_))
    undo()
    assert seen == [(begins, "forward"), (begins, "backward")]
    assert left == [(leaves, "forward"), (leaves, "forward" if leaves == "other" else "backward")]
