"""A stop signal that comes again while a rank ends."""

import signal
import subprocess
import sys

import pytest

from megatron_mone.common.exit_status import STOPPED
from tests.training_cases import ROOT

RANK = f"""
import os, sys
from megatron_mone.checkpoint import signals

class Again:  # deleted after Python gave up its handlers
    def __del__(self, kill=os.kill, number=int(sys.argv[1]), process=os.getpid()):
        kill(process, number)

handler = signals.StopHandler(signals.SIGNALS)
again = Again()
handler.end_process()
sys.exit({STOPPED})
"""


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_rank_that_ends_keeps_its_status(number: signal.Signals) -> None:
    words = [sys.executable, "-c", RANK, str(int(number))]
    assert subprocess.run(words, cwd=ROOT).returncode == STOPPED
