"""A profile.json as calibration needs it: its runs as jobs that can be traced, and their phases.

A run is asked for by the flags of the profiled job; a baseline's by those with the fields of its
model that differ. Data, tokenizer and folders are not needed to trace, and are taken out. May
touch: the profile it is given.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.common.checked_json import Field, column, load
from megatron_mone.common.phases import (
    CLIPPING,
    COMMUNICATION,
    DATA,
    OPTIMIZER,
    OTHER,
    PASSES,
    PHASES,
)
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.profiling.baselines import MAIN
from megatron_mone.profiling.profile_document import Profile

NOT_COMPUTE = (*COMMUNICATION, DATA, OTHER)
"""Phases that no curve describes: waiting for others, reading files, Python of the schedule."""
_FIX = "give the profile.json of tools/profile.py"
_SWITCH = "mone_neuron_ratio"
_FILES = (
    "--data-path", "--train-data-path", "--valid-data-path", "--test-data-path",
    "--data-args-path", "--per-split-data-args-path", "--data-cache-path", "--tokenizer-type",
    "--tokenizer-model", "--vocab-size", "--vocab-file", "--merge-file",
    "--make-vocab-size-divisible-by", "--mock-data", "--load", "--save",
    "--pretrained-checkpoint", "--tensorboard-dir", "--mone-record-masks", "--mone-replay-masks",
    "--mone-profile-steps", "--mone-profile-dir", "--wandb-project", "--wandb-exp-name",
    "--wandb-save-dir", "--wandb-entity", "--mlflow-experiment", "--mlflow-run-name",
    "--mlflow-tracking-uri",
)  # fmt: skip


@dataclass(frozen=True)
class ProfiledRun:
    """One run of a profile.

    Attributes:
        name: "mone", "moe", ....
        flags: that ask for it, as `megatron_mone.pretrain` takes them.
        step: seconds of a step.
        rows: of each expert, mean over layers, in any unit; empty in a dense model.
        passes: (phase, pass) -> seconds of a step, mean over ranks; all phases.
        communication: "kind group" -> seconds of a step, likewise.
    """

    name: str
    flags: tuple[str, ...]
    step: float
    rows: tuple[float, ...]
    passes: dict[tuple[str, str], float]
    communication: dict[str, float]

    @property
    def compute(self) -> dict[tuple[str, str], float]:
        """Those of `passes` that are compute."""
        return {key: s for key, s in self.passes.items() if key[0] not in NOT_COMPUTE and s > 0}


@dataclass(frozen=True)
class MeasuredProfile:
    """A profile.

    Attributes:
        path: of its file.
        device: what its ranks computed on, by name.
        on_cpu: whether that is a CPU.
        date: of the profile.
        world_size: W.
        runs: that can be asked for by flags.
        left_out: the others, each with the reason.
    """

    path: Path
    device: str
    on_cpu: bool
    date: str
    world_size: int
    runs: tuple[ProfiledRun, ...]
    left_out: tuple[str, ...]


def read_profile(path: Path) -> MeasuredProfile:
    """Read a profile.json.

    Raises:
        ValueError: one line that names the file, the place and what is wrong there.
    """
    document = Field(load(path, _FIX), path, _FIX)
    document.has_schema(str(Profile.SCHEMA))
    config = document["config"]
    argv = config["argv"]
    if not isinstance(argv.value, list) or not all(isinstance(flag, str) for flag in argv.value):
        argv.fail("must be a list of texts")
    if "--config" in {flag.partition("=")[0] for flag in argv.value}:
        argv.fail("names a run file, which may have changed since: profile again")
    machine = config["machine"]
    gpu = machine["GPU"].text() if "GPU" in machine else None
    processor = re.sub(r", \d+ cores$", "", machine["Processor"].text())
    runs, left_out = _runs(document["runs"], argv.value)
    profile = MeasuredProfile(
        path, gpu or processor, gpu is None, machine["Date"].text() if "Date" in machine else "",
        document["ranks"]["world_size"].whole(), tuple(runs), tuple(left_out),
    )  # fmt: skip
    if not any(run.compute for run in profile.runs):
        document["runs"].fail("no run that flags can ask for has a compute phase")
    return profile


def check_device(profile: MeasuredProfile, cluster: Cluster) -> None:
    """Refuse a profile of other devices than the cluster's.

    Raises:
        ValueError: one line with both names.
    """
    check_device_name(profile.path, profile.device, cluster)


def check_device_name(path: Path, device: str, cluster: Cluster) -> None:
    """Refuse what was measured on another device than the cluster's.

    Names are written in many ways. What tells one device from another is the first word with a
    digit, as in "NVIDIA H100 80GB HBM3"; of a name without any, every word.

    Args:
        path: of the file that says so.
        device: its name there.
        cluster: whose device it should be.

    Raises:
        ValueError: one line with both names.
    """
    words = _words(device)
    telling = [word for word in words if any(c.isdigit() for c in word)][:1] or words
    if not set(telling) <= set(_words(cluster.device.name)):
        raise ValueError(
            f"{path} was measured on {device}, cluster {cluster.name} has "
            f"{cluster.device.name}: give --cluster a file whose device.name says the former"
        )


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", name.lower())


def _runs(runs: Field, argv: Sequence[str]) -> tuple[list[ProfiledRun], list[str]]:
    found, left_out = [], []
    first: dict[str, Any] | None = None
    for run in runs.elements():
        name, model = run["name"].text(), dict(_model(run["model"]))
        first = model if first is None else first
        reason = _reason(name, run["backend"].text(), model, first)
        if reason:
            left_out.append(f"run {name}: {reason}")
            continue
        flags = _flags(argv, model, first, run)
        found.append(
            ProfiledRun(
                name,
                tuple(flags),
                _step(run),
                _rows(run["routing"]),
                _passes(run),
                {key: c["ms"].number() / 1e3 for key, c in run["communication"].members()},
            )
        )
    return found, left_out


def _model(model: Field) -> Iterator[tuple[str, Any]]:
    for name, field in model.members():
        yield name, field.value


def _reason(name: str, backend: str, model: dict[str, Any], first: dict[str, Any]) -> str:
    """Why a run cannot be asked for by flags; "" if it can."""
    if backend == "GroupedMMExperts":
        return "no flag of Megatron's asks for experts in torch's grouped_mm"
    if "engine" in model:
        return f"its engine is {model['engine']}, which is not planned"
    if model == first and name != MAIN and model is not first:
        return "what it changes is not among the fields of its model"
    return ""


def _flags(
    argv: Sequence[str], model: dict[str, Any], first: dict[str, Any], run: Field
) -> list[str]:
    """Of one run, on mock data."""
    dense = _SWITCH in first and _SWITCH not in model
    kept = _without(argv, dense)
    vocabulary = run["model"]["padded_vocab_size"].whole()
    kept += ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size",
             str(vocabulary - 1), "--make-vocab-size-divisible-by", "1"]  # fmt: skip
    changed = {
        name: value
        for name, value in model.items()
        if name in first and value != first[name] and name != "padded_vocab_size"
    }
    if not changed:
        return kept
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import to_flags

    return kept + to_flags(changed, flag_parser(), Path(run["name"].text()))


def _without(argv: Sequence[str], dense: bool) -> list[str]:
    """The flags that name no files; also none of MoNE, where `dense`."""
    kept: list[str] = []
    dropping = False
    for word in argv:
        if word.startswith("--"):
            name = word.partition("=")[0]
            dropping = name in _FILES or (dense and name.startswith("--mone-"))
        if not dropping:
            kept.append(word)
    return kept


def _step(run: Field) -> float:
    milliseconds = run["step_ms"].number()
    if not milliseconds:
        run["step_ms"].fail("must be above 0")
    return milliseconds / 1e3


def _rows(routing: Field) -> tuple[float, ...]:
    layers = [layer["rows"].checked(column) for layer in routing["layers"].elements()]
    if not layers:
        return ()
    if len({len(rows) for rows in layers}) > 1:
        routing["layers"].fail("layers have different numbers of experts")
    return tuple(float(rows) for rows in np.mean(layers, axis=0))


def _passes(run: Field) -> dict[tuple[str, str], float]:
    """Seconds of each; a plan has clipping in the optimizer."""
    found: dict[tuple[str, str], float] = defaultdict(float)
    for phase, passes in run["passes"].members():
        if phase not in PHASES:
            passes.fail(f"{phase!r} is no phase")
        for name, milliseconds in passes.members():
            if name not in PASSES:
                milliseconds.fail(f"{name!r} is none of {', '.join(PASSES)}")
            planned = OPTIMIZER if phase == CLIPPING else phase
            found[planned, name] += milliseconds.number() / 1e3
    return dict(found)
