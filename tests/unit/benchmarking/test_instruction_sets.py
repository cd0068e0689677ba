"""A race that is held to a lower class runs its code, ours and torch's, and says so."""

import json
import subprocess
import sys

import pytest

from megatron_mone.benchmarking import instruction_sets
from megatron_mone.common.places import ROOT
from megatron_mone.kernels.cpu import backend as cpu

SAY = """
import json
from megatron_mone.benchmarking import instruction_sets
instruction_sets.limit("avx2")
print(json.dumps(instruction_sets.facts()))
"""


def test_the_class_is_of_what_runs():
    facts = instruction_sets.facts()
    assert facts["Class"] == instruction_sets.class_here()
    assert "processor " in facts["Instructions"]
    assert "our kernels " in facts["Instructions"]


@pytest.mark.skipif(
    not cpu.available()[0] or "avx2" not in instruction_sets.facts()["Instructions"],
    reason="no AVX2 here",
)
def test_a_later_processor_runs_avx2_code_where_asked():
    done = subprocess.run(
        [sys.executable, "-c", SAY], cwd=ROOT, capture_output=True, text=True, check=True
    )
    facts = json.loads(done.stdout)
    assert facts["Class"] == "avx2"
    assert "our kernels avx2, torch AVX2; " in facts["Instructions"]
    assert "MKL_ENABLE_INSTRUCTIONS=AVX2" in facts["Instructions"]
