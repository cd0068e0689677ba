"""The roofline and its fit: hand-made times, limits, and planted parameters found again."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.common.device import Device
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.roofline import DEFAULTS, Curve, Operation
from tests.unit.planning.curve_fits import Measurement, error_ratios, fit
from tests.unit.planning.made_jobs import gemm, grouped_gemm

DEVICE = Device("made up", {"bf16": 1e15, "fp32": 1e14}, 1e11, 2e12)
# No loss anywhere, so that a time is operations over peak or bytes over bandwidth.
PERFECT = Curve(1.0, 0.0, 0.0, 1, 0.0, 1.0, 0.0, 0.0)
KINDS = sorted(DEFAULTS)


@st.composite
def operations(draw, kinds=KINDS):
    """Any operation, from nothing to much."""
    return Operation(
        draw(st.sampled_from(kinds)),
        "bf16",
        draw(st.floats(0, 1e16)),
        draw(st.floats(0, 1e12)),
        draw(st.floats(0.5, 1e6)),
        draw(st.integers(1, 65536)),
        draw(st.integers(1, 65536)),
        draw(st.floats(1e-3, 1)),
    )


curves = st.builds(
    Curve,
    st.floats(0.01, 1),
    st.floats(0, 1e4),
    st.floats(0, 1e4),
    st.integers(1, 512),
    st.floats(0, 3),
    st.floats(0.01, 1),
    st.floats(0, 1e8),
    st.floats(0, 1e-3),
)


# Closed forms


def test_a_square_product_by_hand():
    """2 x 4096^3 operations at 1 PFLOP/s outlast 3 matrices of 2 x 4096^2 bytes at 2 TB/s."""
    product = gemm(4096, 4096, 4096, "bf16", 2)
    assert product.flops == 2 * 4096**3
    assert product.bytes == 3 * 2 * 4096**2
    assert PERFECT.seconds(product, DEVICE) == pytest.approx(2 * 4096**3 / 1e15)


def test_a_thin_product_is_bound_by_its_weights():
    product = gemm(1, 4096, 4096, "bf16", 2)
    moved = 2 * (4096**2 + 2 * 4096)
    assert PERFECT.seconds(product, DEVICE) == pytest.approx(moved / 2e12)


def test_the_slower_limit_counts_and_the_launch_comes_on_top():
    both = Operation("memory", "bf16", flops=1e12, bytes=1e9)
    assert PERFECT.seconds(both, DEVICE) == pytest.approx(1e-3)
    slow = replace(PERFECT, bandwidth_share=0.25, launch=1e-4)
    assert slow.seconds(both, DEVICE) == pytest.approx(1e9 / 0.5e12 + 1e-4)


def test_half_rows_half_depth_and_half_bytes_halve():
    curve = replace(PERFECT, half_rows=100.0, half_depth=30.0, half_bytes=1e6)
    at_half = Operation("gemm", "bf16", 1.0, 1e6, rows=100, depth=30)
    assert curve.compute_efficiency(at_half) == pytest.approx(0.25)
    assert curve.memory_efficiency(at_half) == pytest.approx(0.5)


def test_columns_are_rounded_up_to_tiles():
    """176 columns, an eighth of 1,408, take as long as 192 in tiles of 64."""
    curve = replace(PERFECT, column_tile=64)
    times = [
        curve.seconds(replace(gemm(4096, n, 4096, "bf16", 2), bytes=0.0), DEVICE)
        for n in (176, 192)
    ]
    assert times[0] == pytest.approx(times[1])


def test_half_a_row_tile_is_what_rounding_up_costs_on_average():
    """Means over many row counts: whole tiles of 128 against rows + 64."""
    rows = np.arange(1, 128 * 64 + 1)
    tiles = np.ceil(rows / 128) * 128
    assert tiles.mean() == pytest.approx((rows + 64).mean(), rel=1e-3)


def test_a_grouped_product_counts_its_rows_and_the_weights_that_are_read():
    """3 of 4 experts have rows: 3 weights move, and the mean is over those 3."""
    product = grouped_gemm([100, 0, 300, 200], 64, 32, "bf16", 2)
    assert product.flops == 2 * 600 * 64 * 32
    assert product.bytes == 2 * (600 * 32 + 3 * 64 * 32 + 600 * 64)
    assert product.rows == 200
    assert grouped_gemm([0, 0], 64, 32, "bf16", 2) is None


def test_few_rows_an_expert_are_slower_than_the_same_rows_in_one():
    many = grouped_gemm([16] * 256, 2048, 2048, "bf16", 2)
    one = grouped_gemm([16 * 256], 2048, 2048, "bf16", 2)
    curve, h100 = DEFAULTS["grouped_gemm"], load_cluster("h100-ndr").device
    assert curve.seconds(many, h100) > 2 * curve.seconds(one, h100)


def test_nothing_costs_nothing():
    assert DEFAULTS["memory"].seconds(Operation("memory", "bf16", 0.0, 0.0), DEVICE) == 0.0


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=16).filter(any), st.integers(1, 4096))
def test_keeping_all_equals_dense(rows, columns):
    """r = 1 is the dense expert's product, and a smaller share is never slower by more than what
    `sparse_loss` says."""
    curve = replace(DEFAULTS["grouped_gemm"], sparse_loss=0.5)
    dense = curve.seconds(grouped_gemm(rows, columns, 2048, "bf16", 2), DEVICE)
    assert curve.seconds(grouped_gemm(rows, columns, 2048, "bf16", 2, kept=1.0), DEVICE) == dense
    for loss in (0.0, 5.0):
        other = replace(curve, sparse_loss=loss)
        assert (
            other.seconds(grouped_gemm(rows, columns, 2048, "bf16", 2, kept=1.0), DEVICE) == dense
        )
    quarter = grouped_gemm(rows, columns, 2048, "bf16", 2, kept=0.25)
    assert curve.seconds(quarter, DEVICE) <= dense
    assert curve.compute_efficiency(quarter) == pytest.approx(
        0.5 * curve.compute_efficiency(replace(quarter, kept=1.0))
    )


# Properties


@given(operations(), curves)
def test_efficiencies_are_shares(operation, curve):
    assert 0 < curve.compute_efficiency(operation) <= 1
    if operation.bytes > 1:
        assert 0 < curve.memory_efficiency(operation) <= 1


@given(operations(), curves, st.floats(1, 1000))
def test_efficiency_rises_with_rows(operation, curve, factor):
    more = replace(operation, rows=operation.rows * factor)
    assert curve.compute_efficiency(more) >= curve.compute_efficiency(operation) * (1 - 1e-12)


@given(operations(), curves, st.floats(1, 1000))
def test_never_slower_with_a_faster_device_and_never_faster_with_more_to_do(op, curve, factor):
    now = curve.seconds(op, DEVICE)
    wider = replace(DEVICE, memory_bandwidth=factor * DEVICE.memory_bandwidth)
    faster = replace(DEVICE, flops={"bf16": factor * DEVICE.flops["bf16"]})
    assert curve.seconds(op, wider) <= now
    assert curve.seconds(op, faster) <= now
    assert curve.seconds(replace(op, flops=op.flops * factor), DEVICE) >= now
    assert curve.seconds(replace(op, bytes=op.bytes * factor), DEVICE) >= now * (1 - 1e-12)


@given(operations(), curves)
def test_never_faster_than_the_peaks(op, curve):
    limit = max(op.flops / DEVICE.flops["bf16"], op.bytes / DEVICE.memory_bandwidth)
    assert curve.seconds(op, DEVICE) >= limit * (1 - 1e-12)


# The fit

PLANTED = Curve(0.72, 210.0, 90.0, 64, 0.3, 0.83, 3e6, 6e-6)


def products(rng, count, kept=(1.0,)):
    """Products from launch-bound to large, as a profiler meets them."""
    for _ in range(count):
        rows = [int(2 ** rng.uniform(4, 15))] * int(rng.integers(1, 9))
        columns, depth = (int(64 * 2 ** rng.uniform(0, 8)) for _ in range(2))
        yield grouped_gemm(rows, columns, depth, "bf16", 2, float(rng.choice(kept)))


def measure(curve, operations, rng=None, noise=0.0):
    return [
        Measurement(o, curve.seconds(o, DEVICE) * math.exp(noise * rng.normal() if rng else 0.0))
        for o in operations
    ]


def test_planted_parameters_are_found_again():
    """Without noise, from the defaults, all of them."""
    rng = np.random.default_rng(0)
    taken = measure(PLANTED, products(rng, 300, (0.1, 0.25, 0.5, 1.0)))
    got = fit(taken, DEVICE, DEFAULTS["grouped_gemm"])
    assert got.worst_error < 0.01
    assert got.measurements == 300
    for name in ("peak_share", "half_rows", "half_depth", "sparse_loss", "bandwidth_share"):
        assert getattr(got.curve, name) == pytest.approx(getattr(PLANTED, name), rel=0.03), name
    assert got.curve.launch == pytest.approx(PLANTED.launch, rel=0.03)
    assert got.curve.column_tile == PLANTED.column_tile


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_noise_of_5_percent_leaves_a_curve_that_predicts_others(seed):
    """Fitted to one half, checked on shapes and noise it has not seen: the median error of a
    perfect curve would be that of the noise, 0.67 x 5%."""
    rng = np.random.default_rng(seed)
    seen = measure(PLANTED, products(rng, 200, (0.25, 1.0)), rng, 0.05)
    other = measure(PLANTED, products(rng, 200, (0.25, 1.0)), rng, 0.05)
    got = fit(seen, DEVICE, DEFAULTS["grouped_gemm"])
    assert 0.02 < got.median_error < 0.05
    assert np.median(np.abs(error_ratios(got.curve, other, DEVICE))) < 0.05
    assert got.curve.peak_share == pytest.approx(PLANTED.peak_share, rel=0.1)
    assert got.curve.half_rows == pytest.approx(PLANTED.half_rows, rel=0.3)


def test_copies_fit_the_bandwidth():
    rng = np.random.default_rng(4)
    planted = replace(DEFAULTS["memory"], bandwidth_share=0.7, half_bytes=8e6, launch=4e-6)
    copies = [Operation("memory", "fp32", 0.0, 2 ** rng.uniform(8, 32)) for _ in range(100)]
    got = fit(measure(planted, copies), DEVICE, DEFAULTS["memory"])
    assert got.worst_error < 0.01
    assert got.curve.bandwidth_share == pytest.approx(0.7, rel=0.02)


def test_what_is_not_measured_stays_where_it_was():
    """Copies say nothing of products: the peak's share, and a parameter of 0, do not move."""
    start = replace(DEFAULTS["gemm"], half_depth=0.0)
    copies = [Operation("gemm", "bf16", 0.0, 2.0**i) for i in range(10, 30)]
    planted = replace(start, bandwidth_share=0.5)
    got = fit(measure(planted, copies), DEVICE, start)
    assert got.curve.peak_share == pytest.approx(start.peak_share)
    assert got.curve.half_rows == pytest.approx(start.half_rows)
    assert got.curve.half_depth == 0.0


