"""The page says what the plan's numbers say, omits what is absent, and holds no foreign code."""

import copy
import json
import re
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from megatron_mone.commands import report_plan
from megatron_mone.common.phases import PHASES
from megatron_mone.planning.cost.rank_memory import ORDER
from megatron_mone.planning.plan_document import Layout
from megatron_mone.planning.terminal_tables import table
from megatron_mone.reporting.plan import curves as plan_curves
from megatron_mone.reporting.plan import plots as plan_plots
from megatron_mone.reporting.plan import tables as plan_tables
from megatron_mone.reporting.plan.report import TIMELINE, write_plan_files, write_report
from megatron_mone.reporting.plan.search_report import answer, refusals
from megatron_mone.reporting.plan.timeline import BUBBLE_COLOUR, COLOURS, colour_of, timeline
from megatron_mone.reporting.plan.view import basis, headline, layout_text, misfits
from megatron_mone.reporting.profile.tables import MOST_ROWS, NOTHING
from tests.unit.reporting.plan_example import (
    LIMIT,
    as_model,
    as_plan,
    as_search,
    example_plan,
    example_search,
)
from tests.unit.reporting.test_reporting_html import HOSTILE, tags_of


@pytest.fixture(scope="module")
def plan():
    return example_plan()


@pytest.fixture(scope="module")
def search():
    return example_search()


@pytest.fixture(scope="module", autouse=True)
def _few_dots():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_mone.reporting.page.plots.DPI", 30)
        yield


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def page(plan, tmp_path_factory):
    return write_report(as_plan(plan), tmp_path_factory.mktemp("page") / "new")


def words(figure) -> str:
    """All text of a figure."""
    return "\n".join(t.get_text() for t in figure.findobj(plt.Text) if t.get_text())


def bars(axes) -> list[tuple[float, float]]:
    """(left, length) of every bar."""
    return [(bar.get_x(), bar.get_width()) for bar in axes.patches]


def test_the_headline_answers_in_one_sentence(plan):
    mone, moe = plan["models"]
    line = headline(as_plan(plan))
    assert f"fits on 128 NVIDIA H100 SXM5 80 GB of cluster h100-ndr (75.8 of {LIMIT} GiB" in line
    assert f"{mone['tokens_per_s_per_gpu']:,.0f} tokens/s a GPU" in line
    assert f"{mone['step_ms'] / moe['step_ms']:.2f} of the step time" in line
    peaks = [model["memory_gib"]["peak"] for model in plan["models"]]
    assert f"{peaks[0] / peaks[1]:.2f} of the peak memory" in line
    assert line.count(". ") == 0


def test_what_does_not_fit_is_warned_of_with_its_cure(plan):
    (text,) = misfits(as_plan(plan))
    assert text.startswith("MoE does not fit")
    assert "passed at activations" in text
    assert "Cheapest change that makes it fit: recompute moe_act" in text
    uncured = copy.deepcopy(plan)
    uncured["models"][1]["cheapest_fix"] = None
    assert "No single change that was tried makes it fit" in misfits(as_plan(uncured))[0]


def test_the_assumptions_are_a_warning_on_the_page(plan, page):
    text = page.read_text()
    boxes = re.findall(r'<p class="warning">(.*?)</p>', text)
    assert boxes[0].startswith("Predicted from a trace of the model, not measured")
    assert "assumed: nothing was measured" in boxes[0]
    assert "Routing: balanced, hottest rank&#x27;s rows over the mean 1.00" in boxes[0]
    assert any(plan["warnings"][0] in box for box in boxes)
    assert basis(as_plan(plan)) != basis(as_plan({**plan, "efficiency": "fitted to run.json"}))


