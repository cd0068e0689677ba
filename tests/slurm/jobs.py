"""What the tests on a real Slurm share: a script to submit, and waiting for a job's state."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.records import FINISHED, JobState
from launch.slurm.state import job_states

PATIENCE_SECONDS = 300.0


def submit(folder: Path, body: str, *options: str) -> str:
    """Submit `body` as a bash script, its output in `folder`; returns the job id."""
    script = folder / "job.sh"
    script.write_text(f"#!/bin/bash\n{body}\n")
    output = f"--output={folder}/%j.out"
    return slurm_commands.submit(script, options=[f"--chdir={folder}", output, *options])


def one(job_id: str) -> JobState:
    """The state of a job that is no array, or of one task of an array."""
    (state,) = job_states([job_id])
    return state


def wait_until(job_id: str, ready: Callable[[JobState], bool]) -> JobState:
    """The job's state once `ready` says so of it; AssertionError with its last state if never."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    state: JobState | None = None
    while state is None or not ready(state):
        assert time.monotonic() < deadline, f"in vain: {state}"
        time.sleep(0.2 if state else 0)
        with contextlib.suppress(SlurmUnavailable):  # a busy machine: asked again
            state = one(job_id)
    return state


def wait_end(job_id: str) -> JobState:
    """The job's state once it ended."""
    return wait_until(job_id, lambda job: job.state in FINISHED)


def wait_state(job_id: str, state: str) -> JobState:
    """The job's state once it is `state`."""
    return wait_until(job_id, lambda job: job.state == state)
