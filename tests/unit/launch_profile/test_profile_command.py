"""submit --profile: the jobs of a sweep over nodes, all in Slurm's queue or none."""

import json
import re
import shlex
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.runs import profile_jobs, submission
from launch.runs.run_manifest import gather
from launch.spec.pre_submit import Refused
from tests.unit.launch.fake_slurm import sbatch_words
from tests.unit.launch_profile.conftest import Asked

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs/demo-mone.yaml")
OWN = ["submit", "--config", DEMO, "--tasks-per-node", "1", "--gpus-per-node", "0", "--profile"]
FLAGS = ["--mock-data", "--expert-model-parallel-size", "1"]


class NoChecks:
    """Finds nothing wrong, but with the numbers of nodes that it is told."""

    def __init__(self, *refused: int) -> None:
        self.refused = refused

    def stated(self, name, values, words):
        return name

    def data(self, job, prefixes):
        pass

    def plans(self, spec):
        return True

    def compared(self, job, baselines):
        return {"mone": job}

    def flags(self, job, spec):
        return True

    def memory(self, jobs, spec, case):
        if spec.nodes in self.refused:
            raise Refused(f"planner, {case}: 90 of 80 GiB: does not fit")


@pytest.fixture
def checks(monkeypatch) -> NoChecks:
    checks = NoChecks()

    @contextmanager
    def pre_submit_checks(force):
        yield checks

    monkeypatch.setattr(profile_jobs, "pre_submit_checks", pre_submit_checks)
    return checks


@pytest.fixture
def here(slurm, checks, tmp_path) -> Path:
    return tmp_path / "cwd"


def commands(scripts: str) -> list[list[str]]:
    return [shlex.split(line) for line in re.findall(r"^command=\((.*)\)$", scripts, re.MULTILINE)]


def parts(scripts: str) -> list[str]:
    return ["#!/bin/bash" + text for text in scripts.split("#!/bin/bash")[1:]]


def test_dry_run_prints_a_script_for_each_size_and_the_report(here, slurm, capsys):
    assert main([*OWN, "--nodes", "2", "--dry-run", "--", *FLAGS, "--windows", "4"]) == 0
    printed = capsys.readouterr().out
    one, two, report = parts(printed)
    assert ["--nodes=1" in sbatch_words(one), "--nodes=2" in sbatch_words(two)] == [True, True]
    assert "--dependency=afterany:ID:ID" in sbatch_words(report)
    words = commands(two)[0]
    profiles = here / "runs/demo-mone/profiles"
    assert words[:4] == [sys.executable, str(ROOT / "tools/profile.py"), "--config", DEMO]
    assert words[-4:] == ["--global-batch-size", "16", "--out", str(profiles / "002-nodes")]
    assert words[4:-4] == ["--steps", "20", "--against", "moe", *FLAGS, "--windows", "4"]
    assert not any(word in ("--save", "--load") for words in commands(printed) for word in words)
    assert commands(report)[0][2:] == [str(here / "runs/demo-mone"), "--nodes", "1,2"]
    assert slurm.submitted == []
    assert not (here / "runs").exists()


def test_the_report_s_job_is_small_and_none_is_requeued(here, capsys):
    site = ["--gpus-per-node", "8", "--tasks-per-node", "8", "--exclusive", "--requeue"]
    more = ["--signal-lead-seconds", "60", "--hang-seconds", "900", "--time-limit", "4:00:00"]
    words = [*OWN, *site, *more, "--nodes", "1", "--dry-run", "--", "--micro-batch-size", "1"]
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert "900" not in printed  # a profile shows no progress to a watchdog
    size, report = (sbatch_words(text) for text in parts(printed))
    assert {"--gpus-per-node=8", "--exclusive", "--no-requeue", "--time=4:00:00"} <= set(size)
    assert {"--nodes=1", "--ntasks-per-node=1", "--no-requeue", "--time=00:30:00"} <= set(report)
    assert not [o for o in report if o.startswith(("--gpus", "--exclusive", "--mem", "--cpus"))]
    assert not [o for o in (*size, *report) if o.startswith("--signal")]