def test_ratios_of_models_are_those_of_their_numbers(plan):
    header, rows = plan_tables.models_table(as_plan(plan))
    assert header == ["", "MoNE", "MoE", "MoNE / MoE"]
    by_name = {row[0]: row[1:] for row in rows}
    mone, moe = plan["models"]
    assert by_name["ms a step"][2] == f"{mone['step_ms'] / moe['step_ms']:.2f}"
    assert by_name["fits"] == ["yes", "no", "-"]
    free = copy.deepcopy(plan)
    free["models"][1]["bubble_ms"] = 0.0
    row = next(
        r for r in plan_tables.models_table(as_plan(free))[1] if r[0].startswith("pipeline bubble")
    )
    assert row[3] == "-"


def test_memory_bars_are_stacked_to_each_stages_peak(plan):
    figure = plan_plots.memory_bars(as_plan(plan))
    for axes, model in zip(figure.axes, plan["models"], strict=True):
        drawn = bars(axes)
        assert len(drawn) == len(ORDER) * len(model["stages"])
        for i, stage in enumerate(model["stages"]):
            row = drawn[i * len(ORDER) : (i + 1) * len(ORDER)]
            sizes = [stage["memory_gib"][part] for part in ORDER]
            assert [size for _, size in row] == pytest.approx(sizes)
            assert sum(row[-1]) == pytest.approx(stage["memory_gib"]["peak"])
        assert [line.get_xdata()[0] for line in axes.lines] == [LIMIT]
        over = [t.get_text() for t in axes.texts if t.get_color() == plan_plots.LIMIT_COLOUR]
        peaks = [stage["memory_gib"]["peak"] for stage in model["stages"]]
        assert over == [f"{peak:.1f}" for peak in peaks if peak > LIMIT]


def test_parts_of_the_step_add_up_and_compute_is_split_by_phase(plan):
    for model in plan["models"]:
        parts = plan_plots.model_parts(as_model(model))
        assert sum(part.size for part in parts) == pytest.approx(model["step_ms"])
        names = [part.name for part in parts]
        assert "compute" not in names
        assert names[: len(model["phases_ms"])] == [p for p in PHASES if p in model["phases_ms"]]
        assert {p.name for p in parts if p.hatched} == {
            "expert parallel", "tensor parallel", "bubble", "data parallel"
        }  # fmt: skip
    whole = {**plan["models"][0], "phases_ms": {}}
    assert plan_plots.model_parts(as_model(whole))[0].name == "compute"
    figure = plan_plots.parts_bars(as_plan(plan))
    assert sum(width for _, width in bars(figure.axes[0])) == pytest.approx(
        sum(model["step_ms"] for model in plan["models"])
    )
    ratio = plan["models"][0]["step_ms"] / plan["models"][1]["step_ms"]
    assert f"{ratio:.2f} of MoE" in words(figure)


def test_a_part_that_rounding_left_below_zero_is_not_drawn():
    assert plan_plots.parts_of({"compute": 1.0, "bubble": -1e-12}) == [
        plan_plots.Part("compute", 1.0, plan_plots.PART_COLOURS["compute"], False)
    ]


def test_the_timeline_draws_every_pass_and_details_only_of_many(plan):
    model = plan["models"][0]
    figure = timeline(as_model(model), model["step_ms"])
    assert len(figure.axes) == 1
    drawn = sum(len(c.get_paths()) for c in figure.axes[0].collections)
    stages, passes = 4, 2 * 2 * 16
    assert drawn == stages * (passes + len(("gather", "reduce", "optimizer")) + len(("ground",)))
    many = example_plan(("mone",), micro_batches=64, sweeps=False)["models"][0]
    assert "its beginning" in words(timeline(as_model(many), many["step_ms"]))
    begin, end = timeline(as_model(many), many["step_ms"]).axes[2].get_xlim()
    assert end == pytest.approx(many["step_ms"])
    assert 0 < begin < end


