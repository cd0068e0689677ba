"""Launch files and flags: text stays text, and a mistake is one line naming file and field."""

from dataclasses import fields
from pathlib import Path

import pytest

from launch.spec.file import FOLDER, SiteFlags, flag_fields, read_fields
from launch.spec.launch_spec import SITE_FIELDS, Container
from megatron_mone.common.program import parse


def _file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "site.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_values_are_the_text_that_was_written(tmp_path):
    """YAML would make 14400, 83, False and 1.1 of these."""
    text = "time_limit: 4:00:00\naccount: 0123\nqos: no\nsbatch: {comment: 1.10}\n"
    assert read_fields(_file(tmp_path, text)) == {
        "time_limit": "4:00:00",
        "account": "0123",
        "qos": "no",
        "sbatch": {"comment": "1.10"},
    }


def test_a_file_holds_every_kind_of_field(tmp_path):
    text = """
    nodes: 2
    cpus_per_task: 4
    exclusive: true
    preflight: true
    preflight_limits: {run_disk_gib: 500}
    hang_seconds: 1800
    partition:            # empty: Slurm chooses
    modules: [cuda, apptainer/1.3]
    environment: {NCCL_DEBUG: INFO, EMPTY: ""}
    container: {kind: pyxis, image: a.sqsh, mounts: [/data]}
    """
    assert read_fields(_file(tmp_path, text)) == {
        "nodes": 2,
        "cpus_per_task": 4,
        "exclusive": True,
        "preflight": True,
        "preflight_limits": {"run_disk_gib": "500"},
        "hang_seconds": 1800,
        "partition": None,
        "modules": ("cuda", "apptainer/1.3"),
        "environment": {"NCCL_DEBUG": "INFO", "EMPTY": ""},
        "container": Container("pyxis", "a.sqsh", ("/data",)),
    }


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("gpus_per_node: 8", {"gpus_per_node": 8}),
        ("gpus_per_node: h100:8", {"gpus_per_node": 8, "gpu_type": "h100"}),
        ("gpus_per_node: h100", {"gpus_per_node": 1, "gpu_type": "h100"}),
        ("gpus_per_node: nvidia_a100-sxm4-80gb:4",
         {"gpus_per_node": 4, "gpu_type": "nvidia_a100-sxm4-80gb"}),
        ("gpus_per_node: 8\ngpu_type: h100", {"gpus_per_node": 8, "gpu_type": "h100"}),
        ("exclusive: user", {"exclusive": "user"}),
        ("exclusive: false", {"exclusive": False}),
        ("rendezvous_suffix: -ib", {"rendezvous_suffix": "-ib"}),
    ],
)  # fmt: skip
def test_a_field_takes_what_sbatch_takes(tmp_path, text, fields):
    assert read_fields(_file(tmp_path, text)) == fields


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {"gpus_per_node": 8, "gpu_type": "h100"}),
        (["--gpus-per-node", "4"], {"gpus_per_node": 4, "gpu_type": "h100"}),
        (["--gpus-per-node", "a100:4"], {"gpus_per_node": 4, "gpu_type": "a100"}),
        (["--gpu-type", "a100"], {"gpus_per_node": 8, "gpu_type": "a100"}),
    ],
)
def test_a_number_of_gpus_keeps_their_type(tmp_path, words, fields):
    below = read_fields(_file(tmp_path, "gpus_per_node: h100:8"))
    assert {**below, **flag_fields(parse(SiteFlags, words)[0], below)} == fields


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nodes: 2-4", "nodes = '2-4' must be a whole number: the layout needs one; spare_nodes"),
        (
            "gpus_per_node: gpu:h100:8",
            "must be a whole number, or a type and a number, like h100:8",
        ),
        ("gpus_per_node: h100:4,v100:4", "or a type and a number, like h100:8"),
        ("exclusive: usr", "exclusive = 'usr' must be true or false, or user, mcs or topo"),
        ("node: 2", "unknown field 'node' (did you mean 'nodes'?)"),
        ("command: [rm]", "unknown field 'command'"),
        ("nodes: two", "nodes = 'two' must be a whole number"),
        ("nodes: -1", "nodes = '-1' must be a whole number"),
        ("nodes: [1]", "nodes = ['1'] must be a whole number"),
        ("exclusive: yes", "exclusive = 'yes' must be true or false"),
        ("account: [a]", "account = ['a'] must be text"),
        ("modules: cuda", "modules = 'cuda' must be a list"),
        ("environment: [A=b]", "must be a mapping"),
        ("environment: {A: [b]}", "environment: 'A' = ['b']"),
        ("container: pyxis", "must be a mapping of kind, image, mounts"),
        ("container: {kind: pyxis}", "container: image is missing"),
        ("container: {kind: pyxis, imgae: x}", "did you mean 'image'?"),
        ("nodes: 1\nnodes: 2", "'nodes' is given twice"),
        ("- nodes", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("a: !!python/object/apply:os.system [id]", "unknown field 'a'"),
    ],
)
def test_a_mistake_is_one_line_with_the_file(tmp_path, text, said):
    path = _file(tmp_path, text)
    with pytest.raises(ValueError) as refusal:
        read_fields(path)
    assert said in str(refusal.value)
    assert path in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_unknown_file_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"local, slurm \(did you mean 'slurm'\?\)"):
        read_fields("slurn")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_with_the_project_can_be_read(path):
    assert read_fields(path.stem)


def _flags(*words: str, below=None):
    return flag_fields(parse(SiteFlags, words)[0], below or {})


def test_every_field_has_a_flag():
    assert {one.name for one in fields(SiteFlags)} == set(SITE_FIELDS)


def test_flags_are_read_as_the_file_is():
    words = ["--nodes", "16", "--no-requeue", "--time-limit", "4:00:00", "--modules", "a"]
    words += ["--modules", "b", "--container", "pyxis:nvcr.io#x:y", "--partition", ""]
    assert _flags(*words) == {
        "nodes": 16,
        "requeue": False,
        "time_limit": "4:00:00",
        "modules": ("a", "b"),
        "container": Container("pyxis", "nvcr.io#x:y"),
        "partition": None,
    }


def test_variables_and_options_are_added_to_the_file_s():
    below = {"environment": {"A": "1", "B": "2"}, "sbatch": {"nice": "5"}}
    words = ("--environment", "B=x=y", "--sbatch", "hold")
    assert _flags(*words, below=below) == {
        "environment": {"A": "1", "B": "x=y"},
        "sbatch": {"nice": "5", "hold": ""},
    }


@pytest.mark.parametrize("flag", ["--environment", "--preflight-limits"])
def test_a_variable_or_a_limit_needs_a_value(flag):
    with pytest.raises(ValueError, match="'A' must be NAME=VALUE"):
        _flags(flag, "A")


def test_a_wrong_flag_names_its_field():
    with pytest.raises(ValueError, match=r"nodes = '1\.5' must be a whole number"):
        _flags("--nodes", "1.5")
