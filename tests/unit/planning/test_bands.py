"""Bands: by hand, wider where less is known, and tied where they overlap."""

import math
from dataclasses import replace

import pytest

from megatron_mone.planning.cost import bands
from megatron_mone.planning.cost.bands import (
    Band,
    FittedRun,
    memory_band,
    place_of,
    tied,
    time_band,
)
from megatron_mone.planning.cost.rank_memory import RankMemory
from tests.unit.planning.made_jobs import facts

DENSE = facts(num_experts=0, ep=1)
MOE = facts(num_experts=8)
MEMORY = RankMemory(10.0, 20.0, 15.0, 4.0, 1.0, 3.0, 2.0, 1.0)


def runs(of=MOE, errors=(0.03, 0.05, 0.04)):
    return [FittedRun(f"{n}", place_of(of), error) for n, error in enumerate(errors)]


def half(of, fitted, numbers=1):
    band = time_band(2.0, of, fitted, numbers)
    assert band.low * band.high == pytest.approx(4.0)
    return math.log(band.high / 2.0)


def test_a_band_is_the_errors_root_mean_square_less_what_was_fitted():
    """Three errors and one number leave two: 1.64 sqrt((9 + 25 + 16) / 3 x 3 / 2) percent."""
    assert half(MOE, runs()) == pytest.approx(0.0164 * 5)
    assert half(MOE, runs(errors=(1e-4, 1e-4))) == pytest.approx(1.64 * bands.LEAST)


def test_of_runs_with_experts_and_without_each_has_its_own_errors():
    both = [*runs(MOE, (0.1, 0.1)), *runs(DENSE, (0.03, 0.03))]
    assert half(MOE, both) == pytest.approx(1.64 * 0.1 * math.sqrt(4 / 3))
    assert half(DENSE, both) == pytest.approx(1.64 * 0.03 * math.sqrt(4 / 3))


def test_a_job_far_from_all_runs_has_a_wider_band():
    """Four doublings away it is 1.41 times as wide; the nearest run counts."""
    longer = replace(MOE, seq_length=4 * MOE.seq_length, micro_batch_size=MOE.micro_batch_size)
    far = math.dist(place_of(longer), place_of(MOE)) / 4
    assert far > 0.5
    assert half(longer, runs()) == pytest.approx(0.0164 * 5 * math.sqrt(1 + far**2))
    nearer = [*runs(), *runs(longer, (0.04,))]
    assert half(longer, nearer) < half(longer, [*runs(), *runs(MOE, (0.04,))])


@pytest.mark.parametrize("change", [{"fp8": "mxfp8"}, {"tp": 8}, {"ep": 64}, {"pp": 16}])
def test_precision_and_groups_are_distances(change):
    assert half(replace(MOE, **change), runs()) > half(MOE, runs())


def test_what_was_never_fitted_or_never_tested_is_assumed():
    assert half(MOE, []) == pytest.approx(bands.UNFITTED)
    assert half(MOE, runs(errors=(0.0,)), numbers=1) == pytest.approx(bands.UNTESTED)


def test_memory_is_off_by_its_errors_and_half_of_the_allowances():
    found = memory_band(MEMORY, (0.03, 0.04))
    assert MEMORY.allocated == 50.0
    share = 1.64 * math.sqrt((9 + 16) / 2) / 100
    assert found.low == pytest.approx(50 * math.exp(-share) + 3.0)
    assert found.high == pytest.approx(50 * math.exp(share) + 9.0)
    assert memory_band(MEMORY, ()).high > memory_band(MEMORY, (0.001,)).high


def test_overlapping_bands_are_tied():
    assert tied(Band(1.0, 2.0), Band(1.9, 3.0))
    assert tied(Band(1.9, 3.0), Band(1.0, 2.0))
    assert tied(Band(1.0, 4.0), Band(2.0, 3.0))
    assert not tied(Band(1.0, 2.0), Band(2.1, 3.0))
    assert not tied(Band(2.1, 3.0), Band(1.0, 2.0))