def test_all_jobs_are_in_the_manifest_and_the_report_waits_for_them(here, slurm, capsys):
    assert main([*OWN, "--nodes", "2", "--", *FLAGS]) == 0
    folder = here / "runs/demo-mone"
    assert capsys.readouterr().out.splitlines() == [
        f"job 41, 1 node, log {folder}/cases/001-nodes/logs/41.log",
        f"job 42, 2 nodes, log {folder}/cases/002-nodes/logs/42.log",
        f"job 43, after them {folder}/profiles/report/report.html, log {folder}/logs/43.log",
    ]
    starts = json.loads((folder / "manifest.json").read_text())["starts"]
    assert [(s["job_id"], s["ranks"]) for s in starts] == [("41", 1), ("42", 2), ("43", 1)]
    assert "--dependency=afterany:41:42" in sbatch_words((folder / "job.sbatch").read_text())
    assert len(slurm.submitted) == 3


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_where_one_is_refused_none_is_left(here, slurm, accepted, capsys):
    slurm.accept(accepted)
    assert main([*OWN, "--nodes", "2", "--", *FLAGS]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "Invalid partition name" in error
    assert slurm.cancelled == ["41", "42"][:accepted]


def test_a_profile_whose_launcher_died_is_not_submitted_twice(here, slurm, monkeypatch, capsys):
    """Its machine went down after the first sbatch: the report was never submitted."""
    with monkeypatch.context() as dying:
        dying.setattr(profile_jobs, "cancel", lambda job_id: None)
        dying.setattr(submission, "add_start", lambda folder, start: sys.exit(9))
        with pytest.raises(SystemExit):
            main([*OWN, "--nodes", "2", "--", *FLAGS])
    monkeypatch.setattr(submission, "unfinished_jobs_in", lambda folder: ["41"])
    assert main([*OWN, "--nodes", "2", "--", *FLAGS]) == 2
    assert "job 41 of demo-mone is in the queue" in capsys.readouterr().err
    assert len(slurm.submitted) == 1
    assert [start["job_id"] for start in gather(here / "runs/demo-mone").starts] == ["41"]


def test_test_only_asks_slurm_of_each(here, slurm, capsys):
    assert main([*OWN, "--nodes", "2", "--test-only", "--", *FLAGS]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == [
        "demo-mone-001-nodes", "demo-mone-002-nodes", "demo-mone-report",
    ]  # fmt: skip
    assert all("--test-only" in asked for asked in slurm.submitted)
    assert not (here / "runs").exists()


def test_sizes_that_do_not_fit_are_left_out_with_a_line(here, checks, slurm, capsys):
    checks.refused = (1,)
    assert main([*OWN, "--nodes", "2", "--", *FLAGS]) == 0
    assert capsys.readouterr().err == "left out: planner, 1 node: 90 of 80 GiB: does not fit\n"
    assert len(slurm.submitted) == 2
    report = commands((here / "runs/demo-mone/job.sbatch").read_text())[0]
    assert report[-2:] == ["--nodes", "2"]


def test_where_no_size_fits_nothing_is_submitted(here, checks, slurm, capsys):
    checks.refused = (1, 2)
    with pytest.raises(Refused):  # that `pre_submit_checks` raises or prints
        profile_jobs._checked(_sweep(here), checks, force=False)
    assert slurm.submitted == []


def test_force_keeps_what_does_not_fit(here, checks, slurm, capsys):
    checks.refused = (1, 2)
    assert main([*OWN, "--nodes", "2", "--force", "--", *FLAGS]) == 0
    assert capsys.readouterr().err.count("warning: ") == 2
    assert len(slurm.submitted) == 3


def test_more_sizes_may_follow_but_not_another_model(here, slurm, capsys):
    own = [*OWN, "--nodes", "4"]
    small = ["--", *FLAGS, "--micro-batch-size"]
    assert main([*own, "--profile-nodes", "1", *small, "1"]) == 0
    assert main([*own, "--profile-nodes", "4", *small, "1"]) == 0
    assert main([*own, *small, "2"]) == 2
    assert "run of another config" in capsys.readouterr().err
    assert len(slurm.submitted) == 4


def test_hostile_words_are_data(here, capsys):
    hostile = [*FLAGS, "--data-cache-path", "$(touch /tmp/x) 'a' \"b\" `c`; d"]
    assert main([*OWN, "--nodes", "1", "--dry-run", "--name", "a b;$(c)", "--", *hostile]) == 0
    words, report = commands(capsys.readouterr().out)
    assert words[8:-4] == hostile
    assert words[-1] == str(here / "runs/a b;$(c)/profiles/001-nodes")
    assert report[2] == str(here / "runs/a b;$(c)")


def _sweep(here: Path) -> profile_jobs.ProfileSweep:
    from launch.__main__ import Options
    from launch.runs.start_commands import site_of
    from megatron_mone.common.program import parse

    options, _ = parse(Options, [*OWN[1:], "--nodes", "2"])
    options.action = OWN[0]
    return profile_jobs.read_sweep(options, FLAGS, site_of(options))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--profile-nodes", "1,b"], "--profile-nodes '1,b' must be numbers of nodes"),
        (["--profile-steps", "0"], "--steps 0 is not allowed"),
        (["--profile-steps", "1000"], "train_iters = 400 is fewer than the 1010 steps"),
        (["--against", "mow"], "--against 'mow' is not a baseline"),
        (["--grid", "seed=1"], "neither --grid nor --array"),
        (["--array", "0-3"], "neither --grid nor --array"),
        (["--", "--save", "x"], "--save: a profile is kept in the run folder"),
        (["--", "--out=x"], "--out=x: a profile is kept in the run folder"),
        (["--", *FLAGS, "--global-batch-size", "17"], "global_batch_size = 17 is no multiple of"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(here, slurm: Asked, capsys, words, said):
    assert main([*OWN, "--nodes", "2", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert slurm.submitted == []


def test_run_has_no_profile(here, capsys):
    assert main(["run", "--config", DEMO, "--profile"]) == 2
    assert "python tools/profile.py" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--strong"], ["--profile-nodes", "1"], ["--against", ""]])
def test_flags_of_a_profile_need_one(here, slurm, capsys, words):
    assert main(["submit", "--config", DEMO, *words]) == 2
    assert capsys.readouterr().err.startswith(f"megatron-mone: error: {words[0]} is for --profile")
    assert slurm.submitted == []
