"""The whole test suite, or the tests named: `make test`, `make test TESTS=tests/unit/moe`.

Three rows of tests run beside each other: tests on a real Slurm, which mostly wait for Slurm's
clocks; unit tests and an installation's; and all others, of which the last, of layouts, start ranks
that keep all processors busy alone. The last row's report is shown as it comes, those of the others
at the end. However this ends, no process that it started stays.
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
_SLURM = ("tests/slurm",)
_UNIT = ("tests/unit", "tests/integration/test_installed_wheel.py")
ROWS = (_SLURM, _UNIT, tuple(f"--ignore={path}" for path in (*_SLURM, *_UNIT)))
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
        return run_rows([[*PYTEST, *tests] for tests in ROWS])
    finally:
        keeper.close()


def run_rows(commands: Sequence[Sequence[str]]) -> int:
    """Run commands beside each other; what all but the last say comes when all have ended.

    Returns:
        0, or 1 where one of them failed.
    """
    with ExitStack() as stack:
        reports = [stack.enter_context(tempfile.TemporaryFile()) for _ in commands[1:]]
        rows = [
            stack.enter_context(_started(command, report))
            for command, report in zip(commands, [*reports, None], strict=True)
        ]
        failed = any([row.wait() != 0 for row in reversed(rows)])
        sys.stdout.flush()
        for report in reports:
            report.seek(0)
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
