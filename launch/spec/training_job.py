"""A training run or any other program -> the fields of a LaunchSpec that a run brings.

--config FILE [-- MEGATRON FLAGS]    ranks of megatron_mone.pretrain, checkpoints in the run folder
-- PROGRAM ARGUMENTS                 ranks of any program that reads RANK and WORLD_SIZE
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.runs.sweep_cases import SINGLE, SweepCase, grown, read_cases
from launch.spec.checks import checked
from launch.spec.environment import gpu_variables, job_variables
from launch.spec.grid import Point, read_grid
from launch.spec.launch_spec import Case, LaunchSpec, Variable
from launch.spec.megatron_flags import stated, stated_words
from megatron_mone.common import checked_json
from megatron_mone.data import blend
from megatron_mone.deepspeed.settings import DEEPSPEED, MEGATRON
from megatron_mone.model.run_config import find_run, load_run
from megatron_mone.model.trackers import flags as trackers

CHECKPOINTS = "checkpoints"
TENSORBOARD = "tensorboard"
_OWN_FLAGS = ("--save", "--load")
# What the curves of a run want beside losses: times, throughput, memory.
_RECORDED = ("log_timers_to_tensorboard", "log_throughput", "log_memory_to_tensorboard")


@dataclass(frozen=True)
class Job:
    """What a command line asks for.

    Attributes:
        spec: checked.
        config: JSON value with all that decides the result; equal for the same run.
        data: prefixes of the datasets it reads.
        points: of the grid; none for a single run.
    """

    spec: LaunchSpec
    config: Any
    data: tuple[str, ...]
    points: tuple[Point, ...] = ()


def training_job(
    config: Path, name: str | None, runs: Path, words: Sequence[str], grid: Sequence[str],
    site: Mapping[str, Any],
) -> Job:  # fmt: skip
    """A training run, or one for each point of a grid.

    Args:
        config: run file, or its name in configs/.
        name: of the run; None takes the file's.
        runs: folder of all run folders.
        words: Megatron flags after those of the run file.
        grid: `ARGUMENT=VALUE,VALUE` each; the runs are all combinations.
        site: fields of the launch file and of flags.

    Raises:
        ValueError: one line naming the file or field, the value and the fix.
    """
    config = find_run(config)
    return job_of_values(config, load_run(config), name, runs, words, grid, site)


def job_of_values(
    config: Path, values: Mapping[str, Any], name: str | None, runs: Path, words: Sequence[str],
    grid: Sequence[str], site: Mapping[str, Any],
) -> Job:  # fmt: skip
    """As `training_job`, where what the run file says is known.

    Args:
        config: run file; not read, and need not be there yet.
        values: Megatron's arguments that it gives.
        name: of the run; None takes the file's.
        runs: folder of all run folders.
        words: Megatron flags after those of the run file.
        grid: as `training_job`.
        site: fields of the launch file and of flags.

    Raises:
        ValueError: one line naming the field, the value and the fix.
    """
    for word in words:
        if word.partition("=")[0] in _OWN_FLAGS:
            raise ValueError(
                f"{word}: checkpoints are in the run folder; give --pretrained-checkpoint to begin "
                "from another run's"
            )
    trackers.check_address(stated("mlflow_tracking_uri", values, words))
    folder = runs.resolve() / (name or config.stem)
    points = read_grid(grid, values, words)
    identity = {"values": values, "arguments": list(words), "sweep": bool(points)}
    identity |= _settings(values, words)
    cases = grid_cases(folder, grown(read_cases(folder), points), identity) if points else ()
    own = () if cases else _own_flags(folder, SINGLE, identity)
    spec = LaunchSpec(
        name=name or config.stem,
        command=("-m", "megatron_mone.pretrain", "--config", str(config.resolve()), *own, *words),
        workdir=str(Path.cwd()),
        folder=str(folder),
        saves_checkpoints=True,
        variables=training_variables(values, words, site),
        cases=cases,
        **site,
    )
    spec = replace(spec, command=(spec.python, *spec.command))
    check_hostfile(site, values, words, cases)
    read = [data_prefixes(values, [*words, *case.arguments]) for case in cases or (Case("", ()),)]
    data = tuple(dict.fromkeys(prefix for prefixes in read for prefix in prefixes))
    return Job(checked(spec), identity, data, points)


def check_hostfile(
    site: Mapping[str, Any], values: Mapping[str, Any], words: Sequence[str],
    cases: Sequence[Case] = (),
) -> None:  # fmt: skip
    """Refuse DeepSpeed's hostfile where no run, or not every case, is DeepSpeed's.

    Args:
        site: fields of the launch file and of flags.
        values: Megatron arguments of the run file.
        words: Megatron flags after them.
        cases: of a grid.

    Raises:
        ValueError: one line.
    """
    for case in cases or (Case("", ()),):
        engine = stated("engine", values, [*words, *case.arguments]) or MEGATRON
        if site.get("hostfile") and engine != DEEPSPEED:
            raise ValueError(
                f"hostfile = True is DeepSpeed's, and engine = {engine!r}: give --engine "
                "deepspeed, or leave it out"
            )


def grid_cases(
    folder: Path, cases: Sequence[SweepCase], config: Mapping[str, Any]
) -> tuple[Case, ...]:
    """The elements of a sweep's job array.

    Args:
        folder: of the sweep.
        cases: all of them, in the order of their numbers.
        config: of the job.
    """
    return tuple(
        Case(str(folder / case.folder), (*_own_flags(folder, case, config), *case.flags))
        for case in cases
    )


def tensorboard_folder(folder: Path, case: SweepCase, config: Mapping[str, Any]) -> Path:
    """Where a case writes its curves: where the user said (in a folder for each of a sweep).

    Args:
        folder: of the run.
        case: of it, or SINGLE.
        config: of the job.
    """
    given = stated("tensorboard_dir", config["values"], config["arguments"])
    if given is None:
        return folder / case.folder / TENSORBOARD
    return Path(given, Path(case.folder).name)


def program_job(name: str | None, runs: Path, words: Sequence[str], site: Mapping[str, Any]) -> Job:
    """Ranks of any program.

    Args:
        name: of the run; None takes the program's.
        runs: folder of all run folders.
        words: the program and its arguments.
        site: fields of the launch file and of flags.

    Raises:
        ValueError: one line naming the field, the value and the fix.
    """
    if not words:
        raise ValueError("nothing to run: give --config FILE, or a program after --")
    if site.get("hostfile"):
        raise ValueError("hostfile = True is for training with engine = deepspeed; leave it out")
    name = name or Path(words[0]).name
    spec = LaunchSpec(
        name=name,
        command=tuple(words),
        workdir=str(Path.cwd()),
        folder=str(runs.resolve() / name),
        variables=job_variables(site.get("cpus_per_task")),
        **site,
    )
    return Job(checked(spec), {"command": list(words)}, ())


def training_variables(
    values: Mapping[str, Any], words: Sequence[str], site: Mapping[str, Any]
) -> tuple[Variable, ...]:
    """What the ranks of a training program need in their environment, on GPUs or without.

    Args:
        values: Megatron arguments of the run file.
        words: Megatron flags after them.
        site: fields of the launch file and of flags.
    """
    variables = job_variables(site.get("cpus_per_task"))
    return variables + gpu_variables(values, words) if site.get("gpus_per_node") else variables


def data_prefixes(values: Mapping[str, Any], words: Sequence[str]) -> tuple[str, ...]:
    """The datasets of a run, and the files listing datasets that are not on this machine.

    Args:
        values: Megatron arguments of the run file.
        words: Megatron flags after them.

    Raises:
        ValueError: from `data.blend.read_data`.
    """
    given: dict[str, Any] = {name: stated_words(name, values, words) for name in blend.WORDS}
    data = blend.read_data(given | {name: stated(name, values, words) for name in blend.FILES})
    return (*data.prefixes, *(path for _, path in data.unread))


def _settings(values: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    """What DeepSpeed's JSON says, which decides the result and may be edited between two starts."""
    path = stated("deepspeed_config", values, words)
    if path is None:
        return {}
    return {"deepspeed_config": checked_json.load(Path(path), "give DeepSpeed's JSON")}


def _own_flags(folder: Path, case: SweepCase, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Where a run keeps its curves and checkpoints, and what is recorded."""
    values = config["values"]
    # Flags without a value: one given twice is as good as once.
    recorded = [f"--{name.replace('_', '-')}" for name in _RECORDED if not values.get(name)]
    curves = str(tensorboard_folder(folder, case, config))
    checkpoints = str(folder / case.folder / CHECKPOINTS)
    return (
        *("--tensorboard-dir", curves, *recorded, "--save", checkpoints, "--load", checkpoints),
        *_names(folder, case, values, config["arguments"]),
    )


def _names(
    folder: Path, case: SweepCase, values: Mapping[str, Any], words: Sequence[str]
) -> tuple[str, ...]:
    """What a tracked run is called where the user does not say: as here, a case after its sweep."""
    own = folder.name if case is SINGLE else f"{folder.name}/{Path(case.folder).name}"
    asked = [name for asks, (name, *_) in trackers.OTHERS.items() if stated(asks, values, words)]
    return tuple(
        word for name in asked if not stated(name, values, words)
        for word in (trackers.flag(name), own)
    )  # fmt: skip
