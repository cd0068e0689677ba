"""The trace of a predicted step holds what the plan says, in the format that the viewers read."""

import gzip
import json
from itertools import pairwise

import pytest

from megatron_mone.planning.plan_document import PlannedModel, Stage, Timeline
from megatron_mone.reporting.plan.perfetto import step_slices, timeline_events, write_perfetto
from tests.unit.reporting.plan_example import as_model, as_plan, example_plan

TINY = {
    "name": "mone",
    "stages": [{"stage": 0, "layers": "embedding, mone*2"}, {"stage": 1, "layers": "mone*2, head"}],
    "timeline": {
        "shown": "all",
        "stages": [
            [[0.0, 1.0, "F", 0, 0], [4.0, 6.0, "B", 0, 0]],
            [[1.5, 2.5, "F", 0, 1], [2.5, 4.0, "B", 0, 1]],
        ],
        "gather_ms": 0.5, "reduce_ms": [0.25, 0.0], "optimizer_ms": 2.0,
    },
}  # fmt: skip
TINY_MODEL = PlannedModel.model_construct(
    name="mone",
    stages=[Stage.model_construct(**stage) for stage in TINY["stages"]],
    timeline=Timeline(**TINY["timeline"]),
)


def slices(trace: dict) -> list[dict]:
    return [event for event in trace["traceEvents"] if event["ph"] == "X"]


def test_a_step_by_hand():
    first, second = step_slices(Timeline(**TINY["timeline"]))
    assert [(one.name, one.start, one.end) for one in first] == [
        ("parameter gather", 0.0, 0.5), ("F0.0", 0.5, 1.5), ("B0.0", 4.5, 6.5),
        ("gradient reduce", 6.5, 6.75), ("optimizer", 6.75, 8.75),
    ]  # fmt: skip
    # no slice of no length; the update waits for the other stage
    assert [(one.name, one.start, one.end) for one in second] == [
        ("parameter gather", 0.0, 0.5), ("F0.1", 2.0, 3.0), ("B0.1", 3.0, 4.5),
        ("optimizer", 6.75, 8.75),
    ]  # fmt: skip


def test_times_that_count_the_gather_give_the_same_step():
    counted = json.loads(json.dumps(TINY["timeline"]))
    for row in counted["stages"]:
        for one in row:
            one[0], one[1] = one[0] + 0.5, one[1] + 0.5
    assert step_slices(Timeline(**counted)) == step_slices(Timeline(**TINY["timeline"]))


def test_slices_are_in_microseconds_with_category_and_place():
    backward = next(one for one in slices(timeline_events([TINY_MODEL])) if one["name"] == "B0.1")
    assert backward == {
        "ph": "X", "name": "B0.1", "cat": "backward", "pid": 1, "tid": 2, "ts": 3000.0,
        "dur": 1500.0, "args": {"micro_batch": 0, "chunk": 1},
    }  # fmt: skip
    names = {
        event["tid"]: event["args"]["name"]
        for event in timeline_events([TINY_MODEL])["traceEvents"]
        if event["name"] == "thread_name"
    }
    assert names == {1: "stage 0: embedding, mone*2", 2: "stage 1: mone*2, head"}


@pytest.mark.parametrize("pp", [1, 4])
def test_a_simulated_step_ends_when_the_plan_says_and_no_stage_does_two_things_at_once(pp):
    model = example_plan(("mone",), pp=pp, vpp=2 if pp > 1 else 1, sweeps=False)["models"][0]
    events = slices(timeline_events([as_model(model)]))
    assert max(e["ts"] + e["dur"] for e in events) == pytest.approx(1e3 * model["step_ms"])
    layout = model["layout"]
    passes = 2 * layout["micro_batches"] * layout["vpp"]
    for stage in range(pp):
        row = sorted((e for e in events if e["tid"] == stage + 1), key=lambda e: e["ts"])
        assert sum(e["cat"] in ("forward", "backward") for e in row) == passes
        assert len({e["name"] for e in row}) == len(row)
        for before, after in pairwise(row):
            assert before["ts"] + before["dur"] <= after["ts"] + 1e-6


def test_one_process_a_model_in_one_gzipped_file(tmp_path):
    plan = example_plan(sweeps=False)
    path = tmp_path / "new" / "timeline.json.gz"
    write_perfetto(path, as_plan(plan))
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = {
        event["pid"]: event["args"]["name"]
        for event in trace["traceEvents"]
        if event["name"] == "process_name"
    }
    assert names == {1: "mone, predicted", 2: "moe, predicted"}
    for process, model in enumerate(plan["models"], 1):
        alone = slices(timeline_events([as_model(model)]))
        together = [one for one in slices(trace) if one["pid"] == process]
        assert [one["name"] for one in together] == [one["name"] for one in alone]
        assert [one["ts"] for one in together] == [one["ts"] for one in alone]
    first = path.read_bytes()
    write_perfetto(path, as_plan(plan))
    assert path.read_bytes() == first  # no date in the file
