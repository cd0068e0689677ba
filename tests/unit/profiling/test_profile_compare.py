"""Two runs compared: what grew is named, chance is not, and the interval keeps its 95%."""

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_mone.commands import compare as tool
from megatron_mone.profiling import resample
from megatron_mone.profiling.compare import compare
from megatron_mone.profiling.profile_document import Profile
from megatron_mone.profiling.rank_steps import middle_half
from megatron_mone.profiling.resample import Samples, difference, student_t
from tests.unit.profiling.profile_builders import make_profile, make_record, make_run

ROOT = Path(__file__).resolve().parents[3]
MEANS = {"attention": 40.0, "up/down GEMM": 50.0, "data": 0.5, "other": 9.5}


def noisy_run(seed: int, name: str = "mone", *, windows: int = 6, noise=0.01, **means) -> dict:
    """A run of 5 steps a window; `means` replace those of MEANS, by their name with _ for blank."""
    generator = np.random.default_rng(seed)
    ms = MEANS | {key.replace("_", " "): value for key, value in means.items()}
    steps = 5 * windows
    phases = {
        phase: {"forward": (mean * (1 + noise * generator.standard_normal(steps))).tolist()}
        for phase, mean in ms.items()
    }
    step_ms = np.sum([passes["forward"] for passes in phases.values()], axis=0).tolist()
    return make_run(
        name,
        steps=steps,
        phases=phases,
        step_ms=step_ms,
        windows=[step // 5 for step in range(steps)],
    )


def folder_of(tmp_path, name: str, *runs: dict, **changes) -> Path:
    folder = tmp_path / name
    make_profile(folder, [make_record(0, 1, runs=list(runs), **changes)])
    return folder


def run_tool(*arguments) -> int:
    return tool.main([str(argument) for argument in arguments])


@pytest.fixture
def before(tmp_path) -> Path:
    return folder_of(tmp_path, "before", noisy_run(1))


# The interval -------------------------------------------------------------------------------------


def test_students_t_agrees_with_its_table():
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 10: 2.228, 30: 2.042}
    for freedom, point in table.items():
        assert student_t(freedom) == pytest.approx(point, rel=2e-3)
    assert student_t(1e9) == pytest.approx(1.95996, rel=1e-5)
    points = [student_t(freedom) for freedom in np.linspace(1, 40, 200)]
    assert points == sorted(points, reverse=True)


def samples(generator, windows: int, shared=None, *, mean: float = 100.0) -> Samples:
    """Steps of a window share a slowdown (`shared`, or one of their own) beside their own noise."""
    steps = 5
    window = 3.0 * generator.standard_normal(windows) if shared is None else shared
    values = mean + np.repeat(window, steps) + generator.standard_normal(windows * steps)
    return Samples(np.repeat(np.arange(windows), steps), values, values[None])


@pytest.mark.parametrize(("windows", "same_job"), [(4, False), (8, False), (4, True), (8, True)])
def test_the_interval_holds_the_true_difference_19_times_in_20(windows, same_job, monkeypatch):
    """Windows that differ more than the steps inside: the case in which drawing steps fails."""
    monkeypatch.setattr(resample, "DRAWS", 200)
    generator = np.random.default_rng(5)
    trials, held, width = 400, 0, 0.0
    for _ in range(trials):
        shared = 3.0 * generator.standard_normal(windows) if same_job else None
        a = samples(generator, windows, shared)
        b = samples(generator, windows, shared, mean=107.0)
        found = difference(a, b, same_job=same_job)
        assert found.paired is same_job
        assert found.drawn == "windows"
        held += found.lower_K[0] <= 7.0 <= found.upper_K[0]
        width += (found.upper_K[0] - found.lower_K[0]) / trials
    assert 0.94 <= held / trials <= 0.995
    # Pairs cancel what the windows share.
    assert width < (4.0 if same_job else 14.0)


def test_few_windows_are_resampled_by_steps():
    generator = np.random.default_rng(2)
    a, b = (samples(generator, 3, np.zeros(3), mean=mean) for mean in (100.0, 110.0))
    found = difference(a, b, same_job=True)
    assert (found.drawn, found.paired) == ("steps", False)
    assert 9.0 < found.lower_K[0] < 10.0 < found.upper_K[0] < 11.0


def test_the_interval_of_two_steps_is_that_of_the_t_test():
    """The middle half of two steps is both, so that the standard error is known: 12 - 10 over 2."""
    a, b = (np.array(values) for values in ([10.0, 12.0], [20.0, 20.0]))
    a, b = (Samples(np.zeros(2), one, one[None]) for one in (a, b))
    found = difference(a, b, same_job=False)
    assert (found.a_K[0], found.b_K[0]) == (11.0, 20.0)
    assert (found.lower_K[0] + found.upper_K[0]) / 2 == pytest.approx(9.0)
    assert found.upper_K[0] - 9.0 == pytest.approx(12.706 * 1.0, rel=0.05)


