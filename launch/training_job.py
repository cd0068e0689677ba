"""A training run or any other program -> the fields of a LaunchSpec that a run brings.

--config FILE [-- MEGATRON FLAGS]    ranks of megatron_mone.pretrain, checkpoints in the run folder
-- PROGRAM ARGUMENTS                 ranks of any program that reads RANK and WORLD_SIZE
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.environment import gpu_variables, job_variables
from launch.job_spec import Case, LaunchSpec, Variable
from launch.spec_checks import checked
from megatron_mone.run_config import load_run

CHECKPOINTS = "checkpoints"
_DATA_PATHS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
_OWN_FLAGS = ("--save", "--load")


@dataclass(frozen=True)
class Job:
    """What a command line asks for.

    Attributes:
        spec: checked.
        config: JSON value with all that decides the result; equal for the same run.
        data: prefixes of the datasets it reads.
    """

    spec: LaunchSpec
    config: Any
    data: tuple[str, ...]


def training_job(
    config: Path, name: str | None, runs: Path, words: Sequence[str], grid: Sequence[str],
    site: Mapping[str, Any],
) -> Job:  # fmt: skip
    """A training run, or one for each point of a grid.

    Args:
        config: run file of configs/.
        name: of the run; None takes the file's.
        runs: folder of all run folders.
        words: Megatron flags after those of the run file.
        grid: `ARGUMENT=VALUE,VALUE` each; the runs are all combinations.
        site: fields of the launch file and of flags.

    Raises:
        ValueError: one line naming the file or field, the value and the fix.
    """
    for word in words:
        if word.partition("=")[0] in _OWN_FLAGS:
            raise ValueError(
                f"{word}: checkpoints are in the run folder; give --pretrained-checkpoint to begin "
                "from another run's"
            )
    values = load_run(config)
    folder = runs.resolve() / (name or config.stem)
    command = [_python(site), "-m", "megatron_mone.pretrain", "--config", str(config.resolve())]
    cases = _cases(folder, grid)
    own = () if cases else _checkpoint_flags(str(folder))
    spec = LaunchSpec(
        name=name or config.stem,
        command=(*command, *own, *words),
        workdir=str(Path.cwd()),
        folder=str(folder),
        saves_checkpoints=True,
        variables=_variables(values, words, site),
        cases=cases,
        **site,
    )
    identity = {"values": values, "arguments": list(words), "grid": list(grid)}
    return Job(checked(spec), identity, data_prefixes(values, words))


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


def data_prefixes(values: Mapping[str, Any], words: Sequence[str]) -> tuple[str, ...]:
    """The datasets of a run, without the weights of a blend."""
    found: list[str] = []
    for name in _DATA_PATHS:
        flag = f"--{name.replace('_', '-')}"
        given: Any = values.get(name) or []
        if flag in words:
            rest = words[words.index(flag) + 1 :]
            given = itertools.takewhile(lambda word: not word.startswith("--"), rest)
        found += given.split() if isinstance(given, str) else map(str, given)
    return tuple(dict.fromkeys(word for word in found if not re.fullmatch(r"[\d.]+", word)))


def _python(site: Mapping[str, Any]) -> str:
    """This interpreter, unless the job brings another."""
    brings = any(site.get(name) for name in ("container", "virtual_environment", "modules"))
    return "python" if brings else sys.executable


def _variables(
    values: Mapping[str, Any], words: Sequence[str], site: Mapping[str, Any]
) -> tuple[Variable, ...]:
    variables = job_variables(site.get("cpus_per_task"))
    return variables + gpu_variables(values, words) if site.get("gpus_per_node") else variables


def _checkpoint_flags(folder: str) -> tuple[str, ...]:
    checkpoints = f"{folder}/{CHECKPOINTS}"
    return ("--save", checkpoints, "--load", checkpoints)


def _cases(folder: Path, grid: Sequence[str]) -> tuple[Case, ...]:
    axes = [_axis(text) for text in grid]
    cases = []
    for number, point in enumerate(itertools.product(*axes) if axes else ()):
        label = ",".join(f"{name}={value}" for name, value in point)
        # The number keeps cases apart whose values differ in letters that a folder should not have.
        own = folder / "cases" / f"{number:03d}-{re.sub(r'[^A-Za-z0-9._=,+-]', '_', label)}"
        flags = [word for name, value in point for word in (f"--{name.replace('_', '-')}", value)]
        cases.append(Case(str(own), (*_checkpoint_flags(str(own)), *flags)))
    return tuple(cases)


def _axis(text: str) -> list[tuple[str, str]]:
    name, equals, values = text.partition("=")
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or not equals or "" in values.split(","):
        raise ValueError(
            f"--grid {text!r} must be ARGUMENT=VALUE,VALUE, like mone_neuron_ratio=1,0.5"
        )
    return [(name, value) for value in values.split(",")]
