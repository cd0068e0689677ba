"""A wheel of this project, alone on the path and in another folder, does what a checkout does."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from megatron_mone.kernels.cpu import native
from tests.training_cases import ROOT

SHIPPED = ("megatron_mone", "launch")
NEEDED = (*SHIPPED, "configs", "tools", "pyproject.toml", "setup.py", "README.md", "LICENSE")


def files(folder: Path) -> set[str]:
    """All files below a folder that Python did not write, by their paths in it."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in found}


def pip(*arguments: str, cwd: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", *arguments, "--no-deps", "--quiet"],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the wheel is built from, without anything that was built here."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in NEEDED:
        if (ROOT / name).is_dir():
            built = shutil.ignore_patterns("__pycache__", "*.so", ".mone_cpu.lock", ".build-*")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=built)
        else:
            shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def installed(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content that cannot be written; beside it a user's cache folder,
    with the kernels as a first use builds them."""
    work = tmp_path_factory.mktemp("installed")
    pip("wheel", str(checkout), "--no-build-isolation", "--wheel-dir", "wheels", cwd=work)
    (wheel,) = (work / "wheels").iterdir()
    pip("install", str(wheel), "--target", "site", "--no-compile", cwd=work)
    for path in (work / "site").rglob("*"):
        path.chmod(path.stat().st_mode & ~0o222)
    kernels = work / "cache" / "megatron-mone" / "kernels"
    kernels.mkdir(parents=True)
    if native.build.find_compiler():
        shutil.copy(native.load()._name, kernels)
    return work / "site"


def run(installed: Path, cwd: Path, *command: str, status: int = 0, **environment: str) -> str:
    """What a command prints that finds this project in the installation alone."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "SLURM_", "MONE_"))}
    clean |= {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(installed.parent / "cache")}
    clean |= {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd, env=clean, timeout=600,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert done.returncode == status, done.stdout[-4000:]
    return done.stdout


def test_the_wheel_holds_the_packages_and_what_they_read(checkout, installed):
    found = {path.name for path in installed.iterdir()}
    assert found == {"bin", *SHIPPED, "megatron_mone-0.1.0.dist-info"}
    for name in SHIPPED:
        own = {path for path in files(installed / name) if not path.startswith("configs/")}
        assert own == files(checkout / name)
    assert files(installed / "megatron_mone" / "configs") == files(checkout / "configs")


def test_the_launcher_writes_a_script_that_needs_no_checkout(installed, tmp_path):
    assert "python -m launch submit" in run(installed, tmp_path, "-m", "launch", "--help")
    config = installed / "megatron_mone/configs/plan/moe-30b-a3b-mone-128.yaml"
    flags = ("--dry-run", "--nodes", "2", "--profile", "--", "--mock-data")
    script = run(installed, tmp_path, "-m", "launch", "submit", "--config", str(config), *flags)
    assert f"-m megatron_mone profile --config {config}" in script
    assert f"-m megatron_mone gather-profiles {tmp_path}/runs/" in script
    assert "tools/" not in script


def test_training_says_its_flags(installed, tmp_path):
    said = run(installed, tmp_path, "-m", "megatron_mone.pretrain", "--help")
    assert "--mone-neuron-ratio" in said


def test_kernels_are_kept_in_the_cache_folder(installed, tmp_path):
    """Where there is none and no compiler, one line says so; nothing is written beside sources."""
    here, before = ("-m", "megatron_mone.kernels"), files(installed)
    none = run(installed, tmp_path, *here, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "no"))
    assert "cpu        not usable: the CPU kernels need a C++ compiler: install g++" in none
    if native.build.find_compiler():
        held = files(installed.parent / "cache")
        assert "cpu        usable" in run(installed, tmp_path, *here)
        assert files(installed.parent / "cache") == held
    assert files(installed) == before


def test_the_command_doctors_and_plans(installed, tmp_path):
    command = str(installed / "bin" / "megatron-mone")
    demo = installed / "megatron_mone/configs/demo-mone.yaml"
    said = run(installed, tmp_path, command, "doctor", "--config", str(demo))
    assert f"{demo} lacks\n  nothing" in said
    (tmp_path / "small.yaml").write_text(
        "model: {num_layers: 1, hidden_size: 128, num_attention_heads: 2, ffn_hidden_size: 512,\n"
        "  num_experts: 8, moe_router_topk: 2, moe_ffn_hidden_size: 512, swiglu: true,\n"
        "  add_bias_linear: false, normalization: RMSNorm, vocab_size: 1024,\n"
        "  max_position_embeddings: 4096, mone_neuron_ratio: 0.25}\n"
        "parallel: {expert_model_parallel_size: 8}\ncluster: gpu\ntrain: plan-4k\n"
    )
    asked = ("--config", "small.yaml", "--gpus", "8")
    said = run(installed, tmp_path, command, "plan", *asked)
    assert "wrote out/plan/plan.json" in said


def test_train_by_name_in_another_folder(installed, tmp_path):
    """As the issue of a newcomer: no data, no checkout under the feet, and it trains."""
    command = str(installed / "bin" / "megatron-mone")
    said = run(
        installed, tmp_path, command, "train", "--config", "demo-mone", "--ranks", "1",
        "--expert-model-parallel-size", "1", "--train-iters", "2", "--lr-warmup-iters", "0",
        "--eval-iters", "1", "--micro-batch-size", "2", "--global-batch-size", "2",
    )  # fmt: skip
    notice, started = said.splitlines()
    assert notice.startswith("megatron-mone: no data is named: training on Megatron's mock data")
    assert started.startswith("demo-mone-mock: 1 ranks here, logs in ")
    assert (
        tmp_path / "runs/demo-mone-mock/checkpoints/latest_checkpointed_iteration.txt"
    ).is_file()


def test_bash_completes_once_it_is_told_to(installed, tmp_path):
    told = "megatron-mone --install-completion; . ~/.bashrc; COMP_CWORD=2; "
    asked = "; ".join(
        f"COMP_WORDS=(megatron-mone {typed}); _megatron_mone_completion megatron-mone; "
        'echo "${COMPREPLY[@]}"'
        for typed in ("submit --test", "bench la")
    )
    bash = f"import os; os.execvp('bash', ['bash', '-c', {told + asked!r}])"
    path = f"{installed / 'bin'}:{os.environ['PATH']}"
    said = run(installed, tmp_path, "-c", bash, PATH=path, HOME=str(tmp_path))
    assert said.splitlines()[-2:] == ["--test-only", "layer"]


def test_an_editable_installation_is_the_checkout(checkout, tmp_path):
    """In an environment of its own, which sees the packages of this one."""
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    (site / "base.pth").write_text(sysconfig.get_path("purelib"))
    pip("--python", str(python), "install", "-e", str(checkout), "--no-build-isolation",
        cwd=tmp_path)  # fmt: skip
    words = ["submit", "--dry-run", "--config", "moe-30b-a3b-mone-128", "--nodes", "2"]
    done = subprocess.run(
        [tmp_path / "venv/bin/megatron-mone", *words, "--", "--mock-data"],
        cwd=tmp_path, env={k: v for k, v in os.environ.items() if not k.startswith("PYTHON")},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert f"--config {checkout}/configs/plan/moe-30b-a3b-mone-128.yaml" in done.stdout, done.stderr
