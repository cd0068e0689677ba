"""What a job, a run or a shell around the launcher left in the environment decides nothing."""

import contextlib
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from launch.__main__ import main
from launch.runs.local import run_local
from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmUnavailable
from launch.slurm.environment import client_environment, site_defaults
from launch.slurm.script import sbatch_script
from megatron_mone.common.surroundings import without_ranks
from tests.unit.launch.fake_slurm import FakeSlurm
from tests.unit.launch.launch_cases import job

AROUND = {
    # An element of an array, requeued once, in a step of srun.
    "SLURM_JOB_ID": "60", "SLURM_JOBID": "60", "SLURM_ARRAY_JOB_ID": "59",
    "SLURM_ARRAY_TASK_ID": "4", "SLURM_ARRAY_TASK_COUNT": "9", "SLURM_RESTART_COUNT": "3",
    "SLURM_JOB_NODELIST": "n7", "SLURM_CPU_BIND": "quiet,mask_cpu:0x1", "SLURM_NTASKS": "24",
    "SLURM_MEM_PER_CPU": "100", "SLURM_MEM_PER_NODE": "100", "SLURM_EXPORT_ENV": "NONE",
    "SLURM_GPUS_PER_TASK": "1", "SLURM_GPU_BIND": "single:1", "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5", "SLURM_LOCALID": "5", "SLURMD_NODENAME": "n7",
    "SLURM_HINT": "nomultithread",
    "_SLURM_SPANK_OPTION_pyxis_container_image": "x", "SPANK_X": "1", "SLURM_SPANK_X": "1",
    "SBATCH_MEM_BIND": "local", "SRUN_DEBUG": "3", "SALLOC_PARTITION": "x", "TMPDIR": "/tmp/job-60",
    # torchrun, MPI, and a run of ours.
    "RANK": "5", "LOCAL_RANK": "5", "WORLD_SIZE": "24", "LOCAL_WORLD_SIZE": "8", "GROUP_RANK": "1",
    "ROLE_RANK": "5", "ROLE_WORLD_SIZE": "24", "NODE_RANK": "1", "MASTER_ADDR": "n6",
    "MASTER_PORT": "29500", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "60",
    "PMI_RANK": "5", "PMI2_RANK": "5", "PMIX_RANK": "5", "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_MCA_orte_hnp_uri": "x", "MPI_LOCALRANKID": "5", "MPI_LOCALNRANKS": "8",
    "CUDA_VISIBLE_DEVICES": "5", "ROCR_VISIBLE_DEVICES": "5", "MEGATRON_MONE_ATTEMPT": "59_4.3",
    "MEGATRON_MONE_PROGRESS": "/x", "MEGATRON_MONE_TERMINAL_FD": "99", "MEGATRON_MONE_STARTER": "1",
}  # fmt: skip
SETTINGS = {
    "SQUEUE_FORMAT": "%i", "SQUEUE_PARTITION": "debug", "SQUEUE_STATES": "PENDING",
    "SACCT_FORMAT": "JobID", "SCANCEL_STATE": "PENDING", "SCANCEL_INTERACTIVE": "1",
    "SCONTROL_FUTURE": "1", "SINFO_FORMAT": "%N", "SLURM_TIME_FORMAT": "relative",
    "SLURM_BITSTR_LEN": "1",
}  # fmt: skip
CLUSTER = {
    "SLURM_CONF": "/etc/x.conf", "SLURM_CONF_SERVER": "ctld", "SLURM_CLUSTERS": "big",
    "SLURM_JWT": "token",
}  # fmt: skip
USERS = {
    "PATH": "/bin", "HOME": "/home/ada", "VIRTUAL_ENV": "/venv", "NCCL_DEBUG": "INFO",
    "OMPI_MCA_btl": "tcp", "I_MPI_FABRICS": "ofi", "OMP_NUM_THREADS": "4", "LD_LIBRARY_PATH": "/x",
    "CUDA_DEVICE_MAX_CONNECTIONS": "1", "XDG_CACHE_HOME": "/x", "PYXIS_X": "1", "PMI": "mine",
}  # fmt: skip


