"""What a run's ranks add up to: routed rows of experts, neuron loads, operations, peak memory.

`Totals` takes one rank record at a time and keeps sums of it. Touches numpy arrays only.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.profiling.rank_record import (
    MOST_EXPERTS,
    Flops,
    LayerNeurons,
    LayerRows,
    Memory,
    RankRecord,
    RankRun,
)
from megatron_mone.profiling.rank_steps import Array
from megatron_mone.profiling.skew import max_over_mean


class Totals:
    """Sums over the ranks of one run.

    Attributes:
        peak_bytes: rank -> its peak, of ranks that had a memory pass.
    """

    def __init__(self) -> None:
        self.peak_bytes: dict[int, int] = {}
        self._fullest: tuple[int, Memory] | None = None
        self._rows: dict[tuple[int, int, int, int], Array] = {}
        self._neurons: dict[int, _LayerLoad] = {}
        self._modules: dict[str, dict[str, float]] = defaultdict(
            lambda: {"executed": 0.0, "active": 0.0}
        )
        self._bytes: dict[str, float] = defaultdict(float)
        self._peaks: dict[str, float | None] = {"peak_flops": 0.0, "peak_bytes_per_s": 0.0}

    def add(self, record: RankRecord, run: RankRun) -> None:
        """Add the run of a rank record."""
        if not len(run.steps):
            return
        where = record.coordinates
        self._add_rows(run.routing.layers, where.edp, len(run.steps))
        for layer in run.neurons.layers if run.neurons else ():
            load = self._neurons.setdefault(layer.layer, _LayerLoad())
            load.add(layer, (where.ep, where.etp))
        self._add_flops(run.flops)
        if run.memory is not None:
            peak = self.peak_bytes[record.rank] = run.memory.peak_bytes
            if self._fullest is None or peak > self._fullest[1].peak_bytes:
                self._fullest = record.rank, run.memory

    def _add_rows(self, layers: list[LayerRows], edp: int, steps: int) -> None:
        for layer in layers:
            rows = np.asarray(layer.rows, dtype=np.float64) / steps
            key = (layer.layer, edp, layer.first_expert, len(rows))
            # Ranks that split an expert's neurons (etp) each count all of its rows.
            self._rows[key] = np.maximum(rows, self._rows.get(key, rows))

    def _add_flops(self, flops: Flops) -> None:
        for phase, counts in flops.modules.items():
            self._modules[phase]["executed"] += counts.executed
            self._modules[phase]["active"] += counts.active
        for name, least in flops.bytes.items():
            self._bytes[name] += least
        for name, total in self._peaks.items():
            peak = getattr(flops, name)
            self._peaks[name] = None if peak is None or total is None else total + peak

    def memory(self) -> dict[str, Any] | None:
        """The memory of the rank with the highest peak; None without a memory pass."""
        if self._fullest is None:
            return None
        rank, memory = self._fullest
        return memory.plain() | {"peak_rank": rank}

    def routing(self, steps: int, ep: int) -> dict[str, Any]:
        """Rows of every expert of every layer over `steps` steps and all replicas.

        Where a rank is missing, its experts' rows are those of their other replicas scaled up, and
        None if there is none.

        Args:
            steps: that the ranks have in common; a rank with more of them counts in proportion.
            ep: expert parallel size, by which the number of experts is known without all ranks.
        """
        layers: list[dict[str, Any]] = []
        for layer in sorted({key[0] for key in self._rows}):
            rows_E = self._rows_of(layer, ep) * steps
            layers.append(
                {
                    "layer": layer,
                    "rows": [None if np.isnan(rows) else round(float(rows)) for rows in rows_E],
                    "max_over_mean": max_over_mean(rows_E[~np.isnan(rows_E)]),
                }
            )
        worst = max((layer["max_over_mean"] for layer in layers), default=1.0)
        return {"rows_max_over_mean": worst, "layers": layers}

    def _rows_of(self, layer: int, ep: int) -> Array:
        """[E] rows a step of a layer's experts, NaN where nothing is known."""
        parts = {key[1:]: rows for key, rows in self._rows.items() if key[0] == layer}
        experts = max(max(first + count, ep * count) for _, first, count in parts)
        experts = min(experts, 2 * MOST_EXPERTS)
        total_E, replicas_E = np.zeros(experts), np.zeros(experts)
        for (_, first, count), rows in parts.items():
            total_E[first : first + count] += rows
            replicas_E[first : first + count] += 1
        with np.errstate(invalid="ignore"):
            return total_E / replicas_E * len({edp for edp, _, _ in parts})

    def neurons(self) -> dict[str, Any] | None:
        """Neuron loads of every layer and of all together; None for a stock model."""
        if not self._neurons:
            return None
        whole = _LayerLoad()
        for load in self._neurons.values():
            whole.join(load)
        layers = [
            {"layer": layer, "rows": load.rows, "width": load.width}
            | load.summary()
            | {"histogram": load.histogram.tolist()}
            for layer, load in sorted(self._neurons.items())
        ]
        return whole.summary() | {"layers": layers}

    def flops(self, step_ms: float) -> dict[str, Any]:
        """Operations of a step over the ranks there are, and their rate in steps of `step_ms`."""
        executed = sum(counts["executed"] for counts in self._modules.values())
        active = sum(counts["active"] for counts in self._modules.values())
        rates = {"executed": 1e3 * executed / step_ms, "active": 1e3 * active / step_ms}
        peak = self._peaks["peak_flops"]
        return {
            "executed": executed,
            "active": active,
            "modules": dict(self._modules),
            "bytes": dict(self._bytes),
            **self._peaks,
            **{f"{kind}_per_s": rate for kind, rate in rates.items()},
            **{
                f"utilisation_{kind}": rate / peak if peak else None for kind, rate in rates.items()
            },
        }


