"""`python -m launch sweep` from the command line to the run folder, with a stand-in for sbatch."""

import json
import re
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from launch.__main__ import main
from launch.runs import run_commands, submission, sweep, sweep_cases
from launch.runs.local import running
from launch.runs.run_manifest import begin_attempt, end_attempt
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.records import JobState
from tests.unit.launch.fake_slurm import sbatch_words

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs/demo-mone.yaml")


class Slurm:
    """An sbatch that notes its words and gives ids from 40 on, and a queue that the test fills."""

    def __init__(self, folder: Path) -> None:
        self.words = folder / "sbatch.words"
        self.queue: list[JobState] = []
        self.silent = False
        programs = folder / "bin"
        programs.mkdir()
        for name, code in {
            "sbatch": f'[ ! -e {folder}/refuse ] || {{ echo "sbatch: error: no" >&2; exit 1; }}\n'
            f'sleep 0.2; echo "$@" >>{self.words}; echo $((39 + $(wc -l <{self.words})))',
            "scancel": f'echo "scancel $@" >>{folder}/scancel.words',
        }.items():
            (programs / name).write_text(f"#!/bin/bash\n{code}\n")
            (programs / name).chmod(0o755)
        self.refuse = folder / "refuse"
        self.cancelled = folder / "scancel.words"
        self.path = f"{programs}:/usr/bin:/bin"

    def job_states(self, jobs: list[str]) -> list[JobState]:
        if self.silent and jobs:
            raise SlurmUnavailable("slurmctld is down")
        # By job: of an array every task.
        asked = {job.partition("_")[0] for job in jobs}
        return [state for state in self.queue if state.job_id in asked]

    def hold(self, job: str, tasks: str, state: str) -> None:
        facts: dict[str, Any] = dict.fromkeys(JobState.__dataclass_fields__, "")
        self.queue.append(JobState(**{**facts, "job_id": job, "array_task": tasks, "state": state}))

    def arrays(self) -> list[str]:
        """--array of every submission."""
        text = self.words.read_text() if self.words.exists() else ""
        return re.findall(r"--array=(\S+)", text)


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    slurm = Slurm(tmp_path)
    monkeypatch.setenv("PATH", slurm.path)
    for module in (sweep_cases, run_commands):
        monkeypatch.setattr(module, "job_states", slurm.job_states)
    return slurm


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def _sweep(*words: str, rest: tuple[str, ...] = ()) -> int:
    return main(["sweep", "--config", DEMO, *words, "--", *rest])


def _end(folder: Path, number: int, job: str, status: int) -> None:
    (case,) = folder.glob(f"cases/{number:03d}-*")
    begin_attempt(case, f"{job}_{number}", f"{job}_{number}.0", "n0")
    reason = "finished" if status == 0 else f"failed with status {status}"
    end_attempt(case, f"{job}_{number}.0", status, reason)


def _starts(folder: Path) -> list[tuple[str | None, list[int]]]:
    starts = json.loads((folder / "manifest.json").read_text())["starts"]
    return [(start.get("job_id"), start["cases"]) for start in starts]


def test_a_sweep_is_submitted_once_and_then_only_what_is_missing(here, slurm, capsys):
    folder = here / "runs/demo-mone"
    assert _sweep("--grid", "r=1/2,1/4,1/8") == 0
    assert capsys.readouterr().out.splitlines() == [
        "0 of 3 cases are finished, 3 are submitted: job 40",
        f"job 40, log {folder}/logs/40_*.log",
    ]
    slurm.hold("40", "0-2", "PENDING")
    assert _sweep("--grid", "r=1/2,1/4,1/8") == 0
    out = capsys.readouterr().out
    assert out.startswith("0 of 3 cases are finished, 3 are waiting, none is missing\n")
    assert out.count("  waiting  ") == 3  # the table
    slurm.queue.clear()
    for number, status in enumerate((0, 3, 0)):
        _end(folder, number, "40", status)
    assert _sweep("--grid", "r=.5,0.25,1/8") == 0
    assert "2 of 3 cases are finished, 1 is submitted: job 41\n" in capsys.readouterr().out
    assert slurm.arrays() == ["0,1,2", "1"]
    assert _starts(folder) == [("40", [0, 1, 2]), ("41", [1])]


