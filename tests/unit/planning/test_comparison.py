"""Two layouts, part by part."""

import pytest

from megatron_mone.common.phases import BACKWARD
from megatron_mone.planning.comparison import (
    compared,
    comparison_table,
    differences,
    memory_parts,
    step_parts,
)
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.plan_document import Comparison
from megatron_mone.planning.plan_parts import GIB, cluster_document
from megatron_mone.planning.planner import Planned
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.unit.planning.made_jobs import CLUSTER, EXACT, FACTS, STAGE, TRACES, product, trace

SLOW = {(0, 0): STAGE, (1, 0): trace(product(30), product(60, BACKWARD))}


def planned(traces, name):
    job = JobSpec(name, {}, {"pipeline_model_parallel_size": 2}, {}, {})
    return Planned(
        job, TracedJob(FACTS, traces, 0.0, 0), {}, predict(traces, FACTS, CLUSTER, EXACT), 1
    )


@pytest.fixture
def document():
    one, other = planned(TRACES, "one"), planned(SLOW, "other")
    return Comparison(
        model="tiny", gpus=16, tokens_per_step=4096, cluster=cluster_document(CLUSTER),
        efficiency="perfect", routing={"kind": "balanced", "hottest": 1.0}, warnings=[],
        first=compared("one", one), second=compared("other", other),
        step_ms=differences(step_parts(one.prediction), step_parts(other.prediction), 1e3),
        compute_ms=differences(one.prediction.phases, other.prediction.phases, 1e3),
        memory_gib=differences(
            memory_parts(one.prediction), memory_parts(other.prediction), 1 / GIB
        ),
    )  # fmt: skip


def test_the_difference_of_two_steps_is_their_parts_difference(document):
    rows = {one.part: one for one in document.step_ms}
    total = document.second.step_ms - document.first.step_ms
    assert sum(one.difference for one in document.step_ms) == pytest.approx(total)
    assert document.step_ms[0].part == "stage imbalance"
    assert rows["stage imbalance"].second == pytest.approx(4 * (90 - 33))
    assert rows["stage imbalance"].first == 0


def test_a_comparison_in_a_terminal_and_in_its_file(document, tmp_path):
    text = comparison_table(document)
    assert "first:  one: tp=None" not in text
    assert "stage imbalance" in text
    assert f"{document.second.step_ms - document.first.step_ms:+11,.0f}" in text
    document.write(tmp_path / "plan.json")
    assert Comparison.read(tmp_path / "plan.json", "").plain() == document.plain()
    rows = document.plain()
    rows["step_ms"][0]["second"] += 1000
    with pytest.raises(ValueError, match="the second of step_ms add up to"):
        Comparison.of(rows, tmp_path / "plan.json")
