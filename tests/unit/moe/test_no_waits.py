"""A MoNE layer on a GPU makes the host wait nowhere, beyond what Megatron itself waits for.

Not run on a GPU yet: its tensors here are torch's fake ones."""

import os
import subprocess
import sys

import pytest

from megatron_mone.common.places import ROOT
from tests.unit.moe import no_waits_cases


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    """Name of a case -> its traceback, "" where it passed."""
    folder = tmp_path_factory.mktemp("cases")
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.moe.no_waits_cases", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert (folder / "end").exists(), done.stderr[-3000:]
    files = {name: folder / str(n) for n, name in enumerate(no_waits_cases.CASES)}
    return {name: file.read_text() if file.exists() else "" for name, file in files.items()}


@pytest.mark.parametrize("name", no_waits_cases.HARNESS)
def test_the_harness(failures, name):
    assert failures[name] == ""


@pytest.mark.parametrize("name", no_waits_cases.LAYERS)
def test_a_layer_waits_for_nothing(failures, name):
    """Dispatch, row counts, check of the experts, balance loss and load counters, both passes."""
    assert failures[name] == ""


@pytest.mark.parametrize("name", no_waits_cases.FLEX)
def test_flex_waits_for_nothing(failures, name):
    """Row counts of both libraries, and a whole layer on HybridEP; Megatron puts what DeepEP brings
    in order, and waits."""
    assert failures[name] == ""


@pytest.mark.parametrize("name", no_waits_cases.RULE)
def test_choosing_by_a_bias_waits_for_nothing(failures, name):
    assert failures[name] == ""


@pytest.mark.parametrize("name", no_waits_cases.KERNELS)
def test_the_kernels_of_a_layer(failures, name):
    """With the Triton experts in place: no wait, launches and bytes kept counted."""
    assert failures[name] == ""


@pytest.mark.parametrize("name", no_waits_cases.CAPTURED)
def test_a_layer_that_a_cuda_graph_may_hold(failures, name):
    """Router to combination, Megatron's own waits too; and what is refused would not do."""
    assert failures[name] == ""