def test_what_is_not_shown_of_a_step_is_not_drawn_as_waiting(plan):
    model = copy.deepcopy(plan["models"][0])
    colours = [c.get_facecolor() for c in timeline(as_model(model), 1.0).axes[0].collections]
    bubble = [plt.matplotlib.colors.to_rgba(BUBBLE_COLOUR)]
    assert any(colour.tolist() == [list(*bubble)] for colour in colours)
    model["timeline"]["shown"] = "the first and last 2 micro-batches"
    colours = [c.get_facecolor() for c in timeline(as_model(model), 1.0).axes[0].collections]
    assert not any(colour.tolist() == [list(*bubble)] for colour in colours)


def test_later_chunks_are_lighter_and_the_first_is_the_legends_colour():
    from megatron_mone.reporting.plan.perfetto import BACKWARD, Slice

    shades = [colour_of(Slice(0.0, 1.0, BACKWARD, 0, chunk), 4) for chunk in range(4)]
    assert shades[0].lower() == COLOURS[BACKWARD].lower()
    assert len({*shades}) == 4
    reds = [int(shade[1:3], 16) for shade in shades]
    assert reds == sorted(reds)


def test_scaling_marks_what_does_not_fit_hollow_and_gives_the_ratio(plan):
    figure = plan_curves.scaling(as_plan(plan))
    rates, ratio = figure.axes
    marks = [line for line in rates.lines if line.get_marker() == "o"]
    hollow = [line.get_xdata()[0] for line in marks if line.get_markerfacecolor() == "white"]
    unfit = [point["gpus"] for point in plan["scaling"] if not point["models"]["moe"]["fits"]]
    assert hollow == unfit
    assert rates.get_xscale() == ratio.get_xscale() == "log"
    points = plan_curves.ratio_points(as_plan(plan).scaling, "mone", "moe")
    at = plan["scaling"][3]["models"]
    expected = at["mone"]["tokens_per_s_per_gpu"] / at["moe"]["tokens_per_s_per_gpu"]
    assert points[3] == (1024, pytest.approx(expected), False)


def test_a_model_that_was_not_planned_at_a_size_leaves_a_gap(plan):
    partly = copy.deepcopy(plan)
    del partly["scaling"][2]["models"]["moe"]
    del partly["scaling"][0]["models"]["mone"]
    points = plan_curves.ratio_points(as_plan(partly).scaling, "mone", "moe")
    assert [gpus for gpus, _, _ in points] == [256, 1024, 2048, 4096, 8192, 16384]
    row = plan_tables.scaling_table(as_plan(partly))[1][2]
    assert row[0] == "512"
    assert row[4:7] == ["-", "-", "-"]
    assert row[-1] == "-"


def test_sweeps_show_their_numbers(plan):
    header, rows = plan_tables.sweep_table(as_plan(plan), as_plan(plan).ratio_sweep)
    steps = [entry["step_ms"] for entry in plan["ratio_sweep"]]
    column = header.index("step / step at r = 1")
    assert [row[column] for row in rows] == [f"{step / steps[0]:.2f}" for step in steps]
    assert rows[0][-1].endswith(" *") == (plan["ratio_sweep"][0]["peak_gib"] > LIMIT)
    text = words(plan_curves.expert_sweep(as_plan(plan)))
    for entry in plan["expert_sweep"]:
        assert f"{entry['topk']} x {entry['neurons']}" in text
    assert "1/8" in words(plan_curves.ratio_sweep(as_plan(plan)))


def test_collectives_that_take_most_come_first_and_may_not_say_whether_they_are_exposed(plan):
    model = copy.deepcopy(plan["models"][0])
    model["collectives"].reverse()
    (header, rows), left = plan_tables.collectives_table(as_model(model))
    taken = [one["calls"] * one["ms"] for one in plan["models"][0]["collectives"]]
    assert taken == sorted(taken, reverse=True)
    assert [row[0] for row in rows] == [o["kind"] for o in plan["models"][0]["collectives"]]
    assert (header[-1], left) == ("exposed", 0)
    assert rows[-1][5] == "4 B"
    for one in model["collectives"]:
        del one["exposed"]
    model["collectives"] *= 10
    (header, rows), left = plan_tables.collectives_table(as_model(model))
    assert header[-1] == "ms of one"
    assert len(rows) + left == 50
    assert left > 0


