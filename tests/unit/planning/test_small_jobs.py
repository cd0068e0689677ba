"""Small jobs: which layout fits the ranks here, and what the step of one says of the job's."""

from dataclasses import replace
from typing import Any

import pytest

from megatron_mone.benchmarking.node_times.small_steps import step_time, without_collectives
from megatron_mone.common.phases import (
    ATTENTION,
    CLIPPING,
    DISPATCH,
    EXPOSED_COMMUNICATION,
    GATE_GEMM,
    LOSS,
    OPTIMIZER,
    PERMUTE,
    SELECTION,
)
from megatron_mone.planning.cost.measured_times import link_key
from megatron_mone.planning.cost.rank_cost import collective_seconds, op_seconds
from megatron_mone.planning.fitting.node_fit import fit_nodes
from megatron_mone.planning.fitting.node_times import (
    CalibrationJob,
    CallTime,
    Link,
    LinkTime,
    OperatorTime,
    OperatorWork,
    Place,
    SmallJob,
    StepTime,
    Times,
    Work,
)
from megatron_mone.planning.fitting.small_jobs import operator_of, sizes_here, within_stage
from megatron_mone.planning.job import SHORT
from megatron_mone.planning.tracing.trace import Collective, Op
from megatron_mone.profiling.profile_document import MeanCalls
from megatron_mone.profiling.rank_record import write_record
from tests.unit.planning.made_jobs import CLUSTER, FACTS
from tests.unit.profiling.profile_builders import make_record, make_run

JOB = CalibrationJob(
    model="made", gpus=2, layout="tp=2", flags=[], cluster="paper", device="paper GPU",
    neuron_block=1, kept_of=0,
)  # fmt: skip


@pytest.mark.parametrize(
    ("layout", "gpus", "here", "expected"),
    [
        ({"tp": 2}, 2, 2, {"tp": 2, "etp": 2}),
        ({"tp": 2, "ep": 2, "etp": 1}, 2, 2, {"tp": 2, "ep": 2}),
        ({"ep": 2}, 4, 4, {"ep": 2, "dp": 4}),
        ({"pp": 2}, 2, 2, {"pp": 2}),
        # Of 1,024 GPUs on two nodes of 8: experts keep together rather than stages.
        ({"pp": 16, "ep": 64}, 1024, 16, {"ep": 16, "dp": 16}),
        ({"tp": 8, "pp": 16, "ep": 8, "etp": 1}, 1024, 16, {"tp": 8, "pp": 2, "ep": 8}),
        ({"tp": 2, "cp": 4, "pp": 2}, 64, 16, {"tp": 2, "cp": 4, "pp": 2, "etp": 2}),
        ({"tp": 8}, 64, 4, {"tp": 4, "etp": 4}),
        ({"pp": 3}, 3, 2, {}),
        ({}, 8, 3, {"dp": 2}),
    ],
)
def test_the_small_job_has_what_of_the_layout_fits_the_ranks(layout, gpus, here, expected):
    values = {SHORT[name]: size for name, size in layout.items()}
    ones = dict.fromkeys(("tp", "cp", "pp", "ep", "etp", "dp"), 1)
    found = sizes_here(values, gpus, here)
    assert found == ones | expected
    ranks = found["tp"] * found["cp"] * found["dp"]
    assert ranks * found["pp"] <= here
    assert ranks % (found["ep"] * found["etp"]) == 0


@pytest.mark.parametrize(
    ("group", "ranks", "stride", "expected"),
    [("tp", 2, 1, True), ("dp-cp", 4, 2, True), ("pp", 2, 8, False), ("mp", 4, 1, True),
     ("mp", 4, 4, False), ("tp", 1, 1, False)],
)  # fmt: skip
def test_what_stages_wait_for_is_the_pipelines(group, ranks, stride, expected):
    """Of 16 ranks in two stages: ranks 0 to 7 are the first."""
    one = Collective("all_reduce", 4, group, ranks, stride, CLIPPING, "forward")
    assert within_stage(one, 8) == expected


