"""The cases of neuron_mask_waits_cases.py, in a process where CUDA is not sent to the CPU."""

import subprocess
import sys

from megatron_mone.common.places import ROOT


def test_neuron_mask_waits_cases():
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/moe/neuron_mask_waits_cases.py"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