def test_a_fit_is_no_worse_than_its_start_and_the_same_twice():
    rng = np.random.default_rng(5)
    taken = measure(PLANTED, products(rng, 40), rng, 0.3)
    start = DEFAULTS["grouped_gemm"]

    def squares(curve):
        return (np.log1p(error_ratios(curve, taken, DEVICE)) ** 2).sum()

    first = fit(taken, DEVICE, start)
    assert squares(first.curve) < squares(start)
    assert fit(taken, DEVICE, start) == first


def test_errors_are_relative_to_the_measured_time():
    op = Operation("memory", "bf16", 0.0, 2e12)  # 1 s
    taken = [Measurement(op, 0.8), Measurement(op, 2.0)]
    np.testing.assert_allclose(error_ratios(PERFECT, taken, DEVICE), [0.25, -0.5])


# Refusals


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"kind": "gem"}, "did you mean 'gemm'"),
        ({"flops": -1.0}, "flops = -1.0"),
        ({"bytes": math.nan}, "bytes = nan"),
        ({"rows": 0}, "rows = 0"),
        ({"depth": 0}, "depth = 0"),
        ({"kept": 0.0}, "kept = 0.0"),
        ({"kept": 1.5}, "kept = 1.5"),
    ],
)
def test_a_wrong_operation_is_refused_in_one_line(changes, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        replace(gemm(1, 1, 1, "bf16", 2), **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [{"peak_share": 1.1}, {"bandwidth_share": 0.0}, {"half_rows": -1.0}, {"column_tile": 0}],
)
def test_a_wrong_curve_is_refused(changes):
    with pytest.raises(ValueError, match=f"{next(iter(changes))} = "):
        replace(PERFECT, **changes)


def test_a_dtype_the_device_lacks_is_refused():
    with pytest.raises(ValueError, match="no peak for dtype 'fp8'"):
        PERFECT.seconds(gemm(8, 8, 8, "fp8", 1), DEVICE)


@pytest.mark.parametrize(
    ("taken", "fault"),
    [
        ([], "0 measurements of nothing"),
        ([Measurement(gemm(8, 8, 8, "bf16", 2), 1.0)], "1 measurements of gemm"),
        (
            [
                Measurement(gemm(8, 8, 8, "bf16", 2), 1.0),
                Measurement(Operation("memory", "bf16", 0.0, 1.0), 1.0),
            ],
            "of gemm, memory",
        ),
        ([Measurement(gemm(8, 8, 8, "bf16", 2), 0.0)] * 2, "took seconds = 0.0"),
        ([Measurement(Operation("memory", "bf16", 0.0, 0.0), 1.0)] * 2, "does nothing"),
    ],
)
def test_measurements_that_fit_no_curve_are_refused_in_one_line(taken, fault):
    with pytest.raises(ValueError, match=fault) as caught:
        fit(taken, DEVICE, DEFAULTS["gemm"])
    assert "\n" not in str(caught.value)
