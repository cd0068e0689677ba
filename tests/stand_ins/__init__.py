"""Packages that tests have not, reduced to what is called of them: files in a folder, no network.

The folder goes to the front of sys.path (`use`), where `import wandb` finds them.
"""

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def use() -> None:
    """In this process, from now on."""
    sys.path.insert(0, str(HERE))


def note(file: Path, **what: Any) -> None:
    """One call more."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as stream:
        stream.write(json.dumps(what, default=str) + "\n")


def noted(file: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The calls in a file, of one kind or all."""
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    return [line for line in lines if kind is None or line["kind"] == kind]


def steps(file: Path, name: str) -> list[tuple[int, float]]:
    """(step, value) of a metric as it was logged."""
    return [(e["step"], e["values"][name]) for e in noted(file, "log") if name in e["values"]]
