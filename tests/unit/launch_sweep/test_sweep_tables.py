"""The results table of a sweep: what is read from event files, and how a missing number looks."""

import csv
import io
import json
import os
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from launch.runs.run_manifest import begin_attempt, end_attempt, record_start
from launch.runs.sweep_cases import SweepCase, write_cases
from launch.runs.sweep_results import draw_again, result_rows, run_of, show_results
from megatron_mone.common.files import write_json
from megatron_mone.evaluation.results import place_in_run
from megatron_mone.reporting.sweep.page import bars, loss_curves, sweep_page
from megatron_mone.reporting.sweep.table import (
    Measured,
    Row,
    cells,
    csv_bytes,
    measure,
    numbers,
    results_of,
    text_lines,
)
from tests.unit.reporting.conftest import make_evaluation

TOKENS = 64


def write_events(folder: Path, losses: list[float], seconds: float) -> None:
    """What pretrain writes for some steps."""
    with SummaryWriter(folder) as writer:
        for step, loss in enumerate(losses, start=1):
            writer.add_scalar("lm loss", loss, step)
            writer.add_scalar("iteration-time", 10.0 if step == 1 else seconds, step)
            writer.add_scalar("mone/executed_tflops_per_rank", 3.0, step)
            writer.add_scalar("mem-max-allocated-bytes", step * 2.0**30, step)
        writer.add_scalar("lm loss validation", losses[-1] + 1, len(losses))
    (folder / "run.json").write_text(json.dumps({"tokens_per_step": TOKENS}))


def row(case: str, state: str = "finished", measured: Measured | None = None, **values) -> Row:
    return Row(case, values, state, measured or Measured())


def test_the_numbers_of_a_case(tmp_path):
    write_events(tmp_path, [3.0, 2.5, 2.0], seconds=0.5)
    found = measure(tmp_path)
    assert (found.steps, found.training_loss, found.validation_loss) == (3, 2.0, 3.0)
    assert found.step_ms == 500.0  # the slow first step is start-up
    assert found.tokens_per_second == TOKENS / 0.5
    assert (found.tflops_per_rank, found.peak_gib) == (3.0, 3.0)
    assert [step for step, _ in found.training_curve] == [1, 2, 3]


def test_megatron_s_own_throughput_where_there_is_no_other(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        writer.add_scalar("throughput", 7.0, 1)
    assert measure(tmp_path).tflops_per_rank == 7.0


def test_a_folder_that_is_not_there_has_no_numbers(tmp_path):
    assert measure(tmp_path / "absent") == Measured()


@pytest.mark.parametrize("damage", ["cut", "garbage", "empty", "a byte"])
def test_a_damaged_event_file_gives_what_it_still_holds(tmp_path, damage):
    write_events(tmp_path, [3.0, 2.5, 2.0], seconds=0.5)
    (path,) = tmp_path.glob("events*")
    whole = path.read_bytes()
    middle = len(whole) // 2
    path.write_bytes(
        {
            "cut": whole[:middle],
            "garbage": os.urandom(500),
            "empty": b"",
            "a byte": whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :],
        }[damage]
    )
    found = measure(tmp_path)
    if damage in ("cut", "a byte"):
        assert found.training_curve[0] == (1, 3.0)  # what came before the damage
    assert found.validation_loss is None


def test_a_damaged_run_json_costs_the_tokens_only(tmp_path):
    write_events(tmp_path, [3.0, 2.0], seconds=0.5)
    for text in ("", "[]", '{"tokens_per_step": null}'):
        (tmp_path / "run.json").write_text(text)
        found = measure(tmp_path)
        assert found.tokens_per_second is None
        assert found.step_ms == 500.0


def test_ratios_are_to_the_first_row_where_both_are_there():
    rows = [
        row("a", measured=Measured(validation_loss=2.0, step_ms=100.0)),
        row("b", measured=Measured(validation_loss=3.0)),
        row("c", measured=Measured(step_ms=50.0)),
    ]
    table = numbers(rows)
    assert [one["validation_loss_ratio"] for one in table] == [1.0, 1.5, None]
    assert [one["step_ms_ratio"] for one in table] == [1.0, None, 0.5]
    assert numbers(rows[2:] + rows[:1])[0]["validation_loss_ratio"] is None


def test_a_missing_number_is_shown_as_such():
    rows = [row("a", "missing", r="0.5"), row("b", "running", Measured(steps=0), seed="1")]
    heading, lines = cells(rows)
    assert heading[:3] == ["r", "seed", "state"]
    assert lines[0] == ["0.5", "-", "missing", *["-"] * (len(heading) - 3)]
    assert lines[1][heading.index("steps")] == "0"  # a zero that was measured
    for line in text_lines(rows):
        assert "None" not in line
    text = csv_bytes(rows).decode()
    (first, second) = csv.DictReader(io.StringIO(text))
    assert (first["step_ms"], second["steps"]) == ("", "0")
    entry = results_of("x", rows).plain()["cases"][0]
    assert entry["step_ms"] is None
    assert entry["values"] == {"r": "0.5"}


def test_a_loss_that_is_no_number_is_none_in_json():
    rows = [row("a", measured=Measured(training_loss=float("nan"), step_ms=float("inf")))]
    entry = results_of("x", rows).plain()["cases"][0]
    assert (entry["training_loss"], entry["step_ms"]) == (None, None)
    json.dumps(entry, allow_nan=False)


