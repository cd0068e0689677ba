"""One evaluation: lm-eval on a model, its results as a document."""

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from megatron_mone.evaluation.results import Results, results_of
from megatron_mone.evaluation.suites import task_manager, task_names

_BOOTSTRAPS = 1000
_SEED = 1234
"""lm-eval's own, for the choice of few-shot examples."""


@dataclass(frozen=True)
class Prepared:
    """Tasks that were read.

    Attributes:
        names: as they were asked for, suites written out.
        tasks: name -> lm-eval's Task, those of groups too.
        groups: name -> lm-eval's Group.
    """

    names: tuple[str, ...]
    tasks: dict[str, Any]
    groups: dict[str, Any]


def prepare(tasks: Sequence[str], include: Path | None) -> Prepared:
    """Read tasks and their data.

    Args:
        tasks: names of tasks and suites.
        include: folder of YAML tasks.

    Raises:
        ValueError: a task is unknown, or its data cannot be read.
    """
    names = task_names(tasks)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = task_manager(names, include)
    prepared = Prepared(tuple(names), {}, {})
    for name in names:
        with _readable(name):
            loaded = manager.load([name])
        prepared.tasks.update(loaded["tasks"])
        prepared.groups.update(loaded["groups"])
    for task in prepared.tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_SEED)
    return prepared


def evaluate(model: Any, prepared: Prepared, limit: int | None, facts: dict[str, Any]) -> Results:
    """Run lm-eval, as its simple_evaluate does, which would first ask the machine what it is.

    Args:
        model: an lm-eval LM, on rank 0.
        prepared: of `prepare`.
        limit: samples of each task; all when None.
        facts: of the model, for the results.

    Raises:
        ValueError: a task asks for what is not here.
    """
    from lm_eval.evaluator import evaluate as run_tasks

    os.environ["DISABLE_MULTIPROC"] = "1"  # bootstraps in a pool would fork this rank
    random.seed(0)
    numpy.random.seed(_SEED)
    found: Any = run_tasks(
        lm=model, task_dict={"tasks": prepared.tasks, "groups": prepared.groups}, limit=limit,
        bootstrap_iters=_BOOTSTRAPS,
    )  # fmt: skip
    truncated = getattr(model, "truncated", None)
    return results_of(found, {**facts, "truncated_requests": truncated, "limit": limit})


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """One line where a task's data is not here."""
    try:
        yield
    except (OSError, ValueError) as error:  # datasets' own errors are of these
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"--tasks {name}: its data cannot be read ({said}): most of lm-eval's are of Hugging "
            "Face's hub and need a network or its cache; --tasks quick needs neither"
        ) from error