def test_a_single_step_has_no_interval():
    one = Samples(np.zeros(1), np.ones(1), np.ones((1, 1)))
    found = difference(one, one, same_job=False)
    assert found.lower_K is None
    assert found.upper_K is None


def test_means_are_those_of_the_middle_half_with_repeats():
    """Drawing step s `times[s]` times is averaging the list in which it stands so often."""
    generator = np.random.default_rng(3)
    for steps in (1, 2, 3, 7, 12):
        values = generator.random(steps)
        times = generator.integers(0, 4, (20, steps)) + (np.arange(steps) == 0)
        found = resample._means(Samples(np.zeros(steps), values, values[None]), times)
        for draw, mean in zip(times, found[:, 0], strict=True):
            listed = np.repeat(values, draw)
            assert mean == pytest.approx(listed[middle_half(listed)].mean())


# Regressions --------------------------------------------------------------------------------------


def test_a_copy_and_another_sample_of_it_are_no_regression(tmp_path, before):
    copied = folder_of(tmp_path, "copy", noisy_run(1))
    again = folder_of(tmp_path, "again", noisy_run(2))
    assert run_tool(before, copied, "--threshold", 0) == 0
    assert run_tool(before, again) == 0


def test_a_slower_step_is_a_regression_with_the_phase_that_it_is_in(tmp_path, before, capsys):
    after = folder_of(tmp_path, "after", noisy_run(2, **{"up/down GEMM": 62.0}))
    assert run_tool(before, after) == 3
    text = capsys.readouterr().out
    assert "regression over 5.0%: step_ms of mone, up/down GEMM of mone" in text
    assert sum("REGRESSION" in line for line in text.splitlines()) == 2
    assert run_tool(after, before) == 0
    assert "faster" in capsys.readouterr().out
    assert run_tool(before, after, "--threshold", 0.3) == 0
    assert "slower" in capsys.readouterr().out


def test_growth_within_chance_and_of_tiny_phases_is_no_regression(tmp_path, before):
    disturbed = noisy_run(4, windows=4, attention=36.0)
    for step in range(10, 20):  # two windows of four: 46 on average
        disturbed["phases"]["attention"]["forward"][step] += 20.0
        disturbed["step_ms"][step] += 20.0
    profile = Profile.read_folder(folder_of(tmp_path, "wild", disturbed))
    found = compare(
        Profile.read_folder(before), profile, "mone", "mone",
        threshold=0.05, same_job=False, allow_different=False,
    )  # fmt: skip
    attention = next(row for row in found.rows if row.what == "attention")
    assert attention.b > 1.05 * attention.a
    assert not attention.significant
    assert not attention.regression
    tiny = folder_of(tmp_path, "tiny", noisy_run(2, data=0.9))  # +80%, but 0.9% of the step
    assert run_tool(before, tiny) == 0
    big = folder_of(tmp_path, "big", noisy_run(2, data=1.8))
    assert run_tool(before, big) == 3


def test_a_phase_that_is_new_is_a_regression_without_a_ratio(tmp_path, before, capsys):
    after = folder_of(tmp_path, "after", noisy_run(2, combine=3.0))
    out = tmp_path / "deep" / "out.json"
    assert run_tool(before, after, "--json", out) == 3
    document = json.loads(out.read_text())
    (comparison,) = document["comparisons"]
    rows = {row["what"]: row for row in comparison["rows"]}
    assert rows["combine"]["ratio"] is None
    assert rows["combine"]["regression"]
    assert rows["combine"]["lower"] <= rows["combine"]["b"] <= rows["combine"]["upper"]
    assert rows["step_ms"]["a"] == pytest.approx(Profile.read_folder(before).runs[0].step_ms)
    assert comparison["regressions"] == ["combine"]


def test_peak_memory_is_compared_where_both_have_it(tmp_path, before):
    heavier = copy.deepcopy(noisy_run(1))
    heavier["memory"]["peak_bytes"] = int(1.06 * heavier["memory"]["peak_bytes"])
    after = folder_of(tmp_path, "after", heavier)
    assert run_tool(before, after) == 3
    assert run_tool(before, after, "--threshold", 0.07) == 0
    without = folder_of(tmp_path, "without", heavier | {"memory": None})
    assert run_tool(before, without) == 0


# Which runs ---------------------------------------------------------------------------------------


