"""A plan or search that cannot be drawn ends in one line with file, field and fix."""

import copy
import json

import pytest

from megatron_mone.planning.plan_document import Plan, Search
from megatron_mone.reporting.plan.report import read_either
from tests.unit.reporting.plan_example import as_plan, as_search, example_plan, example_search

PLAN = json.loads(json.dumps(example_plan(micro_batches=8)))
SEARCH = json.loads(json.dumps(example_search(12)))


def changed(document: dict, place: tuple, value) -> dict:
    """A copy with one field replaced, or removed where `value` is the type `del`."""
    copied = copy.deepcopy(document)
    parent = copied
    for key in place[:-1]:
        parent = parent[key]
    if value is Ellipsis:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    return copied


def refusal(check, document) -> str:
    with pytest.raises(ValueError) as caught:
        check(document)
    line = str(caught.value)
    assert "\n" not in line
    assert line.endswith("plan again with tools/plan_scale.py")
    return line


MODEL = ("models", 0)
POINT = PLAN["scaling"][1]["models"]["moe"]
FAULTS = [
    (("schema",), "megatron-mone/plan/0", "schema is megatron-mone/plan/0, this version reads /1"),
    (("model",), ..., "has no field 'model'"),
    (("gpus",), 0, "gpus: is 0"),
    (("cluster", "memory_gib"), 0.0, "cluster.memory_gib: is 0"),
    (("cluster", "device"), "a\nb", "cluster.device: 'a\\nb' is not a printable text"),
    (("routing", "kind"), "odd", "routing.kind: 'odd' is none of balanced, zipf, replayed"),
    (("warnings", 0), "", "warnings[0]: must be a text"),
    (("models",), [], "models: is empty"),
    (("models", 1, "name"), "mone", "models[1].name: 'mone' is the name of two models"),
    ((*MODEL, "layout", "pp"), 3, "models[0].stages: has 4 stages where layout.pp is 3"),
    ((*MODEL, "layout", "ep"), 0, "models[0].layout.ep: is 0"),
    ((*MODEL, "layout", "recompute"), None, "models[0].layout.recompute: must be a text"),
    ((*MODEL, "fits"), "yes", "models[0].fits: must be true or false"),
    ((*MODEL, "first_unfit"), "stack", "models[0].first_unfit: 'stack' is none of weights"),
    ((*MODEL, "step_ms"), -1.0, "models[0].step_ms: -1.0 is not a finite number"),
    ((*MODEL, "step_ms"), 1.0, "models[0]: parts_ms add up to"),
    ((*MODEL, "parts_ms", "bubble"), -1.0, "models[0].parts_ms.bubble: -1.0 is not"),
    ((*MODEL, "phases_ms", "coffee"), 1.0, "models[0].phases_ms: 'coffee' is none of data"),
    ((*MODEL, "memory_gib", "weights"), 0.0, "models[0].memory_gib: the parts add up to"),
    ((*MODEL, "memory_gib", "swap"), 0.0, "models[0].memory_gib: 'swap' is none of weights"),
    ((*MODEL, "stages", 1, "stage"), 2, "models[0].stages[1].stage: is 2"),
    ((*MODEL, "stages", 1, "chunks", 0, "backward_ms"), "1", "backward_ms: must be a number"),
    ((*MODEL, "collectives", 0, "calls"), 1.5, "collectives[0].calls: must be a whole number"),
    ((*MODEL, "timeline", "reduce_ms"), [1.0], "reduce_ms: has 1 values where there should be 4"),
    ((*MODEL, "timeline", "stages"), [], "timeline.stages: has 0 rows where the model has 4"),
    ((*MODEL, "timeline", "stages", 0), [], "timeline.stages[0]: is empty"),
    ((*MODEL, "timeline", "stages", 0, 0), [1.0, 0.5, "F", 0, 0], "stages[0][0][1]: 0.5 is before"),
    ((*MODEL, "timeline", "stages", 0, 0), [0.0, 1.0, "F", 0], "stages[0][0]: must be [start_ms"),
    ((*MODEL, "timeline", "stages", 0, 0, 2), "W", "stages[0][0][2]: 'W' is none of F, B"),
    ((*MODEL, "timeline", "stages", 0, 1, 0), 0.0, "stages[0][1][0]: 0.0 is before the end of"),
    (("scaling", 1, "gpus"), 128, "scaling[1].gpus: 128 stands in two points"),
    (("scaling", 1, "models", "other"), POINT, "scaling[1].models: 'other' is none of the models,"),
    (("ratio_sweep", 0, "r"), 0.0, "ratio_sweep[0].r: is 0"),
    (("expert_sweep", 0, "topk"), ..., "expert_sweep[0]: has no field 'topk'"),
]  # fmt: skip


@pytest.mark.parametrize(("place", "value", "words"), FAULTS)
def test_a_fault_of_a_plan_is_named(place, value, words):
    assert words in refusal(as_plan, changed(PLAN, place, value))


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (("candidates", 0, "layout", "tp"), ..., "candidates[0].layout: has no field 'tp'"),
        (("candidates", 0, "pareto"), 1, "candidates[0].pareto: must be true or false"),
        (("candidates", 0, "parts_ms", "compute"), 0.0, "candidates[0]: parts_ms add up to"),
        (("refused", 0, "reason"), None, "refused[0].reason: must be a text"),
        (("hopeless",), ..., "has no field 'hopeless'"),
        (("best", 0, "layout"), "tp=9", "best[0].layout: 'tp=9' is the name of no candidate"),
        (("not_tried", "limit"), -1, "not_tried.limit: -1 is not a whole number"),
    ],
)
def test_a_fault_of_a_search_is_named(place, value, words):
    assert words in refusal(as_search, changed(SEARCH, place, value))


def test_rounding_below_zero_is_no_fault():
    """A stage that never waits: its last pass ends where its passes' sum does, but for rounding."""
    for place in ((*MODEL, "bubble_ms"), (*MODEL, "exposed_comm_ms")):
        as_plan(changed(PLAN, place, -3.6e-12))
    assert "bubble_ms: -0.001 is not" in refusal(
        as_plan, changed(PLAN, (*MODEL, "bubble_ms"), -0.001)
    )


def test_what_may_be_absent():
    for place in (("scaling",), ("ratio_sweep",), ("expert_sweep",), (*MODEL, "collectives")):
        as_plan(changed(PLAN, place, []))
    as_plan(changed(PLAN, (*MODEL, "collectives", 0, "exposed"), ...))
    for place in (("candidates",), ("refused",)):
        as_search({**changed(SEARCH, place, []), "best": []})


def test_files_are_read_by_what_they_say_they_are(tmp_path):
    for name, document, kind in (("p", PLAN, Plan), ("s", SEARCH, Search)):
        path = tmp_path / name
        path.write_text(json.dumps(document))
        for found in (kind.read(path, "look elsewhere"), read_either(path)):
            assert json.loads(json.dumps(found.plain())) == document
    with pytest.raises(ValueError, match="schema is megatron-mone/plan-search/2, not"):
        Plan.read(tmp_path / "s", "look elsewhere")
    (tmp_path / "text").write_text("{")
    for name in ("text", "absent"):
        with pytest.raises(ValueError, match=r"name a file that tools/plan_scale\.py wrote"):
            read_either(tmp_path / name)
