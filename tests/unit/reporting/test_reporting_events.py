"""Event files in, curves out: nothing thinned, restarts replace what they repeat."""

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_mone.reporting.page.events import read_events
from megatron_mone.reporting.page.results import ResultError, collect, load_result, save_result
from tests.unit.reporting.conftest import LIMITS, make_result, write_run

KEPT = {"fingerprint": "f", "command": ("c",), "load_average": 0.0}


def session(folder, started, points):
    """An event file whose name says it was begun at `started`."""
    with SummaryWriter(str(folder)) as writer:
        for step, value in points:
            writer.add_scalar("lm loss", value, step)
    newest = max(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns)
    parts = newest.name.split(".")
    parts[3] = str(started)
    newest.rename(folder / ".".join(parts))


def test_many_points_are_all_kept_in_order(tmp_path):
    session(tmp_path, 100, [(step, float(step)) for step in range(1, 12001)])
    curve = read_events(tmp_path).scalars["lm loss"]
    assert curve == [(step, float(step)) for step in range(1, 12001)]


def test_a_restart_replaces_the_steps_it_repeats(tmp_path):
    # 9 sorts after 10 as text: the order is that of the times.
    session(tmp_path, 9, [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)])
    session(tmp_path, 10, [(3, 30.0), (4, 40.0), (5, 50.0)])
    assert read_events(tmp_path).scalars["lm loss"] == [
        (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0),
    ]  # fmt: skip


def test_values_of_one_step_are_averaged(tmp_path):
    session(tmp_path, 9, [(1, 8.0), (2, 2.0), (2, 4.0)])
    assert read_events(tmp_path).scalars["lm loss"] == [(1, 8.0), (2, 3.0)]


def test_a_folder_without_events_has_no_tags(tmp_path):
    assert read_events(tmp_path).scalars == {}


def test_a_run_is_collected_whole(tmp_path):
    write_run(tmp_path, steps=4)
    result = collect("mone", tmp_path, steps=4, **KEPT)
    assert result.val_loss == 5.0
    assert result.tokens == 4 * 64
    assert result.active_flops == 4e9
    assert result.step_ms == pytest.approx(250.0)
    assert result.peak_bytes == 1004
    load = result.load_at(4)["1"]
    assert load.dead == 3
    # TensorBoard may close the histogram with further, empty buckets
    assert load.histogram.limits[: len(LIMITS)] == LIMITS
    assert load.histogram.counts[: len(LIMITS)] == (3, 1, 3, 2, 1)


def test_an_unfinished_run_is_no_result(tmp_path):
    write_run(tmp_path, steps=4)
    with pytest.raises(ResultError, match="ends at step 4, not 6"):
        collect("mone", tmp_path, steps=6, **KEPT)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ResultError, match=r"run\.json"):
        collect("mone", tmp_path, steps=4, **KEPT)


def test_a_result_survives_its_file(tmp_path):
    write_run(tmp_path, steps=4)
    result = collect("mone", tmp_path, steps=4, **KEPT)
    save_result(tmp_path / "result.json", result)
    assert load_result(tmp_path / "result.json") == result


def test_a_damaged_or_foreign_result_is_none(tmp_path):
    path = tmp_path / "result.json"
    assert load_result(path) is None
    save_result(path, make_result("mone"))
    path.write_text(path.read_text()[:200])
    assert load_result(path) is None
    path.write_text('{"name": "mone"}')
    assert load_result(path) is None
    path.write_text("[1]")
    assert load_result(path) is None


def test_the_first_window_holds_the_start_up_and_is_left_out():
    # windows of 9.0, 0.2 and 0.4 seconds
    assert make_result("mone").step_ms == pytest.approx(300.0)
    assert make_result("mone", step_seconds=[(20, 9.0)]).step_ms == pytest.approx(9000.0)
