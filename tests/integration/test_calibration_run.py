"""Calibration on the recorded profile of 4 CPU ranks, with real traces."""

from pathlib import Path

import pytest

from megatron_mone.common.phases import COMMUNICATION, GATE_GEMM
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.fitting.calibration import calibrate
from megatron_mone.planning.fitting.measured_profile import read_profile
from megatron_mone.planning.tracing.trace_cache import TraceCache

PROFILE = (
    Path(__file__).resolve().parents[2]
    / "docs" / "profiles" / "2026-11-22-ep4-cpu-avx2" / "profile.json"
)  # fmt: skip


@pytest.fixture(scope="module")
def found(shared_tracer, tmp_path_factory):
    tracer = shared_tracer(TraceCache(tmp_path_factory.mktemp("traces")))
    return calibrate(read_profile(PROFILE), load_cluster("cpu-avx2"), tracer)


def test_the_recorded_profile_fits(found):
    """All compute of a step within a tenth of its time; the bounds are not results but demands."""
    assert found.summary("fitted")["of_time"] < 0.1
    assert all(0.7 < step.covered < 1 for step in found.steps)
    assert {one.run for one in found.phases} == {"mone", "moe"}
    assert any(words.startswith("run grouped_mm:") for words in found.left_out)
    assert not {one.phase for one in found.phases} & set(COMMUNICATION)


def test_a_run_that_was_held_out_is_predicted(found):
    """Knowing only the other model, a step is predicted within a quarter."""
    assert found.summary("without_run")["of_time"] < 0.25
    for step in found.steps:
        assert step.without_run == pytest.approx(step.measured, rel=0.25)


def test_only_mone_has_a_gate_of_its_own(found):
    assert {one.run for one in found.phases if one.phase == GATE_GEMM} == {"mone"}
    assert "grouped_gemm" in found.fitted_kinds
