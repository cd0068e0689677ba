"""What CI installs for tests that need more than Python: asked for by name, never in the way."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.unit.reporting.test_profile_page_in_browser import NAMES

CI = Path(__file__).resolve().parents[2] / ".ci"
SHELL_TOOLS = ("basename", "dirname", "grep", "id", "mktemp", "rm")


@pytest.fixture
def bare_machine(tmp_path):
    """A PATH without a browser, whose apt-get notes what it is asked for."""
    for name in SHELL_TOOLS:
        (tmp_path / name).symlink_to(shutil.which(name))
    _program(tmp_path / "id", "echo 0")
    return tmp_path


def _program(path: Path, body: str) -> None:
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def _look_for(script: str, machine: Path) -> str:
    """What the script says; it never fails, for its tests can be skipped."""
    done = subprocess.run(
        ["/bin/sh", CI / script], env={"PATH": str(machine)}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr


def test_a_missing_browser_is_installed_and_a_failure_is_one_line(bare_machine):
    asked = bare_machine / "asked"
    _program(bare_machine / "apt-get", f'echo "$@" >>{asked}')
    assert _look_for("browser.sh", bare_machine) == ""
    assert asked.read_text().splitlines()[1].endswith("--no-install-recommends chromium")
    _program(bare_machine / "apt-get", "echo 'E: no network'; exit 100")
    line = r"browser.sh: apt-get failed, so .* skip: E: no network\n"
    assert re.fullmatch(line, _look_for("browser.sh", bare_machine))
    (bare_machine / "apt-get").unlink()
    assert "install chromium by hand" in _look_for("browser.sh", bare_machine)


@pytest.mark.parametrize("name", NAMES)
def test_a_browser_the_tests_would_find_is_enough(bare_machine, name):
    _program(bare_machine / name, "")
    _program(bare_machine / "apt-get", "exit 100")
    assert _look_for("browser.sh", bare_machine) == ""


def test_an_emulator_or_a_compiler_that_is_there_is_no_reason_to_install_nothing(bare_machine):
    asked = bare_machine / "asked"
    _program(bare_machine / "apt-get", f'echo "$@" >>{asked}')
    _program(bare_machine / "qemu-aarch64", "")
    assert _look_for("arm.sh", bare_machine) == ""
    assert asked.read_text().splitlines()[1].endswith(" g++-aarch64-linux-gnu qemu-user")
    asked.unlink()
    _program(bare_machine / "aarch64-linux-gnu-g++", "")
    assert _look_for("arm.sh", bare_machine) == ""
    assert not asked.exists()


def test_ci_calls_all():
    scripts = ("slurm.sh", "browser.sh", "arm.sh")
    assert {f"sh .ci/{name}" for name in scripts} <= set((CI / "run").read_text().splitlines())
    assert all(os.access(CI / name, os.X_OK) for name in ("run", *scripts))
