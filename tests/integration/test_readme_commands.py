"""README's commands do what they say, typed as printed: each is read out of README.md, and of the
documents that its first steps went to, and run.

They run in a folder that looks like a fresh checkout, in a shell as README describes it. Only sizes
differ, by `FORMS`: steps, ranks, widths, placeholders. A command that FORMS does not know, and a
form of no command, fail.
"""

import os
import random
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training_cases import ROOT

PREFIX = "out/data/mine"
_SHORT = "--train-iters 2 --lr-warmup-iters 0 --eval-iters 1"
_ONE_RANK = "--expert-model-parallel-size 1"
_NARROW = "--hidden-size 64 --moe-ffn-hidden-size 64 --ffn-hidden-size 64"
_PROGRAM = (
    r"(?:[A-Z_]+=\S+ )*(?:make|torchrun|python|\.venv/bin/python|sh|\.|tools/\w+\.(?:py|sh)) "
)
_MAKE = ("make", "make -n")  # says what it would run: the real ones take minutes to hours


@dataclass(frozen=True)
class Form:
    """How a command of README is run here, and what it must say."""

    says: str
    """A regular expression that is found in what it prints."""
    sizes: tuple[tuple[str, str], ...] = ()
    """Replaced in the command, in turn; what is to be replaced must be there."""
    also: str = ""
    """Appended to it."""
    status: int = 0


_NO_RUN = "is neither a run nor a job"  # nothing was submitted: that is for tests/slurm
FORMS = {
    "make demo": Form(r"-m tools\.demo", (_MAKE,)),
    "STEPS=20 make demo": Form(r"-m tools\.demo --steps 20", (_MAKE,)),
    "make test": Form(r"-m tools\.run_tests", (_MAKE,)),
    "make lint": Form("-m ruff check .*-m mypy", (_MAKE,)),
    "make bench": Form(r"-m tools\.bench_experts --grid quick", (_MAKE,)),
    "GRID=full make bench": Form(r"-m tools\.bench_experts --grid full", (_MAKE,)),
    "make setup": Form(r"sh tools/bootstrap\.sh", (_MAKE,)),
    ". .venv/bin/activate": Form(r"/bin/python$", also="&& command -v python"),
    "python -m megatron_mone --help": Form(r"(?s)profile.*plan"),
    "python -m megatron_mone.kernels": Form(r"(?m)^cpu +usable"),
    ".venv/bin/python -m tools.prepare_data --input texts/ --output-prefix out/data/mine "
    "--tokenizer bpe:4096": Form(r"3 files read, 0 left out\ndocuments +\d\d\d? \(.txt cut"),
    "torchrun --nproc-per-node 2 -m megatron_mone.pretrain --config configs/demo-mone.yaml "
    "--data-path PREFIX_text_document --tokenizer-model PREFIX.tokenizer --save out/run "
    "--load out/run": Form(
        "validation loss at iteration 2 ",
        (("--nproc-per-node 2", "--nproc-per-node 1"), *(("PREFIX", PREFIX),) * 2),
        f"{_SHORT} {_ONE_RANK}",
    ),
    ".venv/bin/python tools/profile.py --config configs/profile-ep4.yaml --ranks 4 --steps 30 "
    "--warm-up 20 --windows 10 --against moe,grouped_mm --routing replayed --out out/profile "
    "--data-path PREFIX_text_document --tokenizer-model PREFIX.tokenizer": Form(
        r"wrote out/profile/profile\.json and out/profile/report\.html",
        (("--ranks 4", "--ranks 1"), ("--steps 30", "--steps 1"), ("--warm-up 20", "--warm-up 1"),
         ("--windows 10", "--windows 1"), *(("PREFIX", PREFIX),) * 2),
        f"{_ONE_RANK} --micro-batch-size 1 --global-batch-size 1 "
        f"--lr-warmup-iters 0 {_NARROW}",
    ),
    "tools/merge_profile.py": Form(
        "written to out/profile/profile.json", (("tools", "python tools"),), "out/profile"
    ),
    "tools/compare.py A B": Form(
        "no regression", (("tools", "python tools"), ("A B", "out/profile out/profile"))
    ),
    ".venv/bin/python tools/plan_scale.py --config configs/plan/moe-671b-a37b-mone-1024.yaml "
    "--gpus 1024 --against moe,blocks:mone_neuron_block=512 --json out/plan/plan.json": Form(
        r"(?s)mone .*moe .*blocks .*wrote out/plan/plan\.json",
        (("configs/plan/moe-671b-a37b-mone-1024.yaml", "small-plan.yaml"), ("1024", "8"),
         ("=512", "=128")),
    ),
    "python tools/megatron_unit_tests.py CHECKOUT": Form(  # of Megatron-LM, and there is none here
        r"megatron-mone: error: .*CHECKOUT", status=2
    ),
    "tools/check_published.py": Form("usage: ", (("tools", "python tools"),), "--help"),
    "python -m launch run --config configs/demo-mone.yaml -- $D --train-iters 60": Form(
        "demo-mone: 1 ranks here, logs in ",
        (("--train-iters 60", _SHORT), ("run --config", "run --tasks-per-node 1 --config")),
        _ONE_RANK,
    ),
    "python -m launch results demo-mone": Form(
        r"(?s)finished +2 .*runs/demo-mone/results\.html"
    ),
    "python -m launch submit --launch cpu-node.yaml --config configs/demo-mone.yaml "
    "--name one-node -- $D --train-iters 60": Form(
        "(?s)#SBATCH --ntasks-per-node=2.*--train-iters 60", (("--name", "--dry-run --name"),)
    ),
    "python -m launch submit --config configs/plan/moe-30b-a3b-mone-128.yaml --nodes 16 "
    "-- --mock-data": Form(r"(?m)^#SBATCH --nodes=16$", (("--nodes", "--dry-run --nodes"),)),
    "python -m launch sweep --config configs/demo-mone.yaml --grid r=1/2,1/4,1/8 -- $D": Form(
        r"(?m)^#SBATCH --array=0-1", (("--config", "--dry-run --config"), (",1/8", "")),
    ),
    "python -m launch submit --config FILE --nodes 16 --profile --against moe -- $D": Form(
        r"(?m)^#SBATCH --nodes=16$",
        (("FILE", "configs/plan/moe-30b-a3b-mone-128.yaml"), ("--nodes", "--dry-run --nodes")),
    ),
    "python -m launch status one-node": Form(_NO_RUN, status=2),
    "python -m launch status moe-30b-a3b-mone-128": Form(_NO_RUN, status=2),
    "python -m launch logs moe-30b-a3b-mone-128": Form(_NO_RUN, status=2),
}  # fmt: skip

