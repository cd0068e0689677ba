"""How far predictions may be trusted to rank: spread around their bias, and agreement of orders.

A planner that is 8% too fast everywhere chooses right; one that is 0% off on average and spreads by
7 points does not. Touches nothing.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

from megatron_mone.planning.fitting.published import STEP_MS, Comparison

SHAPE = ("hidden_size", "num_layers", "num_experts", "moe_router_topk", "vocab_size")
"""Arguments by which runs are of one model."""


@dataclass(frozen=True)
class Scatter:
    """Signed errors of some figures.

    Attributes:
        count: of figures, 1 or more.
        mean: of their absolute values.
        bias: their own mean.
        spread: standard deviation around the bias; 0 of one figure.
        worst: the largest by absolute value, signed.
    """

    count: int
    mean: float
    bias: float
    spread: float
    worst: float

    @classmethod
    def of(cls, errors: Sequence[float]) -> "Scatter":
        """Of one error or more."""
        bias = math.fsum(errors) / len(errors)
        return cls(
            len(errors),
            math.fsum(map(abs, errors)) / len(errors),
            bias,
            math.sqrt(math.fsum((one - bias) ** 2 for one in errors) / len(errors)),
            max(errors, key=abs),
        )


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau of (predicted, published): pairs in the same order less those in the other,
    over all whose published figures differ; None without any such pair.
    """
    agree = total = 0
    for (p, q), (r, s) in combinations(pairs, 2):
        if q == s:
            continue
        total += 1
        agree += (p < r) - (p > r) if q < s else (p > r) - (p < r)
    return agree / total if total else None


def by_device(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Times of steps by cluster, in its order of names."""
    found = defaultdict(list)
    for one in comparisons:
        if one.figure == STEP_MS:
            found[one.run.cluster].append(one)
    return dict(sorted(found.items()))


def by_model(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Times of steps of runs of one model on one cluster with one kind of routing, two or more."""
    found = defaultdict(list)
    for one in comparisons:
        if one.figure == STEP_MS:
            values = one.run.job.values()
            shape = tuple(values.get(name) for name in SHAPE)
            found[shape, one.run.cluster, one.run.routing].append(one)
    named = {min((c.run.name for c in group), key=len): group for group in found.values()}
    return {name: named[name] for name in sorted(named) if len(named[name]) > 1}


def a_token(comparison: Comparison) -> tuple[float, float]:
    """(predicted, published) milliseconds of one device a token: what a choice of layout is by."""
    values = comparison.run.job.values()
    tokens = values["global_batch_size"] * values["seq_length"] / comparison.run.gpus
    return comparison.predicted / tokens, comparison.published / tokens


def report(comparisons: Sequence[Comparison]) -> str:
    """Scatter by device, order by model, a peer's own predictions beside ours; for a terminal."""
    lines = ["by device, times of steps:"]
    for cluster, group in by_device(comparisons).items():
        lines.append(f"  {cluster:38} {_scatter(group)}")
        held = [one for one in group if not one.run.calibrates]
        if held and len(held) < len(group):
            lines.append(f"  {'  not fitted to':38} {_scatter(held)}")
    lines.append("by model, Kendall's tau of milliseconds a token:")
    for name, group in by_model(comparisons).items():
        tau = kendall_tau([a_token(one) for one in group])
        if tau is not None:
            lines.append(f"  {name:38} {len(group)} runs, tau {tau:+.2f}")
    return "\n".join([*lines, *_peers(comparisons)])


def _scatter(group: Sequence[Comparison]) -> str:
    return _words(Scatter.of([one.error for one in group]))


def _words(found: Scatter) -> str:
    return (
        f"{found.count} figures, mean |error| {found.mean:.1%}, bias {found.bias:+.1%}, "
        f"spread {100 * found.spread:.1f} points, worst {found.worst:+.1%}"
    )


def _peers(comparisons: Sequence[Comparison]) -> list[str]:
    """Lines that hold others' predictions of the same figures against ours."""
    names = dict.fromkeys(str(one.run.peer["name"]) for one in comparisons if one.run.peer)
    lines = []
    for name in names:
        for key, figure in (("step_ms", STEP_MS), ("peak_allocated", "peak GiB")):
            group = [
                one
                for one in comparisons
                if one.figure == figure and one.run.peer.get("name") == name
            ]
            if not group:
                continue
            theirs = [float(one.run.peer[key]) / one.published - 1 for one in group]
            lines.append(f"{figure} of the runs that {name} predicts:")
            lines.append(f"  {'here':38} {_scatter(group)}")
            lines.append(f"  {name:38} {_words(Scatter.of(theirs))}")
            if figure == STEP_MS:
                lines += _orders(name, group)
    return lines


def _orders(name: str, group: Sequence[Comparison]) -> list[str]:
    lines = []
    for model, runs in by_model(group).items():
        ours = [a_token(one) for one in runs]
        scale = [float(one.run.peer["step_ms"]) / one.predicted for one in runs]
        theirs = [(p * s, q) for (p, q), s in zip(ours, scale, strict=True)]
        tau, other = kendall_tau(ours), kendall_tau(theirs)
        if tau is not None and other is not None:
            lines.append(f"  {model:38} {len(runs)} runs, tau {tau:+.2f}, {name} {other:+.2f}")
    return lines
