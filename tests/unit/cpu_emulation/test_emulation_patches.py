"""Every patch is still needed by the installed Megatron and torch, and each check can say no."""

import importlib.util
import json
import subprocess
import sys

import pytest

from megatron_mone.cpu_emulation import PATCHES

ASK = """
import json, sys
from megatron_mone.cpu_emulation import PATCHES, install
if "installed" in sys.argv:
    install()
answers = {patch.name: patch.still_needed() for patch in PATCHES if patch.name in sys.argv}
print("ANSWERS" + json.dumps(answers))
"""

CHANGED_BY_INSTALLING = [
    "factory-functions",
    "tensor-to",
    "tensor-cuda",
    "tensor-type-name",
    "cuda-calls",
    "memory-calls",
    "rng-states",
    "rng-data-loader",
    "splits-as-numpy",
]
"""Patches whose check asks for behaviour that the patch itself mends."""


def ask(*arguments: str) -> dict[str, bool]:
    """Ask the checks in a process of their own, unpatched unless "installed" is an argument."""
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=False
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    assert lines, done.stderr
    return json.loads(lines[-1].removeprefix("ANSWERS"))


@pytest.fixture(scope="module")
def unpatched():
    # One check spawns ranks, which needs a main module that can be imported again.
    names = [patch.name for patch in PATCHES if patch.name != "unequal-collectives"]
    return ask(*names)


@pytest.fixture(scope="module")
def patched():
    return ask("installed", *CHANGED_BY_INSTALLING)


@pytest.mark.parametrize("name", [p.name for p in PATCHES if p.name != "unequal-collectives"])
def test_still_needed(unpatched, name):
    assert unpatched[name], f"{name} is no longer needed: remove the patch"


def test_gloo_still_refuses_unequal_sizes():
    patch = next(patch for patch in PATCHES if patch.name == "unequal-collectives")
    assert patch.still_needed()


@pytest.mark.parametrize("name", CHANGED_BY_INSTALLING)
def test_check_says_no_once_mended(patched, name):
    assert patched[name] is False


@pytest.mark.parametrize(
    "patch",
    [p for p in PATCHES if p.name not in ("rng-data-loader", "unequal-collectives")],
    ids=lambda patch: patch.name,
)
def test_check_says_no_when_the_code_is_gone(monkeypatch, patch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert patch.still_needed() is False


def test_names_are_unique_and_cite_code():
    assert len({patch.name for patch in PATCHES}) == len(PATCHES)
    for patch in PATCHES:
        assert ".py: " in patch.needed_by, patch.name
        assert patch.why
