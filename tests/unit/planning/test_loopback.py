"""The cases of loopback_cases.py, in a process without other tests' process groups."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]


def test_loopback_cases():
    command = [sys.executable, "-m", "pytest", "-q", "tests/unit/planning/loopback_cases.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
