"""Which run of a tracker a training run goes on with: the ids that stand beside its checkpoints.

May touch: trackers.json in the --save folder, and what the trackers do.
"""

import inspect
import os
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path

from megatron_mone.common import checked_json
from megatron_mone.common.files import write_json
from megatron_mone.model.failure import words
from megatron_mone.model.trackers.flags import MLFLOW, WANDB, asked, without_password
from megatron_mone.model.trackers.runs import Run, say, start_mlflow, start_wandb

BOOK = "trackers.json"
"""`wandb ENTITY/PROJECT/NAME` or `mlflow EXPERIMENT/NAME` -> id of the run; another name, project
or experiment begins another run."""
_VARIABLES = {WANDB: "WANDB_RUN_ID", MLFLOW: "MLFLOW_RUN_ID"}
"""What the trackers themselves read: the user's choice."""


def opened(args: Namespace) -> list[Run]:
    """Begin or go on with the runs that are asked for.

    Args:
        args: Megatron's, validated.

    Returns:
        Those that could be opened. One that is known may fail to: what opened it before is right,
        so that the network is not, and training need not wait for it.

    Raises:
        ValueError: a run cannot be begun, or its id not be kept; one line.
    """
    book = Path(args.save) / BOOK if args.save and not args.save.startswith("msc:") else None
    ids = _read(book)
    runs = []
    for tracker in asked(args):
        label = _label(tracker, args)
        known = os.environ.get(_VARIABLES[tracker]) or ids.get(label)
        try:
            run = _starts(args)[tracker](known)
        except Exception as error:
            said = f"{_named(tracker, args)}: {words(error)}"
            if known is None:
                raise ValueError(without_password(said)) from None
            say(f"{said}; training goes on without run {known}")
            continue
        if book is not None and ids.get(label) != run.id:
            ids[label] = run.id
            write_json(book, ids)
        say(f"{run.tracker} run {run.id}{f', after step {run.first - 1}' if run.first else ''}")
        runs.append(run)
    return runs


def _read(book: Path | None) -> dict[str, str]:
    if book is None or not book.exists():
        return {}
    fix = "remove it, and trackers begin new runs"
    ids = checked_json.load(book, fix)
    if not isinstance(ids, dict) or not all(isinstance(one, str) for one in ids.values()):
        raise ValueError(f"{book}: must hold ids of runs by name: {fix}")
    return ids


def _starts(args: Namespace) -> dict[str, Callable[[str | None], Run]]:
    from megatron.training import global_vars

    set_wandb_writer = inspect.unwrap(global_vars._set_wandb_writer)
    return {
        WANDB: partial(start_wandb, args, set_wandb_writer),
        MLFLOW: partial(start_mlflow, args),
    }


def _label(tracker: str, args: Namespace) -> str:
    if tracker == WANDB:
        return f"wandb {args.wandb_entity or ''}/{args.wandb_project}/{args.wandb_exp_name}"
    return f"mlflow {args.mlflow_experiment}/{args.mlflow_run_name or ''}"


def _named(tracker: str, args: Namespace) -> str:
    if tracker == MLFLOW and args.mlflow_tracking_uri:
        return f"mlflow_tracking_uri = {args.mlflow_tracking_uri!r}"
    return f"{tracker} = {getattr(args, tracker)!r}"
