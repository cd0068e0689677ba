"""The runs of a study as Slurm sweeps of `launch`: one a cell, over the seeds.

A sweep's folder is named by what it is made from, so that studies share it; what is submitted,
what is missing and what waits is the launcher's to know. May touch: the folder of sweeps, Slurm
through `launch`.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.runs.kept_runs import TrainingError
from launch.runs.run_commands import SCRIPT
from launch.runs.run_manifest import MANIFEST, digest, gather
from launch.runs.submission import recover_if_free
from launch.runs.sweep import run_sweep, submit_sweep
from launch.runs.sweep_cases import (
    FINISHED,
    MISSING,
    CaseState,
    SweepCase,
    case_states,
    read_cases,
    runs_here,
)  # fmt: skip
from launch.slurm.environment import site_defaults
from launch.slurm.script import sbatch_script
from launch.spec.checks import limit_seconds
from launch.spec.file import read_fields
from launch.spec.launch_spec import LaunchSpec
from launch.spec.training_job import Job, tensorboard_folder, training_job
from megatron_mone.common.files import atomic_write
from megatron_mone.reporting.page.results import collect
from megatron_mone.studies.runs import values_of
from megatron_mone.studies.study import Cell, Preset, Trained

_NAME = 16  # digits of a digest
_SEED = "seed"
_SPARE = 1.5  # of a predicted time


@dataclass(frozen=True)
class Sweep:
    """The runs of a cell.

    Attributes:
        cell: whose they are.
        seeds: of each draw and the order of the data, from 1.
        job: of the launcher, a case a seed; its name is of what it is made from.
    """

    cell: Cell
    seeds: int
    job: Job

    @property
    def folder(self) -> Path:
        """Where everything of the runs is kept."""
        return Path(self.job.spec.folder)

    @property
    def steps(self) -> int:
        """The last optimizer step of a run."""
        return int(self.job.config["values"]["train_iters"])


def site_of(choice: str, gpus: int) -> dict[str, Any]:
    """The fields of a launch file for runs of so many GPUs, SBATCH_* below.

    Args:
        choice: a name of configs/launch, or a path.
        gpus: of a run; 0: one rank on a CPU.

    Raises:
        ValueError: one line naming the file, the field, the value and the fix.
    """
    given = read_fields(choice)
    a_node = int(given.get("gpus_per_node", 0))
    if gpus and not a_node:
        raise ValueError(f"--site {choice}: gpus_per_node is missing: runs take {gpus} GPUs")
    if gpus and not given.get("planner_cluster"):
        raise ValueError(
            f"--site {choice}: planner_cluster is missing: name its hardware, such as h100-ndr"
        )
    if gpus > a_node and gpus % a_node:
        raise ValueError(
            f"--site {choice}: gpus_per_node = {a_node}: runs of {gpus} GPUs need whole nodes"
        )
    if gpus:
        given |= {"gpus_per_node": min(gpus, a_node), "nodes": max(1, gpus // a_node)}
        given.pop("tasks_per_node", None)
    elif a_node:
        raise ValueError(
            f"--site {choice}: gpus_per_node = {a_node}: this preset is trained on CPU cores; give "
            "a launch file with tasks_per_node: 1"
        )
    defaults, _ = site_defaults(os.environ, given)
    return {**defaults, **given}


def with_requeues(site: Mapping[str, Any], hours: float, choice: str) -> dict[str, Any]:
    """A site's fields with as many requeues as the longest run needs, half as long again.

    Args:
        site: of `site_of`.
        hours: of the longest run, predicted.
        choice: the launch file, for errors.

    Raises:
        ValueError: one line; the run would be cut off at a time limit for good.
    """
    limit = limit_seconds(site["time_limit"]) if site.get("time_limit") else math.inf
    needed = math.ceil(_SPARE * 3600 * hours / limit) - 1
    if needed <= 0 or (site.get("requeue") and needed <= site.get("max_requeues", 0)):
        return dict(site)
    if not site.get("requeue") or "max_requeues" in site:
        raise ValueError(
            f"--site {choice}: time_limit = {site['time_limit']!r}: a run takes {hours:,.1f} h by "
            f"the planner: give requeue: true, signal_lead_seconds and max_requeues: {needed} or "
            "more, or a longer time_limit"
        )
    return {**site, "max_requeues": max(needed, LaunchSpec.max_requeues)}


def sweeps(
    cells: Sequence[Cell], preset: Preset, seeds: int, words: Sequence[str], out: Path,
    site: Mapping[str, Any],
) -> list[Sweep]:  # fmt: skip
    """The sweeps of a grid; writes the run file of each.

    Args:
        cells: of the grid.
        preset: its size.
        seeds: of each cell.
        words: Megatron flags that name the data.
        out: folder of all studies.
        site: fields of the launch file.

    Raises:
        ValueError: arguments that a run refuses; one line.
    """
    for cell in cells:
        if cell.after or cell.corpus:
            raise ValueError(
                f"{cell.name}: starts from another cell's weights, or reads a text of its own: it "
                "is trained here alone, leave out --submit"
            )
    return [Sweep(cell, seeds, _job(cell, preset, seeds, words, out, site)) for cell in cells]


def _job(
    cell: Cell, preset: Preset, seeds: int, words: Sequence[str], out: Path, site: Mapping[str, Any]
) -> Job:
    values = values_of(cell, preset, seed=1)
    del values[_SEED]
    config = out / "configs" / f"{digest(values)[:_NAME]}.yaml"
    config.parent.mkdir(parents=True, exist_ok=True)
    if not config.is_file():
        atomic_write(config, yaml.safe_dump({"model": values}, sort_keys=True).encode())
    grid = [f"{_SEED}={','.join(map(str, range(1, seeds + 1)))}"]
    runs = out / "sweeps"
    job = training_job(config, "nameless", runs, words, grid, site)
    return training_job(config, digest(job.config)[:_NAME], runs, words, grid, site)


def write_scripts(found: Sequence[Sweep], folder: Path) -> None:
    """Write the batch script of each, as it would be submitted."""
    folder.mkdir(parents=True, exist_ok=True)
    for one in found:
        script = sbatch_script(one.job.spec)
        atomic_write(folder / f"{one.job.spec.name}.{SCRIPT.rpartition('.')[2]}", script.encode())


def submit(found: Sequence[Sweep]) -> None:
    """Hand to Slurm what has not finished and is not there yet; says so, sweep by sweep.

    Raises:
        ValueError: Slurm refuses one.
        SlurmUnavailable: Slurm does not answer.
    """
    for one in found:
        print(f"{one.cell.name}: ", end="")
        submit_sweep(one.job, lambda job: None)  # the planner has judged


def run_here(found: Sequence[Sweep]) -> None:
    """Run what is missing on this machine's GPU, one run after another.

    Raises:
        TrainingError: a run did not finish; its log is in the sweep's folder.
    """
    for one in found:
        print(f"{one.cell.name}: ", end="")
        if status := run_sweep(one.job):
            raise TrainingError(
                f"{one.cell.name}: a run ended with status {status}; logs in {one.folder}/cases"
            )


def states(one: Sweep) -> dict[int, CaseState]:
    """Seed -> how far its run is.

    Raises:
        ValueError: a record of the sweep cannot be read.
    """
    found = dict.fromkeys(range(1, one.seeds + 1), CaseState(MISSING))
    if (one.folder / MANIFEST).is_file():
        recover_if_free(one.folder)
        cases = read_cases(one.folder)
        starts = gather(one.folder).starts
        known = case_states(one.folder, cases, starts, here=runs_here(one.folder), sure=False)
        found |= {
            int(case.values[_SEED]): state
            for case, state in zip(cases, known, strict=True)
            if int(case.values[_SEED]) in found
        }
    return found


def unfinished(found: Sequence[Sweep]) -> str:
    """In a line, how many runs are finished and which is the first that is not; or nothing."""
    known = {(one.cell.name, seed): state for one in found for seed, state in states(one).items()}
    open_runs = {run: state for run, state in known.items() if state.state != FINISHED}
    if not open_runs:
        return ""
    (cell, seed), state = next(iter(open_runs.items()))
    return (
        f"{len(known) - len(open_runs)} of {len(known)} runs are finished; the first that is not: "
        f"{cell}, seed {seed}: {state}"
    )


def collected(found: Sequence[Sweep]) -> list[Trained]:
    """The finished runs.

    Raises:
        ResultError: training ended without writing all that a result needs.
    """
    trained = []
    for one in found:
        for case in read_cases(one.folder):
            if int(case.values[_SEED]) <= one.seeds:
                trained.append(Trained(one.cell, int(case.values[_SEED]), *_result(one, case)))
    return trained


def _result(one: Sweep, case: SweepCase) -> tuple[Path, Any]:
    folder = one.folder / case.folder
    name = f"{one.folder.name}/{folder.name}"
    return folder, collect(
        name, tensorboard_folder(one.folder, case, one.job.config), steps=one.steps,
        fingerprint=digest(one.job.config), command=(), load_average=0.0,
    )  # fmt: skip