def product(depth: int, phase: str) -> Op:
    """[8, depth] times [depth, 2]."""
    return Op(
        "aten.mm", ((8, depth), (depth, 2)), ((8, 2),), "float32", 160, 64, 32 * depth, phase,
        "forward",
    )  # fmt: skip


def calibrated(counts: list[tuple[Op, float]], step: dict[str, Any]) -> tuple[Work, Times]:
    """Operators that take 1 ms each by themselves, one collective of 1,000 bytes that takes 1 ms
    and one of 3,000 that takes 2; `counts` of the small job, `step` of its time."""
    ops = [operator_of(one) for one, _ in counts]
    share = 1.0 / len(ops)
    small = SmallJob(
        flags=[], ranks=2, launches=1, operators=ops, counts=[count for _, count in counts],
        groups=[Place(group="tp", ranks=2, stride=1)],
    )  # fmt: skip
    links = [
        LinkTime(
            link=Link(kind="all_gather", group="tp", ranks=2, stride=1, bytes=size),
            seconds=ms / 1e3, share=0.5,
        )
        for size, ms in ((1000, 1.0), (3000, 2.0))
    ]  # fmt: skip
    work = Work(
        job=JOB, ranks=2, links=[], small=small, launch=None, notes=[],
        operators=[OperatorWork(operator=one, share=share) for one in ops],
    )  # fmt: skip
    times = Times(
        job=JOB, processor="paper", device="paper", on_cpu=True, ranks=2, load=0.0, date="now",
        links=links, small_job=StepTime(step_ms=100.0, **step), launch_job=None, notes=[],
        operators=[
            OperatorTime(operator=one, seconds=1e-3, by="itself", share=share) for one in ops
        ],
    )  # fmt: skip
    return work, times


def test_a_phase_takes_what_it_takes_in_the_step_of_the_small_job():
    ops = [product(4, ATTENTION), product(5, LOSS), product(6, GATE_GEMM), product(7, OPTIMIZER)]
    work, times = calibrated(
        [(op, count) for op, count in zip(ops, (10, 2, 4, 1), strict=True)],
        {"phases_ms": {ATTENTION: 15.0, LOSS: 1.0, GATE_GEMM: 3.0, SELECTION: 9.0, OPTIMIZER: 1.0,
                       CLIPPING: 2.0, EXPOSED_COMMUNICATION: 40.0}, "collectives": []},
    )  # fmt: skip
    found = fit_nodes(work, times, CLUSTER).efficiency
    scales = [op_seconds(op, CLUSTER, found) / 1e-3 for op in ops]
    # The choice belongs to the kernel of the gate, clipping to the update.
    assert scales == pytest.approx([1.5, 0.5, 3.0, 3.0])
    assert op_seconds(replace(ops[0], phase="mamba"), CLUSTER, found) == pytest.approx(1e-3)


def test_a_collective_takes_what_the_small_job_waits_for_it():
    work, times = calibrated(
        [(product(4, ATTENTION), 1)],
        {"phases_ms": {ATTENTION: 1.0}, "collectives": [
            CallTime(kind="all_gather", group="tp", bytes=1000, calls=4, ms=20.0),
            CallTime(kind="all_reduce", group="tp", bytes=8, calls=2, ms=3.0),
            CallTime(kind="send", group="pp", bytes=1000, calls=2, ms=90.0),
        ]},
    )  # fmt: skip
    found = fit_nodes(work, times, CLUSTER).efficiency
    assert found.measured.waits == {
        ("all_gather", "tp", 2, 1): ((1000, 5e-3),), ("all_reduce", "tp", 2, 1): ((8, 1.5e-3),),
    }  # fmt: skip
    gather = Collective("all_gather", 1000, "tp", 2, 1, ATTENTION, "forward")
    assert link_key(gather) in found.measured.links

    def seconds(**other: Any) -> float:
        return collective_seconds(replace(gather, **other), FACTS, CLUSTER, found)

    assert seconds() == pytest.approx(5e-3)
    assert seconds(bytes=3000) == pytest.approx(6e-3)  # late by 4 ms as well
    assert seconds(group="ep") == pytest.approx(1e-3)


