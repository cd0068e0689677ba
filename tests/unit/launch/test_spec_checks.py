"""A wrong field is refused in one line that names it, its value and the fix."""

import sys

import pytest

from launch.slurm.script import sbatch_options
from launch.spec.checks import OPTION_FIELDS, SECONDS_OF_NO_LIMIT, limit_seconds
from launch.spec.launch_spec import Case, Container
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
    "a secret": ({"environment": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY holds a secret"),
    "a secret in an address": (
        {"environment": {"MLFLOW_TRACKING_URI": "https://me:hunter2@host"}},
        "MLFLOW_TRACKING_URI holds a secret",
    ),
    "a variable of bash": ({"environment": {"UID": "0"}}, "UID is set by"),
    "a variable of Slurm": ({"environment": {"SLURM_JOB_ID": "1"}}, "SLURM_JOB_ID is set by"),
    "an option with a field": ({"sbatch": {"time": "5"}}, "give time_limit"),
    "an option with dashes": ({"sbatch": {"--hold": ""}}, "without dashes"),
    "two GPU types": ({"gpus_per_node": 8, "gpu_type": "a,b"}, "gpu_type = 'a,b'"),
    "a type of no GPU": ({"gpu_type": "h100"}, "gpu_type = 'h100' without gpus_per_node"),
    "a signal that sbatch refuses": ({"signal_lead_seconds": 65536}, "must be at most 65535"),
    "memory that is none": ({"memory": "1.5G"}, "memory = '1.5G'"),
    "no rendezvous": ({"environment": {"MASTER_ADDR": ""}}, "MASTER_ADDR is empty"),
    "two rendezvous": (
        {"environment": {"MASTER_ADDR": "a"}, "rendezvous_suffix": "i"},
        "MASTER_ADDR = 'a' and rendezvous_suffix = 'i'",
    ),
    "a rendezvous's end that is none": ({"rendezvous_suffix": "-ib x"}, "rendezvous_suffix"),
    "a port that is none": ({"environment": {"MASTER_PORT": "0"}}, "MASTER_PORT = '0'"),
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


# What sbatch takes beside fields of ours: option, value, fields, and what the refusal names.
CONTRADICTIONS = [
    ("ntasks", "8", {}, "give nodes and tasks_per_node"),
    ("tasks-per-node", "8", {}, "give tasks_per_node"),
    ("ntasks-per-socket", "4", {}, "give tasks_per_node"),
    ("gpus", "16", {"gpus_per_node": 8}, "give nodes and gpus_per_node"),
    ("gpus-per-node", "8", {}, "give gpus_per_node"),
    ("gpus-per-task", "1", {"gpus_per_node": 8}, "each rank would see one device"),
    ("gpu-bind", "single:1", {"gpus_per_node": 8}, "each rank would see one device"),
    ("ntasks-per-gpu", "1", {"gpus_per_node": 8}, "each rank would see one device"),
    ("tres-per-task", "gres/gpu:1", {}, "each rank would see one device"),
    ("gres", "gpu:h100:8", {}, "asks for GPUs: give gpus_per_node = h100:8"),
    ("gres", "lustre:1,gpu:4", {}, "give gpus_per_node = 4"),
    ("mem-per-cpu", "4G", {"memory": "0"}, "and memory = '0': leave one out"),
    ("mem-per-gpu", "64G", {"memory": "64G", "gpus_per_node": 8}, "and memory = '64G'"),
    ("mem-per-gpu", "64G", {}, "without gpus_per_node"),
    ("cpus-per-gpu", "12", {"cpus_per_task": 12, "gpus_per_node": 8}, "and cpus_per_task = 12"),
    ("oversubscribe", "", {"exclusive": True}, "and exclusive = True"),
    ("export", "NIL", {}, "give ALL or NONE, and variables of the ranks in environment"),
    ("export", "A=1", {}, "in environment"),
    ("export-file", "x", {}, "give environment"),
    ("wait", "", {}, "submit does not wait"),
    ("quiet", "", {}, "would not say the job's number"),
    ("test-only", "", {}, "give --test-only"),
    ("clusters", "big", {}, "set SLURM_CLUSTERS"),
    ("no-kill", "", {}, "a job that lost a node is started again"),
    ("distribution", "cyclic", {}, "ranks are numbered node by node"),
    ("container-image", "x", {}, "give container"),
    ("container", "/bundle", {}, "give container"),
    ("no-requeue", "", {}, "give requeue"),
    # sbatch takes the begin of a name for the whole.
    ("gpus-per-tas", "1", {}, "'gpus-per-tas' is short for 'gpus-per-task': write it whole"),
    ("part", "x", {}, "'part' is short for 'partition'"),
    ("n", "8", {}, "'n' is not an option of sbatch: write its long name"),
    ("gpus_per_task", "1", {}, "without dashes (did you mean 'gpus-per-task'?)"),
]


@pytest.mark.parametrize(("option", "value", "fields", "said"), CONTRADICTIONS)
def test_an_option_of_sbatch_that_contradicts_us_is_named_with_the_fix(option, value, fields, said):
    with pytest.raises(ValueError) as refusal:
        job(sbatch={option: value}, **fields)
    assert str(refusal.value).startswith("sbatch: ")
    assert option in str(refusal.value)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("comment", "a b"), ("begin", "now+3600"), ("hold", ""), ("nice", "100"), ("wckey", "x"),
        ("exclude", "n[7-9]"), ("nodelist", "n1"), ("switches", "1@10:00"), ("licenses", "a:2"),
        ("gres", "lustre:1"), ("cpus-per-gpu", "12"), ("mem-per-gpu", "64G"), ("export", "NONE"),
        ("mem-per-cpu", "4G"), ("distribution", "block:cyclic"), ("tmp", "1G"), ("time-min", "5"),
        ("reboot", ""), ("an-option-of-a-plug-in", "x"),
    ],
)  # fmt: skip
def test_other_options_of_sbatch_are_passed_on(option, value):
    assert (option, value) in sbatch_options(job(sbatch={option: value}, gpus_per_node=8))


@pytest.mark.parametrize(
    ("fields", "option"),
    [
        ({"gpus_per_node": 8, "gpu_type": "h100"}, ("gpus-per-node", "h100:8")),
        ({"gpus_per_node": 8}, ("gpus-per-node", "8")),
        ({"exclusive": True}, ("exclusive", "")),
        ({"exclusive": "user"}, ("exclusive", "user")),
        ({"time_limit": "0", "signal_lead_seconds": 300}, ("time", "0")),
        *(({"memory": size}, ("mem", size)) for size in ("0", "64000", "64G", "64g", "64GB", "1T")),
    ],
)
def test_what_sbatch_takes_reaches_it(fields, option):
    assert option in sbatch_options(job(**fields))


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
        ("infinite", SECONDS_OF_NO_LIMIT),
        ("-1", SECONDS_OF_NO_LIMIT),
        # "A time limit of zero requests that no time limit be imposed."
        ("0", SECONDS_OF_NO_LIMIT),
        ("0:00", SECONDS_OF_NO_LIMIT),
        ("00:00:00", SECONDS_OF_NO_LIMIT),
        ("0-0", SECONDS_OF_NO_LIMIT),
        ("0:30", 30),
        ("1-0:30:0", 24.5 * 3600),
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