@pytest.mark.parametrize("where", [[], ["--here"]], ids=["submit", "here"])
def test_a_sweep_whose_launcher_died_is_not_submitted_again(
    here, slurm, monkeypatch, capsys, where
):
    """Its machine went down right after sbatch's answer."""
    with monkeypatch.context() as dying:
        dying.setattr(submission, "add_start", lambda folder, start: sys.exit(9))
        with pytest.raises(SystemExit):
            _sweep("--grid", "r=1/2,1/4")
    assert _starts(here / "runs/demo-mone") == []
    monkeypatch.setattr(submission, "unfinished_jobs_in", lambda folder: ["40"])
    slurm.hold("40", "0-1", "PENDING")
    capsys.readouterr()
    assert _sweep("--grid", "r=1/2,1/4", *where) == 0
    assert "2 are waiting, none is missing" in capsys.readouterr().out
    assert slurm.arrays() == ["0,1"]
    assert _starts(here / "runs/demo-mone") == [("40", [0, 1])]


def test_where_there_is_no_slurm_the_sweep_can_be_run_here(here, slurm, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert _sweep("--grid", "r=1/2") == 75
    assert "sbatch: not found" in capsys.readouterr().err
    monkeypatch.setattr(sweep, "run_local", lambda spec: 0)
    assert _sweep("--grid", "r=1/2", "--here") == 0


def test_a_sweep_grows_and_its_numbers_stay(here, slurm, capsys):
    folder = here / "runs/demo-mone"
    _sweep("--grid", "r=1/2,1/4")
    first = (folder / "job.sbatch").read_text()
    for number in (0, 1):
        _end(folder, number, "40", 0)
    capsys.readouterr()
    assert _sweep("--grid", "r=1,1/4,1/2") == 0
    assert "2 of 3 cases are finished, 1 is submitted" in capsys.readouterr().out
    assert slurm.arrays() == ["0,1", "2"]
    script = (folder / "job.sbatch").read_text()
    for number, ratio in enumerate(("0.5", "0.25", "1")):
        own = script.partition(f"\n{number})\n")[2].partition(";;")[0]
        assert f"--mone-neuron-ratio {ratio})" in own
        assert f"cases/{number:03d}-mone_neuron_ratio={ratio}/tensorboard" in own
        assert (f"--mone-neuron-ratio {ratio})" in first) == (number < 2)
    # A smaller grid asks for its own cases alone.
    assert _sweep("--grid", "r=1/2") == 0
    assert "1 of 1 case is finished, none is missing" in capsys.readouterr().out


def test_two_users_at_once_submit_each_case_once(here, slurm, capsys, monkeypatch):
    """The one who comes second waits for the first one's submission, then sees its job."""
    found = []
    take = sweep_cases.job_states

    def job_states(jobs):
        if jobs:
            slurm.queue.clear()
            for job in jobs:
                slurm.hold(job, "0-1", "PENDING")
        return take(jobs)

    monkeypatch.setattr(sweep_cases, "job_states", job_states)
    monkeypatch.setattr(sweep, "show_results", lambda folder: None)  # pyplot is for one thread
    _sweep("--grid", "r=1/2", "--dry-run")  # imports Megatron, once
    words = ["--grid", "r=1/2,1/4"]
    users = [threading.Thread(target=lambda: found.append(_sweep(*words))) for _ in range(3)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert found == [0, 0, 0]
    assert slurm.arrays() == ["0,1"]


def test_submit_with_a_grid_is_the_same(here, slurm, capsys):
    assert main(["submit", "--config", DEMO, "--grid", "r=1/2,1/4"]) == 0
    _end(here / "runs/demo-mone", 0, "40", 0)
    capsys.readouterr()
    assert _sweep("--grid", "r=1/2,1/4") == 0
    assert "1 of 2 cases are finished, 1 is submitted: job 41" in capsys.readouterr().out


def test_a_refused_sweep_leaves_no_cases(here, slurm, capsys):
    slurm.refuse.touch()
    assert _sweep("--grid", "r=1/2,1/4") == 2
    assert "sbatch: no" in capsys.readouterr().err
    slurm.refuse.unlink()
    assert _sweep("--grid", "r=1/8") == 0
    assert (here / "runs/demo-mone/cases/000-mone_neuron_ratio=0.125").is_dir()


def test_where_slurm_does_not_answer_nothing_is_submitted_twice(here, slurm, capsys):
    _sweep("--grid", "r=1/2")
    slurm.silent = True
    assert _sweep("--grid", "r=1/2") == 75
    assert slurm.arrays() == ["0"]
    assert main(["results", "demo-mone"]) == 0
    assert "unknown: Slurm does not answer" in capsys.readouterr().out


def test_a_sweep_that_runs_here_is_not_submitted(here, slurm, capsys):
    with running(here / "runs/demo-mone"):
        assert _sweep("--grid", "r=1/2") == 2
    assert "is run by another process" in capsys.readouterr().err
    assert slurm.arrays() == []


def test_dry_run_prints_every_case_and_touches_nothing(here, slurm, capsys):
    assert _sweep("--grid", "r=1/2,1/4", "--dry-run") == 0
    assert "--array=0-1" in sbatch_words(capsys.readouterr().out)
    assert not (here / "runs").exists()


def test_resume_submits_what_is_missing(here, slurm, capsys):
    folder = here / "runs/demo-mone"
    _sweep("--grid", "r=1/2,1/4,1/8")
    for number, status in enumerate((0, 3, 1)):
        _end(folder, number, "40", status)
    assert main(["resume", "40_1"]) == 0
    slurm.hold("41", "1", "RUNNING")
    assert main(["resume", "demo-mone"]) == 0
    assert slurm.arrays() == ["0,1,2", "1", "2"]
    slurm.hold("42", "2", "PENDING")
    capsys.readouterr()
    assert main(["resume", "demo-mone"]) == 0
    assert capsys.readouterr().out == "demo-mone: no case is missing\n"
    assert main(["resume", "40_7"]) == 2
    assert "40_7 is no case of demo-mone" in capsys.readouterr().err


def test_status_and_cancel_see_every_array_of_a_sweep(here, slurm, capsys):
    _sweep("--grid", "r=1/2,1/4")
    _sweep("--grid", "r=1/2,1/4,1/8")
    folder = here / "runs/demo-mone"
    _end(folder, 0, "40", 0)
    slurm.hold("40", "0", "COMPLETED")
    slurm.hold("40", "1", "RUNNING")
    slurm.hold("41", "2", "RUNNING")
    capsys.readouterr()
    assert main(["status", "demo-mone"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head == "demo-mone: 3 cases: 1 finished, 2 running"
    assert [line.split(";")[0] for line in lines] == [
        "demo-mone: job 40_1 RUNNING",
        "demo-mone: job 41_2 RUNNING",
    ]
    assert main(["cancel", "demo-mone"]) == 0
    assert capsys.readouterr().out == "job 40 is cancelled\njob 41 is cancelled\n"
    assert slurm.cancelled.read_text() == "scancel 40\nscancel 41\n"


@pytest.fixture
def stand_in(tmp_path) -> list[str]:
    """Flags with which ranks run a program that fails where the folder has `fail-RATIO`, and stops
    as after a checkpoint where it has `stop-RATIO`."""
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        f"""#!/bin/bash
ratio="${{@: -1}}"
echo "$ratio" >>{tmp_path}/started
[ ! -e {tmp_path}/stop-$ratio ] || exit 75
[ ! -e {tmp_path}/fail-$ratio ] || {{ echo "megatron-mone: error: no $ratio" >&2; exit 3; }}
"""
    )
    python.chmod(0o755)
    return ["--here", "--tasks-per-node", "1", "--virtual-environment", str(tmp_path / "venv")]


def test_here_a_failed_case_does_not_stop_the_others(here, slurm, tmp_path, stand_in, capfd):
    (tmp_path / "fail-0.5").touch()
    grid = ["--grid", "r=1/2,1/4"]
    assert _sweep(*grid, *stand_in) == 3
    out = capfd.readouterr().out
    assert out.startswith("0 of 2 cases are finished, 2 are run here")
    assert "0.5                failed with status 3" in out
    assert "000-mone_neuron_ratio=0.5: megatron-mone: error: no 0.5" in out
    (tmp_path / "fail-0.5").unlink()
    assert _sweep(*grid, *stand_in) == 0
    assert "1 of 2 cases are finished, 1 is run here" in capfd.readouterr().out
    assert (tmp_path / "started").read_text().split() == ["0.5", "0.25", "0.5"]
    assert _sweep(*grid, *stand_in) == 0
    assert capfd.readouterr().out.startswith("2 of 2 cases are finished, none is missing\n")
    assert slurm.arrays() == []
    assert _starts(here / "runs/demo-mone") == [(None, [0, 1]), (None, [0])]


def test_here_a_stop_is_meant_for_the_sweep(here, slurm, tmp_path, stand_in, capfd):
    (tmp_path / "stop-0.5").touch()
    assert _sweep("--grid", "r=1/2,1/4", *stand_in) == 75
    assert (tmp_path / "started").read_text().split() == ["0.5"]
    out = capfd.readouterr().out
    assert "stopped after a checkpoint" in out
    assert "missing" in out


def test_run_with_a_grid_is_the_same(here, slurm, tmp_path, stand_in, capfd):
    grid = ["--grid", "r=1/2,1/4"]
    assert main(["run", "--config", DEMO, *grid, *stand_in[1:]]) == 0
    assert _sweep(*grid, *stand_in) == 0
    assert capfd.readouterr().out.count("2 of 2 cases are finished") == 1
    assert (tmp_path / "started").read_text().split() == ["0.5", "0.25"]


def test_resume_leaves_out_what_was_only_run_here(here, slurm, tmp_path, stand_in, capfd):
    """The script on disk does not know such a case."""
    _sweep("--grid", "r=1/2")
    (tmp_path / "fail-0.25").touch()
    assert _sweep("--grid", "r=1/4", *stand_in) == 3
    assert main(["resume", "demo-mone"]) == 0
    assert slurm.arrays() == ["0", "0"]


def test_curves_go_where_the_user_said_a_folder_for_each_case(here, slurm, capsys):
    assert _sweep("--grid", "r=1/2", "--dry-run", rest=("--tensorboard-dir", "/logs/a")) == 0
    script = capsys.readouterr().out
    assert "--tensorboard-dir /logs/a/000-mone_neuron_ratio=0.5 " in script
    assert main(["submit", "--config", DEMO, "--dry-run"]) == 0
    assert f"--tensorboard-dir {here}/runs/demo-mone/tensorboard " in capsys.readouterr().out


def test_results_of_a_single_run_are_one_row(here, slurm, capsys):
    assert main(["submit", "--config", DEMO]) == 0
    capsys.readouterr()
    assert main(["results", "demo-mone"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3  # heading, row, path of the page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--grid", "mone_neuron_ration=1/2"], "did you mean 'mone_neuron_ratio'"),
        (["--grid", "r=1/0"], "1/0 is over zero"),
        (["--grid", "r=1/2,"], "must be ARGUMENT=VALUE,VALUE"),
        ([], "--grid is missing"),
        (["--grid", "r=1/2", "--here", "--dry-run"], "--dry-run and --test-only are for submit"),
        (["--grid", "r=1/2", "--here", "--nodes", "2"], "nodes = 2"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(here, slurm, capsys, words, said):
    assert _sweep(*words) == 2
    _one_line(capsys, said)
    assert not (here / "runs").exists()


def test_a_folder_of_another_config_is_refused(here, slurm, capsys):
    _sweep("--grid", "r=1/2")
    before = (here / "runs/demo-mone/sweep.json").read_text()
    capsys.readouterr()
    assert _sweep("--grid", "r=1/4", rest=("--seed", "7")) == 2
    _one_line(capsys, "holds a run of another config")
    assert main(["submit", "--config", DEMO]) == 2  # a run that is no sweep
    _one_line(capsys, "holds a run of another config")
    assert (here / "runs/demo-mone/sweep.json").read_text() == before
    assert slurm.arrays() == ["0"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sweep", "--grid", "r=1/2"], "needs --config"),
        (["run", "--here", "--", "true"], "--here is for sweep"),
        (["results"], "results takes one run"),
        (["results", "absent"], "neither a run nor a job"),
    ],
)
def test_other_mistakes(here, slurm, capsys, words, said):
    assert main(words) == 2
    _one_line(capsys, said)


def test_a_program_has_no_results(here, slurm, capsys):
    assert main(["submit", "--name", "p", "--", "true"]) == 0
    assert main(["results", "p"]) == 2
    _one_line(capsys, "p is no training run")


def _one_line(capsys, said: str) -> None:
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert said in error
    assert error.count("\n") == 1
