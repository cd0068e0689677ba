"""The whole test suite, or the tests named: `make test`, `make test TESTS=tests/unit/moe`.

Three rows of tests run beside each other: tests on a real Slurm, which mostly wait for Slurm's
clocks; unit tests and an installation's; and all that start ranks, then the rest of the unit tests,
so that the last two rows, which share the processors, take about as long. The first two rows'
reports come at the end. However this ends, no process that it started stays.
"""

import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, Any

from megatron_mone.common.child_processes import end_with_starter, tied
from tests.processes import Keeper

PYTEST = (sys.executable, "-m", "pytest")
REST = ("tests/unit/benchmarking", "tests/unit/cpu_emulation")
_SLURM = "tests/slurm"
_UNIT = ("tests/unit", "tests/integration/test_installed_wheel.py")
BESIDE = ((_SLURM,), (*_UNIT, *(f"--ignore={folder}" for folder in REST)))
ROW = (tuple(f"--ignore={path}" for path in (_SLURM, *_UNIT)), REST)
_SECONDS_TO_STOP = 10.0


def main() -> int:
    """Run the command line; 0, or 1 where a test failed, or 128 and the number of a signal."""
    end_with_starter()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    keeper = Keeper()
    try:
        named = sys.argv[1:]
        if named:
            with _started([*PYTEST, *named]) as tests:
                return tests.wait()
        beside, row = ([[*PYTEST, *tests] for tests in commands] for commands in (BESIDE, ROW))
        return run_rows(beside, row)
    finally:
        keeper.close()


def run_rows(beside: Sequence[Sequence[str]], row: Sequence[Sequence[str]]) -> int:
    """Run commands beside others that run one after another; what the first say comes last.

    Returns:
        0, or 1 where one of them failed.
    """
    with ExitStack() as stack:
        reports = [stack.enter_context(tempfile.TemporaryFile()) for _ in beside]
        others = [
            stack.enter_context(_started(command, report))
            for command, report in zip(beside, reports, strict=True)
        ]
        failed = False
        for command in row:
            with _started(command) as tests:
                failed |= tests.wait() != 0
        for tests, report in zip(others, reports, strict=True):
            failed |= tests.wait() != 0
            report.seek(0)
            sys.stdout.flush()
            shutil.copyfileobj(report, sys.stdout.buffer)
    print("make test: failed" if failed else "make test: all parts passed")
    return int(failed)


@contextmanager
def _started(command: Sequence[str], report: IO[bytes] | None = None) -> Iterator[subprocess.Popen]:
    """A running command; if we leave before it ends, it gets the time to put its things away."""
    process = subprocess.Popen(command, stdout=report, stderr=report, preexec_fn=tied())
    try:
        yield process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_SECONDS_TO_STOP)
        process.kill()
        process.wait()


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)
