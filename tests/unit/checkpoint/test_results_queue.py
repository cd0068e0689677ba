"""The process of its own that Megatron's queue of an asynchronous save lives in."""

import os
import select
import subprocess
import sys

from tests.training_cases import ROOT

HOLDER = """
import os, signal, sys
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron_mone.checkpoint import signals
from megatron_mone.common.patch import install

install(signals.PATCHES)
for number in signals.SIGNALS:
    signal.signal(number, lambda *received: None)
queue = filesystem_async.get_write_results_queue("fork")
os.killpg(0, signal.SIGTERM)
os.killpg(0, signal.SIGUSR1)
queue.put("written")
print(queue.get(), queue._manager._process.pid, flush=True)
sys.stdin.read()
"""


def test_it_outlives_the_signals_that_ask_for_a_save_and_no_rank():
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], cwd=ROOT, start_new_session=True, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert holder.stdout is not None
    said, process = holder.stdout.readline().split()
    assert said == "written"
    pidfd = os.pidfd_open(int(process))
    holder.kill()
    holder.wait()
    assert select.select([pidfd], [], [], 60)[0] == [pidfd]
    os.close(pidfd)
