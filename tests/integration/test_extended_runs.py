"""A run that has ended goes on: with more steps, and with another schedule where a flag says so."""

from pathlib import Path

import pytest

from tests.training_cases import MOCK, TINY, Case, run_cases, scalars

CONSTANT = ("--lr-decay-style", "constant")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where every case was run, one after another, on one rank."""
    from tests.integration.test_refusals import make_datasets

    folder = tmp_path_factory.mktemp("extended")
    make_datasets(folder)

    tiny = (*TINY, "--global-batch-size", "2")  # one micro-batch

    def steps(name: str, number: int, *flags: str, of: str = "") -> Case:
        places = ("--save", f"{folder}/{of or name}.save", "--save-interval", "100")
        if of:
            places += ("--load", f"{folder}/{of}.save")
        return Case(name, (*tiny, *MOCK, *places, "--train-iters", str(number), *flags))

    def reading(name: str, *flags: str) -> Case:
        words = (*tiny, "--tokenizer-type", "HuggingFaceTokenizer", "--train-iters", "3")
        tokenizer = ("--tokenizer-model", f"{folder}/ten.tokenizer")
        return Case(name, (*words, *tokenizer, *flags))

    a, b, one = (f"{folder}/{name}_text_document" for name in ("a", "b", "one"))
    cases = [
        steps("whole", 5), steps("short", 3), steps("extended", 5, of="short"),
        steps("constant", 3, *CONSTANT), steps("constant on", 5, *CONSTANT, of="constant"),
        steps("first", 3),
        steps("other lr", 5, "--lr", "1e-3", "--override-opt-param-scheduler", of="first"),
        steps("second", 3),
        steps("kept lr", 5, "--lr", "1e-3", "--use-checkpoint-opt-param-scheduler", of="second"),
        steps("third", 3), steps("anew", 5, "--no-load-optim", of="third"),
        reading("weights", "--data-path", "0.5", a, "0.5", b),
        reading("no weights", "--data-path", a, b),
        reading("one of two", "--data-path", "0.5", a, "0.5", one, "--split", "950,50,0"),
        reading("one document", "--data-path", one, "--split", "950,50,0"),
        reading("by part", "--train-data-path", "0.3", a, "0.7", b, "--valid-data-path", a, b),
        reading("late evaluation", "--data-path", "0.5", a, "0.5", b, "--split", "80,20,0",
                "--eval-iters", "1", "--eval-interval", "2", "--start-eval-at-iter", "9"),
    ]  # fmt: skip
    run_cases(cases, 1, folder)
    return folder


def rates(folder: Path, name: str) -> dict[int, float]:
    return scalars(folder / name, "learning-rate")


def test_a_run_that_ended_goes_on_as_if_it_had_not(folder: Path):
    """Three steps and two more are five, where the schedule does not hang on their number."""
    whole, more = (scalars(folder / name, "lm loss") for name in ("whole", "extended"))
    assert {4: whole[4], 5: whole[5]} == more
    assert sorted(rates(folder, "constant on")) == [4, 5]


def test_a_flag_says_which_learning_rate_is_meant(folder: Path):
    """The optimizer's groups follow the schedule: Megatron looks for them by their rates."""
    whole, other, kept = (rates(folder, name) for name in ("whole", "other lr", "kept lr"))
    assert kept[5] == whole[5]
    least, rate = 3e-4, 1e-3
    share = (whole[5] - least) / (3e-3 - least)
    assert other[5] == pytest.approx(least + share * (rate - least), rel=1e-5)


def test_a_schedule_that_begins_anew_is_said(folder: Path):
    """--no-load-optim goes on with the iterations and starts the schedule again."""
    assert rates(folder, "anew")[4] == rates(folder, "whole")[1]
    log = (folder / "whole.log").read_text()
    assert log.count("megatron-mone: no_load_optim = True: training goes on from the check") == 1


@pytest.mark.parametrize(
    "name", ["weights", "no weights", "one of two", "one document", "by part", "late evaluation"]
)
def test_data_of_which_nothing_is_evaluated(folder: Path, name: str):
    """With --eval-iters 0 no validation set is made, which Megatron's loader of a blend refuses."""
    assert sorted(scalars(folder / name, "lm loss")) == [1, 2, 3]