ELSEWHERE = {
    "python -m tools.bench_layer": "unit/benchmarking/test_bench_layer.py",
    # Its dots are Megatron-LM's own arguments, and its script is not in Megatron's package.
    "torchrun ... -m megatron_mone.cpu_emulation pretrain_gpt.py --transformer-impl local ...":
        "unit/cpu_emulation/test_emulation_stock_script.py",
}  # fmt: skip
"""Commands that another test runs, in a short form too."""


def printed_commands(text: str) -> list[str]:
    """The commands of code blocks and code spans, each once, in order; none of comments."""
    found = []
    joined = re.sub(r"(?s)<!--.*?-->", "", text).replace("\\\n", " ")
    for block, span in re.findall(r"(?m)^ {4}(\S.*)$|`([^`\n]+)`", joined):
        command = block.removeprefix("$ ") or span
        prompted = block.startswith("$ ")
        if prompted or re.match(_PROGRAM, f"{command} "):
            found.append(" ".join(re.sub(r" # .*", "", f"{command} ").split()))
    return [command for command in dict.fromkeys(found) if " " in command or ".py" in command]


def section(name: str, heading: str = "") -> str:
    """A document, or what stands under one of its headings."""
    text = (ROOT / name).read_text(encoding="utf-8")
    return text if not heading else text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