def test_without_a_step_operators_and_collectives_stay_as_they_were_timed():
    op = product(4, ATTENTION)
    work, times = calibrated([(op, 1)], {"phases_ms": {}, "collectives": []})
    for known in (times, Times.of({**times.plain(), "small_job": None}, None)):
        found = fit_nodes(work, known, CLUSTER)
        assert found.small is None
        assert found.efficiency.measured.waits == found.efficiency.measured.phases == {}
        assert op_seconds(op, CLUSTER, found.efficiency) == pytest.approx(1e-3)
    assert "no step was timed" in found.efficiency.source


def test_collectives_are_taken_out_of_the_phase_they_count_in():
    calls = [
        MeanCalls(operation="all_to_all", group="ep", bytes=8, phase=PERMUTE, calls=2, ms=3.0),
        MeanCalls(operation="all_gather", group="tp", bytes=8, phase=ATTENTION, calls=2, ms=5.0),
    ]
    phases = {ATTENTION: 10.0, DISPATCH: 4.0, EXPOSED_COMMUNICATION: 5.0}
    left = {ATTENTION: 10.0, DISPATCH: 1.0, EXPOSED_COMMUNICATION: 0.0}
    assert without_collectives(phases, calls) == left


def test_disturbed_steps_of_the_small_job_do_not_count(tmp_path):
    """Six steps of two ranks: in the first and the last something else ran on a core."""
    sent = {"operation": "all_to_all", "group": "ep", "bytes": 64, "phase": PERMUTE}
    attention = ([9.0, 4.0, 4.1, 4.3, 4.4, 2.0], [3.0, 2.0, 2.1, 2.3, 2.4, 8.0])
    for rank, ms in enumerate(attention):
        calls = [sent | {"calls": [2] * 6, "ms": [7.0, *[1.0] * 4, 7.0]}]
        phases = {ATTENTION: {"forward": ms}, DISPATCH: {"forward": [8.0, *[3.0] * 4, 8.0]}}
        run = make_run(
            steps=6, phases=phases, collectives=calls,
            step_ms=[a + b for a, b in zip(ms, phases[DISPATCH]["forward"], strict=True)],
        )  # fmt: skip
        write_record(tmp_path, make_record(rank, runs=[run]))
    found = step_time(tmp_path)
    assert found.step_ms == pytest.approx(6.2)
    assert found.phases_ms == pytest.approx({ATTENTION: 3.2, DISPATCH: 2.0})
    assert [one.plain() for one in found.collectives] == [
        {"kind": "all_to_all", "group": "ep", "bytes": 64, "calls": 2.0, "ms": 1.0}
    ]


def buffer(size: int) -> Op:
    """Zeros written over so many floats."""
    return Op("aten.zero_", ((size,),), ((size,),), "float32", 0, 4 * size, 0, OPTIMIZER, "forward")


def test_a_buffer_of_another_size_takes_as_much_more_as_it_moves():
    """What it took by itself, out of the caches or not, says nothing of a step."""
    known, larger = buffer(1000), buffer(4000)
    step = {"phases_ms": {OPTIMIZER: 3.0}, "collectives": []}
    work, times = calibrated([(known, 1), (product(4, ATTENTION), 1)], step)
    slow = OperatorTime(operator=operator_of(larger), seconds=9.0, by="itself", share=0.0)
    more = [*work.operators, OperatorWork(operator=slow.operator, share=0.0)]
    work = Work.of({**work.plain(), "operators": [one.plain() for one in more]}, None)
    rows = [one.plain() for one in (*times.operators, slow)]
    times = Times.of({**times.plain(), "operators": rows}, None)
    found = fit_nodes(work, times, CLUSTER).efficiency
    assert op_seconds(known, CLUSTER, found) == pytest.approx(3e-3)
    assert op_seconds(larger, CLUSTER, found) == pytest.approx(12e-3)
