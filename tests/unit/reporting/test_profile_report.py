"""The report says what the profile's numbers say, survives what may be absent, and stays small."""

import copy
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot as plt

from megatron_mone.commands import report_profile
from megatron_mone.common.phases import COMMUNICATION
from megatron_mone.profiling.profile_document import Profile
from megatron_mone.reporting.page.events import read_events
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.profile import plots as profile_plots
from megatron_mone.reporting.profile import resource_plots as profile_resource_plots
from megatron_mone.reporting.profile import statement as profile_statement
from megatron_mone.reporting.profile import tables as profile_tables
from megatron_mone.reporting.profile.check import check_one_model
from megatron_mone.reporting.profile.report import write_report
from megatron_mone.reporting.profile.tensorboard import write_tensorboard
from megatron_mone.reporting.profile.view import (
    engineering,
    rank_ranges,
    short,
    signed_ms,
    skew_note,
    speed_verdict,
)
from tests.unit.profiling.profile_builders import make_profile, make_record, make_run
from tests.unit.reporting.profile_example import as_profile, example_profile
from tests.unit.reporting.test_reporting_html import HOSTILE, assert_self_contained

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def profile():
    return example_profile()


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture
def coarse(monkeypatch):
    """Pictures are drawn once, with few dots: for tests of the page's text."""

    def save(figure, stem: Path) -> bytes:
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=30)
        plt.close(figure)
        return picture.getvalue()

    monkeypatch.setattr("megatron_mone.reporting.profile.report.save", save)


def words(figure) -> str:
    """All text of a figure."""
    texts = [text.get_text() for text in figure.findobj(plt.Text)]
    return "\n".join(text for text in texts if text)


def with_step(profile: dict, run: int, factor: float) -> dict:
    """`profile` with all times of one run multiplied."""
    changed = copy.deepcopy(profile)
    one = changed["runs"][run]
    one["step_ms"] *= factor
    one["phases"] = {phase: factor * ms for phase, ms in one["phases"].items()}
    for name, values in one["samples"]["phases"].items():
        one["samples"]["phases"][name] = [factor * ms for ms in values]
    return changed


def test_the_example_is_consistent(profile):
    for run in profile["runs"]:
        assert sum(run["phases"].values()) == pytest.approx(run["step_ms"])
        for phase, split in run["passes"].items():
            assert sum(split.values()) == pytest.approx(run["phases"][phase])
        for phase, values in run["by_rank"]["phases"].items():
            assert np.mean(values) == pytest.approx(run["phases"][phase])
        memory = run["memory"]
        assert sum(memory["by_kind"].values()) == memory["peak_bytes"]
        executed = sum(counts["executed"] for counts in run["flops"]["modules"].values())
        assert executed == pytest.approx(run["flops"]["executed"])
    as_profile(profile)


def test_a_merged_profile_can_be_drawn(tmp_path, coarse):
    """What merge writes, not what this file thinks that it writes."""
    stock = make_run("moe", neurons=None)
    runs = [make_run(), stock]
    make_profile(tmp_path, [make_record(rank, 2, runs=runs) for rank in range(2)])
    merged = Profile.read_folder(tmp_path)
    text = write_report(merged, tmp_path).read_text()
    assert "MoNE" in text
    write_tensorboard(merged, tmp_path / "tensorboard")


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.5, "faster"), (0.5, "slower"), (None, "not clearly different")]
)
def test_the_headline_calls_mone_what_its_numbers_say(profile, factor, verdict):
    mone, moe = profile["runs"][:2]
    equal = mone["step_ms"] / moe["step_ms"]
    changed = with_step(profile, 1, equal * (factor or 1.0))
    assert speed_verdict(as_profile(changed), as_profile(changed).runs[1]) == verdict
    line = profile_statement.headline(as_profile(changed))
    ratio = mone["step_ms"] / changed["runs"][1]["step_ms"]
    than = "from" if factor is None else "than"
    assert f"{verdict} {than} MoE (" in line
    assert f"ratio {ratio:.2f})" in line
    assert "CPU ranks" in line
    assert "neurons kept: MoNE 25.0%" in line
    assert f"MoNE {mone['routing']['rows_max_over_mean']:.2f}" in line


