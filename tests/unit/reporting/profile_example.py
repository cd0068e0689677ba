"""A made-up profile.json whose numbers agree with each other, as merge would write it."""

from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.common.phases import COMMUNICATION, PHASES
from megatron_mone.profiling.profile_document import Profile

MODEL = {
    "num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "num_experts": 16,
    "moe_router_topk": 2, "moe_ffn_hidden_size": 1408, "seq_length": 256,
}  # fmt: skip
KEPT = 0.25
TOKENS_PER_RANK = 1024
PEAK_FLOPS, PEAK_BYTES = 1.0e12, 1.6e10
PADDED = 1.25  # what MoNE's backend executes over what the kept neurons need

# ms a step of the phases that every run has, then of those in which the runs differ
_COMMON = {
    "data": 0.9, "embedding": 1.8, "attention": 61.0, "layer norm": 6.1, "router": 5.2,
    "permute": 9.3, "dispatch": 12.4, "combine": 11.1, "loss": 38.0, "grad reduce": 15.7,
    "optimizer": 21.9, "other": 7.6,
}  # fmt: skip
_EXPERTS = {
    "mone": {"gate GEMM": 19.5, "selection": 14.2, "up/down GEMM": 42.0, "balance loss": 3.4},
    "moe": {"up/down GEMM": 117.0},
    "grouped_mm": {"up/down GEMM": 74.0},
}
_BACKENDS = {"mone": "cpu", "moe": "sequential", "grouped_mm": "grouped_mm"}
_FORWARD_SHARE = {"loss": 0.4, "router": 0.5, "selection": 1.0, "data": 1.0}
_ONLY_FORWARD = ("optimizer", "grad reduce")


def as_profile(document: dict[str, Any]) -> Profile:
    """The profile of an example, perhaps changed."""
    return Profile.of(document, Path("profile.json"))


