"""tools/bench_layer.py runs a small layer and writes what it measured."""

import json
import subprocess
import sys

import pytest

from megatron_mone.kernels.cpu import backend as cpu

SMALL = ("--tokens", "32", "--hidden", "16", "--neurons", "64", "--experts", "4", "--repeats", "1")


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
def test_three_layers_are_measured(tmp_path):
    out = tmp_path / "layer.json"
    command = [sys.executable, "-m", "tools.bench_layer", *SMALL, "--fused", "--json", str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    results = json.loads(out.read_text())["results"]
    assert list(results) == ["stock", "mone", "mone + loss"]
    assert all(value > 0 for found in results.values() for value in found.values())
    assert results["mone"]["saved_bytes"] < results["stock"]["saved_bytes"]
    assert "mone + loss" in said
