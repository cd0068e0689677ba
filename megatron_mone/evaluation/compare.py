"""Two evaluations of the same samples: paired differences with standard errors and confidence.

Of each metric that samples have, the mean of what B has more than A on the same sample: pairing
takes out how hard a sample is, so that far smaller differences are seen than by two standard
errors. Where a task's value is a ratio of sums (perplexities), the difference is of log-likelihood
per unit, in nats. Touches nothing.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_mone.common.spelling import nearest_name
from megatron_mone.evaluation.results import FILE, columns, mean_and_error, pair_of, read_results

CONFIDENCE = 1.959964
"""Standard errors of a two-sided 95% interval; a normal's, so meant for some 30 samples or more."""


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Task -> metric -> a, b, difference (b - a), its stderr, low, high, samples.

    Args:
        first, second: results.json files, or their folders.

    Raises:
        ValueError: a file is missing or no evaluation, they share no task, or their samples differ.
    """
    one, two = _read(first), _read(second)
    shared = [task for task in one["tasks"] if task in two["tasks"]]
    shared = [t for t in shared if one["tasks"][t]["file"] and two["tasks"][t]["file"]]
    if not shared:
        missing = next(iter(one["tasks"]), "")
        hint = nearest_name(missing, list(two["tasks"]))
        raise ValueError(f"{first} and {second} share no task{hint}: evaluate both on the same")
    found = {}
    for task in shared:
        a = _samples(_folder(first) / one["tasks"][task]["file"])
        b = _samples(_folder(second) / two["tasks"][task]["file"])
        found[task] = _of_task(task, a, b)
    return found


def table(found: Mapping[str, Any]) -> str:
    """The differences for a person; a `*` where the interval leaves out 0."""
    rows = [("task", "metric", "A", "B", "B - A", "stderr", "95% interval", "samples", "")]
    for task, metrics in found.items():
        for metric, one in metrics.items():
            error, low, high = one["stderr"], one["low"], one["high"]
            interval = "-" if error is None else f"[{low:+.4f}, {high:+.4f}]"
            rows.append((
                task, metric, f"{one['a']:.4f}", f"{one['b']:.4f}", f"{one['difference']:+.4f}",
                "-" if error is None else f"{error:.4f}", interval, str(one["samples"]),
                "*" if error is not None and not low <= 0 <= high else "",
            ))  # fmt: skip
    return columns(rows)


def _of_task(
    task: str, a: Mapping[Any, Mapping[str, Any]], b: Mapping[Any, Mapping[str, Any]]
) -> dict[str, Any]:
    if a.keys() != b.keys():
        raise ValueError(
            f"task {task}: {len(a)} and {len(b)} samples are not the same ones: evaluate both with "
            "the same --limit"
        )
    for key, sample in a.items():
        if sample["hash"] != b[key]["hash"]:
            raise ValueError(f"task {task}: sample {key} has another text: its data changed")
    found = {}
    for metric in next(iter(a.values()))["metrics"]:
        pairs = [(pair_of(a[k]["metrics"].get(metric)), pair_of(b[k]["metrics"].get(metric)))
                 for k in a]  # fmt: skip
        whole = [(x, y) for x, y in pairs if x is not None and y is not None and x[1] == y[1]]
        if len(whole) == len(pairs):
            found[metric] = _difference(whole)
    return found


def _difference(
    pairs: list[tuple[tuple[float, float], tuple[float, float]]],
) -> dict[str, Any]:
    mean, error = mean_and_error([(y[0] - x[0], x[1]) for x, y in pairs])
    reach = None if error is None else CONFIDENCE * error
    return {
        "a": mean_and_error([x for x, _ in pairs])[0],
        "b": mean_and_error([y for _, y in pairs])[0],
        "difference": mean,
        "stderr": error,
        "low": None if reach is None else mean - reach,
        "high": None if reach is None else mean + reach,
        "samples": len(pairs),
    }


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def _read(path: Path) -> dict[str, Any]:
    return read_results(path / FILE if path.is_dir() else path)


def _samples(file: Path) -> dict[Any, dict[str, Any]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
        return {(one := json.loads(line))["id"]: one for line in lines}
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError) as error:
        raise ValueError(f"{file} holds a line that is no sample: {error}") from error