def example_profile(
    world_size: int = 4,
    names: tuple[str, ...] = ("mone", "moe", "grouped_mm"),
    *,
    hosts: int = 2,
    stages: int = 1,
    memory: bool = True,
    peaks: bool = True,
    recompute: bool = False,
    missing: tuple[int, ...] = (),
    slow_rank: int | None = None,
    seed: int = 7,
) -> dict[str, Any]:
    """A profile dict of `megatron-mone/profile/1`.

    Args:
        world_size: ranks of the job.
        names: of the runs: "mone", "moe" or "grouped_mm".
        hosts: the ranks are spread over them evenly.
        stages: of the pipeline.
        memory: whether a memory pass was made.
        peaks: whether the ranks' peaks are known.
        recompute: whether attention runs again inside the backward.
        missing: ranks whose file is not there.
        slow_rank: this rank computes 1.5 times as long.
        seed: of every number.
    """
    random = np.random.default_rng(seed)
    present = [rank for rank in range(world_size) if rank not in missing]
    host_of = {rank: f"node{rank * hosts // world_size:02d}" for rank in range(world_size)}
    by_host: dict[str, list[int]] = {}
    for rank in present:
        by_host.setdefault(host_of[rank], []).append(rank)
    layout = {"tp": 1, "cp": 1, "dp": world_size // stages, "pp": stages, "vpp": 1,
              "ep": min(4, world_size), "etp": 1, "edp": max(1, world_size // 4)}  # fmt: skip
    return {
        "schema": "megatron-mone/profile/1",
        "config": {
            "layout": layout, "routing": "real", "micro_batches": 2,
            "tokens_per_step": TOKENS_PER_RANK * world_size,
            "argv": ["--config", "configs/demo-mone.yaml", "--steps", "20"],
            "machine": {"Processor": "Example CPU, 2 cores", "Versions": "torch 2.14"},
        },
        "ranks": {"world_size": world_size, "present": len(present), "missing": list(missing),
                  "incomplete": [], "hosts": by_host},
        "runs": [
            _Run(name, random, world_size, present, host_of, stages, slow_rank).profile(
                memory=memory, peaks=peaks, recompute=recompute
            )
            for name in names
        ],
    }  # fmt: skip


class _Run:
    def __init__(self, name, random, world_size, present, host_of, stages, slow_rank):
        self.name, self.random, self.world_size = name, random, world_size
        self.ranks, self.stages = present, stages
        self.hosts = [host_of[rank] for rank in present]
        base = {**_COMMON, **_EXPERTS[name]}
        self.phases_ms = {p: base[p] for p in PHASES if p in base}
        self.by_rank = self._by_rank(slow_rank)
        self.mean = {p: float(np.mean(v)) for p, v in self.by_rank.items()}
        self.step_ms = sum(self.mean.values())

    def profile(self, *, memory: bool, peaks: bool, recompute: bool) -> dict[str, Any]:
        mone = self.name == "mone"
        model = {**MODEL, "mone_neuron_ratio": KEPT} if mone else dict(MODEL)
        compute = self._compute_ms()
        held = self._memory() if memory else None
        peak = held["peak_bytes"] if held else None
        return {
            "name": self.name, "backend": _BACKENDS[self.name], "model": model,
            "step_ms": self.step_ms, "phases": self.mean,
            "passes": {p: self._passes(p, ms, recompute) for p, ms in self.mean.items()},
            "samples": self._samples(),
            "over_ranks": self._over(self.ranks, "rank"),
            "over_nodes": self._over(self.hosts, "host"),
            "by_rank": {
                "rank": self.ranks, "host": self.hosts, "stage": self._stage(),
                "step_ms": [self.step_ms] * len(self.ranks), "compute_ms": compute.tolist(),
                "rows": [int(v) for v in 8192 * self._jitter(0.1)],
                "peak_bytes": [peak] * len(self.ranks),
                "phases": {p: v.tolist() for p, v in self.by_rank.items()},
            },
            "stragglers": self._stragglers(compute),
            "expert_groups": [
                {"ranks": self.ranks[i : i + 4],
                 "rows_max_over_mean": 1.0 + float(self.random.uniform(0.05, 0.3)),
                 "expert_ms_max_over_mean": 1.0 + float(self.random.uniform(0.02, 0.2))}
                for i in range(0, len(self.ranks), 4)
            ],
            "communication": {
                "all_to_all ep": {"calls": 32.0, "bytes": 33554432.0, "ms": 18.2},
                "reduce_scatter dp": {"calls": 2.0, "bytes": 5242880.0, "ms": 11.9},
            },
            "routing": self._routing(),
            "neurons": self._neurons() if mone else None,
            "flops": self._flops(peaks),
            "memory": held,
        }  # fmt: skip

    def _jitter(self, scale: float) -> np.ndarray:
        return self.random.uniform(1 - scale, 1 + scale, len(self.ranks))

    def _stage(self) -> list[int]:
        return [rank * self.stages // self.world_size for rank in self.ranks]

    def _by_rank(self, slow_rank: int | None) -> dict[str, np.ndarray]:
        """ms by rank; who computes less waits longer in the combine, so all steps end together."""
        spread = {p: ms * self._jitter(0.04) for p, ms in self.phases_ms.items()}
        if slow_rank is not None:
            where = self.ranks.index(slow_rank)
            for phase in spread:
                if phase not in COMMUNICATION:
                    spread[phase][where] *= 1.5
        total = sum(spread.values())
        spread["combine"] = spread["combine"] + (total.max() - total)
        return spread

    def _compute_ms(self) -> np.ndarray:
        return sum(v for p, v in self.by_rank.items() if p not in COMMUNICATION)

    @staticmethod
    def _passes(phase: str, ms: float, recompute: bool) -> dict[str, float]:
        if phase in _ONLY_FORWARD:
            return {"forward": ms}
        forward = _FORWARD_SHARE.get(phase, 0.34) * ms
        if recompute and phase == "attention":
            return {"forward": 0.75 * forward, "backward": ms - 1.5 * forward,
                    "recompute": 0.75 * forward}  # fmt: skip
        return {"forward": forward, "backward": ms - forward} if forward < ms else {"forward": ms}

    def _samples(self) -> dict[str, Any]:
        factors = self.random.uniform(0.97, 1.03, 12)
        return {
            "steps": [5 * (i // 3) + i % 3 + 3 for i in range(12)],
            "windows": [i // 3 for i in range(12)],
            "step_ms": [float(1.01 * self.step_ms * f) for f in factors],
            "phases": {p: [float(ms * f) for f in factors] for p, ms in self.mean.items()},
        }

    def _over(self, members: list, kind: str) -> dict[str, Any]:
        total = {"step_ms": sum(self.by_rank.values()), **self.by_rank}
        result = {}
        for phase, values in total.items():
            means = {m: float(np.mean([v for k, v in zip(members, values, strict=True) if k == m]))
                     for m in dict.fromkeys(members)} if kind == "host" else dict(
                         zip(members, map(float, values), strict=True))  # fmt: skip
            low, high = min(means, key=means.get), max(means, key=means.get)
            result[phase] = {
                "min": means[low], "median": float(np.median(list(means.values()))),
                "max": means[high], f"min_{kind}": low, f"max_{kind}": high,
            }  # fmt: skip
        return result

    def _stragglers(self, compute: np.ndarray) -> list[dict[str, Any]]:
        median = float(np.median(compute))
        return [
            {"rank": rank, "host": host, "stage": stage, "compute_ms": float(ms),
             "median_ms": median, "phase": "up/down GEMM", "rows_over_mean": 1.4}
            for rank, host, stage, ms in zip(
                self.ranks, self.hosts, self._stage(), compute, strict=True)
            if ms > 1.1 * median
        ]  # fmt: skip

    def _routing(self) -> dict[str, Any]:
        layers = []
        for layer in range(1, MODEL["num_layers"] + 1):
            shares = self.random.dirichlet(np.full(MODEL["num_experts"], 25.0))
            rows = np.round(shares * 12 * 2 * TOKENS_PER_RANK * self.world_size)
            layers.append({"layer": layer, "rows": [int(row) for row in rows],
                           "max_over_mean": float(rows.max() / rows.mean())})  # fmt: skip
        worst = max(layer["max_over_mean"] for layer in layers)
        return {"rows_max_over_mean": worst, "layers": layers}

    def _neurons(self) -> dict[str, Any]:
        layers = []
        for layer in range(1, MODEL["num_layers"] + 1):
            load = self.random.lognormal(-0.1, 0.45, 16 * MODEL["moe_ffn_hidden_size"])
            load /= load.mean()
            bins = np.searchsorted(LOAD_EDGES, load, side="right")
            counts = np.bincount(bins, minlength=len(LOAD_EDGES) + 1)
            p1, p50, p99 = (float(v) for v in np.percentile(load, (1, 50, 99)))
            layers.append({"layer": layer, "rows": 98304, "width": 1408, "kept_ratio": KEPT,
                           "load_p1": p1, "load_p50": p50, "load_p99": p99, "dead": 0,
                           "max_over_mean": float(load.max()),
                           "histogram": counts.tolist()})  # fmt: skip
        return {
            "kept_ratio": KEPT, "load_p1": p1, "load_p50": p50, "load_p99": p99,
            "max_over_mean": max(layer["max_over_mean"] for layer in layers), "dead": 0,
            "layers": layers,
        }  # fmt: skip

    def _flops(self, peaks: bool) -> dict[str, Any]:
        """Operations of one step over all ranks, from the model's dimensions."""
        tokens = TOKENS_PER_RANK * self.world_size
        layers, hidden, width = 4, MODEL["hidden_size"], MODEL["moe_ffn_hidden_size"]
        expert = 2.0 * layers * tokens * MODEL["moe_router_topk"] * hidden * width * 3
        attention = 6.0 * layers * tokens * hidden * (4 * hidden + MODEL["seq_length"])
        modules = {"attention": attention, "loss": 6.0 * tokens * hidden * 8192,
                   "router": 6.0 * layers * tokens * hidden * 16}  # fmt: skip
        if self.name == "mone":
            modules |= {"gate GEMM": expert / 3 * (1 + 2 * KEPT), "up/down GEMM": 2 * expert * KEPT}
            intensities = {"gate GEMM": 90.0, "up/down GEMM": 38.0}
        else:
            modules["up/down GEMM"] = 3 * expert
            intensities = {"up/down GEMM": 120.0}
        padded = PADDED if self.name == "mone" else 1.0
        counts = {
            p: {"executed": v * (padded if p == "up/down GEMM" else 1.0), "active": v}
            for p, v in modules.items()
        }
        peak = PEAK_FLOPS * len(self.ranks)
        result: dict[str, Any] = {
            "modules": counts,
            "bytes": {p: modules[p] / intensity for p, intensity in intensities.items()},
            "peak_flops": peak if peaks else None,
            "peak_bytes_per_s": PEAK_BYTES * len(self.ranks) if peaks else None,
        }
        for kind in ("executed", "active"):
            done = sum(count[kind] for count in counts.values())
            rate = 1e3 * done / self.step_ms
            result |= {kind: done, f"{kind}_per_s": rate,
                       f"utilisation_{kind}": rate / peak if peaks else None}  # fmt: skip
        return result

    def _memory(self) -> dict[str, Any]:
        """Activations rise in the forward and fall in the backward; temporaries come and go."""
        count, mib = 200, 2**20
        ms = np.linspace(0.0, self.step_ms, count)
        rise = np.minimum(np.linspace(0, 2.6, count), np.linspace(1.3, 0, count)).clip(0, 1)
        kinds = {
            "weights": np.full(count, 26.0), "gradients": np.full(count, 26.0),
            "optimizer": np.full(count, 78.0),
            "activations": (48.0 if self.name == "mone" else 71.0) * rise,
            "temporaries": 14.0 * self.random.random(count) * (rise > 0),
            "communication": 4.0 * (self.random.random(count) > 0.7),
        }  # fmt: skip
        kinds = {kind: np.round(values * mib).astype(int) for kind, values in kinds.items()}
        total = sum(kinds.values())
        top = int(np.argmax(total))
        edges = np.cumsum(list(self.phases_ms.values())) / sum(self.phases_ms.values())
        names = list(self.phases_ms)
        phase = [names[min(int(np.searchsorted(edges, x)), len(names) - 1)]
                 for x in np.linspace(0, 1, count)]  # fmt: skip
        by_phase: dict[str, dict[str, int]] = {}
        for i, name in enumerate(phase):
            most = by_phase.setdefault(name, dict.fromkeys(kinds, 0))
            by_phase[name] = {k: max(most[k], int(kinds[k][i])) for k in kinds}
        return {
            "peak_bytes": int(total[top]), "peak_phase": phase[top], "peak_pass": "backward",
            "peak_ms": float(ms[top]), "by_kind": {k: int(v[top]) for k, v in kinds.items()},
            "by_phase": by_phase,
            "timeline": {"ms": ms.tolist(), "phase": phase,
                         **{k: v.tolist() for k, v in kinds.items()}},
            "measured": {"allocator_peak_bytes": None, "process_peak_bytes": int(9.1e8)},
            "peak_rank": self.ranks[-1],
        }  # fmt: skip
