"""Files and modules that documents, docstrings and comments name are there."""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from functools import cache
from importlib.metadata import files as installed_files
from pathlib import Path

import pytest

from megatron_mone.common.places import ROOT

FOLDERS = ("megatron_mone", "launch", "tools")
LIST_WHAT_WAS = ("LOG.md", "CHANGELOG.md")
PATH = re.compile(r"(?<![\w/.{}*<>-])(?:[\w.-]+/)*[\w-]+\.(?:py|md|j2)\b")
MODULE = re.compile(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})(?:\.\w+)+")
NOT_HERE = {
    # Megatron-LM's scripts, which its package leaves out; what NVIDIA's libraries hold.
    "pretrain_gpt.py", "PERFORMANCE.md", "parallel_experts.py", "glu.py", "__init__.py",
    # Transformer Engine's, which only GPUs have.
    "backends.py", "fp8.py", "_common.py", "rmsnorm.py", "layer_norm.py", "cross_entropy.py",
    "rope.py", "linear.py", "layernorm_linear.py", "fused_adam.py", "multi_tensor_apply.py",
    "quantized_tensor.py", "utils.py",
    # Made by a command.
    "engines.md",
    "parity.md",
}  # fmt: skip


def endings(paths: Iterator[Path]) -> set[str]:
    """All tails of the paths: a text may name a file from any folder above it."""
    return {"/".join(p.parts[i:]) for p in paths for i in range(len(p.parts))}


@cache
def known() -> set[str]:
    """What a text may name: files of the project, and of Megatron and torch as installed."""
    own = (p for name in (*FOLDERS, "tests", "docs", "configs") for p in (ROOT / name).rglob("*.*"))
    theirs = (p for name in ("megatron-core", "torch") for p in installed_files(name) or ())
    top = (p.relative_to(ROOT) for p in ROOT.glob("*.*"))
    return endings(p.relative_to(ROOT) for p in own) | endings(map(Path, theirs)) | endings(top)


def texts(path: Path) -> Iterator[str]:
    """A document, or the docstrings and comments of a source."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        yield source
        return
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


def is_module(name: str) -> bool:
    """Whether a dotted name is a module, or stands in the text of the module before it."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        place = ROOT.joinpath(*parts[:end])
        file = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if file.is_file():
            return all(word in file.read_text(encoding="utf-8") for word in parts[end:])
    return False


def unknown(text: str) -> set[str]:
    """What a text names that is not there."""
    paths = {name for name in PATH.findall(text) if name.removeprefix("./") not in known()}
    foreign = {name for name in paths if name.rpartition("/")[2] in NOT_HERE}
    return paths - foreign | {name for name in MODULE.findall(text) if not is_module(name)}


SOURCES = sorted(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))
DOCUMENTS = [p for folder in (ROOT, ROOT / "docs") for p in folder.glob("*.md")
             if p.name not in LIST_WHAT_WAS]  # fmt: skip


@pytest.mark.parametrize("paths", [SOURCES, DOCUMENTS], ids=["sources", "documents"])
def test_every_file_and_module_that_is_named_exists(paths):
    found = {str(p.relative_to(ROOT)): set().union(*map(unknown, texts(p))) for p in paths}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("text", "missing"),
    [
        ("see moe/layer.py and `docs/MODEL.md`, megatron_mone.moe.layer.MoNELayer", set()),
        ("see moe/no_such.py", {"moe/no_such.py"}),
        ("kernels/layer.py", {"kernels/layer.py"}),
        ("`MONE.md` says", {"MONE.md"}),
        ("-m megatron_mone.no_such", {"megatron_mone.no_such"}),
        ("megatron_mone.moe.layer.NoSuch", {"megatron_mone.moe.layer.NoSuch"}),
    ],
)
def test_a_name_of_nothing_is_found(text, missing):
    assert unknown(text) == missing
