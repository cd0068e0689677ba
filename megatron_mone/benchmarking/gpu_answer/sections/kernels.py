"""Each kernel's time, with the flops and bytes that the planner takes, beside torch and TE."""

import importlib.util
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from megatron_mone.benchmarking.gpu_answer.clock import replay_ms
from megatron_mone.benchmarking.gpu_answer.given import Given, given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan
from megatron_mone.benchmarking.gpu_answer.steps import Steps
from megatron_mone.kernels.gpu_answer_results import KernelTime, LaunchFacts
from megatron_mone.kernels.triton.launch import Launch, recording


class Peer(NamedTuple):
    """What another library does for one of our kernels."""

    name: str
    run: Callable[[], object]


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """A row a kernel and shape; what fails is a note, and the next one runs."""
    for shape in plan.timed:
        steps = Steps(given(shape, device))
        for step in steps.all:
            call = step.timed or step.run
            ms = replay_ms(call, device, plan.repeats)
            book.add(KernelTime(kernel=step.name, ms=ms, launches=facts(call), **shape.sizes()))
        for peer in peers(steps):
            try:
                ms = replay_ms(peer.run, device, plan.repeats)
            except Exception as error:
                book.note(f"{peer.name} at {shape.label}: {type(error).__name__}: {error}")
                continue
            book.add(KernelTime(kernel=peer.name, ms=ms, launches=[], **shape.sizes()))
        del steps
    if importlib.util.find_spec("transformer_engine") is None:
        book.note("Transformer Engine is not installed: its grouped GEMM was not timed")


def facts(call: Callable[[], object]) -> list[LaunchFacts]:
    """Of the launches that a call makes."""
    taken: list[Launch] = []
    with recording(taken.append):
        call()
    return [_facts(one) for one in taken]


def _facts(one: Launch) -> LaunchFacts:
    return LaunchFacts(
        kernel=one.kernel,
        reads=[list(tensor.shape) for tensor in one.reads],
        writes=[list(tensor.shape) for tensor in one.writes],
        dtype=str(one.reads[0].dtype).removeprefix("torch."),
        bytes_read=sum(tensor.nbytes for tensor in one.reads),
        bytes_written=sum(tensor.nbytes for tensor in one.writes),
        flops=one.flops,
    )


def peers(steps: Steps) -> Iterator[Peer]:
    """The products of K1, K4, K7 and K8 in torch and Transformer Engine."""
    given, offsets_E = steps.given, steps.where.offsets_E1[1:]
    gate, up, down = given.weights

    def mm(left: Tensor, right: Tensor) -> Tensor:
        return functional.grouped_mm(left, right, offs=offsets_E)

    yield Peer("torch grouped_mm as K1", lambda: mm(given.x_NH, gate.transpose(1, 2)))
    yield Peer("torch grouped_mm as K4", lambda: mm(steps.h_NF, down))
    yield Peer("torch grouped_mm as K7", lambda: mm(steps.da_NF, gate) + mm(steps.du_NF, up))
    yield Peer("torch grouped_mm as K8", lambda: mm(steps.da_NF.t(), given.x_NH))
    if importlib.util.find_spec("transformer_engine") is not None:
        yield Peer("Transformer Engine as K1", _te(given))


def _te(given: Given) -> Callable[[], object]:
    """GroupedLinear, forward; written against its sources, and a note when it changed."""
    module: list[Callable[..., Tensor]] = []

    def run() -> Tensor:
        if not module:
            from transformer_engine.pytorch import GroupedLinear

            shape = given.shape
            made = GroupedLinear(
                shape.experts, shape.hidden, shape.neurons, bias=False,
                params_dtype=shape.torch_dtype, device=given.x_NH.device.type,
            )  # fmt: skip
            module.append(made)
        with torch.no_grad():
            return module[0](given.x_NH, list(given.shape.counts))

    return run
