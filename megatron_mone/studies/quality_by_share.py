"""What the measures of the study `sparsity` say: what a share of neurons costs, and which share
keeps a model's quality. Pure.

Values differ by seed, where a cell was trained several times; else by block of text or question.
"""

import math
from collections.abc import Callable, Mapping, Sequence

from megatron_mone.studies.document import Measure, StudyResults
from megatron_mone.studies.measuring.sparsity_names import AS_IT_IS, CHANCE, GATE, LOSS, OWN, RIGHT
from megatron_mone.studies.statistics import Estimate, estimate

Samples = Mapping[float, Sequence[float]]
"""Share -> values, the same seeds, blocks or questions at each."""


def samples(results: StudyResults, of: str, who: str) -> Samples:
    """What was measured of a model at each place; empty where it was not."""
    each = [_by_place(one) for one in results.measured(of, who).values()]
    if len(each) < 2:
        return each[0] if each else {}
    return {x: [_mean(one[x]) for one in each] for x in each[0]}


def _by_place(measure: Measure) -> dict[float, list[float]]:
    values: dict[float, list[float]] = {}
    for x, y in zip(measure.x, measure.y, strict=True):
        values.setdefault(x, []).append(y)
    return values


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def first(results: StudyResults, of: str, who: str) -> float:
    """The one value of a measure that is the same for all seeds."""
    return next(iter(results.measured(of, who).values())).y[0]


def as_it_is(results: StudyResults, who: str, of: str = AS_IT_IS) -> Sequence[float]:
    """Losses of a model with the share that it keeps by itself."""
    return next(iter(samples(results, of, who).values()))


def between(values: Samples, share: float) -> list[float]:
    """Values at a share, of those measured on both sides of it, linear in its logarithm; at none
    below the smallest that was measured."""
    above = min(x for x in values if x >= share)
    below = max((x for x in values if x <= share), default=above)
    weight = 0.0 if above == below else math.log(share / below) / math.log(above / below)
    pairs = zip(values[below], values[above], strict=True)
    return [low + weight * (high - low) for low, high in pairs]


def added(values: Sequence[float], base: Sequence[float]) -> Estimate:
    """What values are over others, paired by seed, block or question."""
    return estimate([one - other for one, other in zip(values, base, strict=True)])


def smallest_share(margins: Mapping[float, float], own: float) -> float | None:
    """The share down to which quality is kept.

    Args:
        margins: share -> 0 or more where quality is kept.
        own: share from which one goes down; up, where quality is not kept at it.

    Returns:
        The zero of the margin between the last share that keeps it and the next smaller one, linear
        in the share's logarithm; the smallest measured where that keeps it; None where none does.
    """
    good = [share for share in sorted(margins) if share >= own and margins[share] >= 0]
    if not good:
        return None
    last = good[0]
    for share in sorted((one for one in margins if one < last), reverse=True):
        if margins[share] < 0:
            weight = margins[last] / (margins[last] - margins[share])
            return last * (share / last) ** weight
        last = share
    return last


def share_that_keeps(
    results: StudyResults, who: str, values: Samples, margin: Callable[[float, float], float],
    base: Sequence[float],
) -> Estimate | None:  # fmt: skip
    """Of each seed, where there are several; else of the mean over blocks or questions.

    Args:
        results: hold the measures.
        who: model or cell.
        values: by share.
        margin: of (value, base), 0 or more where quality is kept.
        base: as the model is.
    """
    own = first(results, OWN, who)
    if len(results.measured(OWN, who)) < 2:
        values, base = {x: [_mean(y)] for x, y in values.items()}, [_mean(base)]
    found = [
        smallest_share({x: margin(y[n], at) for x, y in values.items()}, own)
        for n, at in enumerate(base)
    ]
    known = [one for one in found if one is not None]
    return estimate(known) if len(known) == len(found) else None


def keeps_loss(results: StudyResults, who: str, criterion: str, lost: float) -> Estimate | None:
    """The share of neurons at which the loss is `lost` of it higher than as the model is."""
    values = samples(results, LOSS.format(criterion), who)
    base = as_it_is(results, who)
    return share_that_keeps(results, who, values, lambda y, at: at * (1 + lost) - y, base)


def right_as_it_is(results: StudyResults, who: str) -> Sequence[float]:
    """Right answers, 1 or 0, or seeds' shares of them; empty where none were asked for."""
    values = samples(results, RIGHT.format(GATE), who)
    return between(values, first(results, OWN, who)) if values else ()


def has_signal(results: StudyResults, who: str) -> bool:
    """Whether a model as it is answers more questions right than chance does, clearly."""
    right = right_as_it_is(results, who)
    return bool(right) and estimate(right).low > first(results, CHANCE, who)


def keeps_answers(results: StudyResults, who: str, criterion: str, lost: float) -> Estimate | None:
    """The share of neurons at which `lost` of the right answers are lost."""
    values = samples(results, RIGHT.format(criterion), who)
    base = right_as_it_is(results, who)
    return share_that_keeps(results, who, values, lambda y, at: y - at * (1 - lost), base)
