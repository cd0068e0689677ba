"""Benchmarks of a run's checkpoints, as `megatron-mone eval` left them in its folder.

    RUN/eval/*/results.json -> one column a checkpoint, one row a task and metric

May touch: reads those files.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_mone.evaluation.results import EVALUATIONS, FILE, read_results, short
from megatron_mone.reporting.page.html import Page

ABSENT = "-"
_COLUMNS = 4
"""Checkpoints side by side; further ones are in a table below."""
_LAYOUT = (("tensor_model", "TP"), ("expert_tensor", "ETP"), ("expert_model", "EP"),
           ("pipeline_model", "PP"))  # fmt: skip
Column = tuple[str, Sequence[Mapping[str, Any]]]
"""A checkpoint's name, and the documents of its evaluations; a later one's score counts."""


def read_evaluations(run: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """The evaluations of a run, as they were written, and a line for each that cannot be read.

    Args:
        run: folder of the run, or of a sweep's case.
    """
    found, unread = [], []
    for file in sorted(run.glob(f"{EVALUATIONS}/*/{FILE}"), key=lambda f: f.stat().st_mtime):
        try:
            found.append(read_results(file))
        except ValueError as error:
            unread.append(str(error))
    return found, unread


def columns_of(evaluated: Mapping[str, Iterable[Mapping[str, Any]]]) -> list[Column]:
    """A column for each evaluated checkpoint, by rising iteration.

    Args:
        evaluated: name of a run, empty where there is one alone -> documents of its evaluations.
    """
    columns: dict[str, list[Mapping[str, Any]]] = {}
    for name, documents in evaluated.items():
        for document in sorted(documents, key=lambda one: one["model"].get("iteration", 0)):
            iteration = document["model"].get("iteration")
            which = "as a folder" if iteration is None else f"iteration {iteration}"
            columns.setdefault(", ".join(filter(None, (name, which))), []).append(document)
    return list(columns.items())


def score_rows(columns: Sequence[Column]) -> list[list[str]]:
    """Rows of task, metric, samples and each checkpoint's score +- standard error."""
    scores = [_scores(documents) for _, documents in columns]
    keys = dict.fromkeys(key for own in scores for key in own)
    return [[*map(str, key), *(own.get(key, ABSENT) for own in scores)] for key in keys]


def add_scores(page: Page, columns: Sequence[Column]) -> None:
    """Tables of some checkpoints' scores, and a line on how each was evaluated."""
    for start in range(0, len(columns), _COLUMNS):
        part = columns[start : start + _COLUMNS]
        page.table(["task", "metric", "samples", *(name for name, _ in part)], score_rows(part))
    page.paragraph(
        "Score ± standard error over the task's samples (lm-evaluation-harness; not over training "
        f"seeds); {ABSENT}: not evaluated."
    )
    told: dict[str, dict[str, None]] = {}
    for name, documents in columns:
        for one in documents:
            told.setdefault(_how(one), {})[name] = None
    page.bullets([f"{'; '.join(names)}: {how}" for how, names in told.items()])


def _scores(documents: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str, int], str]:
    found = {}
    for document in documents:
        for task, result in document["tasks"].items():
            for metric, one in result["metrics"].items():
                error = "" if one["stderr"] is None else f" ± {short(one['stderr'])}"
                found[task, metric, result["samples"]] = f"{short(one['value'])}{error}"
    return found


def _how(document: Mapping[str, Any]) -> str:
    model = document["model"]
    if "folder" in model:
        return f"the Hugging Face folder {model['folder']}"
    sizes = [f"{letters} {size}" for name, letters in _LAYOUT
             if (size := model[f"{name}_parallel_size"]) > 1]  # fmt: skip
    ranks = model["world_size"]
    said = [f"{ranks} rank{'s' if ranks > 1 else ''}", *sizes, model["precision"],
            f"sequences of {model['seq_length']} tokens"]  # fmt: skip
    if cut := model["truncated_requests"]:
        said.append(f"{cut} requests had their beginning cut to fit")
    return ", ".join(said)
