"""Rank files to `profile.json`: what all ranks of a job measured, as one document.

    files -> agreement among ranks -> steps all have -> means, skew, totals of each run

docs/PROFILER.md describes both formats. Reads `folder/ranks/`, writes `folder/profile.json`; one
rank record is in memory at a time. Imports no torch.
"""

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_mone.common.checked_json import UnreadableFile, differences
from megatron_mone.common.phases import PASSES
from megatron_mone.profiling import skew
from megatron_mone.profiling.profile_document import PROFILE, Profile
from megatron_mone.profiling.rank_record import FOLDER, RankRecord, RankRun, read_record
from megatron_mone.profiling.rank_steps import (
    PHASE_NAMES,
    Aligned,
    RankSteps,
    align,
    common_steps,
    take_steps,
)
from megatron_mone.profiling.totals import Totals

_RANK_FILE = re.compile(r"rank-(\d+)\.json", re.ASCII)
_ONE_CONFIG = "profile all ranks with one config"
_AGREED_CONFIG = ("layout", "routing", "micro_batches", "tokens_per_step")

OnFile = Callable[[int, int], None]


def merge(folder: Path, *, skip_unreadable: bool = False, on_file: OnFile | None = None) -> Profile:
    """Merge `folder/ranks/rank-*.json` and write `folder/profile.json` atomically.

    Args:
        folder: of one profiling job.
        skip_unreadable: a file that holds no JSON is named on stderr and its rank is missing,
            instead of an error.
        on_file: told (files read, files) after each.

    Returns:
        What was written.

    Raises:
        ValueError: one line that names the file at fault.
    """
    profile = combine(_read(rank_files(folder), skip_unreadable, on_file))
    profile.write(folder / PROFILE)
    return profile


def combine(records: Iterable[tuple[Path, RankRecord]]) -> Profile:
    """The profile of checked rank records, each with the file that errors are to name.

    Raises:
        ValueError: the ranks disagree, have no step in common, or there is none; one line.
    """
    job = _Job()
    for path, record in records:
        job.add(record, path)
    if not job.hosts:
        raise ValueError("no rank's file can be read; profile again")
    return Profile.of(job.profile(), Path(PROFILE))


def _read(
    files: list[Path], skip_unreadable: bool, on_file: OnFile | None
) -> Iterator[tuple[Path, RankRecord]]:
    for done, path in enumerate(files, start=1):
        try:
            yield path, read_record(path)
        except UnreadableFile as error:
            if not skip_unreadable:
                raise
            print(f"left out: {error}", file=sys.stderr)
        if on_file is not None:
            on_file(done, len(files))


def rank_files(folder: Path) -> list[Path]:
    """The rank files of a job by rank; half-written ones beside them are not."""
    place = folder / FOLDER
    by_rank: dict[int, Path] = {}
    for path in sorted(place.iterdir()) if place.is_dir() else ():
        match = _RANK_FILE.fullmatch(path.name)
        if match is None:
            continue
        rank = int(match[1])
        if rank in by_rank:
            raise ValueError(
                f"{path}: {by_rank[rank].name} claims rank {rank} too; delete the one that is a "
                "copy"
            )
        by_rank[rank] = path
    if not by_rank:
        raise ValueError(
            f"{place}: has no rank-NNNNN.json; give the folder that tools/profile.py wrote"
        )
    return [by_rank[rank] for rank in sorted(by_rank)]