def test_one_step_is_not_called_faster(profile):
    changed = copy.deepcopy(profile)
    for run in changed["runs"]:
        samples = run["samples"]
        for lists in (samples, samples["phases"]):
            lists.update({k: v[:1] for k, v in lists.items() if isinstance(v, list)})
    assert (
        speed_verdict(as_profile(changed), as_profile(changed).runs[1]) == "not clearly different"
    )
    assert "no confidence interval" in " ".join(profile_statement.findings(as_profile(changed)))


def test_differences_of_phases_add_up_to_the_steps(profile):
    found = next(
        text for text in profile_statement.findings(as_profile(profile)) if "Against MoE," in text
    )
    assert f"gate GEMM {signed_ms(profile['runs'][0]['phases']['gate GEMM'])[0]}" in found
    parts, total = found.split("; together ")
    numbers = [
        float(n.replace("\u2212", "-")) for n in re.findall(r"[+\u2212]?\d+\.?\d*(?=[,;]|$)", parts)
    ]
    together = float(total.split()[0].replace("\u2212", "-"))
    assert sum(numbers) == pytest.approx(together, abs=0.3)
    assert together < 0  # as the example's MoNE is faster


def test_both_utilisations_and_the_memory_ratio_are_told(profile):
    text = " ".join(profile_statement.findings(as_profile(profile)))
    mone, moe = (run["memory"]["peak_bytes"] for run in profile["runs"][:2])
    flops = profile["runs"][0]["flops"]
    assert f"of MoE (ratio {mone / moe:.2f})" in text
    assert f"{flops['utilisation_executed']:.1%} executed" in text
    assert f"{flops['utilisation_active']:.1%} active" in text
    assert flops["executed"] > flops["active"]


def test_a_gpu_is_not_called_a_cpu(profile):
    changed = copy.deepcopy(profile)
    changed["config"]["machine"]["GPU"] = "a GPU"
    assert "4 GPU ranks" in profile_statement.headline(as_profile(changed))
    assert "CPU" not in profile_statement.headline(as_profile(changed))


def test_missing_and_incomplete_ranks_are_warned_of_before_any_number():
    profile = example_profile(8, missing=(5, 6))
    profile["ranks"]["incomplete"] = [1]
    first, second = profile_statement.warnings(as_profile(profile))
    assert "2 of 8 ranks wrote no file (rank 5-6)" in first
    assert "over the 6 that did" in first
    assert "1 of 8 ranks stopped before the end (rank 1)" in second


def test_the_phase_bars_carry_totals_ratios_and_names(profile):
    figure = profile_plots.phase_bars(as_profile(profile))
    text = words(figure)
    for run in profile["runs"]:
        assert f"{run['step_ms']:.0f} ms" in text
    ratio = profile["runs"][0]["step_ms"] / profile["runs"][1]["step_ms"]
    assert f"{ratio:.2f} of MoE" in text
    bars = [bar for bar in figure.axes[0].patches if bar.get_width()]
    ends = {}
    for bar in bars:
        row = round(bar.get_y() + bar.get_height() / 2)
        ends[row] = max(ends.get(row, 0.0), bar.get_x() + bar.get_width())
    assert [ends[i] for i in range(3)] == pytest.approx([r["step_ms"] for r in profile["runs"]])
    hatched = sum(bool(bar.get_hatch()) for bar in bars)
    waiting = sum(phase in COMMUNICATION for run in profile["runs"] for phase in run["phases"])
    assert hatched == waiting > 0


