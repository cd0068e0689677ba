"""Layers over the stages of a pipeline: even and balanced splits, and the least time of a step.

A split is a count of decoder layers for each virtual stage, in the order in which a micro-batch
goes through them: virtual stage s is chunk s // P of stage s % P. The embedding is the first one's,
the head, with any multi-token-prediction layers, the last one's. Touches nothing.
Shapes: P stages, V chunks of a stage, S = P V virtual stages, M micro-batches.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_mone.planning.tracing.stages import VirtualStage

Split = tuple[int, ...]
"""[S] decoder layers."""
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Shape:
    """Of a schedule: P, V, M, and how many micro-batches go through one chunk in a row."""

    stages: int
    chunks: int
    micro_batches: int
    group: int


def held_micro_batches(shape: Shape) -> NDArray[np.int64]:
    """[P, V] micro-batches that each chunk holds once its stage has made the first forward of 1F1B.

    At no earlier moment are there more; the schedule's first backward comes after it.
    """
    found = np.zeros((shape.stages, shape.chunks), dtype=np.int64)
    for stage in range(shape.stages):
        after = shape.stages - stage - 1
        if shape.chunks == 1:
            found[stage, 0] = min(after + 1, shape.micro_batches)
            continue
        warmup = 2 * after + (shape.chunks - 1) * shape.group
        count = min(warmup + 1, shape.micro_batches * shape.chunks)
        rounds, rest = divmod(count, shape.group * shape.chunks)
        for chunk in range(shape.chunks):
            of_rest = min(max(rest - chunk * shape.group, 0), shape.group)
            found[stage, chunk] = rounds * shape.group + of_rest
    return found


def least_seconds(shape: Shape, forward_PV: Seconds, backward_PV: Seconds) -> float:
    """What no 1F1B schedule falls short of, with or without interleaving: two bounds, the larger.

    A stage waits until the first micro-batch has come to it, makes M passes each way through its
    chunks, and its last backward goes on through the stages before it. And its first backward
    waits for a forward through all virtual stages and the backward of the stages after it; until
    then it has made no more forwards than its warm-up and one.

    Args:
        shape: of the schedule.
        forward_PV, backward_PV: seconds of one micro-batch.
    """
    forward_P, backward_P = forward_PV.sum(1), backward_PV.sum(1)
    whole_P = shape.micro_batches * (forward_P + backward_P)
    before_P = _before(forward_PV[:, 0]) + _before(backward_PV[:, 0])
    after_P = backward_PV[::-1, -1].cumsum()[::-1] - backward_PV[:, -1]
    made_P = (held_micro_batches(shape) * forward_PV).sum(1)
    first_P = forward_PV.sum() + after_P - made_P + _before(backward_PV[:, 0])
    return float(np.max(whole_P + np.maximum(before_P, first_P)))


def _balance(shape: Shape, forward_PV: Seconds, backward_PV: Seconds) -> float:
    """What a split is chosen by: interleaved, stages that differ chunk by chunk wait in turn."""
    least = least_seconds(shape, forward_PV, backward_PV)
    if shape.chunks == 1:
        return least
    return least + shape.micro_batches * float((forward_PV + backward_PV).max(0).sum())


def _before(seconds_P: Seconds) -> Seconds:
    return seconds_P.cumsum() - seconds_P


def even_split(layers: int, stages: int, chunks: int) -> Split | None:
    """Megatron's own; None where it refuses to divide."""
    virtual = stages * chunks
    return None if layers % virtual else (layers // virtual,) * virtual


def neighbours(split: Split, stages: int, costs_S: Seconds) -> Iterator[Split]:
    """Splits in which one layer has gone from the slowest stage to any other; only the virtual
    stages at both ends may be left with none."""
    virtual = len(split)
    of_stage = costs_S.reshape(-1, stages).sum(0)
    slowest = int(of_stage.argmax())
    for giver in range(slowest, virtual, stages):
        if split[giver] <= (0 < giver < virtual - 1):
            continue
        for taker in range(virtual):
            if taker % stages != slowest:
                moved = list(split)
                moved[giver] -= 1
                moved[taker] += 1
                yield tuple(moved)


def balanced_split(
    layers: int,
    shape: Shape,
    passes: Callable[[Split], tuple[Seconds, Seconds]],
    start: Split | None = None,
) -> Split:
    """The split of least time that moving single layers finds from an even one.

    Args:
        layers: of the decoder.
        shape: of the schedule.
        passes: split -> [P, V] forward and backward seconds.
        start: where to begin; from layers spread evenly if None.
    """
    virtual = shape.stages * shape.chunks
    least, more = divmod(layers, virtual)
    # The stages at both ends have the embedding and the head beside their layers.
    middle = sorted(range(virtual), key=lambda s: (s in (0, virtual - 1), abs(2 * s - virtual)))
    taking = set(middle[:more])
    best = start or tuple(least + (s in taking) for s in range(virtual))
    forward_PV, backward_PV = passes(best)
    seconds = _balance(shape, forward_PV, backward_PV)
    while True:
        found = None
        costs_S = (forward_PV + backward_PV).T.reshape(-1)
        for split in neighbours(best, shape.stages, costs_S):
            tried = passes(split)
            taken = _balance(shape, *tried)
            if taken < seconds * (1 - 1e-9):
                seconds, found, (forward_PV, backward_PV) = taken, split, tried
        if found is None:
            return best
        best = found


def split_stages(split: Split, kinds: Sequence[str], mtp: int) -> list[VirtualStage]:
    """[S] what each virtual stage holds.

    Args:
        split: of the layers.
        kinds: of every decoder layer, of stages.KINDS.
        mtp: multi-token-prediction layers.
    """
    found, layer = [], 0
    for s, count in enumerate(split):
        head = s == len(split) - 1
        ends = count > 0 and layer + count == len(kinds)
        found.append(
            VirtualStage(
                first_layer=layer + 1,
                kinds=tuple(kinds[layer : layer + count]),
                embedding=s == 0,
                head=head,
                final_norm=ends if mtp else head,
                mtp=mtp * head,
                by_number=False,
            )
        )
        layer += count
    return found


def layout_text(split: Split, mtp: int) -> str:
    """In the notation of --pipeline-model-parallel-layout."""
    stages = split_stages(split, ("moe",) * sum(split), mtp)
    return "|".join(stage.layout for stage in stages)