class _Job:
    """What all ranks agree on, and what is kept of each.

    Attributes:
        hosts: rank -> host.
    """

    def __init__(self) -> None:
        self.hosts: dict[int, str] = {}
        self._agreed: dict[str, tuple[Any, str]] = {}
        self._config: dict[str, Any] = {}
        self._stopped: set[int] = set()
        self._runs: dict[str, _Run] = {}
        self._run_names: dict[int, set[str]] = {}

    def add(self, record: RankRecord, path: Path) -> None:
        """Take what is needed from a record; refuse one of another job."""
        for field in ("job", "world_size"):
            value = getattr(record, field)
            self._agree(field, value, path, "the files are of two jobs: delete one's")
        config = record.config.plain()
        for field in _AGREED_CONFIG:
            self._agree(f"config.{field}", config[field], path, _ONE_CONFIG)
        if not self.hosts:
            self._config = config
        self.hosts[record.rank] = record.host
        self._run_names[record.rank] = {run.name for run in record.runs}
        if not record.complete:
            self._stopped.add(record.rank)
        for run in record.runs:
            for field in ("backend", "model"):
                self._agree(f"runs.{run.name}.{field}", getattr(run, field), path, _ONE_CONFIG)
            self._runs.setdefault(run.name, _Run(run)).add(record, run)

    def _agree(self, field: str, value: Any, path: Path, fix: str) -> None:
        agreed, first = self._agreed.setdefault(field, (value, path.name))
        if value == agreed:
            return
        if isinstance(value, dict):
            key, agreed, value = differences(agreed, value)[0]
            field = f"{field}.{key}"
        raise ValueError(f"{path}: {field} is {value!r}, and in {first} {agreed!r}; {fix}")

    def profile(self) -> dict[str, Any]:
        """The document."""
        incomplete = set(self._stopped)
        for name, run in self._runs.items():
            lacking = {rank for rank, names in self._run_names.items() if name not in names}
            if lacking - self._stopped:
                rank = min(lacking - self._stopped)
                raise ValueError(
                    f"rank {rank}: is complete and lacks run {name!r}, which other ranks have; "
                    "delete the files of all but one job"
                )
            incomplete |= run.shorter_ranks()
        world_size = self._agreed["world_size"][0]
        by_host: dict[str, list[int]] = {}
        for rank in sorted(self.hosts):
            by_host.setdefault(self.hosts[rank], []).append(rank)
        return {
            "schema": Profile.SCHEMA,
            "config": self._config,
            "ranks": {
                "world_size": world_size,
                "present": len(self.hosts),
                "missing": [rank for rank in range(world_size) if rank not in self.hosts],
                "incomplete": sorted(incomplete),
                "hosts": by_host,
            },
            "runs": [run.document(self._config["layout"]["ep"]) for run in self._runs.values()],
        }


class _Run:
    """One run of the job over its ranks."""

    def __init__(self, run: RankRun) -> None:
        self._head = {"name": run.name, "backend": run.backend, "model": run.model}
        self._ranks: list[RankSteps] = []
        self._totals = Totals()

    def add(self, record: RankRecord, run: RankRun) -> None:
        """Take one rank's."""
        self._ranks.append(take_steps(record, run))
        self._totals.add(record, run)

    def shorter_ranks(self) -> set[int]:
        """Ranks that have fewer steps than others."""
        most = max(len(one.steps) for one in self._ranks)
        return {one.rank for one in self._ranks if len(one.steps) < most}

    def document(self, ep: int) -> dict[str, Any]:
        """The run's part of the profile, with expert parallel size `ep`."""
        steps = common_steps(self._ranks)
        if not len(steps):
            raise ValueError(
                f"run {self._head['name']!r}: no step was measured by every rank; profile again"
            )
        aligned = align(self._ranks, steps)
        means = skew.rank_means(aligned)
        step_ms = float(aligned.mean(aligned.step_ms_RS))
        return self._head | {
            "step_ms": step_ms,
            **_phases(aligned),
            "samples": _samples(aligned),
            "over_ranks": skew.over_ranks(means),
            "over_nodes": skew.over_nodes(means),
            "by_rank": skew.by_rank(means, self._totals.peak_bytes),
            "stragglers": skew.stragglers(means),
            "expert_groups": skew.expert_groups(means),
            "communication": aligned.traffic(),
            "collectives": aligned.collectives(),
            "routing": self._totals.routing(len(steps), ep),
            "neurons": self._totals.neurons(),
            "flops": self._totals.flops(step_ms),
            "memory": self._totals.memory(),
        }


def _phases(aligned: Aligned) -> dict[str, Any]:
    """`phases` and `passes`, those that took any time."""
    mean_PQ = aligned.mean(aligned.phase_ms_RPQS)
    phases, passes = {}, {}
    for p, phase in enumerate(PHASE_NAMES):
        ran = [q for q in range(len(PASSES)) if aligned.ran_PQ[p, q]]
        if ran:
            phases[phase] = float(mean_PQ[p].sum())
            passes[phase] = {PASSES[q]: float(mean_PQ[p, q]) for q in ran}
    return {"phases": phases, "passes": passes}


def _samples(aligned: Aligned) -> dict[str, Any]:
    """One value a step: the slowest rank's time, the phases' means over ranks."""
    phase_ms_PS = aligned.over_ranks_S(aligned.phase_ms_RPQS).sum(axis=1)
    ran_P = aligned.ran_PQ.any(axis=1)
    return {
        "steps": aligned.steps.tolist(),
        "windows": aligned.windows.tolist(),
        "step_ms": aligned.step_ms_RS.max(axis=0).tolist(),
        "phases": {
            phase: phase_ms_PS[p].tolist() for p, phase in enumerate(PHASE_NAMES) if ran_P[p]
        },
    }
