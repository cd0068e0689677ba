"""What of this project, its packages and programs is installed, for what, and how to get the rest.

Asks the system and the packages' metadata; imports none of them, so that it is fast and says what
is wrong where one cannot be imported.
"""

import os
import re
import shutil
import subprocess
import tomllib
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import Requirement

from megatron_mone.common.machine import version
from megatron_mone.common.places import IS_CHECKOUT, ROOT

NAME = "megatron-mone"
UNKNOWN = "of unknown version"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Installed:
    """One package or program.

    Attributes:
        name: as its index or distribution has it.
        version: installed; empty where it is not.
        use: what needs it.
        install: the line that installs it; empty where the installed version will do.
        required: whether nothing works without it.
    """

    name: str
    version: str
    use: str
    install: str
    required: bool = False


@dataclass(frozen=True)
class _Program:
    """Names it goes by, the first on PATH counts; what for; the line that installs it."""

    names: tuple[str, ...]
    use: str
    install: str


# Beside what pyproject.toml asks for: what needs it, and the line.
_OPTIONAL = {
    "transformer-engine": ("layers and the te backend on GPUs", "pip install 'megatron-mone[te]'"),
    "deep_ep": ("the flex dispatcher on GPUs", "build https://github.com/deepseek-ai/DeepEP"),
    "triton": ("the triton backend on GPUs", "pip install triton"),
    "flash-attn": ("fused attention without Transformer Engine on GPUs",
                   "pip install flash-attn --no-build-isolation"),
    "apex": ("fused norms and optimizers without Transformer Engine on GPUs",
             "build https://github.com/NVIDIA/apex"),
    "emerging-optimizers": ("Muon, SOAP and Lion", "pip install 'megatron-mone[optimizers]'"),
    "pyarrow": ("data from Parquet files", "pip install 'megatron-mone[parquet]'"),
    "lm-eval": ("megatron-mone eval", "pip install 'megatron-mone[eval]'"),
    "wandb": ("--wandb-project", "pip install 'megatron-mone[trackers]'"),
    "mlflow": ("--mlflow-experiment", "pip install 'megatron-mone[trackers]'"),
    "deepspeed": ("--engine deepspeed, a peer in make bench",
                  "pip install 'megatron-mone[deepspeed]'"),
}  # fmt: skip
_PROGRAMS = {
    "C++ compiler": _Program(("g++", "c++"), "the cpu backend", "apt-get install g++, or set CXX"),
    "nvcc": _Program(("nvcc",), "building GPU packages", "install NVIDIA's CUDA toolkit"),
    "Slurm": _Program(("sbatch",), "launch submit", "apt-get install slurm-client, or log in to "
                      "the cluster"),
    "browser": _Program(BROWSERS, "tests of report pages", "apt-get install chromium"),
}  # fmt: skip


def own() -> tuple[str, list[str]]:
    """This project's version and what it requires, as a checkout says or its installation."""
    if IS_CHECKOUT:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        project = tomllib.loads(text)["project"]
        return project["version"], project["dependencies"]
    found = metadata.distribution(NAME)
    return found.version, found.requires or []


def packages() -> list[Installed]:
    """What the project requires, then what parts of it can use."""
    found = []
    for requirement in map(Requirement, own()[1]):
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            here = version(requirement.name)
            fits = here and requirement.specifier.contains(here, prereleases=True)
            line = "" if fits else f"pip install '{requirement.name}{requirement.specifier}'"
            found.append(Installed(requirement.name, here, "everything", line, required=True))
    for name, (use, line) in _OPTIONAL.items():
        here = version(name)
        found.append(Installed(name, here, use, "" if here else line))
    return found


def programs() -> list[Installed]:
    """Compilers, Slurm and a browser on PATH."""
    found = []
    for name, program in _PROGRAMS.items():
        given = os.environ.get("CXX") if program.names[0] == "g++" else None
        path = next(filter(None, map(shutil.which, [given] if given else program.names)), None)
        here = _said_version(path) if path else ""
        found.append(Installed(name, here, program.use, "" if path else program.install))
    return found


def _said_version(path: str) -> str:
    """The first version in what `PROGRAM --version` prints; Slurm's needs its configuration."""
    try:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return UNKNOWN
    found = re.search(r"\d+(\.\d+)+", done.stdout)
    return found[0] if found else UNKNOWN
