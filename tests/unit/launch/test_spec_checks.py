"""A wrong field is refused in one line that names it, its value and the fix."""

import sys

import pytest

from launch.job_spec import Case, Container
from launch.script import sbatch_options
from launch.spec_checks import OPTION_FIELDS, SECONDS_OF_NO_LIMIT, limit_seconds
from tests.unit.launch.launch_cases import SPECS, job

WRONG = {
    "no name": ({"name": ""}, "name = ''"),
    "a path as a name": ({"name": "a/b"}, "without '/'"),
    "an option as a name": ({"name": "-x"}, "not beginning with"),
    "no program": ({"command": ()}, "command = ''"),
    "an option as a program": ({"command": ("-c", "x")}, "command = '-c'"),
    "a relative folder": ({"folder": "runs/a"}, "must be an absolute path"),
    "no nodes": ({"nodes": 0}, "nodes = 0 must be at least 1"),
    "no tasks": ({"tasks_per_node": 0}, "tasks_per_node = 0"),
    "negative GPUs": ({"gpus_per_node": -1}, "gpus_per_node = -1"),
    "two ranks a GPU": ({"gpus_per_node": 4, "tasks_per_node": 8}, "a GPU has one rank"),
    "a time in words": ({"time_limit": "4h"}, "time_limit = '4h'"),
    "a signal after the end": (
        {"time_limit": "5", "signal_lead_seconds": 300},
        "signal_lead_seconds = 300",
    ),
    "memory in words": ({"memory": "64 GB"}, "memory = '64 GB'"),
    "an array in words": ({"array": "all"}, "array = 'all'"),
    "an array over one checkpoint": ({"array": "0-1", "saves_checkpoints": True}, "--grid"),
    "an array and a grid": ({"array": "0-1", "cases": (Case("/x", ()),)}, "leave one out"),
    "a variable of the launcher": ({"environment": {"RANK": "0"}}, "RANK is set by"),
    "a variable of the attempt": (
        {"environment": {"MEGATRON_MONE_ATTEMPT": "1"}},
        "MEGATRON_MONE_ATTEMPT is set by",
    ),
    "no failure": ({"max_failures": 0}, "max_failures = 0 must be at least 1"),
    "a negative wait": ({"backoff_seconds": -1}, "backoff_seconds = -1 must be at least 0"),
    "a limit below the first wait": (
        {"backoff_seconds": 100, "backoff_limit_seconds": 99},
        "backoff_limit_seconds = 99 is below backoff_seconds = 100",
    ),
    "a negative watchdog": ({"hang_seconds": -1}, "hang_seconds = -1"),
    "negative spare nodes": ({"preflight": True, "spare_nodes": -1}, "spare_nodes = -1"),
    "spare nodes for nothing": ({"spare_nodes": 2}, "spare_nodes = 2 without preflight"),
    "an unknown limit": (
        {"preflight_limits": {"tmp_disk_gb": "1"}},
        "preflight_limits: 'tmp_disk_gb' = '1'",
    ),
    "a limit in words": (
        {"preflight_limits": {"tmp_disk_gib": "much"}},
        "preflight_limits: tmp_disk_gib = 'much'",
    ),
    "a variable of bash": ({"environment": {"UID": "0"}}, "UID is set by"),
    "a variable of Slurm": ({"environment": {"SLURM_JOB_ID": "1"}}, "SLURM_JOB_ID is set by"),
    "an option with a field": ({"sbatch": {"time": "5"}}, "give time_limit"),
    "an option with dashes": ({"sbatch": {"--hold": ""}}, "without dashes"),
    "an unknown container": ({"container": Container("pixys", "x")}, "did you mean 'pyxis'"),
    "an option as an image": ({"container": Container("pyxis", "--x")}, "image = '--x'"),
    "two environments": (
        {"container": Container("pyxis", "x"), "virtual_environment": "/venv"},
        "leave one out",
    ),
    "two mounts in one": ({"container": Container("pyxis", "x", ("/a,/b",))}, "without a comma"),
    "a folder that no mount can name": (
        {"container": Container("pyxis", "x"), "workdir": "/a:b"},
        "':' ends",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_field_is_named_in_one_line(kind):
    fields, said = WRONG[kind]
    with pytest.raises(ValueError) as refusal:
        job(**fields)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90 * 60),
        ("90:30", 90 * 60 + 30),
        ("4:00:00", 4 * 3600),
        ("1-12", 36 * 3600),
        ("1-12:30", 36.5 * 3600),
        ("2-0:0:5", 48 * 3600 + 5),
        ("UNLIMITED", SECONDS_OF_NO_LIMIT),
    ],
)
def test_a_time_limit_is_what_slurm_takes_it_for(text, seconds):
    """The forms of sbatch's manual under --time."""
    assert limit_seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "4h", "1:2:3:4", "-5", "1-", "٤"])
def test_other_times_are_refused(text):
    with pytest.raises(ValueError, match="time_limit"):
        limit_seconds(text)


def test_a_gpu_has_a_rank():
    assert job(gpus_per_node=8).tasks_per_node == 8
    assert job().tasks_per_node == 1


def test_the_ranks_interpreter_is_the_one_they_bring():
    assert job().python == sys.executable
    assert job(virtual_environment="/venv").python == "python"
    assert job(modules=("python",)).python == "python"
    assert job(container=Container("pyxis", "x")).python == "python"


@pytest.mark.parametrize("name", SPECS)
def test_what_the_script_sets_cannot_be_passed_on_a_second_time(name):
    spec = SPECS[name]()
    assert {option for option, _ in sbatch_options(spec)} - set(spec.sbatch) <= set(OPTION_FIELDS)
