"""Which nodes are good, and why the others are not: from all lines to one verdict. Pure."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.limits import Limits
from launch.preflight.lines import TaskLine
from launch.preflight.pairs import Pair, guilty_nodes

CLOCK_SECONDS = 60.0
"""Clocks that are further apart are wrong; tasks of one srun start closer together."""
_FEWEST_RESULTS = 4
_MOST_REASONS = 12


@dataclass(frozen=True)
class Verdict:
    """Nodes are numbers of the host list.

    Attributes:
        chosen: the nodes to train on, `need` of them at most, in the order of the list.
        good: nodes without a fault.
        bad: node -> what is wrong with it.
        failed_pairs: pair -> why, where neither node could be told to be the bad one.
        pairs: bus bandwidth of each pair that was measured, GB/s.
    """

    chosen: tuple[int, ...]
    good: tuple[int, ...]
    bad: Mapping[int, Sequence[str]]
    failed_pairs: Mapping[Pair, str]
    pairs: Mapping[Pair, float]

    @property
    def median_pair(self) -> float | None:
        """Median bus bandwidth over the pairs, GB/s."""
        return statistics.median(self.pairs.values()) if self.pairs else None


def verdict(lines: Sequence[TaskLine], hosts: Sequence[str], need: int, limits: Limits) -> Verdict:
    """Judge all nodes.

    Args:
        lines: at most one of each task.
        hosts: names of all nodes.
        need: nodes to train on.
        limits: of bandwidth.
    """
    reasons: dict[int, list[str]] = {node: [] for node in range(len(hosts))}
    heads = {line.node: line for line in lines if line.local_rank == 0}
    _add_missing(reasons, lines)
    for line in lines:
        reasons[line.node] += line.faults
    _add_other_versions(reasons, heads)
    _add_wrong_clocks(reasons, heads)
    _add_slow_nodes(reasons, heads, limits)
    results = pair_results(heads)
    pairs = {pair: value for pair, value in results.items() if isinstance(value, float)}
    failed = _failed_pairs(results, pairs, limits)
    for node in guilty_nodes([pair for pair in pairs if pair not in failed], failed):
        why = next(text for pair, text in sorted(failed.items()) if node in pair)
        reasons[node].append(f"all-reduce with each of its partners failed or was slow: {why}")
    bad = {
        node: tuple(dict.fromkeys(texts))[:_MOST_REASONS]
        for node, texts in reasons.items()
        if texts
    }
    unclear = {pair: why for pair, why in sorted(failed.items()) if not bad.keys() & set(pair)}
    good = tuple(node for node in reasons if node not in bad)
    return Verdict(_choose(good, unclear, need), good, bad, unclear, pairs)


def pair_results(heads: Mapping[int, TaskLine]) -> dict[Pair, float | str]:
    """What both nodes of each pair say of it: the lower bandwidth, or why there is none."""
    results: dict[Pair, float | str] = {}
    for node, line in sorted(heads.items()):
        for partner, value in line.pairs.items():
            if partner == node:
                continue
            pair = (min(node, partner), max(node, partner))
            other = results.get(pair, value)
            if isinstance(other, float):
                results[pair] = min(other, value) if isinstance(value, float) else value
            else:
                results[pair] = other
    return results


def _failed_pairs(
    results: Mapping[Pair, float | str], pairs: Mapping[Pair, float], limits: Limits
) -> dict[Pair, str]:
    least = _least([*pairs.values()], limits.pair_gb_per_s, limits.relative)
    failed = {pair: value for pair, value in results.items() if isinstance(value, str)}
    slow = {
        pair: f"{value:.3g} GB/s, {least:.3g} are expected"
        for pair, value in pairs.items()
        if value < least
    }
    return failed | slow


def _least(values: Sequence[float], absolute: float | None, relative: float) -> float:
    """The least bandwidth that is not slow; few values have no meaningful median."""
    share = relative * statistics.median(values) if len(values) >= _FEWEST_RESULTS else 0.0
    return max(absolute or 0.0, share)


def _choose(good: Sequence[int], unclear: Mapping[Pair, str], need: int) -> tuple[int, ...]:
    """The first good nodes, without both of a pair that failed."""
    chosen: list[int] = []
    for node in good:
        if len(chosen) < need and not any(
            (other, node) in unclear or (node, other) in unclear for other in chosen
        ):
            chosen.append(node)
    return tuple(chosen)


def _add_missing(reasons: dict[int, list[str]], lines: Sequence[TaskLine]) -> None:
    counts = Counter(line.node for line in lines)
    sizes = Counter(line.ranks_per_node for line in lines)
    expected = sizes.most_common(1)[0][0] if sizes else 1
    for node, texts in reasons.items():
        if not counts[node]:
            texts.append("none of its tasks answered")
        elif counts[node] < expected:
            texts.append(f"{counts[node]} of its {expected} tasks answered")


def _add_other_versions(reasons: dict[int, list[str]], heads: Mapping[int, TaskLine]) -> None:
    """Name what differs from most nodes; of a tie the first node is right: it runs the script."""
    names = dict.fromkeys(name for _, head in sorted(heads.items()) for name in head.versions)
    for name in names:
        have = {node: head.versions.get(name, "absent") for node, head in sorted(heads.items())}
        usual = Counter(have.values()).most_common(1)[0][0]
        for node, version in have.items():
            if version != usual:
                reasons[node].append(f"{name} is {version}, {usual} on the others")


def _add_wrong_clocks(reasons: dict[int, list[str]], heads: Mapping[int, TaskLine]) -> None:
    if not heads:
        return
    usual = statistics.median_low([head.time for head in heads.values()])
    for node, head in heads.items():
        if abs(head.time - usual) > CLOCK_SECONDS:
            where = "ahead" if head.time > usual else "behind"
            reasons[node].append(f"its clock is {abs(head.time - usual):.0f} s {where}")


def _add_slow_nodes(
    reasons: dict[int, list[str]], heads: Mapping[int, TaskLine], limits: Limits
) -> None:
    measured = {n: h.node_gb_per_s for n, h in heads.items() if h.node_gb_per_s is not None}
    least = _least([*measured.values()], limits.node_gb_per_s, limits.relative)
    for node, value in measured.items():
        if value < least:
            reasons[node].append(
                f"all-reduce within it has {value:.3g} GB/s, {least:.3g} are expected"
            )
