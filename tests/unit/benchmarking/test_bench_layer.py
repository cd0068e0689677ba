"""tools/bench_layer.py runs a small layer and writes what it measured."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.benchmarking import whole_layer
from megatron_mone.kernels.cpu import backend as cpu

SMALL = ("--tokens", "32", "--hidden", "16", "--neurons", "64", "--experts", "4", "--repeats", "1")


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
def test_layers_with_ever_more_are_measured(tmp_path):
    out = tmp_path / "layer.json"
    command = [sys.executable, "-m", "tools.bench_layer", *SMALL, "--fused", "--json", str(out)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    content = json.loads(out.read_text())
    results = content["results"]
    assert list(results) == ["stock", "mone alone", "mone", "mone + loss", "mone + loss + masks"]
    assert all(value > 0 for found in results.values() for value in found.values())
    assert results["mone"]["saved_bytes"] < results["stock"]["saved_bytes"]
    assert [part["part"] for part in content["parts"]] == [
        "load counters", "balance loss", "masks recorded",
    ]  # fmt: skip
    assert "of the forward + backward of the layer" in said


def test_what_a_part_adds_is_the_median_of_the_rounds_differences():
    both = {
        "stock": [9.0] * 3, "mone alone": [1.0, 5.0, 3.0], "mone": [2.0, 7.0, 4.0],
        "mone + loss": [4.0, 10.0, 5.0], "mone + loss + masks": [4.0, 10.0, 9.0],
    }  # fmt: skip
    times = {name: {"forward_backward": taken} for name, taken in both.items()}
    options = SimpleNamespace(
        tokens=32, hidden=16, neurons=64, experts=4, ratio=0.25, neuron_block=1, dtype="fp32"
    )
    parts = whole_layer.parts_of(times, options)
    assert [(part.part, part.ms, part.of_ms) for part in parts] == [
        ("load counters", 1.0, 5.0), ("balance loss", 2.0, 5.0), ("masks recorded", 0.0, 5.0),
    ]  # fmt: skip


def test_what_is_left_out_of_a_layer_is_not_done(one_rank):
    """Alone it counts nothing, and each further one what it is named after."""
    options = SimpleNamespace(
        tokens=32, hidden=16, neurons=64, experts=4, ratio=0.25, neuron_block=1, dtype="fp32",
        fused=False,
    )  # fmt: skip
    layer = whole_layer._build(options)
    x = torch.randn(32, 1, 16, requires_grad=True)
    for name, counted in (("mone alone", False), ("mone", True), ("mone + loss", True)):
        layer.neuron_load.forget_step()
        with whole_layer._only(layer, name):
            y = layer(x)[0]
        assert bool(layer.neuron_load.step_counts_EF.any()) == counted
        names, todo = set(), [y.grad_fn]
        while todo:
            node = todo.pop()
            names.add(node.name())
            todo += [after for after, _ in node.next_functions if after is not None]
        assert ("MoEAuxLossAutoScalerBackward" in names) == (name == "mone + loss")
