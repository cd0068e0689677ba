"""The statement says who won whatever the numbers, and the summary keeps its schema."""

import html
import json
import math
from dataclasses import replace

import pytest

from megatron_mone.reporting.demo.report import Scores, common_loads, write_report
from megatron_mone.reporting.demo.statement import (
    TIE_NATS,
    loss_at_flops,
    near_balance,
    neuron_statement,
    noise_note,
    statement,
    verdict,
)
from megatron_mone.reporting.page.results import summary
from tests.unit.reporting.conftest import make_evaluation, make_load, make_result

UNIGRAM = 5.0


def said(runs, unigram=UNIGRAM) -> str:
    return "\n".join(statement(unigram, {run.name: run for run in runs}))


def with_losses(mone: float, total: float, active: float):
    return [
        make_result("mone", mone, active_flops_per_step=1e12),
        make_result("moe_total", total),
        make_result("moe_active", active, active_flops_per_step=1e12),
    ]


def test_summary_has_exactly_the_schema(three_runs):
    value = summary(5.5, three_runs).plain()
    assert set(value) == {"unigram_loss", "runs"}
    assert value["unigram_loss"] == 5.5
    assert [run["name"] for run in value["runs"]] == ["mone", "moe_total", "moe_active"]
    assert value["runs"][0] == {
        "name": "mone",
        "val_loss": 4.0,
        "tokens": 4000,
        "active_flops": 40e12,
        "step_ms": pytest.approx(300.0),
        "peak_bytes": 2**30,
    }
    assert all(set(run) == set(value["runs"][0]) for run in value["runs"])


@pytest.mark.parametrize(
    ("loss", "other", "expected"),
    [(4.0, 4.5, "better"), (4.5, 4.0, "worse"), (4.0, 4.0 + 0.9 * TIE_NATS, "equal")],
)
def test_verdict(loss, other, expected):
    assert verdict(loss, other) == expected


def test_a_win_a_loss_and_a_tie_are_called_so():
    tokens = [line for line in said(with_losses(4.0, 4.2, 3.7)).splitlines() if "equal tok" in line]
    assert "MoNE wins by 0.200" in tokens[0]
    assert "MoNE loses by 0.300" in tokens[1]
    assert "wins" not in tokens[1]
    tie = said(with_losses(4.0, 4.001, 4.0))
    assert tie.count("a tie (they differ by less than") == 2
    assert "wins" not in tie
    assert "loses" not in tie


def test_equal_flops_are_compared_inside_the_longer_run():
    # moe_total spends twice as much a step: at MoNE's end it is at step 20, one nat above its end
    text = said(with_losses(4.5, 4.0, 4.5))
    assert "MoNE loses by 0.500" in text
    assert (
        "At equal active FLOPs (40.00 TFLOP) the losses are 4.500 and 5.000: MoNE is ahead" in text
    )


def test_loss_at_flops_interpolates_and_stays_in_range():
    run = make_result("moe_total", 4.0)  # 2e12 a step; 5.0 at step 20 and 4.0 at step 40
    assert loss_at_flops(run, 60e12) == pytest.approx(4.5)
    assert loss_at_flops(run, 80e12) == 4.0
    assert loss_at_flops(run, 10e12) is None
    assert loss_at_flops(run, 90e12) is None


def test_worse_than_unigram_is_admitted():
    assert "All three learn from context" in said(with_losses(4.0, 4.1, 4.2))
    text = said(with_losses(4.0, 4.1, 5.1))
    assert "All three" not in text
    assert "Not every run learned from context" in text
    assert f"{math.exp(5.1):.1f}" in text


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.6, "2.00 times as long as"), (0.15, "0.50 times the time of"),
                           (0.3, "about as long as")]
)  # fmt: skip
def test_step_time_is_stated_either_way_with_the_reason(seconds, words):
    runs = with_losses(4.0, 4.0, 4.0)
    runs[0] = replace(runs[0], step_seconds=[(40, seconds)])
    assert words in said(runs)
    assert "saves no time in this demo" in said(runs)


def test_a_backend_that_skips_neurons_is_not_said_to_compute_them():
    runs = with_losses(4.0, 4.0, 4.0)
    runs[0] = replace(runs[0], executed_flops_per_step=runs[0].active_flops_per_step)
    assert "computes only the kept neurons" in said(runs)
    assert "saves no time" not in said(runs)


def test_evenness_is_stated_whoever_is_more_even():
    # each load: dead + 1 neurons below 1/4, 1 below 1/2, 6 + 2 near balance
    few = {"1": make_load(20, dead=1.0), "2": make_load(20, dead=2.0)}
    many = {"1": make_load(20, dead=9.0), "2": make_load(20, dead=8.0)}
    assert near_balance(few) == pytest.approx(16 / 23)
    assert near_balance({}) == 0.0
    text = neuron_statement(20, few, many)
    assert "69.6% of the neurons carried between half and twice" in text
    assert "against 43.2% without it: a more even load" in text
    assert "Never kept in that window: 3 with it, 17 without." in text
    assert "a less even load" in neuron_statement(20, many, few)
    assert "no visible difference" in neuron_statement(20, few, few)


def test_loads_are_compared_at_the_last_common_step(three_runs):
    without = make_result("mone_without_ng", neuron_load={"1": [make_load(10, 5.0)]})
    loads = common_loads(three_runs[0], without)
    assert loads is not None
    assert loads.step == 10
    assert loads.without_ng["1"].dead == 5.0
    assert loads.with_ng["1"].histogram.step == 10
    assert common_loads(three_runs[0], make_result("mone_without_ng")) is None


def test_the_report_writes_every_file(tmp_path, three_runs):
    layers = {"1": [make_load(20, 5.0)], "2": [make_load(20, 6.0)]}
    without = make_result("mone_without_ng", neuron_load=layers)
    scores = Scores({"mone": make_evaluation(40, {"t": 0.75})}, (("score", "it"),))
    page = write_report(tmp_path, UNIGRAM, three_runs, without, ("python", "-m", "x"), scores)
    plots = ("demo", "training_loss", "step_time", "cost", "neuron_load")
    names = {f"{plot}.{kind}" for plot in plots for kind in ("png", "svg")}
    names |= {"summary.json", "details.json", "report.html"}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (
        json.loads((tmp_path / "summary.json").read_text()) == summary(UNIGRAM, three_runs).plain()
    )
    details = json.loads((tmp_path / "details.json").read_text())
    assert [run["name"] for run in details["runs"]][-1] == "mone_without_ng"
    text = html.unescape(page.read_text())
    assert all(sentence in text for sentence in details["statement"])
    assert "0 with it, 11 without." in text
    assert text.count("data:image/png;base64,") == len(plots)
    assert "<td>0.7500 ± 0.0500</td>" in text
    assert "MoNE, r = 1/4, iteration 40" in text
    assert "score it" in text
    assert details["scores"]["mone"]["tasks"]["t"]["metrics"]["acc"]["value"] == 0.75


def test_without_lm_eval_the_report_says_how_to_get_scores(tmp_path, three_runs):
    without = make_result("mone_without_ng")
    page = write_report(tmp_path, UNIGRAM, three_runs, without, ("python",), Scores({}))
    text = html.unescape(page.read_text())
    assert "lm-eval is not installed. pip install 'megatron-mone[eval]', then the same" in text


def test_a_busy_machine_is_named(three_runs):
    # the ranks themselves are no other work
    own = [replace(run, load_average=2.2) for run in three_runs]
    assert noise_note(own) == []
    runs = [replace(three_runs[0], load_average=7.5), *three_runs[1:]]
    assert "load average up to 7.5" in noise_note(runs)[0]
