"""Slurm's commands as stand-ins that note what they were asked, and a tracer of real flags."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import Tracer

_SBATCH = """[ "$(wc -l <"$0.asked")" -lt "$(cat "$0.most")" ] || { echo "sbatch: error: \
Batch job submission failed: Invalid partition name specified" >&2; exit 1; }
printf '%s\\n' "$*" >>"$0.asked"
number=$((40 + $(wc -l <"$0.asked")))
case "$*" in *--test-only*) echo "sbatch: Job $number to start" >&2;; *) echo $number;; esac
"""


@dataclass(frozen=True)
class Asked:
    """The stand-ins of sbatch, which answers 41, 42, ..., and scancel."""

    folder: Path

    def accept(self, most: int) -> None:
        """Refuse every job after so many."""
        (self.folder / "sbatch.most").write_text(str(most))

    @property
    def submitted(self) -> list[str]:
        """Arguments of each accepted sbatch."""
        return (self.folder / "sbatch.asked").read_text().splitlines()

    @property
    def cancelled(self) -> list[str]:
        """Arguments of each scancel."""
        path = self.folder / "scancel.asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asked:
    """Stand-ins first in PATH, and an empty working folder beside them."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, code in {"sbatch": _SBATCH, "scancel": 'echo "$@" >>"$0.asked"\n'}.items():
        (programs / name).write_text(f"#!/bin/bash\n{code}")
        (programs / name).chmod(0o755)
    (programs / "sbatch.asked").touch()
    asked = Asked(programs)
    asked.accept(100)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return asked


@pytest.fixture(scope="session")
def tracer(
    shared_tracer: Callable[..., Tracer], tmp_path_factory: pytest.TempPathFactory
) -> Tracer:
    """A tracer that remembers nothing of earlier sessions."""
    return shared_tracer(TraceCache(tmp_path_factory.mktemp("traces")))
