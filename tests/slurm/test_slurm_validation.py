"""Slurm's own judgement of a script for a large cluster, of which only the controller runs."""

from pathlib import Path

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm.commands import SlurmRefused
from tests.slurm.conftest import Boot

SCRIPT = """#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=128
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=1-00:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
srun hostname
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "train.sbatch"
    path.write_text(SCRIPT)
    return path


def test_1024_gpus_on_128_nodes_are_accepted(validation_cluster: Boot, script: Path) -> None:
    with validation_cluster(128).selected():
        answer = slurm_commands.submit(script, test_only=True)
    assert "to start at" in answer
    assert "on nodes n[0-127] in partition main" in answer
    assert "\n" not in answer


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--nodes=129", "`sinfo -o '%P %D %G %c %m'`"),
        ("--gpus-per-node=9", "`sinfo -o '%P %D %G %c %m'`"),
        ("--cpus-per-task=13", "sinfo -o"),
        ("--mem=9T", "less memory"),
        ("--partition=absent", "`sinfo -s` lists the partitions"),
        ("--constraint=absent", "`sinfo -o '%N %f'`"),
        ("--nodelist=absent", "`sinfo -N` lists the nodes"),
        ("--gres=absent:1", "`sinfo -o '%P %G'`"),
        ("--reservation=absent", "`scontrol show reservation`"),
        ("--time=soon", "write minutes, HH:MM:SS or D-HH:MM:SS"),
        ("--dependency=afterok:soon", "the job it depends on"),
        ("--array=9999999", "MaxArraySize"),
        ("--absent=1", "`sbatch --help`"),
    ],
)
def test_the_impossible_is_refused_in_one_line_with_the_fix(
    validation_cluster: Boot, script: Path, option: str, says: str
) -> None:
    with validation_cluster(128).selected(), pytest.raises(SlurmRefused) as caught:
        slurm_commands.submit(script, test_only=True, options=[option])
    assert str(caught.value).startswith("sbatch: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "srun hostname\n"], ids=["empty", "no interpreter"])
def test_a_file_that_is_no_script_is_refused(
    validation_cluster: Boot, tmp_path: Path, text: str
) -> None:
    script = tmp_path / "job with a space.sh"
    script.write_text(text)
    with validation_cluster(128).selected(), pytest.raises(SlurmRefused, match="start with #!"):
        slurm_commands.submit(script)


def test_what_is_only_tested_is_not_submitted(validation_cluster: Boot, script: Path) -> None:
    with validation_cluster(128).selected():
        slurm_commands.submit(script, test_only=True)
        assert slurm_commands.queue(["1"]) == []
