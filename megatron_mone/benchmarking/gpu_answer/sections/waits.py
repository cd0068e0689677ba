"""Whether the host waits for the device in a layer, and a graph of it gives the same bits."""

from collections.abc import Callable

import torch

from megatron_mone.benchmarking.gpu_answer.clock import captured
from megatron_mone.benchmarking.gpu_answer.experts import Experts, Variant
from megatron_mone.benchmarking.gpu_answer.given import given
from megatron_mone.benchmarking.gpu_answer.notebook import Notebook
from megatron_mone.benchmarking.gpu_answer.plan import Plan, kept_of
from megatron_mone.benchmarking.gpu_answer.sections.kernels import facts
from megatron_mone.kernels.gpu_answer_results import MONE, Check

NEEDS_A_GPU = "needs a GPU: not checked"


def run(plan: Plan, device: torch.device, book: Notebook) -> None:
    """Launches, no wait, capture and replay: of single neurons and of blocks."""
    quarter = kept_of(plan.one, 1 / 4)
    inputs = given(plan.one, device)
    for block in (1, quarter):
        variant = Variant(MONE, quarter, block, balance_loss=True, nan_check=True)
        experts = Experts(inputs, variant)
        try:
            launched = [one.kernel for one in facts(experts.passes)]
        except ValueError as error:
            book.note(str(error))
            continue
        name = f"{variant.label}: launches of ours, forward and backward"
        book.add(Check(name=name, passed=None, words=f"{len(launched)}: {', '.join(launched)}"))
        for what, check in (("no host wait", _no_wait), ("graph replay", _replays)):
            name = f"{variant.label}: {what}"
            if device.type == "cuda":
                book.add(_checked(name, lambda check=check, experts=experts: check(experts)))
            else:
                book.add(Check(name=name, passed=None, words=NEEDS_A_GPU))


def _checked(name: str, check: Callable[[], str]) -> Check:
    """Passed where `check` says nothing and raises nothing."""
    try:
        words = check()
    except Exception as error:
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return Check(name=name, passed=not words, words=words)


def _no_wait(experts: Experts) -> str:
    """Forward and backward under torch's own check for waits, after one that compiles."""
    experts.passes()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        experts.passes()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return ""


def _replays(experts: Experts) -> str:
    """Twice replayed, the same bits as run."""
    eager = [t.clone() for t in experts.passes()]
    held: list[torch.Tensor] = []

    def call() -> None:
        held[:] = experts.passes()

    graph = captured(call)
    for turn in ("first", "second"):
        graph.replay()
        torch.cuda.synchronize()
        for name, was, now in zip(("y", "dx", "dp", *("dW",) * 3), eager, held, strict=True):
            if not torch.equal(was, now):
                return (
                    f"{name} of the {turn} replay has other bits than the layer as Python runs it"
                )
    return ""