def test_two_runs_of_one_profile_are_compared_in_pairs(tmp_path, capsys):
    moe = noisy_run(1, "moe") | {"neurons": None}
    moe["model"] = {"num_layers": 1, "hidden_size": 16}
    both = folder_of(tmp_path, "both", moe, noisy_run(2))
    assert run_tool(f"{both}:moe", f"{both / 'profile.json'}:mone") == 0
    text = capsys.readouterr().out
    assert "windows drawn in pairs" in text
    assert "differs: model.mone_neuron_ratio: 'absent' in A, 0.25 in B" in text


def test_without_a_name_every_common_run_is_compared(tmp_path, capsys):
    a = folder_of(tmp_path, "a", noisy_run(1, "moe"), noisy_run(2), noisy_run(3, "only_a"))
    b = folder_of(tmp_path, "b", noisy_run(4), noisy_run(5, "moe"))
    assert run_tool(a, b) == 0
    text = capsys.readouterr().out
    assert text.count("95% interval of") == 2
    assert run_tool(a, b, "--run", "moe") == 0
    assert capsys.readouterr().out.count("95% interval of") == 1
    assert run_tool(a, f"{b}:moe") == 0
    text = capsys.readouterr().out
    assert "A: moe   B: moe" in text
    assert text.count("95% interval of") == 1


def test_a_path_may_hold_a_colon(tmp_path):
    odd = folder_of(tmp_path, "10:30", noisy_run(1))
    assert run_tool(odd, f"{odd}:mone") == 0


def fails(capsys, *arguments) -> str:
    """The one line with which the command refuses."""
    assert run_tool(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert error.count("\n") == 1
    return error


def test_different_models_and_layouts_are_refused_by_their_first_field(tmp_path, before, capsys):
    other = noisy_run(2)
    other["model"]["hidden_size"] = 32
    model = folder_of(tmp_path, "model", other)
    assert "model.hidden_size is 16 in A and 32 in B" in fails(capsys, before, model)
    assert run_tool(before, model, "--allow-different") == 0
    assert "differs: model.hidden_size: 16 in A, 32 in B" in capsys.readouterr().out
    config = copy.deepcopy(make_record(0, 1)["config"])
    config["layout"]["pp"] = 2
    layout = folder_of(tmp_path, "layout", noisy_run(2, "moe"), config=config)
    line = fails(capsys, f"{before}:mone", f"{layout}:moe")  # names do not excuse a layout
    assert "config.layout.pp is 1 in A and 2 in B" in line


def test_another_backend_is_said_and_not_refused(tmp_path, before, capsys):
    after = folder_of(tmp_path, "after", noisy_run(2) | {"backend": "te"})
    assert run_tool(before, after) == 0
    assert "differs: backend: 'cpu' in A, 'te' in B" in capsys.readouterr().out


def test_wrong_input_is_one_line(tmp_path, before, capsys):
    assert "A has no run 'moe'; its runs are: mone" in fails(capsys, f"{before}:moe", before)
    assert "--run names the run" in fails(capsys, f"{before}:mone", before, "--run", "mone")
    other = folder_of(tmp_path, "other", noisy_run(1, "moe"))
    assert "no run name is in both" in fails(capsys, before, other)
    assert "cannot be read" in fails(capsys, before, tmp_path / "nowhere")
    assert "must be PATH or PATH:NAME" in fails(capsys, ":mone", before)
    profile = json.loads((other / "profile.json").read_text())
    for change, words in (
        ({"schema": "megatron-mone/profile/7"}, "this version reads /1"),
        ({"runs": [{}]}, "runs[0]: has no field 'name'"),
    ):
        (other / "profile.json").write_text(json.dumps(profile | change))
        assert words in fails(capsys, before, other)
    profile["runs"][0]["samples"]["phases"]["other"].pop()
    (other / "profile.json").write_text(json.dumps(profile))
    assert "runs[0].samples.phases.other: has 29 values" in fails(capsys, before, other)


@pytest.mark.parametrize("threshold", ["-0.1", "nan", "much"])
def test_a_threshold_that_is_no_share_is_refused(before, capsys, threshold):
    with pytest.raises(SystemExit) as caught:
        run_tool(before, before, f"--threshold={threshold}")
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("megatron-mone: error: argument --threshold")


@pytest.mark.parametrize("start", [["tools/compare.py"], ["-m", "tools.compare"]])
def test_the_command_starts_both_ways_beside_a_file_named_profile(before, start):
    """tools/ holds profile.py, which must not be what the library's `import profile` finds."""
    command = [sys.executable, "-X", "importtime", *start, str(before), str(before)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "no regression" in done.stdout
    assert "| torch" not in done.stderr
