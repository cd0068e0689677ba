"""Benchmarks of a run's checkpoints beside its curves."""

import json
import os

from megatron_mone.evaluation.results import place_in_run
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.scores import add_scores, columns_of, read_evaluations, score_rows
from tests.unit.reporting.conftest import make_evaluation
from tests.unit.reporting.test_reporting_html import HOSTILE, assert_self_contained


def test_each_evaluation_of_a_run_has_its_own_place(tmp_path):
    place = place_in_run(tmp_path, "iter_0000400", "quick")
    assert place == tmp_path / "eval" / "iter_0000400-quick"
    others = [
        place_in_run(tmp_path, "iter_0000400", tasks, limit)
        for tasks, limit in (("quick", 5), ("a/b", None), ("a b", None), ("t," * 50, None),
                             ("t," * 60, None))
    ]  # fmt: skip
    assert len({place, *others}) == 6
    assert all(one.parent == place.parent and len(one.name) < 120 for one in others)


def test_checkpoints_stand_side_by_side_and_the_later_of_two_evaluations_counts():
    first, again = make_evaluation(400, {"a": 0.25}), make_evaluation(400, {"a": 0.5, "b": 0.125})
    columns = columns_of({"": [first, again, make_evaluation(20, {"a": 0.75})]})
    assert [name for name, _ in columns] == ["iteration 20", "iteration 400"]
    assert score_rows(columns) == [
        ["a", "acc", "100", "0.7500 ± 0.0500", "0.5000 ± 0.0500"],
        ["b", "acc", "100", "-", "0.1250 ± 0.0500"],
    ]


def test_scores_of_other_numbers_of_samples_are_other_rows():
    few = make_evaluation(20, {"a": 0.5})
    few["tasks"]["a"] |= {"samples": 2, "metrics": {"acc": {"value": 1.0, "stderr": None}}}
    columns = columns_of({"r = 0.5": [make_evaluation(20, {"a": 0.25}), few]})
    assert columns[0][0] == "r = 0.5, iteration 20"
    assert score_rows(columns) == [
        ["a", "acc", "100", "0.2500 ± 0.0500"],
        ["a", "acc", "2", "1.0000"],
    ]


def test_the_page_says_how_and_keeps_tables_narrow():
    page = Page("x")
    documents = [make_evaluation(step, {HOSTILE: 0.5}) for step in range(1, 10)]
    documents += [
        make_evaluation(10, {"a": 0.5}, world_size=4, expert_model_parallel_size=4,
                        truncated_requests=3)
    ]  # fmt: skip
    add_scores(page, columns_of({"": documents}))
    text = page.render()
    assert_self_contained(text)
    assert text.count("<table>") == 3
    assert (
        "iteration 10: 4 ranks, EP 4, float32, sequences of 64 tokens, 3 requests had their "
        "beginning cut to fit" in text
    )
    assert "iteration 8; iteration 9: 1 rank, float32, sequences of 64 tokens" in text


def test_what_cannot_be_read_is_told_and_the_rest_is_shown(tmp_path):
    for number, name in enumerate(("second", "first", "damaged")):
        folder = tmp_path / "eval" / name
        folder.mkdir(parents=True)
        text = json.dumps(make_evaluation(number, {"a": 0.5})) if name != "damaged" else "{"
        (folder / "results.json").write_text(text)
    os.utime(tmp_path / "eval" / "second" / "results.json", (1, 1))
    found, unread = read_evaluations(tmp_path)
    assert [one["model"]["iteration"] for one in found] == [0, 1]
    assert len(unread) == 1
    assert f"{tmp_path}/eval/damaged/results.json is no JSON" in unread[0]
    assert read_evaluations(tmp_path / "none") == ([], [])