def test_absent_parts_leave_no_trace(tmp_path):
    bare = example_plan(("moe",), pp=1, vpp=1, sweeps=False)
    bare["models"][0]["collectives"] = []
    text = write_report(as_plan(bare), tmp_path).read_text()
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == ["Memory", "Time", "Stages of MoE", "Configuration"]
    assert {path.stem for path in (tmp_path / "plots").iterdir()} == {
        "memory", "parts", "timeline-0"
    }  # fmt: skip
    assert "against" not in headline(as_plan(bare))


def test_a_plan_is_drawn_to_the_same_bytes_each_time(plan, page, tmp_path):
    write_report(as_plan(plan), tmp_path)
    drawn = {path.name: path.read_bytes() for path in (tmp_path / "plots").iterdir()}
    assert {Path(name).suffix for name in drawn} == {".png", ".svg"}
    assert drawn == {name: (page.parent / "plots" / name).read_bytes() for name in drawn}


def test_the_files_beside_the_page(page):
    text = page.read_text()
    stems = {"memory", "parts", "timeline-0", "timeline-1", "scaling", "ratio", "experts"}
    plots = {path.name for path in (page.parent / "plots").iterdir()}
    assert plots == {f"{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    links = [values["href"] for tag, values in tags_of(text) if "href" in values]
    assert links == [TIMELINE]
    assert (page.parent / TIMELINE).is_file()


def test_hostile_text_stays_text(tmp_path):
    names = {"model": HOSTILE, "efficiency": HOSTILE, "warnings": [HOSTILE]}
    plan = {**example_plan(micro_batches=8), **names}
    plan["cluster"] |= {"name": HOSTILE, "device": HOSTILE}
    plan["models"][0] |= {"name": HOSTILE}
    plan["models"][0]["layout"]["recompute"] = HOSTILE
    plan["models"][0]["timeline"]["shown"] = HOSTILE
    plan["models"][0]["stages"][0]["layers"] = HOSTILE
    plan["models"][0]["collectives"][0] |= {"kind": HOSTILE, "group": "$x$"}
    plan["models"][1]["cheapest_fix"]["change"] = HOSTILE
    for point in plan["scaling"]:
        point["models"][HOSTILE] = point["models"].pop("mone")
    search = {**example_search(12), **names}
    search["refused"][0] |= {"layout": HOSTILE, "reason": HOSTILE}
    search["best"][0]["why"] = HOSTILE
    for name, document in {"plan": as_plan(plan), "search": as_search(search)}.items():
        text = write_plan_files(document, tmp_path / name).read_text()
        for tag, attributes in tags_of(text):
            assert tag not in {"script", "link", "iframe", "object", "embed"}, tag
            for key, value in attributes.items():
                assert not key.startswith("on"), key
                assert key != "src" or value.startswith("data:image/")
                assert key != "href" or value == TIMELINE
        assert "url(" not in text
        for picture in (tmp_path / name / "plots").glob("*.svg"):
            assert "<script" not in picture.read_text()


def test_a_search_says_what_is_best_and_what_was_left_out(search, tmp_path):
    fit = [one for one in search["candidates"] if one["fits"]]
    assert 0 < len(fit) < len(search["candidates"])
    text = answer(as_search(search))
    assert text.startswith(
        f"The fastest layout that fits is {layout_text(Layout(**fit[0]['layout']))}"
    )
    assert f"{len(search['candidates'])} layouts were predicted and {len(fit)} fit" in text
    assert "Megatron refuses 3 more" in text
    assert "1 are too large without any activation" in text
    assert "24 beyond --limit, of which none takes less than 900 ms" in text
    assert answer(as_search({**search, "best": []})).startswith("No layout fits: ")
    page = write_plan_files(as_search(search), tmp_path).read_text()
    assert re.search(r"<summary>3 layouts that Megatron refuses</summary>", page)
    (reason,) = refusals(as_search(search))
    assert reason.startswith("Megatron refuses pipeline_model_parallel_size")
    assert reason.endswith(": 3 layouts: tp=1,ep=8,pp=5; tp=2,ep=8,pp=5; tp=4,ep=8,pp=5")


def test_of_many_best_layouts_the_page_has_the_first(tmp_path):
    search = example_search(200, best=MOST_ROWS + 6)
    for one in search["candidates"]:
        one["tied"] = one["name"] == search["best"][1]["layout"]
    assert len(search["best"]) == MOST_ROWS + 6
    page = write_plan_files(as_search(search), tmp_path).read_text()
    assert f"{MOST_ROWS}: " in page
    assert f"{MOST_ROWS + 1}: " not in page
    assert "6 slower ones are left out" in page
    (header, rows), left = plan_tables.best_table(as_search(search))
    assert (len(rows), left) == (MOST_ROWS, 6)
    ties = [row[header.index("tied with 1")] for row in rows]
    assert ties == [NOTHING, "yes", *["no"] * (MOST_ROWS - 2)]


def test_the_scatter_shows_every_candidate_once_and_the_front_as_a_line(search):
    figure = plan_curves.candidates(as_search(search))
    front, *marks, limit = figure.axes[0].lines
    found = search["candidates"]
    on_front = sorted((one["peak_gib"], one["step_ms"]) for one in found if one["pareto"])
    assert [*zip(front.get_xdata(), front.get_ydata(), strict=True)] == on_front
    assert limit.get_xdata()[0] == LIMIT
    assert len(marks) == len(found)
    for mark, one in zip(marks, found, strict=True):
        assert (mark.get_xdata()[0], mark.get_ydata()[0]) == (one["peak_gib"], one["step_ms"])
        assert (mark.get_markerfacecolor() == "white") == (not one["fits"])
        assert (mark.get_color() == front.get_color()) == one["pareto"]
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == ["1", "2", "3", "4", "5"]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
    assert plan_curves.candidates(as_search({**search, "candidates": [], "best": []})) is None


def test_the_tool_draws_beside_the_file_or_where_it_is_told(tmp_path, capsys):
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(example_plan(("mone",), micro_batches=8, sweeps=False)))
    assert report_plan.main([str(path)]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'report.html'}\n"
    path.write_text(json.dumps(example_search(12)))
    assert report_plan.main([str(path), "--out", str(tmp_path / "there")]) == 0
    assert "Search of layouts" in (tmp_path / "there" / "report.html").read_text()