def test_labels_stay_inside_their_bars(profile):
    figure = profile_plots.phase_bars(as_profile(profile))
    axes = figure.axes[0]
    bars = [bar.get_window_extent() for bar in axes.patches]
    labels = [text for text in axes.texts if text.get_fontweight() != "bold"]
    assert len(labels) > 9
    for text in labels:
        box = text.get_window_extent()
        assert any(bar.x0 <= box.x0 and box.x1 <= bar.x1 and bar.y0 <= box.y0 and box.y1 <= bar.y1
                   for bar in bars), text.get_text()  # fmt: skip


def test_the_heat_map_shows_each_rank_against_its_stages_median():
    profile = example_profile(8, stages=2, slow_rank=6, missing=(3,))
    run = profile["runs"][0]
    phases = ["attention", "combine"]
    run["by_rank"]["phases"]["attention"] = [1.0, 1.0, 4.0, 10.0, 10.0, 20.0, 10.0]
    ratios = profile_plots._ratios_by_rank(as_profile(profile).runs[0], phases, 8)
    assert 2 ** ratios[0, [0, 2, 4, 6]] == pytest.approx([1.0, 4.0, 1.0, 2.0])
    assert np.isnan(ratios[:, 3]).all()
    figure = profile_plots.rank_heat_map(as_profile(profile), as_profile(profile).runs[0])
    assert "straggler: rank 6" in words(figure)
    assert "no file: rank 3" in words(figure)