@pytest.mark.parametrize("program", ["sbatch", "squeue", "scontrol", "sacct", "scancel"])
def test_slurm_s_commands_see_the_cluster_and_what_is_the_user_s(program):
    own = client_environment({**AROUND, **SETTINGS, **CLUSTER, **USERS}, program)
    told = {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
    if program == "sbatch":
        told = {"SLURM_TIME_FORMAT": "relative"}
    assert own == {**CLUSTER, **USERS, **told}


def test_a_shell_outside_of_a_job_keeps_its_temporary_folder():
    assert client_environment({"TMPDIR": "/scratch"}, "sbatch") == {"TMPDIR": "/scratch"}


def test_every_command_is_started_so(tmp_path, monkeypatch):
    for name in ("sbatch", "squeue", "scontrol", "sacct", "scancel"):
        (tmp_path / name).write_text(f"#!/bin/bash\nenv -0 >{tmp_path}/{name}.environment\n")
        (tmp_path / name).chmod(0o755)
    for name, value in {**AROUND, **SETTINGS, "PATH": f"{tmp_path}:/usr/bin:/bin"}.items():
        monkeypatch.setenv(name, value)
    slurm_commands.cancel("1")
    slurm_commands.requeue("1")
    slurm_commands.accounting(["1"])
    for call in (lambda: slurm_commands.submit(Path("x")), slurm_commands.queue):
        with contextlib.suppress(ValueError, SlurmUnavailable):  # they say nothing here
            call()
    for path in tmp_path.glob("*.environment"):
        pairs = dict(line.partition("=")[::2] for line in path.read_text().split("\0") if line)
        told = {"SLURM_TIME_FORMAT", "SLURM_BITSTR_LEN"}
        assert not {*AROUND, *SETTINGS} & pairs.keys() - told, path
    assert len(list(tmp_path.glob("*.environment"))) == 5


def _run_script(tmp_path: Path, text: str, **variables: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "slurm").mkdir()
    slurm = FakeSlurm(
        tmp_path / "slurm", scontrol='case "$1" in show) echo n0;; *) echo "asked: $*";; esac',
        squeue='case "$*" in *=RestartCnt*) echo "$RESTARTS";; *%T*) echo RUNNING;; esac',
        sleep=":",
    )  # fmt: skip
    own = {name: value for name, value in AROUND.items() if name != "SLURM_JOB_ID"}
    return slurm.run(text, **{**own, "RESTARTS": "0  ", "SLURM_JOB_NODELIST": "n0", **variables})


def test_a_script_touches_its_own_job_alone(tmp_path):
    """Handed to sbatch by hand from inside an element of an array, whose numbers it then has."""
    spec = job(
        workdir=str(tmp_path), folder=str(tmp_path / "run"), requeue=True,
        command=("sh", "-c", 'echo "ids [$SLURM_ARRAY_JOB_ID] $MEGATRON_MONE_ATTEMPT"; exit 9'),
    )  # fmt: skip
    done = _run_script(tmp_path, sbatch_script(spec))
    assert done.returncode == 9, done.stderr
    assert "ids [] 70000.0\n" in done.stdout
    assert re.findall("asked: requeue.*", done.stdout) == ["asked: requeue 70000"]
    assert {path.name for path in (tmp_path / "run/attempts").iterdir()} == {
        "70000.0.start.json", "70000.0.end.json", "70000.failures",
    }  # fmt: skip


def test_ranks_and_nodes_are_those_of_the_job_whatever_was_around(tmp_path):
    spec = job(workdir=str(tmp_path), folder=str(tmp_path / "run"), nodes=2, tasks_per_node=3)
    assert _run_script(tmp_path, sbatch_script(spec)).returncode == 0
    words = (tmp_path / "slurm/srun.words").read_text().split("\0")
    assert {"--nodes=2", "--ntasks=6", "--ntasks-per-node=3"} <= set(words)


def test_restarts_are_those_that_slurm_counts(tmp_path):
    spec = job(workdir=str(tmp_path), folder=str(tmp_path / "run"))
    assert _run_script(tmp_path, sbatch_script(spec), RESTARTS="2").returncode == 0
    assert (tmp_path / "run/attempts/70000.2.end.json").exists()


def test_ranks_here_are_not_ranks_of_a_run_around_them(tmp_path, monkeypatch):
    for name, value in {**AROUND, **USERS, "PATH": os.environ["PATH"]}.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "work").mkdir()
    spec = job(
        workdir=str(tmp_path / "work"), folder=str(tmp_path / "run"), tasks_per_node=2,
        command=("bash", "-c", "env -0"),
    )  # fmt: skip
    assert run_local(spec) == 0
    for rank, log in enumerate(sorted(tmp_path.glob("run/logs/*/rank-*.log"))):
        seen = dict(line.partition("=")[::2] for line in log.read_text().split("\0") if line)
        assert (seen["RANK"], seen["WORLD_SIZE"], seen["MASTER_ADDR"]) == (
            str(rank), "2", "127.0.0.1"
        )  # fmt: skip
        assert seen["MEGATRON_MONE_ATTEMPT"].startswith("local-")
        assert seen["CUDA_VISIBLE_DEVICES"] == "5"  # of this allocation: ours to use
        assert seen["SLURM_JOB_ID"] == "60"  # a program may start steps in it
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "PMI_RANK", "SLURM_PROCID", "GROUP_RANK",
                     "OMPI_COMM_WORLD_RANK", "SLURM_NTASKS"):  # fmt: skip
            assert name not in seen
        assert seen["OMPI_MCA_btl"] == "tcp"


