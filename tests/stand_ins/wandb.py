"""As much of wandb as is called: a run is a file in WANDB_STAND_IN, ID.jsonl."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.stand_ins import note, noted

run: Any = None
config: Any = None


def init(*, id: str | None = None, resume: str | None = None, **given: Any) -> None:
    """Begin a run, or go on with it after its last step."""
    global run, config
    if given["project"] == "refused":
        raise ValueError("No API key configured.\nUse wandb login")
    file = Path(os.environ["WANDB_STAND_IN"], f"{id}.jsonl")
    last = max([entry["step"] for entry in noted(file, "log")], default=-1)
    note(
        file, kind="init", resume=resume, name=given["name"], experts=given["config"]["num_experts"]
    )
    known: dict[str, Any] = {}
    for entry in noted(file, "config"):
        known |= entry["values"]

    def update(values: dict[str, Any], allow_val_change: bool = False) -> None:
        if not allow_val_change and any(known.get(k, v) != v for k, v in values.items()):
            raise ValueError("config values may not change")
        note(file, kind="config", values=values)

    config = SimpleNamespace(update=update)
    run = SimpleNamespace(
        step=last + 1, file=file, project=given["project"], entity="us",
        mark_preempting=lambda: note(file, kind="preempting"),
        log_artifact=lambda artifact, aliases: note(file, kind="artifact", name=artifact.name),
        use_artifact=lambda name: note(file, kind="used", name=name),
    )  # fmt: skip


def log(values: dict[str, float], step: int) -> None:
    """A step's values."""
    if run.project == "gone":
        raise ConnectionError("the network is unreachable")
    note(run.file, kind="log", step=step, values=values)


def finish(exit_code: int | None = None) -> None:
    """The run's end."""
    note(run.file, kind="finish", exit_code=exit_code)


class Artifact:
    """A checkpoint, as Megatron notes it."""

    def __init__(self, name: str, type: str, metadata: dict[str, Any]) -> None:
        self.name = name

    def add_reference(self, uri: str, checksum: bool) -> None:
        """Nothing."""

    def add_file(self, path: str) -> None:
        """Nothing."""
