"""Where trackers come into Megatron's training, on the rank that writes.

Megatron gives its TensorBoard writer all numbers, of MoNE too, and wandb most of them again, one
call a number. What either is given of a step is gathered, and goes to each tracker when the next
step begins, or training ends: once, under one step. May touch: Megatron's writers, while a run
lasts; trackers.json in the --save folder.
"""

import contextlib
import functools
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from megatron_mone.common.exit_status import LEASE_LOST, STOPPED
from megatron_mone.common.patch import Replaced, wrapping
from megatron_mone.model.trackers.flags import asked
from megatron_mone.model.trackers.opening import opened
from megatron_mone.model.trackers.runs import (
    FAILED,
    FINISHED,
    KILLED,
    Run,
    WandbRun,
    forget_told,
    going_on,
    say,
)

_OF_SAMPLES = " vs samples"
"""Ends the names that Megatron gives what stands under another name, over samples."""


class Gathered:
    """What the runs of trackers have not been given yet: the values of one step.

    Args:
        runs: one of each tracker.
    """

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self.undo = contextlib.ExitStack()  # gives Megatron its own writers back
        self._step = -1
        self._values: dict[str, float] = {}
        self._behind: set[str] = set()

    def add(self, values: Mapping[str, Any], step: int) -> None:
        """Values of a step: numbers, or tensors of one."""
        if step != self._step:
            self.hand_on()
            self._step = step
        self._values.update((name, float(value)) for name, value in values.items())

    def hand_on(self) -> None:
        """Give each run the step, unless it has it from an earlier start."""
        values, self._values = self._values, {}
        for run in self.runs if values else ():
            if self._step >= run.first:
                with going_on(run.tracker):
                    run.log(values, self._step)
            elif run.tracker not in self._behind:
                self._behind.add(run.tracker)
                say(f"{run.tracker} has steps to {run.first - 1} already: not logged again")


_gathered: Gathered | None = None
"""On the last rank of a run that is tracked."""


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """End the trackers' runs as what is inside ends."""
    status: str | None = FAILED
    try:
        yield
        status = FINISHED
    except SystemExit as ended:
        status = {None: FINISHED, 0: FINISHED, STOPPED: KILLED, LEASE_LOST: None}.get(
            ended.code,  # type: ignore[arg-type]
            FAILED,
        )
        raise
    except KeyboardInterrupt:
        status = KILLED
        raise
    finally:
        _end(status)


def _end(status: str | None) -> None:
    """With None nothing is sent: another attempt goes on with the runs."""
    global _gathered
    gathered, _gathered = _gathered, None
    if gathered is None:
        return
    gathered.undo.close()
    if status is None:
        return
    gathered.hand_on()
    for run in gathered.runs:
        with going_on(run.tracker):
            run.end(status)


class _WandbWriter:
    """wandb, as Megatron calls it; a step's values are gathered, and the end is `_end`'s to say."""

    def __init__(self, wandb: Any, gathered: Gathered) -> None:
        self._wandb = wandb
        self.log = gathered.add
        self.config = SimpleNamespace(update=self._configure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wandb, name)

    def _configure(self, values: Mapping[str, Any]) -> None:
        with going_on(WandbRun.tracker):
            self._wandb.config.update(values, allow_val_change=True)  # another start's may differ

    def finish(self) -> None:
        """Nothing: Megatron calls it before its last saves, and not where training fails."""


def _begin(args: Namespace) -> None:
    """Open the runs. Collective over all ranks.

    Raises:
        ValueError: on every rank: a run cannot be begun; one line.
    """
    global _gathered
    refusal: list[str | None] = [None]
    if args.rank == args.world_size - 1:
        forget_told()
        try:
            _gathered = Gathered(opened(args))
        except ValueError as error:
            refusal[0] = str(error)
    torch.distributed.broadcast_object_list(refusal, src=args.world_size - 1)
    if refusal[0] is not None:
        raise ValueError(refusal[0])
    if _gathered is not None:
        _stand_between(_gathered)


def _stand_between(gathered: Gathered) -> None:
    """Hear what Megatron writes."""
    from megatron.training import global_vars

    writer, wandb = global_vars.get_tensorboard_writer(), global_vars.get_wandb_writer()
    add_scalar = writer.add_scalar

    @functools.wraps(add_scalar)
    def added(tag: str, value: Any, step: int, *given: Any, **named: Any) -> None:
        add_scalar(tag, value, step, *given, **named)
        if not tag.endswith(_OF_SAMPLES):
            gathered.add({tag: value}, step)

    gathered.undo.enter_context(Replaced(writer, "add_scalar", added))
    if wandb is not None:
        ours = _WandbWriter(wandb, gathered)
        gathered.undo.enter_context(Replaced(global_vars, "_GLOBAL_WANDB_WRITER", ours))


def _later(set_wandb_writer: Callable[[Namespace], None]) -> Callable[[Namespace], None]:
    @functools.wraps(set_wandb_writer)  # by which `opened` finds it
    def later(args: Namespace) -> None:
        pass

    return later


def _with_trackers(initialize: Callable[..., Any]) -> Callable[..., Any]:
    from megatron.training import get_args

    @functools.wraps(initialize)
    def with_trackers(*given: Any, **named: Any) -> Any:
        done = initialize(*given, **named)
        if asked(get_args()):
            _begin(get_args())
        return done

    return with_trackers


def _going_on_without(log_checkpoint: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(log_checkpoint)
    def going_on_without(*given: Any, **named: Any) -> None:
        with going_on(WandbRun.tracker):
            log_checkpoint(*given, **named)

    return going_on_without


PATCHES = (
    wrapping(
        "wandb-later", "megatron.training.global_vars: _set_wandb_writer", _later,
        why="it opens a run under a new id, while arguments are read that may yet be refused",
        needed_while="wandb.init(**wandb_kwargs)",
    ),
    wrapping(
        "trackers", "megatron.training.training: initialize_megatron", _with_trackers,
        why="nothing else of ours runs on all ranks between the taking of the checkpoint folder, "
        "where the runs' ids stand, and the first number",
        needed_while="\n    initialize_megatron(\n",
    ),
    wrapping(
        "wandb-checkpoint", "megatron.training.wandb_utils: on_save_checkpoint_success",
        _going_on_without,
        why="where W&B cannot note a checkpoint it ends the run that saved it",
        needed_while="wandb_writer.run.log_artifact(artifact",
    ),
)  # fmt: skip
