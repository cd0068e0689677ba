"""`python -m launch`: run and submit from the command line to the run folder."""

import json
import os
import sys
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.slurm.environment import client_environment
from launch.spec.training_job import data_prefixes, training_job
from tests.unit.launch.fake_slurm import sbatch_words

ROOT = Path(__file__).resolve().parents[3]
DEMO = str(ROOT / "configs/demo-mone.yaml")


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder, with an sbatch that notes what it is given and answers 42."""
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(
        f"#!/bin/bash\nprintf '%s\\n' \"$@\" >>{tmp_path}/sbatch.words\n"
        'case "$*" in *--test-only*) echo "sbatch: Job 7 to start" >&2;; *) echo 42;; esac\n'
    )
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "cwd"


def test_run_starts_ranks_and_records_them(here, capfd):
    assert main(["run", "--name", "hello", "--", "bash", "-c", "echo $RANK of $WORLD_SIZE"]) == 0
    assert "hello: 2 ranks here" in capfd.readouterr().out
    logs = sorted((here / "runs/hello/logs").glob("*/rank-*.log"))
    assert [log.read_text() for log in logs] == ["0 of 2\n", "1 of 2\n"]
    manifest = json.loads((here / "runs/hello/manifest.json").read_text())
    assert [attempt["reason"] for attempt in manifest["attempts"]] == ["finished"]
    assert manifest["starts"][0]["ranks"] == 2


def test_a_failed_rank_is_the_status(here):
    assert main(["run", "--name", "bad", "--", "bash", "-c", "exit 9"]) == 9
    manifest = json.loads((here / "runs/bad/manifest.json").read_text())
    assert manifest["attempts"][0]["status"] == 9


def test_dry_run_prints_the_script_and_touches_nothing(here, capsys):
    words = ["submit", "--config", DEMO, "--nodes", "16", "--account", "a b", "--dry-run"]
    assert main([*words, "--", "--seed", "7"]) == 0
    script = capsys.readouterr().out
    options = sbatch_words(script)
    assert "--nodes=16" in options
    assert "--account=a b" in options
    checkpoints = f"{here}/runs/demo-mone/checkpoints"
    assert f"--save {checkpoints} --load {checkpoints} --seed 7)" in script
    assert f"command=({sys.executable} -m megatron_mone.pretrain --config {DEMO} " in script
    assert not (here / "runs").exists()


TRACKED = ("--wandb-project", "p", "--mlflow-experiment=e")


def test_a_tracked_run_is_called_as_here_and_a_case_after_its_sweep(here, capsys):
    words = ["submit", "--config", DEMO, "--name", "mine", "--dry-run"]
    assert main([*words, "--", *TRACKED]) == 0
    assert "--wandb-exp-name mine --mlflow-run-name mine " in capsys.readouterr().out
    assert main([*words, "--", *TRACKED, "--wandb-exp-name", "other"]) == 0
    script = capsys.readouterr().out
    assert script.count("--wandb-exp-name") == script.count("--wandb-exp-name other)") == 1
    assert main([*words, "--grid", "r=1/2", "--", *TRACKED]) == 0
    script = capsys.readouterr().out
    assert "--wandb-exp-name mine/000-mone_neuron_ratio=0.5 " in script
    assert main(words) == 0
    assert "--wandb" not in capsys.readouterr().out


def test_a_trackers_secret_reaches_the_job_and_no_file(here, capsys, monkeypatch):
    """sbatch hands its own environment to the job."""
    monkeypatch.setenv("WANDB_API_KEY", "hunter2")
    assert main(["submit", "--config", DEMO, "--", *TRACKED, "--mock-data"]) == 0
    files = [path.read_bytes() for path in here.rglob("*") if path.is_file()]
    assert files
    assert not any(b"hunter2" in text for text in files)
    assert client_environment(os.environ, "sbatch")["WANDB_API_KEY"] == "hunter2"
    address = ("--mlflow-tracking-uri", "https://me:hunter2@host")
    assert main(["submit", "--config", DEMO, "--dry-run", "--", *TRACKED, *address]) == 2
    said = capsys.readouterr()
    assert "MLFLOW_TRACKING_PASSWORD" in said.err
    assert "hunter2" not in said.out + said.err


def test_submit_writes_the_script_and_prints_job_and_log(here, capsys):
    assert main(["submit", "--config", DEMO]) == 0
    folder = here / "runs/demo-mone"
    assert capsys.readouterr().out == f"job 42, log {folder}/logs/42.log\n"
    assert (folder / "logs").is_dir()  # Slurm does not make it
    assert str(folder / "job.sbatch") in (here.parent / "sbatch.words").read_text().split("\n")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["starts"][0] | {"job_id": "42", "ranks": 8} == manifest["starts"][0]
    assert manifest["config"]["values"]["global_batch_size"] == 16


def test_test_only_asks_slurm_and_writes_nothing(here, capsys):
    assert main(["submit", "--config", DEMO, "--test-only"]) == 0
    assert "Job 7 to start" in capsys.readouterr().out
    assert not (here / "runs").exists()


def test_another_config_under_the_same_name_is_not_submitted(here, capsys):
    assert main(["submit", "--config", DEMO, "--name", "x"]) == 0
    before = (here.parent / "sbatch.words").read_text()
    script = (here / "runs/x/job.sbatch").read_text()
    assert main(["submit", "--config", DEMO, "--name", "x", "--", "--seed", "9"]) == 2
    assert "run of another config" in capsys.readouterr().err
    assert (here.parent / "sbatch.words").read_text() == before
    assert (here / "runs/x/job.sbatch").read_text() == script


def test_an_edited_json_of_deepspeed_is_another_config(here, capsys):
    path = here / "ds.json"
    words = ["submit", "--config", DEMO, "--name", "x", "--"]
    words += ["--engine", "deepspeed", "--deepspeed-config", str(path)]
    for size, status in ((2e8, 0), (200_000_000, 0), (1e8, 2)):
        path.write_text(json.dumps({"zero_optimization": {"reduce_bucket_size": size}}))
        assert main(words) == status, capsys.readouterr().err
    assert "run of another config" in capsys.readouterr().err


def test_deepspeed_s_stages_are_a_grid_and_each_case_writes_its_hostfile(here, capsys):
    grid = ["--grid", "zero_stage=0,1,2", "--hostfile", "--no-preflight", "--dry-run"]
    assert main(["submit", "--config", DEMO, *grid, "--", "--engine", "deepspeed"]) == 0
    script = capsys.readouterr().out
    assert "--array=0-2" in sbatch_words(script)
    assert [f"--zero-stage {stage})" in script for stage in (0, 1, 2)] == [True] * 3
    assert '\nwrite_hostfile "${named[@]}"\n' in script


def test_a_grid_is_an_array_with_a_folder_for_each_case(here, capsys):
    grid = ["--grid", "mone_neuron_ratio=0.5,0.25", "--grid", "seed=1,2"]
    assert main(["submit", "--config", DEMO, *grid]) == 0
    assert capsys.readouterr().out.endswith("logs/42_*.log\n")
    script = (here / "runs/demo-mone/job.sbatch").read_text()
    assert "--array=0-3" in sbatch_words(script)
    cases = sorted((here / "runs/demo-mone/cases").iterdir())
    assert [case.name for case in cases] == [
        "000-mone_neuron_ratio=0.5,seed=1",
        "001-mone_neuron_ratio=0.5,seed=2",
        "002-mone_neuron_ratio=0.25,seed=1",
        "003-mone_neuron_ratio=0.25,seed=2",
    ]
    assert f"--load {cases[3]}/checkpoints --mone-neuron-ratio 0.25 --seed 2)" in script
    assert f"{here}/runs/demo-mone/checkpoints" not in script


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["submit"], "give --config FILE, or a program after --"),
        (["submit", "--nodez", "4"], "unknown argument '--nodez' (did you mean '--nodes'?)"),
        (["launch"], "invalid choice"),
        (["submit", "--config", "absent.yaml"], "absent.yaml"),
        (["submit", "--launch", "absent", "--", "true"], "configs/launch/"),
        (["submit", "--grid", "seed=1", "--", "true"], "needs --config"),
        (["submit", "--config", DEMO, "--grid", "seed"], "must be ARGUMENT=VALUE,VALUE"),
        (["submit", "--config", DEMO, "--", "--save", "x"], "--save: checkpoints are in"),
        (["submit", "--config", DEMO, "--", "--load=x"], "--load=x: checkpoints are in"),
        (["submit", "--config", DEMO, "--time-limit", "soon"], "time_limit = 'soon'"),
        (["run", "--dry-run", "--", "true"], "are for submit"),
        (["run", "--nodes", "2", "--", "true"], "nodes = 2"),
        (["submit", "--config", DEMO, "--", "--data-path", "0.5 a 0.5 b"], "this is one word"),
        (["run", "--config", DEMO, "--", "--data-path", "a.bin"], "data_path = 'a.bin'"),
        (["submit", "--config", DEMO, "--hostfile"], "hostfile = True is DeepSpeed's, and engine"),
        (["submit", "--config", DEMO, "--hostfile", "--profile"], "hostfile = True is DeepSpeed's"),
        (["submit", "--config", DEMO, "--hostfile", "--grid", "engine=deepspeed,megatron"],
         "engine = 'megatron': give --engine deepspeed"),
        (["submit", "--hostfile", "--", "true"], "hostfile = True is for training"),
        (["run", "--config", DEMO, "--hostfile", "--", "--engine", "deepspeed"],
         "hostfile = True: ranks of run are on this machine"),
        (["submit", "--config", DEMO, "--", "--deepspeed-config", "absent.json"],
         "absent.json: cannot be read"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(here, capsys, words, said):
    try:
        status = main(words)
    except SystemExit as end:
        status = end.code
    assert status == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (here / "runs").exists()


def test_without_slurm_submit_says_so(here, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(here))
    assert main(["submit", "--config", DEMO]) == 75
    assert capsys.readouterr().err.count("\n") == 1


def test_a_job_that_brings_its_python_is_given_no_other(tmp_path):
    for site in ({"virtual_environment": "/venv"}, {"modules": ("python",)}):
        job = training_job(Path(DEMO), None, tmp_path, [], [], site)
        assert job.spec.command[0] == "python"


@pytest.mark.parametrize(
    ("values", "words", "expected"),
    [
        ({}, [], ()),
        ({"data_path": ["0.3", "a", "0.7", "b"]}, [], ("a", "b")),
        ({"data_path": "a"}, [], ("a",)),
        ({"data_path": ["a"]}, ["--data-path", "c", "d", "--seed", "1"], ("c", "d")),
        ({"data_path": ["a"], "valid_data_path": ["v"]}, [], ("a", "v")),
        ({"data_path": ["a"]}, ["--data-path", "1e-3", "c", "0.999", "d"], ("c", "d")),
        ({}, ["--data-path", "c", "--data-path", "d"], ("d",)),
        ({}, ["--data-path=c"], ("c",)),
        ({}, ["--data-args-path", "/nowhere/list"], ("/nowhere/list",)),
        ({}, ["--mock-data"], ()),
    ],
)
def test_the_datasets_of_a_run(values, words, expected):
    assert data_prefixes(values, words) == expected


def test_the_datasets_of_a_grid_are_those_of_all_its_cases(tmp_path):
    grid = ["data_path=a,b"]
    job = training_job(Path(DEMO), None, tmp_path, ["--data-path", "c"], grid, {})
    assert job.data == ("a", "b")
