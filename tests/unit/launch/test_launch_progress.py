"""The bar of a local run: steps as Megatron logs them."""

import pytest

from launch.runs.progress import StepReader

LINE = (
    " [2026-11-22 19:51:05.347240] iteration {step:8d}/ {total:8d} | consumed samples: {step:12d} "
    "| elapsed time per iteration (ms): 217.7 | learning rate: 2.443510E-03 | lm loss: {loss} | "
    "load_balancing_loss: 1.059825E+00 | grad norm: 1.667 |\n"
)


def test_whole_lines_count_once(tmp_path):
    log = tmp_path / "rank-00001.log"
    reader = StepReader(log)
    assert reader.new() == []
    log.write_text("INFO: loading\n")
    assert reader.new() == []
    first, second = (LINE.format(step=s, total=60, loss=f"{s}.5E+00") for s in (1, 2))
    with log.open("a") as stream:
        stream.write(first + second[:120])
        stream.flush()
        assert reader.new() == [(1, 60, 1.5)]
        stream.write(second[120:])
        stream.flush()
        assert reader.new() == [(2, 60, 2.5)]
    assert reader.new() == []


@pytest.mark.parametrize(
    "line",
    ["iteration of lm loss: x \n", " validation loss at iteration 60 | lm loss value: 4.9 | \n"],
)
def test_other_lines_are_no_steps(tmp_path, line):
    log = tmp_path / "log"
    log.write_text(line)
    assert StepReader(log).new() == []


def test_a_loss_that_is_no_number_is_a_step_too(tmp_path):
    log = tmp_path / "log"
    log.write_text(LINE.format(step=3, total=9, loss="nan"))
    (latest,) = StepReader(log).new()
    assert latest[:2] == (3, 9)
