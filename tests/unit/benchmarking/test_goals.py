"""Every figure has its goal beside it, by the machine's class; what is above is listed."""

from megatron_mone.benchmarking import summary
from megatron_mone.benchmarking.goal_table import above_ceiling, goal_rows
from megatron_mone.benchmarking.goals import CEILING, goal_of, goals_of
from megatron_mone.benchmarking.report import markdown
from megatron_mone.kernels.race_results import CellConfig, PartTime
from tests.unit.benchmarking.conftest import make_cell, make_results

DEMO = {"tokens": 4096, "hidden": 512, "neurons": 1408, "experts": 8, "ratios": [0.5, 0.25],
        "dtype": "fp32", "routing": "balanced"}  # fmt: skip


def _config(**changes) -> CellConfig:
    return CellConfig(**DEMO | changes)


def _results(both: float, machine_class: str = "avx512", **changes):
    """One cell of the demo's shape; MoNE at r = 1/4 takes `both` of the fastest dense peer's 8 ms,
    and a third of it forward."""
    cell = make_cell(64, "fp32", {0.5: 7.0, 0.25: 8 * both})
    cell = cell.model_copy(update={"config": _config(**changes)})
    return make_results(cells=[cell], machine={"Class": machine_class})


def test_goals_are_those_of_the_demos_shape():
    for routing in ("balanced", "skewed"):
        found = [goal_of(_config(routing=routing), r, "forward_backward", "avx2")
                 for r in (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)]  # fmt: skip
        assert found == [1.03, 1.03, 0.45, 0.33, 0.25]
    assert goal_of(_config(), 1 / 4, "forward", "avx2") == 0.60
    assert goal_of(_config(neuron_block=352), 1 / 4, "forward_backward", "avx512") == 0.42
    for other in ({"tokens": 512}, {"hidden": 256}, {"dtype": "bf16"}, {"neuron_block": 16}):
        assert goal_of(_config(**other), 1 / 4, "forward_backward", "avx512") == CEILING
    half = _config(dtype="bf16", neuron_block=32)
    assert goal_of(half, 1 / 4, "forward_backward", "avx512") == CEILING
    assert goal_of(half, 1 / 4, "forward_backward", "amx") == 0.60
    assert goal_of(_config(dtype="bf16", tokens=64), 1 / 4, "forward", "amx") == 0.60
    assert goal_of(_config(), 1 / 4, "forward", "sm_90") is None
    assert goals_of("sm_90") == []


def test_a_goal_is_met_or_not_by_the_figure_that_is_shown():
    for both, met, beside in ((0.454, "yes", "0.45, met"), (0.456, "no", "0.45, above")):
        results = _results(both)
        text = markdown(results, [])
        assert "Class of the machine: avx512" in text
        (line,) = [s for s in text.splitlines() if s.startswith("| forward + backward, r = 1/4")
                   and "blocks" not in s]  # fmt: skip
        assert line == (
            f"| forward + backward, r = 1/4, fp32 | 0.45 | {both:.2f} (balanced) | {met} |"
        )
        assert f"{both:.2f} | {beside}" in text


def test_a_goal_without_a_figure_and_another_machine_say_so():
    rows = {row[0]: row for row in goal_rows(_results(0.4), summary.points(_results(0.4)))}
    assert rows["forward + backward, r = 1/8, fp32"][2:] == ["not in this grid", "-"]
    assert rows["any r and cell"][1:] == ["1.03", "0.88 at most; 0 of 4 above", "yes"]
    gpu = _results(0.4, "sm_90")
    assert "None for this class of machine (sm_90)." in markdown(gpu, [])
    assert "| 0.40 | - |" in markdown(gpu, [])


def test_every_figure_above_the_ceiling_is_listed():
    results = _results(1.04)
    assert above_ceiling(summary.points(results)) == [
        "Above 1.03: forward 1.04 at r = 1/4, N 4096, H 512, F 1408, E 8, fp32, balanced.",
        "Above 1.03: forward + backward 1.04 at r = 1/4, N 4096, H 512, F 1408, E 8, fp32, "
        "balanced.",
    ]
    rows = {row[0]: row for row in goal_rows(results, summary.points(results))}
    assert rows["any r and cell"][2:] == ["1.04 at most; 2 of 4 above", "no"]
    assert above_ceiling(summary.points(_results(1.03))) == ["No figure is above 1.03."]


def test_parts_of_a_layer_are_added_and_widths_are_each_for_itself():
    def part(name: str, of: str, ms: float, neurons: int = 1408) -> PartTime:
        return PartTime(part=name, of=of, config=_config(neurons=neurons), ms=ms, of_ms=100.0)

    layer, dense = "forward + backward of the layer", "the fastest dense forward"
    parts = [part("choosing neurons", dense, 4.0, 256), part("choosing neurons", dense, 5.04, 512),
             part("load counters", layer, -0.1), part("balance loss", layer, 4.3)]  # fmt: skip
    results = _results(0.4).model_copy(update={"parts": parts})
    choosing, sums = goal_rows(results, [])[-2:]
    assert choosing == [
        "choosing neurons, of the fastest dense forward", "5%", "F 256 4.0%, F 512 5.0%", "yes",
    ]  # fmt: skip
    assert sums == [
        "balance loss, load counters and masks, of forward + backward of the layer", "4%",
        "4.2%: load counters -0.1%, balance loss 4.3%", "no",
    ]  # fmt: skip
