"""Gives every run of a profile the expert choices of the first, token for token.

A tape of the first run writes down what those of the others hand out in the step of the same
number. May touch: `router_replay` of Megatron's routers.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_mone.moe.routing_tape import RoutingTape


@contextmanager
def repeated_routing(layers: Sequence[Any]) -> Iterator[Callable[[], None]]:
    """Two steps that route alike, so that they allocate alike.

    Args:
        layers: of one run on this rank.

    Yields:
        What to call between the first step and the second.
    """
    before = [layer.router.router_replay for layer in layers]
    first = [tape or RoutingTape(records=True) for tape in before]
    second = [RoutingTape(records=False) for _ in layers]

    def install(tapes: Sequence[RoutingTape | None]) -> None:
        for layer, tape in zip(layers, tapes, strict=True):
            layer.router.router_replay = tape

    def repeat() -> None:
        for done, tape in zip(first, second, strict=True):
            tape.begin_step(done.choices)
        install(second)

    install(first)
    try:
        yield repeat
    finally:
        install(before)


class SharedRouting:
    """One tape a MoE layer and run; the first run's record, the others' replay.

    Args:
        runs: MoE layers of each run on this rank.

    Raises:
        ValueError: the runs have different MoE layers or top-k, so choices cannot be shared.
    """

    def __init__(self, runs: Sequence[Sequence[Any]]) -> None:
        shapes = [[(x.config.num_moe_experts, x.config.moe_router_topk) for x in r] for r in runs]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                "--routing replayed needs the same MoE layers, num_experts and moe_router_topk in "
                "every run: use --routing real or balanced"
            )
        self._tapes = [[RoutingTape(records=not i) for _ in run] for i, run in enumerate(runs)]
        self._steps: dict[int, list[list[Tensor]]] = {}
        self._waiting: dict[int, int] = {}  # runs that have yet to take a step's choices
        for layers, tapes in zip(runs, self._tapes, strict=True):
            for layer, tape in zip(layers, tapes, strict=True):
                layer.router.router_replay = tape

    def begin_step(self, run: int, iteration: int) -> None:
        """Before a step of a run."""
        for layer, tape in enumerate(self._tapes[run]):
            tape.begin_step([] if tape.records else self._steps[iteration][layer])

    def end_step(self, run: int, iteration: int) -> None:
        """After it: keep the first run's choices until every other run has taken them."""
        if run == 0:
            self._steps[iteration] = [tape.choices for tape in self._tapes[0]]
            self._waiting[iteration] = len(self._tapes)
        self._waiting[iteration] -= 1
        if not self._waiting[iteration]:
            del self._steps[iteration], self._waiting[iteration]
