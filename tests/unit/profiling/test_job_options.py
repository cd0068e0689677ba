"""The options of tools/profile.py: what they count, and what is refused."""

import pytest

from megatron_mone.common.program import parse
from megatron_mone.profiling.job_options import Asked, read_options


def options(*flags):
    return read_options(parse(Asked, flags)[0])


@pytest.mark.parametrize(
    ("steps", "windows", "split"), [(20, 5, [4] * 5), (7, 3, [3, 2, 2]), (2, 2, [1, 1])]
)
def test_steps_are_split_evenly(steps, windows, split):
    given = options("--steps", str(steps), "--windows", str(windows))
    assert given.window_steps == split


def test_all_steps_of_a_run_are_counted():
    given = options(
        *("--steps", "20", "--windows", "5", "--warm-up", "3", "--against", "moe,grouped_mm")
    )
    # warm-up, one to settle in each window, measured, two of memory
    assert given.steps_of_a_run == 3 + 5 + 20 + 2
    assert given.total_steps == 3 * 30
    assert options("--steps", "2").window_steps == [1, 1]
    assert options("--no-memory", "--trace").steps_of_a_run == 3 + 5 + 20 + 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps 0 is not allowed"),
        (["--warm-up", "0"], "--warm-up 0 is not allowed"),
        (["--steps", "3", "--windows", "4"], "--windows 4 is more than --steps 3"),
        (["--routing", "even"], "--routing 'even' is not one of real, balanced, replayed"),
        (["--against", "dense"], "--against 'dense' is not a baseline"),
        (["--out", __file__], "is a file: name a folder"),
    ],
)
def test_wrong_options_are_one_line(flags, words):
    with pytest.raises(ValueError, match=words):
        options(*flags)
