"""`scale`: laws that are fitted to points of known laws, their bands, and what is said of them."""

import math
import random
from itertools import pairwise

import pytest

from megatron_mone.studies import laws
from megatron_mone.studies.catalogue import small, study_of
from megatron_mone.studies.catalogue.ratio import TOTAL
from megatron_mone.studies.catalogue.scale import (
    KINDS,
    PARAMETERS,
    SIZES,
    ladder,
    name_of,
    parameters,
    sized,
    widths,
)
from megatron_mone.studies.document import Measure
from megatron_mone.studies.page import study_page
from megatron_mone.studies.runs import values_of
from tests.unit.studies.made_up import made_up

STUDY = study_of("scale")
WIDTHS = widths(small.MODEL)


def size_of(width: int) -> int:
    values = STUDY.presets["cpu"].values
    return parameters({**values, **sized(width, values)})


SIZES_HERE = [size_of(width) for width in WIDTHS]
TRUE = {KINDS[0]: laws.Law(1.6, 300.0, 0.35), KINDS[1]: laws.Law(1.5, 310.0, 0.35)}


def noisy(law: laws.Law, spread: float, draw: random.Random) -> laws.Points:
    return [
        (x, {seed: law.at(x) + draw.gauss(0, spread) for seed in (1, 2, 3)}) for x in SIZES_HERE
    ]


def results_of(spread: float, widths=WIDTHS):
    draw = random.Random(1)
    losses, flops = {}, {}
    for kind, more in zip(KINDS, (1.0, 1.7), strict=True):
        for width in widths:
            name, at = name_of(kind, width), TRUE[kind].at(size_of(width))
            losses[name] = {seed: at + draw.gauss(0, spread) for seed in (1, 2, 3)}
            flops[name] = 2300.0 * more * size_of(width)
    measures = [
        Measure(of=PARAMETERS, cell=name, seed=seed, x=[0], y=[size_of(int(name.split()[-1]))])
        for name in losses for seed in (1, 2, 3)
    ]  # fmt: skip
    return made_up(STUDY, losses, flops, measures)


@pytest.mark.parametrize("law", [*TRUE.values(), laws.Law(0.0, 9.0, 0.05), laws.Law(3, 4e5, 1.1)])
def test_a_law_fitted_to_its_own_points_is_that_law(law):
    found = laws.fitted([(x, {1: law.at(x)}) for x in SIZES_HERE])
    assert found.exponent == pytest.approx(law.exponent, rel=1e-3)
    assert found.floor == pytest.approx(law.floor, abs=5e-3)
    for x in (*SIZES_HERE, *SIZES.values()):
        assert found.at(x) == pytest.approx(law.at(x), rel=2e-3)
    assert found.reaches(found.at(7e5)) == pytest.approx(7e5)
    assert laws.Law(2.0, 1.0, 0.1).reaches(1.9) == math.inf


def test_a_floor_is_never_below_nothing():
    """Straight in log x: without a bound the floor would be far below 0."""
    found = laws.fit(SIZES_HERE, [9 - 0.4 * math.log(x) for x in SIZES_HERE])
    assert found.floor == 0
    assert found.factor > 0


def test_bands_hold_what_is_true_most_times():
    """95% bands of 40 made-up ladders, of the exponent and at ten times the largest size."""
    draw, law = random.Random(2), TRUE[KINDS[0]]
    far = 10 * SIZES_HERE[-1]
    held = {"exponent": 0, "far": 0}
    for _ in range(40):
        points = noisy(law, 0.01, draw)
        fitted = laws.fitted(points)
        again = laws.fitted_again(points, laws.draws(len(points), (1, 2, 3))[:200])
        exponent = laws.band(fitted.exponent, [one.exponent for one in again])
        at = laws.band(fitted.at(far), [one.at(far) for one in again])
        held["exponent"] += exponent.low <= law.exponent <= exponent.high
        held["far"] += at.low <= law.at(far) <= at.high
    assert min(held.values()) >= 34, held


def test_bands_widen_with_the_spread_of_seeds_and_with_distance():
    near, wide = (ladder(results_of(spread), PARAMETERS) for spread in (0.001, 0.02))
    sizes = (SIZES_HERE[3], 1e8, 7e9)
    widths = [[band.high - band.low for band in map(one.over, sizes)] for one in (near, wide)]
    assert all(one < other for one, other in zip(*widths, strict=True))
    assert all(one < other for each in widths for one, other in pairwise(each))


def test_a_law_of_few_sizes_is_refused():
    with pytest.raises(ValueError, match="3 sizes are no ladder"):
        laws.fit([1, 2, 3, 3], [4, 3, 2, 2])
    results = results_of(0.001, WIDTHS[:3])
    assert STUDY.findings(results)[-1] == "No law: it takes 4 sizes of both kinds."
    assert len(STUDY.sections(results)) == 1


def test_sizes_differ_as_they_say():
    preset = STUDY.presets["cpu"]
    values = {cell.name: values_of(cell, preset, 1) for cell in STUDY.grid(preset)}
    for width in WIDTHS:
        one, other = (values[name_of(kind, width)] for kind in KINDS)
        assert one["train_iters"] * 2048 == pytest.approx(0.5165 * size_of(width), rel=0.07)
        assert one["train_iters"] % one["eval_interval"] == 0
        assert one["lr"] * width**0.5 == pytest.approx(3e-3 * 8)
        kept = {name: value for name, value in one.items() if not name.startswith("mone_")}
        assert kept == other
    main = values[name_of(KINDS[0], 64)]
    assert main == {**small.training(small.CPU_STEPS), "seed": 1}
    ratio = study_of("ratio")
    (total,) = (cell for cell in ratio.grid(ratio.presets["cpu"]) if cell.name == TOTAL)
    assert values[name_of(KINDS[1], 64)] == values_of(total, ratio.presets["cpu"], 1)


def test_the_page_says_what_the_laws_do_and_how_far_they_go(tmp_path):
    results = results_of(0.002)
    found = STUDY.findings(results)
    by_size = ladder(results, PARAMETERS)
    page = study_page(STUDY, results, tmp_path)
    for words, size in SIZES.items():
        over = by_size.over(size)
        assert by_size.at(KINDS[0], size).text(".2f") in page
        assert f"<td>{over.high - over.low:.2f}</td>" in page
        (said,) = (one for one in found if one.startswith(f"At {words} parameters"))
        assert f"{size / SIZES_HERE[-1]:,.0f} times the largest model" in said
    assert sum(one.startswith("Fitted without H = 96") for one in found) == 2
    times = ladder(results, "operations").times(results.cell("MoNE, H = 96").runs[0].steps * 2300
                                                * SIZES_HERE[-1])  # fmt: skip
    assert f"{times.text('.2f')} times the operations" in page