def test_what_is_no_rank_s_stays():
    assert without_ranks(USERS) == USERS


@pytest.fixture
def here(tmp_path, monkeypatch):
    (tmp_path / "sbatch").write_text(f'#!/bin/bash\nenv >"{tmp_path}/environment"\necho 42\n')
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site.yaml").write_text("tasks_per_node: 1\npartition: gpu\n")
    return tmp_path


def test_a_profile_s_defaults_are_fields_and_said(here, monkeypatch, capsys):
    """sbatch would put them over the script: a job would get another account than the file says."""
    for name, value in {
        "SBATCH_ACCOUNT": "physics", "SBATCH_PARTITION": "debug", "SBATCH_EXCLUSIVE": "user",
        "SBATCH_QOS": "", "SBATCH_CLUSTERS": "big",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert main(["submit", "--launch", "site.yaml", "--name", "x", "--", "true"]) == 0
    said = capsys.readouterr().err
    assert "account = 'physics' from SBATCH_ACCOUNT\n" in said
    assert "SBATCH_PARTITION=debug is left out: partition = 'gpu' is given\n" in said
    assert "SBATCH_EXCLUSIVE=user is left out: give a field" in said
    assert "SBATCH_CLUSTERS=big is left out: set SLURM_CLUSTERS" in said
    script = (here / "runs/x/job.sbatch").read_text()
    assert "#SBATCH --account=physics\n" in script
    assert "#SBATCH --partition=gpu\n" in script
    assert "--qos" not in script
    assert "SBATCH_" not in (here / "environment").read_text()


def test_a_flag_wins_over_a_profile_s_default(here, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "5")
    words = ["submit", "--launch", "site.yaml", "--time-limit", "10", "--dry-run", "--", "true"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "#SBATCH --time=10\n" in said.out
    assert "SBATCH_TIMELIMIT=5 is left out: time_limit = '10' is given" in said.err


def test_a_wrong_default_is_one_line(here, monkeypatch, capsys):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "soon")
    assert main(["submit", "--launch", "site.yaml", "--", "true"]) == 2
    assert "time_limit = 'soon'" in capsys.readouterr().err.splitlines()[-1]


def test_in_a_job_slurm_s_own_sbatch_variables_are_no_news():
    assert site_defaults({"SLURM_JOB_ID": "1", "SBATCH_MEM_BIND": "local"}, {}) == ({}, [])
    assert site_defaults({"SLURM_JOB_ID": "1", "SBATCH_QOS": "a"}, {})[0] == {"qos": "a"}


def test_ranks_here_take_no_defaults_of_sbatch(here, monkeypatch):
    monkeypatch.setenv("SBATCH_TIMELIMIT", "soon")
    assert main(["run", "--launch", "site.yaml", "--name", "x", "--", "true"]) == 0
    assert json.loads((here / "runs/x/manifest.json").read_text())["attempts"][0]["status"] == 0
