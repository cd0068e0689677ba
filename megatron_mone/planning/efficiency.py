"""Efficiency: how near to its data sheets a machine comes; all that the planner cannot compute.

Without a file these are assumptions (roofline.DEFAULTS and the ones here). `--calibrate` writes a
file that is fitted to a profile, with what it was fitted to. Files are JSON, schema
"megatron-mone/efficiency/1". Touches the files it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from megatron_mone.files import write_json
from megatron_mone.planning.roofline import DEFAULTS, Curve
from megatron_mone.profiling.checked_json import Field, check_schema, load

SCHEMA = "megatron-mone/efficiency/1"
ASSUMED = "assumed: nothing was measured"
FITTED_ROOT = Path(__file__).resolve().parents[2] / "configs" / "cluster" / "efficiency"
_FIX = "write it anew with tools/plan_scale.py --calibrate"


@dataclass(frozen=True)
class Efficiency:
    """Curves of the device, and what overlap and the host cost.

    Attributes:
        curves: kind of operation -> its curve; all of roofline.DEFAULTS.
        host_seconds: from one launch of a kernel or collective to the next, of the Python process
            that makes them: modules, autograd, dispatch. Compute is never faster than its launches.
        overlap_tax: compute is longer by this share of the communication that goes on beside it,
            for the multiprocessors and bandwidth that collectives take.
        hidden_share: of communication for which there is enough compute, what is hidden in it.
        source: what was measured, for reports.
    """

    curves: Mapping[str, Curve] = field(default_factory=lambda: dict(DEFAULTS))
    host_seconds: float = 5e-6
    overlap_tax: float = 0.15
    hidden_share: float = 0.9
    source: str = ASSUMED

    def __post_init__(self) -> None:
        missing = sorted(set(DEFAULTS) - set(self.curves))
        if missing:
            raise ValueError(f"efficiency has no curve for {', '.join(missing)}: {_FIX}")
        for name, most in (("host_seconds", 1.0), ("overlap_tax", 1.0), ("hidden_share", 1.0)):
            value = getattr(self, name)
            if not 0 <= value <= most:
                raise ValueError(f"{name} = {value} of an efficiency must be 0 to {most:g}")

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_json(path, {"schema": SCHEMA, **asdict(self)})

    @classmethod
    def read(cls, path: Path) -> Efficiency:
        """Read a file.

        Raises:
            ValueError: one line that names the file, the place and what is wrong there.
        """
        document = Field(load(path, _FIX), path, _FIX)
        check_schema(document, SCHEMA)
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
            curves,
            document["host_seconds"].number(),
            document["overlap_tax"].number(),
            document["hidden_share"].number(),
            document["source"].text(),
        )


def efficiency_of(cluster: str) -> Efficiency:
    """The efficiency fitted for a cluster of configs/cluster/hardware/; assumptions without one.

    Args:
        cluster: its name.

    Raises:
        ValueError: the file is damaged; one line.
    """
    path = FITTED_ROOT / f"{cluster}.json"
    return Efficiency.read(path) if path.is_file() else Efficiency()