@pytest.mark.parametrize("world", [400, 401, 1024])
def test_no_straggler_is_lost_between_columns(world):
    ratios = np.zeros((2, world))
    ratios[1, 333], ratios[0, world - 1], ratios[0, 5] = -0.7, 0.9, np.nan
    pooled = profile_plots._pool(ratios)
    width = profile_plots.ranks_in_a_column(world)
    assert pooled.shape[1] <= 400
    assert pooled[1, 333 // width] == -0.7
    assert pooled[0, -1] == 0.9
    assert np.isnan(pooled[0, 5 // width]) == (width == 1)


def test_scaling_is_per_rank_and_by_rising_ranks(profile):
    others = [as_profile(example_profile(16)), as_profile(example_profile(8, names=("mone",)))]
    points = profile_plots.scaling_points(as_profile(profile), others)
    assert [ranks for ranks, _ in points["mone"]] == [4, 8, 16]
    assert [ranks for ranks, _ in points["moe"]] == [4, 16]
    rate = 1024 / profile["runs"][0]["step_ms"] * 1e3
    assert points["mone"][0][1] == pytest.approx(rate)
    assert profile_plots.scaling(as_profile(profile), []) is None


def test_the_roofline_places_gemms_by_their_own_phase(profile):
    points = profile_resource_plots.roofline_points(as_profile(profile))
    mone = profile["runs"][0]
    assert {(i, phase) for i, phase, _, _ in points} == {
        (0, "gate GEMM"), (0, "up/down GEMM"), (1, "up/down GEMM"), (2, "up/down GEMM")
    }  # fmt: skip
    _, _, intensity, rate = next(p for p in points if p[:2] == (0, "gate GEMM"))
    done = mone["flops"]["modules"]["gate GEMM"]["executed"]
    assert intensity == pytest.approx(done / mone["flops"]["bytes"]["gate GEMM"])
    assert rate == pytest.approx(done / (mone["phases"]["gate GEMM"] / 1e3))


def test_the_roof_is_the_one_that_utilisation_was_taken_against(profile):
    changed = copy.deepcopy(profile)
    known, bandwidth = profile_resource_plots.roof(as_profile(changed))
    for run in changed["runs"]:
        del run["flops"]["peak_flops"], run["flops"]["peak_bytes_per_s"]
    assert profile_resource_plots.roof(as_profile(changed)) == (pytest.approx(known), None)
    assert bandwidth == pytest.approx(4 * 1.6e10)
    assert profile_resource_plots.roof(as_profile(example_profile(peaks=False))) == (None, None)


def test_labels_of_the_roofline_cover_nothing_and_stay_inside(profile):
    figure = profile_resource_plots.roofline(as_profile(profile))
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 5  # four GEMMs and the roof
    inside = axes.get_window_extent()
    for i, box in enumerate(boxes):
        assert box.x0 >= inside.x0
        assert box.x1 <= inside.x1
        assert not any(box.overlaps(other) for other in boxes[:i])


def test_timelines_share_a_scale_and_name_the_peaks_phase(profile):
    figure = profile_resource_plots.memory_timeline(as_profile(profile))
    assert len({axes.get_ylim() for axes in figure.axes}) == 1
    for run in profile["runs"]:
        assert f"in {run['memory']['peak_phase']}, backward" in words(figure)


def test_experts_of_missing_ranks_do_not_stop_the_drawing(profile):
    changed = copy.deepcopy(profile)
    for layer in changed["runs"][0]["routing"]["layers"]:
        layer["rows"][3] = None
    as_profile(changed)
    assert profile_resource_plots.skew(as_profile(changed)) is not None


def test_the_phase_table_brackets_what_may_be_chance(profile):
    header, rows = profile_tables.phase_table(as_profile(profile))
    assert header[-2:] == ["MoNE less MoE, ms", "MoNE less MoE grouped_mm, ms"]
    by_phase = {row[0]: row for row in rows}
    gate = profile["runs"][0]["phases"]["gate GEMM"]
    assert by_phase["gate GEMM"][1] == f"{gate:.1f} ({gate / profile['runs'][0]['step_ms']:.1%})"
    assert by_phase["gate GEMM"][2] == "-"
    assert by_phase["up/down GEMM"][4].startswith("\u2212")
    same = with_step(profile, 0, 1.0)
    same["runs"][1]["samples"] = copy.deepcopy(same["runs"][0]["samples"])
    rows = {row[0]: row for row in profile_tables.phase_table(as_profile(same))[1]}
    assert rows["attention"][4] == "(0.00)"
    assert "dispatch *" in rows


def test_the_runs_table_has_times_with_their_skew(profile):
    header, rows = profile_tables.runs_table(as_profile(profile))
    moe = dict(zip(header, rows[1], strict=True))
    mone = dict(zip(header, rows[0], strict=True))
    assert moe["ratio to MoE"] == "1.00"
    assert moe["neurons kept"] == "-"
    assert mone["neurons kept"] == "25.0%"
    step = profile["runs"][0]["step_ms"]
    assert mone["tokens/s"] == f"{4096 / step * 1e3:,.0f}"
    assert mone["util. executed"] != mone["util. active"]


def test_stragglers_come_worst_first_and_are_counted():
    profile = example_profile(64, slow_rank=9)
    run = profile["runs"][0]
    run["stragglers"] = [
        {**run["stragglers"][0], "rank": rank, "compute_ms": 100.0 + rank, "median_ms": 100.0}
        for rank in range(40)
    ]
    (_, rows), left = profile_tables.stragglers_table(as_profile(profile))
    assert [row[0] for row in rows[:3]] == ["9", "9", "39"]  # the other runs': +50%
    assert left == 42 - len(rows) > 0


def test_every_caption_of_a_time_tells_the_skew(tmp_path):
    profile = example_profile(2, names=("mone", "moe"))
    other = example_profile(8, names=("mone",), hosts=1)
    path = write_report(as_profile(profile), tmp_path, [as_profile(other)])
    assert path.stat().st_size < 2e6
    text = path.read_text()
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, re.S)
    note = skew_note(as_profile(profile)).replace("'", "&#x27;")
    timed = [
        caption for caption in captions if not re.match(r"Bytes|What the peaks|Routed", caption)
    ]
    assert len(timed) == 6  # phases, passes, two heat maps, scaling, roofline
    assert all(note in caption for caption in timed)
    assert_self_contained(text)
    for name in ("phases", "passes", "scaling", "memory_timeline", "roofline", "skew"):
        for kind in ("png", "svg"):
            assert (tmp_path / "plots" / f"{name}.{kind}").stat().st_size > 1000


def test_one_stock_run_on_one_rank_with_nothing_beside_times(tmp_path, coarse):
    profile = example_profile(1, names=("moe",), hosts=1, memory=False, peaks=False)
    text = write_report(as_profile(profile), tmp_path).read_text()
    assert "no baseline ran beside it" in text
    assert "No memory pass was made" in text
    assert "no peak is known" in text
    assert "<h2>Stragglers" not in text
    assert "<h2>Scaling" not in text
    assert "node boundaries" not in text


def test_a_warning_is_escaped():
    page = Page("title")
    page.warning(HOSTILE)
    assert "&lt;script&gt;" in page.render()
    assert_self_contained(page.render())


def test_hostile_texts_stay_text(tmp_path, coarse):
    profile = example_profile(2, names=("mone", "moe"), hosts=1, slow_rank=1, memory=False)
    host = HOSTILE + "$\\frac{" + "h" * 300
    profile["ranks"]["hosts"] = {host: [0, 1]}
    profile["config"]["argv"] = [HOSTILE]
    profile["config"]["machine"] = {HOSTILE: HOSTILE}
    for run in profile["runs"]:
        run["name"] = f"{run['name']}$\\frac{{<b>"
        run["backend"] = HOSTILE
        run["model"][HOSTILE] = HOSTILE
        run["communication"][HOSTILE] = run["communication"].pop("all_to_all ep")
        run["by_rank"]["host"] = [host] * 2
        run["over_nodes"]["attention"]["max_host"] = host
        run["stragglers"][0]["host"] = host
    text = write_report(as_profile(profile), tmp_path).read_text()
    assert_self_contained(text)
    assert "<b>" not in text
    assert "h" * 60 not in text


def test_a_thousand_ranks_stay_readable(tmp_path, coarse):
    profile = example_profile(1024, names=("mone",), hosts=128, stages=4, missing=(17,))
    path = write_report(as_profile(profile), tmp_path)
    text = path.read_text()
    assert len(re.sub('base64,[^"]*', "", text)) < 60_000
    assert "Each column stands for 3 ranks" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.update(schema="other/1"), "schema is other/1, not megatron-mone/profile/1"),
        (lambda p: p.update(schema="megatron-mone/profile/2"), "this version reads /1"),
        (lambda p: p.pop("ranks"), "has no field 'ranks'"),
        (lambda p: p.update(runs=[]), "runs: is empty"),
        (lambda p: p["runs"].append(p["runs"][0]), "'mone' is the name of two runs"),
        (lambda p: p["runs"][0].update(step_ms=0.0), "runs[0].step_ms: is 0"),
        (lambda p: p["runs"][0]["phases"].update(sleep=1.0), "'sleep' is none of"),
        (lambda p: p["runs"][1]["by_rank"]["stage"].pop(), "runs[1].by_rank.stage: has 3 values"),
        (lambda p: p["runs"][0]["by_rank"]["rank"].__setitem__(0, 4), "ranks below world_size 4"),
        (lambda p: p["runs"][0]["memory"].update(peak_ms="x"), "runs[0].memory.peak_ms: must be"),
        (lambda p: p["config"].update(tokens_per_step=-1), "config.tokens_per_step: -1 is not"),
    ],
)
def test_a_wrong_field_is_named(profile, change, message):
    changed = copy.deepcopy(profile)
    change(changed)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        Profile.of(changed, Path("there/profile.json"))
    assert str(caught.value).startswith("there/profile.json: ")
    assert "\n" not in str(caught.value)