def test_the_columns_of_the_text_stand_under_their_heading():
    rows = [row("a", "failed with status 3", r="0.5"), row("b", r="0.25")]
    heading, first, second = text_lines(rows)
    at = heading.index("state")
    assert first[at:].startswith("failed with status 3")
    assert second[at:].startswith("finished")
    ends = [heading.index(name) + len(name) for name in ("steps", "ms / step", "tokens / s")]
    assert all(line[end - 1] == "-" for line in (first, second) for end in ends)


def test_the_plots_show_every_case_and_no_bar_for_a_missing_number():
    rows = [
        row("a", measured=Measured(step_ms=100.0, training_curve=[(1, 3.0), (2, 2.0)]), r="1"),
        row("b", "missing", r="0.5"),
    ]
    left, right = loss_curves(rows).axes
    assert [list(line.get_ydata()) for line in left.lines] == [[3.0, 2.0], []]
    assert len(right.lines) == 2
    times, losses = bars(rows).axes
    assert [bar.get_width() for bar in times.patches] == [100.0, 0.0]
    assert [text.get_text() for text in losses.texts] == ["-", "-"]


def test_text_of_a_case_cannot_become_html(tmp_path):
    page = sweep_page("<b>", [row("x", "failed: <script>", a="<i>")], tmp_path / "plots")
    for tag in ("<b>", "<script>", "<i>"):
        assert tag not in page


@pytest.fixture
def sweep(tmp_path) -> Path:
    """A sweep of three cases: one finished, one that failed, one that never began."""
    folder = tmp_path / "s"
    cases = [
        SweepCase(number=n, values={"r": value}, flags=[])
        for n, value in enumerate(("1", "0.5", "0.25"))
    ]
    config = {"values": {}, "arguments": [], "sweep": True}
    record_start(folder, "s", config, (), {"ranks": 1, "cases": [0, 1, 2]})
    write_cases(folder, cases)
    for case, status in zip(cases, (0, 3), strict=False):
        own = folder / case.folder
        begin_attempt(own, "local-1-1", "local-1-1.0", "here")
        reason = "finished" if status == 0 else "failed with status 3"
        end_attempt(own, "local-1-1.0", status, reason)
        write_events(own / "tensorboard", [4.0, 3.0], seconds=0.25)
    log = folder / cases[1].folder / "logs/local-1-1.0/rank-00000.log"
    log.parent.mkdir(parents=True)
    log.write_text("much\nmegatron-mone: error: loss is NaN\n")
    return folder


def test_results_are_printed_and_kept(sweep, capsys):
    show_results(sweep)
    *table, why, page = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in table[1:]] == [
        ["1", "finished"],
        ["0.5", "failed"],
        ["0.25", "missing"],
    ]
    assert why == "001-r=0.5: megatron-mone: error: loss is NaN"
    assert page == f"{sweep}/results.html"
    kept = json.loads((sweep / "results.json").read_text())["cases"]
    assert [case["training_loss"] for case in kept] == [3.0, 3.0, None]
    assert len((sweep / "results.csv").read_text().splitlines()) == 4
    html = (sweep / "results.html").read_text()
    assert html.count("data:image/png") == 2
    assert not list(sweep.glob(".*.tmp"))


def test_benchmarks_of_checkpoints_are_on_the_page(sweep, capsys):
    one, other = (sweep / case for case in ("cases/000-r=1", "cases/001-r=0.5"))
    for case, steps in ((one, (2, 4)), (other, (4,))):
        for step in steps:
            place = place_in_run(case, f"iter_{step:07d}", "quick")
            place.mkdir(parents=True)
            write_json(place / "results.json", make_evaluation(step, {"cloze": step / 8}))
    assert draw_again(sweep) is None  # nobody has asked for a page
    show_results(sweep)
    html = (sweep / "results.html").read_text()
    heads = ("r = 1, iteration 2", "r = 1, iteration 4", "r = 0.5, iteration 4")
    assert "".join(f"<th>{head}</th>" for head in heads) in html
    assert "<td>0.2500 ± 0.0500</td><td>0.5000 ± 0.0500</td><td>0.5000 ± 0.0500</td>" in html
    place = place_in_run(other, "iter_0000002", "quick")
    place.mkdir()
    (place / "results.json").write_text("{")
    assert draw_again(sweep) == sweep / "results.html"
    capsys.readouterr()
    show_results(sweep)
    assert f"{place}/results.json is no JSON" in capsys.readouterr().out


def test_a_checkpoint_knows_its_run(sweep, tmp_path):
    case = sweep / "cases/000-r=1"
    assert run_of(case / "checkpoints/iter_0000002") == (sweep, case)
    assert run_of(case / "elsewhere/iter_0000002") is None
    single = tmp_path / "run"
    assert run_of(single / "checkpoints/iter_0000002") is None  # no manifest: not launch's
    record_start(single, "run", {"values": {}, "arguments": []}, (), {"ranks": 1})
    assert run_of(single / "checkpoints/iter_0000002") == (single, single)


def test_curves_of_a_folder_that_the_user_chose(tmp_path):
    folder, chosen = tmp_path / "run", tmp_path / "mine"
    config = {"values": {}, "arguments": ["--tensorboard-dir", str(chosen)], "sweep": False}
    record_start(folder, "run", config, (), {"ranks": 1})
    write_events(chosen, [4.0, 3.0], seconds=0.25)
    ((found,), why) = result_rows(folder)
    assert found.measured.training_loss == 3.0
    assert why == []