def test_the_tool_refuses_wrong_input_in_one_line(tmp_path, capsys):
    path = tmp_path / "plan.json"
    cases: dict[str, object] = {"absent": None, "text": "no json", "list": [], "other": {
        **example_plan(sweeps=False), "schema": "megatron-mone/profile/1"}}  # fmt: skip
    for name, content in cases.items():
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(content if isinstance(content, str) else json.dumps(content))
        assert report_plan.main([str(path)]) == 2, name
        error = capsys.readouterr().err
        assert error.startswith(f"megatron-mone: error: {path}")
        assert error.count("\n") == 1
    assert [Path(found).name for found in tmp_path.iterdir()] == ["plan.json"]


def test_what_is_on_the_host_is_a_row_of_its_own(plan):
    assert plan_tables.memory_table(as_plan(plan))[1][-1][0] == "device"
    held = copy.deepcopy(plan)
    held["models"][0]["host"] = {
        "memory_gib": 28.4, "limit_gib": 256.0, "to_host_gib": 7.1, "to_device_gib": 3.5,
        "copy_ms": 220.0, "update_ms": 1180.0,
    }  # fmt: skip
    *_, row = plan_tables.memory_table(as_plan(held))[1]
    assert row == ["on the host", "28.40", *[""] * (len(plan["models"]) - 1)]
    assert "on the host: 28.4 of 256 GiB, copies 220 ms" in table(as_plan(held))
