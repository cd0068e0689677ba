"""Gives every run of a profile the expert choices of the first, token for token.

Megatron's router asks `router.router_replay` for its top-k where there is one; a tape stands there
and hands out, call by call, what the first run's tape wrote down in the step of the same number.
Probabilities remain each run's own. May touch: `router_replay` of Megatron's routers.
Shapes: T tokens of a micro-batch on this rank, E experts, k chosen.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from megatron_mone.moe.recompute import in_recompute


class RoutingTape:
    """The expert choices of one layer in one step, in the order of its forwards.

    Attributes:
        records: whether choices are made here; otherwise they are handed out.
        choices: [T, k] of each forward so far.
    """

    def __init__(self, *, records: bool) -> None:
        self.records = records
        self.choices: list[Tensor] = []
        self._next = 0
        self._next_recompute = 0

    def begin_step(self, choices: list[Tensor]) -> None:
        """Forget the last step; `choices` are to be handed out, or to be filled."""
        self.choices = choices
        self._next = self._next_recompute = 0

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(scores [T, k] of the chosen, their numbers [T, k]); see RouterReplay.get_replay_topk."""
        if in_recompute():  # in the order of the forwards, as micro-batches go backward
            index, self._next_recompute = self._next_recompute, self._next_recompute + 1
        elif self.records:
            assert default_compute_topk is not None
            found = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
            self.choices.append(found[1])
            return found
        else:
            index, self._next = self._next, self._next + 1
        chosen = self.choices[index]
        return scores.gather(1, chosen), chosen


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
