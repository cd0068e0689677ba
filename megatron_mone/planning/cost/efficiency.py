"""Efficiency: how near to its data sheets a machine comes; all that the planner cannot compute.

Without a file these are assumptions (roofline.DEFAULTS and the ones here). `--calibrate` writes a
file that is fitted to a profile, with what it was fitted to; `calibrate` one that also holds what
it timed, which goes before the curves. Files are JSON, schema "megatron-mone/efficiency/3". Touches
the files it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from megatron_mone.common.checked_json import Field, load
from megatron_mone.common.files import write_json
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.planning.cost.bands import FittedRun
from megatron_mone.planning.cost.measured_times import MeasuredTimes
from megatron_mone.planning.cost.roofline import DEFAULTS, Curve

SCHEMA = "megatron-mone/efficiency/3"
ASSUMED = "assumed: nothing was measured"
FITTED_ROOT = CONFIG_ROOT / "cluster" / "efficiency"
_FIX = "write it anew with megatron-mone calibrate, or plan --calibrate"
HOST = ("kernel_seconds", "node_seconds", "function_seconds", "pass_seconds", "wait_seconds")
"""Names of what the host costs."""


@dataclass(frozen=True)
class Efficiency:
    """Curves of the device, and what overlap and the host cost.

    Attributes:
        curves: kind of operation -> its curve; all of roofline.DEFAULTS.
        kernel_seconds: of the host, for one launch of a kernel or collective. Compute is never
            faster than its launches.
        node_seconds: likewise for a node of autograd in C++, as it is made and again as it runs.
        function_seconds: likewise for one in Python, its module included.
        pass_seconds: likewise for a pass through a pipeline's stage, its transfers included.
        wait_seconds: that host and device lose where the host waits for the device: until it has
            launched ahead again.
        overlap_tax: compute is longer by this share of the communication that goes on beside it,
            for the multiprocessors and bandwidth that collectives take.
        hidden_share: of communication for which there is enough compute, what is hidden in it.
        source: what was measured, for reports.
        runs: that it was fitted to; empty where none were.
        numbers: that were fitted to them.
        memory_errors: sizes of the logarithm of predicted over published bytes, of runs that say
            them.
        measured: operators and collectives that were timed.
    """

    curves: Mapping[str, Curve] = field(default_factory=lambda: dict(DEFAULTS))
    kernel_seconds: float = 8e-6
    node_seconds: float = 3e-6
    function_seconds: float = 1.5e-4
    pass_seconds: float = 5e-4
    wait_seconds: float = 5e-5
    overlap_tax: float = 0.15
    hidden_share: float = 0.9
    source: str = ASSUMED
    runs: tuple[FittedRun, ...] = ()
    numbers: int = 0
    memory_errors: tuple[float, ...] = ()
    measured: MeasuredTimes = field(default_factory=MeasuredTimes)

    def __post_init__(self) -> None:
        missing = sorted(set(DEFAULTS) - set(self.curves))
        if missing:
            raise ValueError(f"efficiency has no curve for {', '.join(missing)}: {_FIX}")
        for name in (*HOST, "overlap_tax", "hidden_share"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} = {value} of an efficiency must be 0 to 1")

    def without_host(self) -> Efficiency:
        """The same, of a host that costs nothing."""
        nothing: dict[str, Any] = dict.fromkeys(HOST, 0.0)
        return replace(self, **nothing)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        found = self.measured
        fields_ = asdict(replace(self, measured=MeasuredTimes()))
        del fields_["measured"]
        timed = {"measured": found.plain()} if found.operators or found.links else {}
        write_json(path, {"schema": SCHEMA, **fields_, **timed})

    @classmethod
    def read(cls, path: Path) -> Efficiency:
        """Read a file.

        Raises:
            ValueError: one line that names the file, the place and what is wrong there.
        """
        document = Field(load(path, _FIX), path, _FIX)
        document.has_schema(SCHEMA)
        curves = {}
        for kind, element in document["curves"].members():
            if kind not in DEFAULTS:
                element.fail(f"{kind!r} is no kind of operation; one of {', '.join(DEFAULTS)}")
            values = {
                one.name: element[one.name].whole() if one.name == "column_tile"
                else element[one.name].number()
                for one in fields(Curve)
            }  # fmt: skip
            curves[kind] = Curve(**values)  # type: ignore[arg-type]
        return cls(
            curves=curves,
            **{name: document[name].number() for name in HOST},
            overlap_tax=document["overlap_tax"].number(),
            hidden_share=document["hidden_share"].number(),
            source=document["source"].text(),
            runs=tuple(_run(one) for one in document["runs"].elements()),
            numbers=document["numbers"].whole(),
            memory_errors=tuple(one.number() for one in document["memory_errors"].elements()),
            measured=MeasuredTimes.of(document["measured"]) if "measured" in document
            else MeasuredTimes(),
        )  # fmt: skip


def _run(one: Field) -> FittedRun:
    place = tuple(number.number() for number in one["place"].elements())
    return FittedRun(one["name"].text(), place, one["error"].number())


def efficiency_of(cluster: str) -> Efficiency:
    """The efficiency fitted for a cluster of configs/cluster/hardware/; assumptions without one.

    Args:
        cluster: its name.

    Raises:
        ValueError: the file is damaged; one line.
    """
    path = FITTED_ROOT / f"{cluster}.json"
    return Efficiency.read(path) if path.is_file() else Efficiency()
