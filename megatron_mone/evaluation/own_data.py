"""The data of the tasks that come with this package: JSON beside their YAML, without a network."""

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).resolve().parent / "tasks"


def read(file: str, **ignored: Any) -> dict[str, Any]:
    """The splits of a task, as lm-eval's `custom_dataset` wants them.

    Args:
        file: its name without `.json`.
        ignored: the task's metadata, which lm-eval hands over too.
    """
    from datasets import Dataset

    del ignored
    documents = json.loads((_FOLDER / f"{file}.json").read_text(encoding="utf-8"))
    return {"test": Dataset.from_list(documents)}