class _LayerLoad:
    """Neuron loads of one layer, or of all.

    Attributes:
        rows: routed rows over ranks and steps; each expert tensor parallel rank counts its own.
        width: neurons of an expert on one rank.
        histogram: neurons by relative load, replicas counted each.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.width = 0
        self.histogram: Array = np.zeros(len(LOAD_EDGES) + 1, dtype=np.int64)
        self._kept = 0
        self._candidates = 0
        self._max_over_mean = 0.0
        self._dead: dict[Any, int] = {}

    def add(self, layer: LayerNeurons, shard: tuple[int, int]) -> None:
        """Add one rank's; `shard` names its experts and neurons, alike in all replicas."""
        self.rows += layer.rows
        self.width = max(self.width, layer.width)
        self.histogram = self.histogram + np.asarray(layer.histogram, dtype=np.int64)
        self._kept += layer.kept
        self._candidates += layer.rows * layer.width
        self._max_over_mean = max(self._max_over_mean, layer.max_over_mean)
        # A neuron is dead if every replica says so: at most as many as the least of them counts.
        self._dead[shard] = min(self._dead.get(shard, layer.dead), layer.dead)

    def join(self, other: _LayerLoad) -> None:
        """Add another layer."""
        self.histogram = self.histogram + other.histogram
        self._kept += other._kept
        self._candidates += other._candidates
        self._max_over_mean = max(self._max_over_mean, other._max_over_mean)
        self._dead[len(self._dead)] = sum(other._dead.values())

    def summary(self) -> dict[str, Any]:
        """Kept ratio, percentiles of the relative load, the largest one, dead neurons."""
        p1, p50, p99 = histogram_quantiles(self.histogram, self._max_over_mean, (0.01, 0.5, 0.99))
        return {
            "kept_ratio": self._kept / self._candidates if self._candidates else 0.0,
            "load_p1": p1,
            "load_p50": p50,
            "load_p99": p99,
            "max_over_mean": self._max_over_mean,
            "dead": sum(self._dead.values()),
        }


def histogram_quantiles(
    histogram: Array, largest: float, shares: tuple[float, ...]
) -> tuple[float, ...]:
    """Quantiles of relative load, linear within a bin.

    Args:
        histogram: [len(LOAD_EDGES) + 1] neurons; the first bin begins at 0.
        largest: the largest load, where the last bin that has neurons ends.
        shares: from 0 to 1.
    """
    total = int(histogram.sum())
    if not total:
        return (0.0,) * len(shares)
    edges = np.minimum(np.array([0.0, *LOAD_EDGES, np.inf]), largest)
    below = np.concatenate(([0], np.cumsum(histogram)))
    return tuple(float(np.interp(share * total, below, edges)) for share in shares)
