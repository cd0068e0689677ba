"""Curves planted under published times of kernels are found again; the files are whole."""

import json
from dataclasses import replace

import numpy as np
import pytest

from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.roofline import DEFAULTS, Operation
from megatron_mone.planning.fitting.kernel_benchmarks import (
    COLUMNS,
    KernelBenchmark,
    KernelPoint,
    fit_benchmarks,
    read_benchmark,
    spread,
)
from tests.training_cases import ROOT

FILES = sorted((ROOT / "tests" / "published" / "kernels").glob("*.json"))
DEVICE = load_cluster("b200-ndr").device


def attention(queries, heads, size=128):
    flops = 2.0 * queries * queries * heads * size
    return Operation("attention", "bf16", flops, 1e6, queries, queries, size, heads=heads)


def test_an_attention_curve_is_found_again():
    truth = replace(DEFAULTS["attention"], peak_share=0.7, half_rows=900.0, half_grid=4e4)
    shapes = [(q, h) for q in (1024, 4096, 16384, 65536) for h in (2, 8, 32, 128)]
    kernels = [attention(*shape) for shape in shapes]
    points = [KernelPoint(one, truth.seconds(one, DEVICE)) for one in kernels]
    found = fit_benchmarks([KernelBenchmark("a", "b200-ndr", "x", tuple(points))], DEVICE)
    assert spread(DEFAULTS["attention"], points, DEVICE) > 0.2
    assert spread(found["attention"], points, DEVICE) < 0.02
    assert found["attention"].half_grid == pytest.approx(4e4, rel=0.1)
    assert found["attention"].wide_loss == 0  # nothing tells of wide heads
    truth = replace(truth, wide_loss=0.8)
    kernels += [attention(*shape, 192) for shape in shapes]
    points = [KernelPoint(one, truth.seconds(one, DEVICE)) for one in kernels]
    found = fit_benchmarks([KernelBenchmark("a", "b200-ndr", "x", tuple(points))], DEVICE)
    assert found["attention"].wide_loss == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_read_and_no_kernel_is_faster_than_its_device(path):
    found = read_benchmark(path)
    device = load_cluster(found.cluster).device
    assert found.source.startswith("https://")
    for point in found.points:
        one = point.operation
        assert one.flops <= point.seconds * device.peak(one.dtype), one
        assert one.bytes <= 1.05 * point.seconds * device.memory_bandwidth, one
    curves = fit_benchmarks([found], device)
    assert set(curves) == {point.operation.kind for point in found.points}
    for kind, curve in curves.items():
        points = [p for p in found.points if p.operation.kind == kind]
        assert spread(curve, points, device) <= spread(DEFAULTS[kind], points, device)
        assert np.isfinite(curve.seconds(points[0].operation, device))


def test_a_wrong_file_is_one_line(tmp_path):
    path = tmp_path / "wrong.json"
    document = {"cluster": "b200-ndr", "dtype": "bf16", "source": "x", "points": []}
    path.write_text(json.dumps({**document, "columns": [*COLUMNS[:-1], "ms"]}))
    with pytest.raises(ValueError, match="columns") as failure:
        read_benchmark(path)
    assert str(path) in str(failure.value)
    assert "\n" not in str(failure.value)
