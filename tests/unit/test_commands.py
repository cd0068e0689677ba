"""`megatron-mone`: its commands' flags, its mistakes in one line, its completion, and `train`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import __main__ as launcher
from megatron_mone import pretrain
from megatron_mone.commands.app import main
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.model.run_config import find_run, load_run
from tests.training_cases import ROOT

COMMANDS = {
    "train": "--ranks", "prepare": "--json-key", "profile": "--warm-up", "compare": "--threshold",
    "plan": "--sweep", "calibrate": "--prepare",
    "merge-profile": "--skip-unreadable", "gather-profiles": "--nodes",
    "report-plan": "--out", "inspect": "--mone", "generate": "--top-p", "eval": "--tasks",
    "export-load": "--steps",
    "run": "--hang-seconds", "submit": "--test-only", "sweep": "--grid", "status": "--runs",
    "cancel": "--runs", "logs": "--follow", "resume": "--runs",
}  # fmt: skip

HEAVY = {"torch", "megatron", "matplotlib", "transformers"}


def status_of(*words: str) -> int:
    try:
        return main(words)
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_shows_its_flags_alone(name, capsys):
    assert status_of(name, "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: ")
    assert COMMANDS[name] in printed
    assert ("--warm-up" in printed) == (name == "profile")
    assert ("--test-only" in printed) == (name in ("run", "submit", "sweep"))


def test_help_waits_for_no_heavy_import():
    code = (
        "import sys; from megatron_mone.commands.app import main; main(['--help'])\n"
        f"assert not {HEAVY!r} & set(sys.modules), {HEAVY!r} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in (*COMMANDS, "bench"))


@pytest.mark.parametrize(
    ("typed", "offered"),
    [("megatron-mone pro", "profile"), ("megatron-mone profile --warm", "--warm-up"),
     ("megatron-mone bench la", "layer"), ("megatron-mone can", "cancel"),
     ("megatron-mone submit --test", "--test-only"),
     ("megatron-mone bench experts --tok", "--tokens")],
)  # fmt: skip
def test_a_shell_completes_commands_and_flags(typed, offered):
    """At a key press: so nothing heavy is imported for it."""
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" "))}
    code = (
        "import atexit, sys; from megatron_mone.commands import app; sys.argv[0] = 'megatron-mone'"
    )
    code += f"; atexit.register(lambda: print(*{HEAVY!r} & set(sys.modules), file=sys.stderr))"
    code += "; app.main()"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "_MEGATRON_MONE_COMPLETE": "complete_bash", **asked},
    )  # fmt: skip
    assert done.stdout.split() == [offered], done.stderr
    assert done.stderr.strip() == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "Missing command"),
        (("profle",), "invalid choice: 'profle' (did you mean 'profile'?)"),
        (("--verson",), "unrecognized arguments: --verson (did you mean '--version'?)"),
        (("compare", "a"), "the following arguments are required: RUN_B[:NAME]"),
        (("--hlep",), "unrecognized arguments: --hlep (did you mean '--help'?)"),
        (("compare", "a", "b", "c"), "unrecognized arguments: c; see --help"),
        (("check-published", "--runs", "no"), "--runs no holds no run: give tests/published of a"),
        (("train", "--config", "no.yaml"), "no.yaml cannot be read: No such file or directory\n"),
        (("plan", "--model", "demo-mone"), "--gpus is missing: give the devices of the job"),
        (("train", "--config", "demo-mone", "--ranks", "0"), "--ranks 0 is not allowed: give at"),
        (("calibrate", "--model", "demo-mone"), "--gpus is missing: give the devices of the job"),
        (("calibrate", "--gpus", "2"), "give --model NAME, or --config RUN.yaml, and not both"),
        (("calibrate", "--seconds", "0"), "--seconds 0 is not allowed: it must be above 0"),
        (("calibrate", "--row-seconds", "0"), "--row-seconds 0 is not allowed: it must be above 0"),
        (("calibrate", "--prepare", "--prepared"), "--prepared takes it as it is: give one"),
        (("calibrate", "--ranks", "0"), "--ranks 0 is not allowed: give at least 1"),
        (("calibrate", "--model", "demo-mone", "--gpus", "2", "--cluster", "h100"), "cluster 'h1"),
        (("compare", "a", "b", "--jsn", "c"), "unrecognized arguments: --jsn (did you mean"),
        (("plan", "--gpus", "many"), "argument --gpus: invalid int value: 'many'"),
        (("plan", "--gpus"), "argument --gpus: expected one argument"),
        (("plan", "--compare", "a", "--gpus", "8"), "argument --compare: expected 2 arguments"),
        (("plan", "--gpus", "8", "--compare", "a"), "argument --compare: expected 2 arguments"),
        (("plan", "--model", "--gpus", "8"), "argument --model: expected one argument"),
        (("prepare", "--corpus", "milton", "--output-prefix", "x"), "argument --corpus: "),
        (("prepare", "--output-prefix", "x"), "one of the arguments --input --corpus is required"),
        (("submit", "stray", "--", "true"), "unknown argument 'stray'"),
        (("submit", "--dry-run", "--test-only"), "argument --test-only: not allowed with"),
        (("train", "--config", "demo-mnoe"), "(did you mean 'demo-mone'?)"),
        (("bench", "layer", "--experts", "0"), "--experts = 0: it must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, said, capsys):
    assert status_of(*words) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_both_names_are_one_program(capsys):
    assert status_of("--version") == 0
    printed = capsys.readouterr().out
    done = subprocess.run(
        [sys.executable, "-m", "megatron_mone", "--version"], cwd=ROOT, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.stdout == printed == "megatron-mone 0.1.0\n"


@pytest.mark.parametrize(
    ("name", "file"),
    [("demo-mone", "demo-mone.yaml"), ("configs/demo-mone.yaml", "demo-mone.yaml"),
     ("moe-30b-a3b-mone-128", "plan/moe-30b-a3b-mone-128.yaml")],
)  # fmt: skip
def test_a_shipped_run_is_found_by_name_from_any_folder(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_run(Path(name)) == CONFIG_ROOT / file
    assert load_run(Path(name)) == load_run(CONFIG_ROOT / file)
    own = tmp_path / name
    own.parent.mkdir(exist_ok=True)
    own.write_text("model: {num_layers: 1}\n")
    assert find_run(Path(name)) == Path(name)  # a user's own file is meant before ours


@pytest.fixture
def launched(monkeypatch, tmp_path) -> list[list[str]]:
    """Words that reach the launcher."""
    found: list[list[str]] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(launcher, "main", lambda words: found.append(words) or 0)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return found


def test_train_without_data_uses_mock_data_and_says_so(launched, capsys):
    assert status_of("train", "--config", "demo-mone", "--train-iters", "3") == 0
    own = ["run", "--config", str(CONFIG_ROOT / "demo-mone.yaml"), "--name", "demo-mone-mock", "--"]
    mock = ["--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "4096"]
    assert launched == [[*own, "--train-iters", "3", *mock]]
    assert "no data is named: training on Megatron's mock data" in capsys.readouterr().err


def test_train_on_data_is_launch_run(launched, capsys):
    words = ["--data-path", "x", "--tokenizer-model", "t", "--save=x"]
    assert status_of("train", "--config", "demo-mone", "--ranks", "4", *words) == 0
    own = ["--name", "demo-mone", "--tasks-per-node", "4", "--", *words]
    assert launched[0][3:] == own
    assert capsys.readouterr().err == ""


def test_a_run_has_the_name_that_train_is_given(launched):
    """What to do where the folder holds a run of another config."""
    assert status_of("train", "--config", "demo-mone", "--name", "second") == 0
    assert launched[0][3:5] == ["--name", "second"]


def test_train_under_torchrun_is_one_rank_of_the_entry_point(launched, monkeypatch):
    seen: list[list[str]] = []
    monkeypatch.setattr(pretrain, "main", seen.append)
    ours = list(sys.argv)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert status_of("train", "--config", "demo-mone", "--mock-data", "--seed", "1") == 0
    file = str(CONFIG_ROOT / "demo-mone.yaml")
    assert seen == [["--config", file, "--mock-data", "--seed", "1"]]
    assert (launched, sys.argv) == ([], ours)
    for flag in (("--ranks", "2"), ("--name", "x")):
        assert status_of("train", "--config", "demo-mone", *flag) == 2
