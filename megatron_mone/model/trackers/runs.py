"""A training run's run in W&B, and in MLflow: started or gone on with, given values, ended.

Both packages are optional, and imported where they are used. May touch: the network and files, as
they do.
"""

import contextlib
import os
import queue
import secrets
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Protocol

from megatron_mone.common.patch import Replaced
from megatron_mone.model.failure import words
from megatron_mone.model.trackers.flags import without_password

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"  # as MLflow calls them
END_SECONDS = 120
"""A tracker that does not answer holds up the end of a run for so long."""
REST_SECONDS = 30.0
"""Between a step that MLflow did not take and the next one's turn."""
_STEP = "iteration"
"""A metric of every step sent to MLflow, which knows of a run's metrics the last values alone."""
_PARAMETERS = 100  # that MLflow takes at once
_told: set[str] = set()


class Run(Protocol):
    """A run of a tracker.

    Attributes:
        tracker: its name, for people.
        id: by which it is gone on with.
        first: step from which on it has no values.
    """

    tracker: str
    id: str
    first: int

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take the values of a step, greater than any before."""

    def end(self, status: str) -> None:
        """FINISHED, FAILED or KILLED (to be started again)."""


class WandbRun:
    """The run that wandb has open. Sends in a process of its own, which waits for the network."""

    tracker = "W&B"

    def __init__(self, wandb: Any, run_id: str) -> None:
        self._wandb = wandb
        self.id = run_id
        self.first: int = wandb.run.step

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As of `Run`."""
        self._wandb.log(values, step)

    def end(self, status: str) -> None:
        """As of `Run`; what is to be started again W&B calls preempted."""
        if status == KILLED:
            self._wandb.run.mark_preempting()
        self._wandb.finish(exit_code=int(status != FINISHED))


def start_wandb(
    args: Namespace, set_wandb_writer: Callable[[Namespace], None], known: str | None
) -> WandbRun:
    """Have Megatron open the run, as it does, under an id.

    Args:
        args: Megatron's.
        set_wandb_writer: Megatron's function.
        known: the id to go on with; None begins a run.
    """
    import wandb

    os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(END_SECONDS))
    run_id = known or secrets.token_hex(6)
    with Replaced(wandb, "init", partial(wandb.init, id=run_id, resume="allow")):
        set_wandb_writer(args)
    return WandbRun(wandb, run_id)


class MLflowRun:
    """A run in MLflow, sent to from a thread: its client waits for the server."""

    tracker = "MLflow"

    def __init__(self, client: Any, run_id: str, first: int) -> None:
        self._client = client
        self.id, self.first = run_id, first
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._send, name="mlflow", daemon=True)
        self._thread.start()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """As of `Run`."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, step) for key, value in {**values, _STEP: step}.items()]
        self._calls.put(partial(self._client.log_batch, self.id, metrics=metrics))

    def end(self, status: str) -> None:
        """As of `Run`.

        Raises:
            TimeoutError: the server took not all in END_SECONDS.
        """
        self._calls.put(partial(self._client.set_terminated, self.id, status))
        self._calls.put(None)
        self._ending.set()
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._calls.qsize()} steps were not sent in {END_SECONDS} s")

    def _send(self) -> None:
        """In their order; a step that is not taken is left out."""
        while (call := self._calls.get()) is not None:
            with going_on(self.tracker) as went:
                call()
            if not went:
                self._ending.wait(REST_SECONDS)


def start_mlflow(args: Namespace, known: str | None) -> MLflowRun:
    """Begin a run, with Megatron's arguments as its parameters, or go on with one.

    Args:
        args: Megatron's.
        known: the id to go on with; None begins a run.
    """
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")  # of 7, which take minutes
    from mlflow import MlflowClient
    from mlflow.entities import Param

    client = MlflowClient(tracking_uri=args.mlflow_tracking_uri)
    if known is not None:
        metrics = client.get_run(known).data.metrics
        client.update_run(known, status="RUNNING")
        return MLflowRun(client, known, int(metrics.get(_STEP, -1)) + 1)
    experiment = _experiment(client, args.mlflow_experiment)
    run_id = client.create_run(experiment, run_name=args.mlflow_run_name).info.run_id
    parameters = [Param(name, str(value)) for name, value in sorted(vars(args).items())]
    for at in range(0, len(parameters), _PARAMETERS):
        client.log_batch(run_id, params=parameters[at : at + _PARAMETERS])
    return MLflowRun(client, run_id, 0)


def _experiment(client: Any, name: str) -> str:
    """The id of an experiment, made unless another run has made it, or does at the same time."""
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return client.create_experiment(name)
        except Exception:
            if (found := client.get_experiment_by_name(name)) is None:
                raise
    return found.experiment_id


@contextlib.contextmanager
def going_on(tracker: str) -> Iterator[list[bool]]:
    """What fails inside is said, once for a tracker; training goes on. Gives [True] if it went."""
    went: list[bool] = []
    try:
        yield went
    except Exception as error:
        if tracker not in _told:
            _told.add(tracker)
            say(f"{tracker}: {words(error)}; training goes on, and what it does not take is lost")
    else:
        went.append(True)


def forget_told() -> None:
    """A run begins in this process."""
    _told.clear()


def say(line: str) -> None:
    """On stderr, without passwords."""
    print(f"megatron-mone: {without_password(line)}", file=sys.stderr, flush=True)