DOCUMENTS = {
    "README.md": section("README.md"),
    "docs/TRAINING.md": section("docs/TRAINING.md"),
    "docs/LAUNCH.md": section("docs/LAUNCH.md", "From a laptop to 16 nodes"),
    "docs/TESTS.md": section("docs/TESTS.md"),
}
COMMANDS = printed_commands("\n".join(DOCUMENTS.values()))


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with this checkout's files, none of its outputs, and the texts of a newcomer."""
    activate = Path(sys.prefix) / "bin" / "activate"
    if not activate.is_file():
        pytest.skip("this Python is of no virtual environment, which README's commands stand in")
    folder = tmp_path_factory.mktemp("checkout")
    for path in ROOT.iterdir():
        if path.name not in (".venv", ".git", "out", "runs", "build"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "texts").mkdir()
    words = ["the", "old", "tree", "and", "a", "stone", "of", "light.\n\n"]
    draw = random.Random(0)
    for name in ("sea.txt", "wood.txt", "hill.txt"):
        (folder / "texts" / name).write_text(" ".join(draw.choices(words, k=6000)))
    (folder / "cpu-node.yaml").write_text(
        'tasks_per_node: 2\ntime_limit: "01:00:00"\nsignal_lead_seconds: 300\nrequeue: true\n'
    )
    (folder / "small-plan.yaml").write_text(
        "model: {num_layers: 1, hidden_size: 128, num_attention_heads: 2, ffn_hidden_size: 512,\n"
        "  num_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 512, swiglu: true,\n"
        "  add_bias_linear: false, normalization: RMSNorm, vocab_size: 1024,\n"
        "  max_position_embeddings: 4096, mone_neuron_ratio: 0.25}\n"
        "parallel: {expert_model_parallel_size: 8}\ncluster: gpu\ntrain: plan-4k\n"
    )
    return folder


def run_as_printed(command: str, folder: Path) -> tuple[int, str]:
    """(exit status, all it printed) of a command line in a newcomer's shell."""
    data = f"--data-path {PREFIX}_text_document --tokenizer-model {PREFIX}.tokenizer"
    hidden = ("PYTHONPATH", "SLURM_", "SBATCH_", "MAKE", "MFLAGS")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"D": data}
    shell = subprocess.Popen(
        ["bash", "-c", f". .venv/bin/activate && {command}"], cwd=folder, env=environment,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed = shell.communicate(timeout=900)[0]
    finally:
        if shell.poll() is None:
            os.killpg(shell.pid, signal.SIGKILL)
            shell.wait()
    return shell.returncode, printed


def test_every_command_has_a_form_and_every_form_a_command():
    assert sorted(COMMANDS) == sorted([*FORMS, *ELSEWHERE])


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_another_test_runs(command):
    """Its module and the command's agree on what is started."""
    module = re.search(r"-m (\S+)", command)[1]
    assert f'"-m", "{module}"' in (ROOT / "tests" / ELSEWHERE[command]).read_text(encoding="utf-8")


def needed_first(command: str) -> int:
    """README shows how to train before how to prepare data, and results come after a run."""
    if "prepare_data" in command or command not in COMMANDS:
        return -1
    return COMMANDS.index(command)


@pytest.mark.parametrize("command", sorted(FORMS, key=needed_first))
def test_command(checkout, command):
    form = FORMS[command]
    for printed, used in form.sizes:
        assert printed in command, f"{printed!r} of FORMS is not in README's command"
        command = command.replace(printed, used, 1)
    status, said = run_as_printed(f"{command} {form.also}", checkout)
    assert status == form.status, said[-4000:]
    assert re.search(form.says, said.strip()), said[-4000:]


def test_every_file_that_readme_names_is_there():
    folders = "megatron_mone|configs|docs|tools|tests|launch"
    found, missing = 0, []
    for name, text in DOCUMENTS.items():
        links = re.findall(r"\]\((?!http)([^)#]+)[^)]*\)", text)
        spans = re.findall(rf"`((?:{folders})/[\w./*-]+)`", text)
        paths = [*((ROOT / name).parent / link for link in links), *(ROOT / span for span in spans)]
        found += len(paths)
        missing += [path for path in paths if not path.exists()]
    assert found > 20
    assert missing == []
