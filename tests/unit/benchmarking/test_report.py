"""The report says what synthetic results hold."""

import json
from pathlib import Path

import pytest

from megatron_mone.benchmarking import summary
from megatron_mone.benchmarking.goals import UNNAMED
from megatron_mone.benchmarking.plots import PLOTS
from megatron_mone.benchmarking.race import with_ratios
from megatron_mone.benchmarking.report import cell_table, markdown, write_report
from megatron_mone.common.places import ROOT
from megatron_mone.kernels.race_results import AGAIN, LeftOut, Peaks, RaceResults
from tests.unit.benchmarking.conftest import make_results, make_row


def test_the_report_holds_tables_plots_and_what_was_not_run(tmp_path):
    results = make_results()
    page = write_report(tmp_path, results).read_text(encoding="utf-8")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for name, _, caption in PLOTS:
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
        assert f"]({name}.png)" in text
        assert caption.split(";")[0].split(",")[0] in page
    assert page.count("data:image/png;base64,") == len(PLOTS)
    assert results.command in text
    assert "- scattermoe: not run: the package scattermoe is not installed" in text
    assert "100 GFLOP/s fp32, 200 GFLOP/s bf16, copy 10.0 GB/s" in text


def test_where_mone_wins_is_counted_from_the_rows():
    found = summary.points(make_results())
    texts = "\n".join(summary.where_mone_wins(found))
    assert len(found) == 8
    assert "faster than the fastest dense peer in 2 of 8 (cell, ratio) pairs" in texts
    assert "best: 0.50 of the fastest dense peer's time at r = 1/4, N 64" in texts
    assert "worst: 2.00 of the fastest dense peer's time at r = 1/4, N 8" in texts
    assert "less than any dense peer in 2 of 8 pairs, from 0.50 to 2.00 of it" in texts


def test_a_wrong_or_copied_row_is_no_point():
    cells = []
    for cell in make_results().cells:
        rows = [
            row.model_copy(update={"agrees": row.agrees and row.name != "mone-cpu"})
            for row in cell.results
        ]
        copy = {"name": "mone-auto", "ratio": 0.25, "same_as": "mone-cpu"}
        rows.append(rows[0].model_copy(update=copy))
        cells.append(cell.model_copy(update={"results": rows}))
    results = make_results(cells=cells)
    assert summary.points(results) == []
    assert "nothing can be said" in markdown(results, [])


def test_bf16_is_no_win_over_a_machine_without_it():
    """Slow bf16 products alone are no comparison; float32 peers of the same rows are."""
    slow = {"peaks": Peaks(flops={"fp32": 1e11, "bf16": 1e10}, bandwidth=1e10)}
    results = make_results(**slow)
    assert {point.config.dtype for point in summary.points(results)} == {"fp32"}
    text = markdown(results, [])
    assert "2 of 4 cells are no comparison and are left out here" in text
    assert text.count("- ratio: to peers in bf16 alone") == 2
    cells = []
    for cell in results.cells:
        wide = [make_row("torch-loop-fp32", 2.0)] * (cell.config.dtype == "bf16")
        cells.append(cell.model_copy(update={"results": with_ratios([*cell.results, *wide])}))
    found = summary.points(make_results(cells=cells, **slow))
    assert len(found) == 8
    assert [p.forward_backward for p in found if p.config.dtype == "bf16"] == [6.0, 8.0, 6.0, 2.0]
    told = "In 4 of 4 pairs in bf16 the fastest dense peer multiplies in float32"
    assert told in "\n".join(summary.where_mone_wins(found))
    assert "no comparison" not in markdown(make_results(cells=cells, **slow), [])


def test_a_cell_that_was_left_out_is_named():
    config = make_results().cells[0].config
    left_out = LeftOut(config=config, reason="needs about 9.0 GiB, 1.0 GiB are free")
    results = make_results(skipped=[left_out])
    assert "fp32, balanced: needs about 9.0 GiB, 1.0 GiB are free" in markdown(results, [])


def test_a_table_row_shows_time_spread_and_ratio():
    rows = make_results().cells[1].results
    line = next(line for line in cell_table(rows) if "mone-cpu | 1/4" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[5:8] == ["4", "3.6 .. 4.8", "0.50"]


def test_a_time_below_the_roofline_is_a_warning():
    results = make_results()
    assert "Do not read the roofline" not in markdown(results, [])
    first = results.cells[0].results
    first[0] = first[0].model_copy(update={"limit_forward_backward_ms": 9.0})
    assert "1 of 16 times lie below the roofline" in markdown(results, [])


def test_fractions():
    assert [summary.fraction(r) for r in (1.0, 0.25, 1 / 16, 0.3)] == ["1", "1/4", "1/16", "3/10"]


COMMITTED = sorted((ROOT / "docs/benchmarks").iterdir())


@pytest.mark.parametrize("folder", COMMITTED, ids=[folder.name for folder in COMMITTED])
def test_a_report_in_docs_is_made_of_the_results_beside_it(tmp_path, folder):
    """And its folder names the class of the machine."""
    results = RaceResults.read(folder / "results.json", "look into docs")
    assert summary.class_of(results) in (folder.name.split("-cpu-")[1].split("-")[0], UNNAMED)
    figures = [(name, caption) for name, _, caption in PLOTS]
    assert markdown(results, figures) == (folder / "report.md").read_text(encoding="utf-8")
    results.write(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_bytes() == (folder / "results.json").read_bytes()
    assert RaceResults.read(tmp_path / "results.json", "").plain() == results.plain()


@pytest.mark.parametrize(
    ("place", "value", "told"),
    [
        (("cells", 0, "config", "dtype"), "fp8",
         "cells[0].config.dtype: 'fp8' is none of fp32, bf16"),
        (("cells", 0, "results", 1, "forward_ms"), None,
         "cells[0].results[1].forward_ms: is null in a row that is available"),
        (("cells", 0, "results", 1, "ratio"), 0.5,
         "cells[0].results[1].ratio: must be null in a dense row, and only there"),
        (("settings", "repeats"), 0, "settings.repeats: is 0, it must be 1 or more"),
        (("cells", 0, "results", 1, "error"), -1.0,
         "cells[0].results[1].error: -1.0 is not a finite number of 0 or more"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_one_line_with_its_place(place, value, told):
    content = inside = json.loads(json.dumps(make_results().plain()))
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    with pytest.raises(ValueError) as caught:
        RaceResults.of(content, Path("results.json"))
    assert str(caught.value) == f"results.json: {told}; {AGAIN}"
