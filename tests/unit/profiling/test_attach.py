"""The flags of the profiler on a normal run, and what it leaves of Megatron's loop."""

from argparse import ArgumentParser
from pathlib import Path

import pytest

from megatron_mone.model.profile_window import add_arguments, profile_dir, window_of


def arguments(*flags, **others):
    parser = ArgumentParser()
    add_arguments(parser)
    args = parser.parse_args(flags)
    defaults = {"tensorboard_dir": None, "save": None, "train_iters": 10}
    vars(args).update({**defaults, **others})
    return args


def test_no_flag_no_window():
    assert window_of(arguments()) is None


@pytest.mark.parametrize(("text", "window"), [("3:5", (3, 5)), ("4:4", (4, 4)), ("1:99", (1, 99))])
def test_a_window_is_first_and_last(text, window):
    assert window_of(arguments("--mone-profile-steps", text, save="s")) == window


@pytest.mark.parametrize("text", ["5:3", "0:2", "3", "3:", ":3", "a:b", "-1:2", "1:2:3", "1.5:2"])
def test_a_wrong_window_is_one_line(text):
    with pytest.raises(ValueError, match=r"mone_profile_steps = .* write FIRST:LAST") as error:
        window_of(arguments(f"--mone-profile-steps={text}", save="s"))
    assert "\n" not in str(error.value)


def test_a_window_after_the_end_is_refused():
    with pytest.raises(ValueError, match="begins after the last step, train_iters = 10"):
        window_of(arguments("--mone-profile-steps", "11:12", save="s"))


def test_a_folder_without_a_window_is_refused():
    with pytest.raises(ValueError, match="profiles nothing"):
        window_of(arguments("--mone-profile-dir", "d"))


def test_a_window_without_a_folder_is_refused():
    with pytest.raises(ValueError, match="give --mone-profile-dir, --tensorboard-dir or --save"):
        window_of(arguments("--mone-profile-steps", "1:2"))


def test_the_folder_is_the_one_given_or_beside_the_results():
    assert profile_dir(arguments("--mone-profile-dir", "d", save="s")) == Path("d")
    assert profile_dir(arguments(save="s", tensorboard_dir="t")) == Path("t/profile")
    assert profile_dir(arguments(save="s")) == Path("s/profile")
