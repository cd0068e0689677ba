"""doctor: what is installed and works here, what a run file lacks, and how to get it."""

import json
import sys

import pytest

from megatron_mone.commands import doctor
from megatron_mone.commands.doctor import main
from megatron_mone.common import installed
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.deepspeed import supported

DEMO = str(CONFIG_ROOT / "demo-mone.yaml")


def found(capsys, *words: str, status: int = 0) -> dict:
    assert main(["--json", *words]) == status
    return json.loads(capsys.readouterr().out)


@pytest.fixture
def requires(monkeypatch):
    """Has the project require what is named."""
    return lambda *lines: monkeypatch.setattr(installed, "own", lambda: ("0.1.0", list(lines)))


def test_a_whole_installation(capsys):
    said = found(capsys)
    by_name = {one["name"]: one for one in said["installed"]}
    assert (said["missing"], said["version"]) == ([], installed.own()[0])
    assert by_name["torch"]["version"].startswith("2.")
    assert not by_name["torch"]["install"]
    assert said["works"]["ranks on CPUs"] == said["works"]["backend reference"] == ""
    assert main([]) == 0
    text = capsys.readouterr().out
    for one in said["installed"]:
        assert f"{one['use']}: {one['install']}" in text if one["install"] else one["name"] in text
    assert all(why in text for why in said["works"].values())


def test_what_the_base_lacks_is_status_2_with_the_lines_that_install_it(capsys, requires):
    requires("numpy>=99", "torch", "no-such-package", "elsewhere; extra == 'te'")
    lines = ["numpy: pip install 'numpy>=99'", "no-such-package: pip install 'no-such-package'"]
    assert found(capsys, status=2)["missing"] == lines
    assert main(["--config", DEMO]) == 2  # which is not read then
    assert all(f"  {line}\n" in capsys.readouterr().out for line in lines[:1])


def test_programs_and_folders_that_are_not_here(capsys, monkeypatch, tmp_path):
    for name in ("PATH", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("CXX", "no-compiler")
    (tmp_path / "none").touch()
    said = found(capsys)
    by_name = {one["name"]: one for one in said["installed"]}
    lines = {name: by_name[name]["install"] for name in ("C++ compiler", "Slurm", "browser")}
    assert all(line.startswith("apt-get install ") for line in lines.values())
    assert said["works"]["launch submit"].startswith("sbatch, scancel")
    assert "cannot be made" in said["works"]["plan"]


def test_a_torch_that_cannot_be_imported_is_said(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert "torch cannot be imported: " in found(capsys)["works"]["all else"]


def test_a_run_file_needs_nothing_or_each_thing_is_named(capsys):
    assert found(capsys, "--config", DEMO)["missing"] == []
    flags = "--tokenizer-type TikTokenizer --async-save --moe-router-fusion --mone-backend te "
    flags += "--moe-token-dispatcher-type flex --transformer-impl transformer_engine"
    lines = found(capsys, "--config", DEMO, "--", *flags.split(), status=2)["missing"]
    assert [line.partition(" = ")[0] for line in lines] == [
        *("async_save", "tokenizer_type", "moe_router_fusion"),
        *("moe_flex_dispatcher_backend", "backend", "transformer_impl"),
    ]
    assert "pip install tiktoken" in lines[1]


def test_deepspeed_is_named_where_it_is_not_installed(capsys, monkeypatch):
    deepspeed = ["--config", DEMO, "--", "--engine", "deepspeed"]
    said = found(capsys, *deepspeed)
    assert (said["missing"], said["works"]["engine deepspeed"]) == ([], "")
    for module in (doctor, supported):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    said = found(capsys, *deepspeed, status=2)
    assert said["works"]["engine deepspeed"] == "the package deepspeed is not installed"
    (line,) = said["missing"]
    assert line.startswith("engine = 'deepspeed' needs the package deepspeed: pip install")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--", "--lr", "1"], "--lr: flags are of a run file: give --config too"),
        (["--config", "no.yaml"], "no.yaml"),
        (["--config", DEMO, "--", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_a_mistake_is_one_line(capsys, words, said):
    assert main(words) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("megatron-mone: error: ")
    assert said in line
