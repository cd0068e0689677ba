"""Seconds that were measured of operators and collectives, looked up before any curve is asked.

`megatron-mone calibrate` times what a traced job consists of: an operator is known by its name, its
shapes and its type, a collective by its kind, its ranks and where these sit, at the sizes timed. A
size between two of them lies on the line between; one beyond takes the bandwidth of the two
nearest. Where a step was timed, each phase's operators are scaled to it, and a collective of a
group takes what the step waited for its like. What was not timed has no entry, and its price stays
that of the curves and of the cluster file. Touches nothing.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from megatron_mone.common.checked_json import Field
from megatron_mone.planning.cost.collectives import Placement, place_stride
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.tracing.trace import Collective, Op

Shapes = tuple[tuple[int, ...], ...]
OperatorKey = tuple[str, Shapes, Shapes, str, int]
"""Name, shapes of inputs and of outputs, type, bytes read."""
LinkKey = tuple[str, int, int]
"""Kind, ranks, stride."""
WaitKey = tuple[str, str, int, int]
"""Kind, group, ranks, stride."""
Points = tuple[tuple[int, float], ...]
"""(bytes, seconds), bytes rising."""
_OF_TWO = ("send", "recv")


def operator_key(op: Op) -> OperatorKey:
    """By which an operator is known, wherever in a step it runs and however often."""
    return op.name, op.inputs, op.outputs, op.dtype, op.bytes_read


def link_key(one: Collective) -> LinkKey:
    """By which a collective is known but for its bytes; a receipt is the send that it waits for."""
    if one.kind in _OF_TWO:
        return "send", 2, one.stride
    return one.kind, one.ranks, one.stride


def wait_key(one: Collective) -> WaitKey:
    """By which a collective is known in a step, where it matters what the group waits for."""
    return one.kind, one.group, one.ranks, one.stride


@dataclass(frozen=True)
class MeasuredTimes:
    """What was timed.

    Attributes:
        operators: seconds of each by itself.
        links: seconds at each size timed.
        phases: phase -> seconds in a step over those of its operators by themselves, where a step
            was timed: memory that another operator left cold, cores and bandwidth shared with
            other ranks, and the host where it is the device.
        waits: seconds that a step waits for a collective at each size that it had: for links that
            others use, for ranks that are late, less what goes on beside it.
    """

    operators: Mapping[OperatorKey, float] = field(default_factory=dict)
    links: Mapping[LinkKey, Points] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    waits: Mapping[WaitKey, Points] = field(default_factory=dict)

    def in_step(self, op: Op) -> float:
        """What the seconds of an operator by itself are multiplied by."""
        return self.phases.get(op.phase, 1.0)

    def operator(self, op: Op) -> float | None:
        """Seconds of one; None where it was not timed."""
        return self.operators.get(operator_key(op)) if self.operators else None

    def waited(self, one: Collective) -> bool:
        """Whether a step was timed that waits for its like: then none of it is hidden."""
        return wait_key(one) in self.waits

    def collective(self, one: Collective, cluster: Cluster) -> float | None:
        """Seconds of one: what a step waits for it, else what it takes if all ranks of its group
        call together; None where no group that sits alike was timed.

        Of another size than the step's it takes as much longer than together as the nearest of
        these, for ranks are late whatever the size; or the same share, where that hides some of it.
        """
        waits = self.waits.get(wait_key(one))
        if waits is None:
            return self._together(one, cluster)
        size, seconds = min(
            waits, key=lambda point: abs(math.log((point[0] + 1) / (one.bytes + 1)))
        )
        if size == one.bytes:
            return seconds
        near = self._together(replace(one, bytes=size), cluster)
        together = self._together(one, cluster)
        if not near or together is None:
            return between(waits, one.bytes)
        return together + seconds - near if seconds > near else together * seconds / near

    def _together(self, one: Collective, cluster: Cluster) -> float | None:
        kind, ranks, stride = link_key(one)
        points = self._placed(cluster).get((kind, place_stride(ranks, stride, cluster)))
        return None if points is None else between(points, one.bytes)

    def _placed(self, cluster: Cluster) -> Mapping[tuple[str, Placement], Points]:
        known = self._by_cluster.get(cluster.name)
        if known is None:
            known = self._by_cluster[cluster.name] = {
                (kind, place_stride(ranks, stride, cluster)): points
                for (kind, ranks, stride), points in self.links.items()
            }
        return known

    @cached_property
    def _by_cluster(self) -> dict[str, Mapping[tuple[str, Placement], Points]]:
        return {}

    def plain(self) -> dict[str, Any]:
        """As an efficiency file has it."""
        return {
            "operators": [
                {"name": name, "inputs": inputs, "outputs": outputs, "dtype": dtype,
                 "bytes_read": read, "seconds": seconds}
                for (name, inputs, outputs, dtype, read), seconds in self.operators.items()
            ],
            "links": [
                {"kind": kind, "ranks": ranks, "stride": stride, "points": points}
                for (kind, ranks, stride), points in self.links.items()
            ],
            "phases": dict(self.phases),
            "waits": [
                {"kind": kind, "group": group, "ranks": ranks, "stride": stride, "points": points}
                for (kind, group, ranks, stride), points in self.waits.items()
            ],
        }  # fmt: skip

    @classmethod
    def of(cls, section: Field) -> MeasuredTimes:
        """What `plain` made.

        Raises:
            ValueError: one line that names the file and the place.
        """
        operators = {
            (
                one["name"].text(), _shapes(one["inputs"]), _shapes(one["outputs"]),
                one["dtype"].text(), one["bytes_read"].whole(),
            ): one["seconds"].number()
            for one in section["operators"].elements()
        }  # fmt: skip
        links = {
            (one["kind"].text(), *_placed(one)): _points(one) for one in section["links"].elements()
        }
        waits = {
            (one["kind"].text(), one["group"].text(), *_placed(one)): _points(one)
            for one in (section["waits"].elements() if "waits" in section else ())
        }
        phases = {name: one.number() for name, one in section["phases"].members()}
        return cls(operators, links, phases, waits)


def between(points: Points, size: float) -> float:
    """Seconds at a size, on the line between its neighbours; beyond the ends on theirs, and never
    less than the first's share of them.
    """
    known_sizes = dict(points)
    if size in known_sizes:
        return known_sizes[int(size)]
    if len(points) == 1:
        ((known, seconds),) = points
        return seconds * max(1.0, size / known) if known else seconds
    at = min(max(1, bisect_left(points, (size, 0.0))), len(points) - 1)
    (low, first), (high, second) = points[at - 1 : at + 1]
    slope = max(0.0, (second - first) / (high - low))  # noise may fall with the size
    return max(0.0, first + slope * (size - low)) if size >= low else first


def _shapes(field_: Field) -> Shapes:
    return tuple(tuple(size.whole() for size in shape.elements()) for shape in field_.elements())


def _placed(one: Field) -> tuple[int, int]:
    ranks, stride = one["ranks"].whole(), one["stride"].whole()
    if min(ranks, stride) < 1:
        one.fail("ranks and stride must be 1 or more")
    return ranks, stride


def _points(one: Field) -> Points:
    points = tuple(_point(pair) for pair in one["points"].elements())
    if not points or any(a >= b for (a, _), (b, _) in pairwise(points)):
        one["points"].fail("must be [bytes, seconds] with rising bytes, one or more")
    return points


def _point(pair: Field) -> tuple[int, float]:
    values = list(pair.elements())
    if len(values) != 2:
        pair.fail("must be [bytes, seconds]")
    return values[0].whole(), values[1].number()
