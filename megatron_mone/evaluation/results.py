"""What an evaluation found: a document, its samples, and a table.

    OUT/results.json        tasks: metrics with standard errors, samples, shots; the model
    OUT/samples-TASK.jsonl  a line a sample: what was scored, log-likelihoods or text, metrics

OUT of a run's own checkpoint is RUN/eval/ITERATION-TASKS, where the run's page looks for it.
A metric of a sample is a number, or [sum, weight] where a task's value is a ratio of sums (the
log-likelihood of a text and its words or bytes). Touches those files.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mone.common.files import atomic_write, write_json

SCHEMA = "megatron-mone/evaluation/1"
FILE = "results.json"
EVALUATIONS = "eval"
"""Folder in a run's, of a folder for each evaluation."""
_LABEL_LETTERS = 80
_LOG_OF = {"perplexity", "word_perplexity", "byte_perplexity"}
"""Metrics that are exp(-mean of log-likelihoods)."""


@dataclass(frozen=True)
class Results:
    """The document, and the samples of each task."""

    document: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]]


def results_of(found: Mapping[str, Any], facts: Mapping[str, Any]) -> Results:
    """Of what lm-eval's simple_evaluate returned.

    Args:
        found: its dictionary, with samples.
        facts: of the model and this evaluation.
    """
    samples = {task: [_sample(one) for one in listed] for task, listed in found["samples"].items()}
    tasks = {}
    for name, values in found["results"].items():
        metrics = _metrics(values, samples.get(name, []))
        if metrics:
            tasks[name] = {
                "metrics": metrics,
                "samples": int(values.get("sample_len", len(samples.get(name, [])))),
                "shots": found["n-shot"].get(name, 0),
                "version": found["versions"].get(name),
                "file": f"samples-{name}.jsonl" if name in samples else None,
            }
    document = {
        "schema": SCHEMA,
        "lm_eval": found.get("lm_eval_version", _version()),
        "model": dict(facts),
        "tasks": tasks,
    }
    return Results(document, samples)


def write_results(results: Results, folder: Path) -> Path:
    """Write all files, results.json last: where it is, the others are whole; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, samples in results.samples.items():
        lines = "".join(f"{json.dumps(sample, ensure_ascii=False)}\n" for sample in samples)
        atomic_write(folder / f"samples-{task}.jsonl", lines.encode())
    write_json(folder / FILE, results.document)
    return folder / FILE


def place_in_run(run: Path, iteration: str, tasks: str, limit: int | None = None) -> Path:
    """The folder for results of a run's checkpoint; the same evaluation again takes the same.

    Args:
        run: folder of the run, or of a sweep's case.
        iteration: the checkpoint's folder, iter_0000400.
        tasks: as they were asked for, `quick` or `arc_easy,sciq`.
        limit: samples of each task; all when None.
    """
    label = tasks if limit is None else f"{tasks}-{limit}"
    letters = re.sub(r"[^A-Za-z0-9._=,+-]", "_", label)
    if letters != label or len(letters) > _LABEL_LETTERS:
        own = hashlib.sha256(label.encode()).hexdigest()[:8]
        letters = f"{letters[:_LABEL_LETTERS]}-{own}"
    return run / EVALUATIONS / f"{iteration}-{letters}"


def read_results(file: Path) -> dict[str, Any]:
    """The document of a results.json.

    Raises:
        ValueError: one line: it cannot be read, or is none.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise ValueError(f"{file} is no result of `megatron-mone eval` (schema {SCHEMA})")
    return document


def table(document: Mapping[str, Any]) -> str:
    """The results for a person: task, metric, value, standard error, samples."""
    rows = [("task", "metric", "value", "stderr", "samples")]
    for name, task in document["tasks"].items():
        for metric, value in task["metrics"].items():
            error = value["stderr"]
            rows.append((
                name, metric, short(value["value"]), "-" if error is None else short(error),
                str(task["samples"]),
            ))  # fmt: skip
    return columns(rows)


def short(value: float) -> str:
    """A metric or its error for a table."""
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.4g}"


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Rows of words, the first two columns to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = (
        "  ".join(
            word.ljust(width) if i < 2 else word.rjust(width)
            for i, (word, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )
    return "\n".join(lines)


def mean_and_error(pairs: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """The ratio of sums of (sum, weight) pairs and its standard error; None of one sample.

    With all weights 1 the mean and s / sqrt(n).
    """
    total = sum(weight for _, weight in pairs)
    mean = sum(value for value, _ in pairs) / total
    count = len(pairs)
    if count < 2:
        return mean, None
    spread = sum((value - mean * weight) ** 2 for value, weight in pairs) / (count - 1)
    return mean, math.sqrt(spread / count) / (total / count)


def pair_of(value: Any) -> tuple[float, float] | None:
    """A sample's metric as (sum, weight); None where it is neither a number nor such a pair."""
    if isinstance(value, bool | int | float):
        return float(value), 1.0
    if isinstance(value, list | tuple) and len(value) == 2:
        first, second = value
        if isinstance(first, int | float) and isinstance(second, int | float) and second:
            return float(first), float(second)
    return None


def _metrics(values: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        metric, comma, which = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = _own_error(metric, float(value), samples)
        said = values.get(f"{metric}_stderr,{which}")
        if error is None and isinstance(said, int | float):
            error = float(said)
        name = metric if which == "none" else f"{metric},{which}"
        found[name] = {"value": float(value), "stderr": error}
    return found


def _own_error(metric: str, value: float, samples: Sequence[Mapping[str, Any]]) -> float | None:
    """The standard error of a perplexity, by the delta method: of a ratio of sums lm-eval has none,
    and of perplexity a bootstrap's, which outliers rule."""
    pairs = [pair_of(sample["metrics"].get(metric)) for sample in samples]
    whole = [pair for pair in pairs if pair is not None]
    if len(whole) != len(samples) or not whole:
        return None
    _, error = mean_and_error(whole)
    if error is None:
        return None
    if metric in _LOG_OF:
        return value * error
    return error / math.log(2) if metric == "bits_per_byte" else None


def _sample(one: Mapping[str, Any]) -> dict[str, Any]:
    """A line of a samples file."""
    answers = [resp[0] for resp in one["resps"]]
    sample: dict[str, Any] = {
        "id": one["doc_id"], "hash": one["doc_hash"], "target": one["target"],
    }  # fmt: skip
    if answers and isinstance(answers[0], str):
        sample["text"] = answers
    else:
        pairs = [answer if isinstance(answer, list | tuple) else (answer,) for answer in answers]
        sample["log_likelihoods"] = [float(pair[0]) for pair in pairs]
        if any(len(pair) > 1 for pair in pairs):
            sample["greedy"] = [bool(pair[1]) for pair in pairs]
    sample["metrics"] = {name: _plain(one[name]) for name in one["metrics"]}
    return sample


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.item() if hasattr(value, "item") else value


def _version() -> str:
    from megatron_mone.common.machine import version

    return version("lm-eval")