def test_a_scaling_curve_needs_one_model_and_other_sizes(profile):
    other = example_profile(8)
    check_one_model([as_profile(profile), as_profile(other)], ["a", "b"])
    none = as_profile(example_profile(8)).model_copy(update={"runs": []})
    other["runs"][1]["model"]["hidden_size"] = 512
    with pytest.raises(ValueError, match=r"run 'moe': model\.hidden_size is 256 in a and 512 in b"):
        check_one_model([as_profile(profile), as_profile(other)], ["a", "b"])
    with pytest.raises(ValueError, match="world_size is 4 in both a and b"):
        check_one_model([as_profile(profile)] * 2, ["a", "b"])
    with pytest.raises(ValueError, match="b has no run of a's"):
        check_one_model([as_profile(profile), none], ["a", "b"])


def write_profile(folder: Path, profile) -> Path:
    folder.mkdir()
    (folder / "profile.json").write_text(
        profile if isinstance(profile, str) else json.dumps(profile)
    )
    return folder


def test_the_tool_refuses_wrong_input_in_one_line(tmp_path, capsys, profile):
    good = write_profile(tmp_path / "good", profile)
    other = example_profile(8)
    other["runs"][0]["model"]["num_layers"] = 5
    cases = {
        "absent": None,
        "text": "no json",
        "schema": {**profile, "schema": "other/1"},
        "nan": json.dumps(profile).replace('"step_ms": 3', '"step_ms": NaN, "x": 3', 1),
        "other model": other,
    }
    for name, content in cases.items():
        folder = tmp_path / name
        if content is not None:
            write_profile(folder, content)
        assert report_profile.main([str(good), str(folder)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith("megatron-mone: error: ")
        assert error.count("\n") == 1
        assert str(folder) in error
    assert "num_layers is 4 in" in error
    assert not (good / "report.html").exists()


def test_the_tool_runs_as_a_file_beside_profile_py(tmp_path):
    """There tools/profile.py stands before the library's `profile`, which cProfile needs."""
    code = (
        "import runpy, sys; sys.argv = ['x', '--help']; sys.path[0] = 'tools'\n"
        "try: runpy.run_path('tools/report_profile.py', run_name='__main__')\n"
        "except SystemExit as left: assert left.code == 0\n"
        "import cProfile, profile; assert 'tools' not in profile.__file__"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "FOLDER" in done.stdout


def test_tensorboard_holds_each_step_of_each_run(tmp_path, profile):
    plots = tmp_path / "plots"
    plots.mkdir()
    plt.imsave(plots / "phases.png", np.zeros((4, 6, 3)))
    changed = copy.deepcopy(profile)
    changed["runs"][2]["name"] = "../escape"
    for _ in range(2):  # the second call replaces what the first wrote
        write_tensorboard(as_profile(changed), tmp_path / "tensorboard")
    scalars = read_events(tmp_path / "tensorboard" / "mone").scalars
    samples = profile["runs"][0]["samples"]
    assert [step for step, _ in scalars["profile/step_ms"]] == samples["steps"]
    gemm = dict(scalars["profile/phase_ms/up-down GEMM"])
    assert gemm[3] == pytest.approx(samples["phases"]["up/down GEMM"][0], rel=1e-6)
    peak = profile["runs"][0]["memory"]["peak_bytes"]
    assert scalars["profile/peak_memory_bytes"][0][1] == pytest.approx(peak, rel=1e-6)
    folders = {path.name for path in (tmp_path / "tensorboard").iterdir()}
    assert folders == {"mone", "moe", "___escape", "plots"}
    events = list((tmp_path / "tensorboard" / "plots").iterdir())
    assert len(events) == 1
    assert b"profile/phases" in events[0].read_bytes()


def test_small_forms():
    assert rank_ranges([3, 17, 18, 19, 40], most=2) == "3, 17-19 and 1 more"
    assert rank_ranges([2, 1, 1]) == "1-2"
    assert engineering(1.234e12, "FLOP") == "1.23 TFLOP"
    assert engineering(999.96e6) == "1.00 G"
    assert engineering(12.0, "B/s") == "12.0 B/s"
    assert signed_ms(-0.004) == "0.00"
    assert signed_ms(-74.12) == "\u221274.1"
    assert short("a\n<b>" + "x" * 60 + "end", 12).endswith("xxend")
    assert len(short("x" * 60, 12)) <= 12
