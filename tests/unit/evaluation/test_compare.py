"""Two evaluations compared: the formula by hand, and what cannot be compared."""

import json
import math

import pytest

from megatron_mone.commands.app import main
from megatron_mone.evaluation.compare import compare
from megatron_mone.evaluation.results import (
    SCHEMA,
    Results,
    mean_and_error,
    results_of,
    write_results,
)


def written(folder, values, metric="acc", task="t"):
    samples = [{"id": i, "hash": f"h{i}", "metrics": {metric: v}} for i, v in enumerate(values)]
    entry = {"metrics": {}, "samples": len(values), "shots": 0, "version": 1,
             "file": f"samples-{task}.jsonl"}  # fmt: skip
    document = {"schema": SCHEMA, "model": {}, "tasks": {task: entry}}
    write_results(Results(document, {task: samples}), folder)
    return folder


def test_differences_are_paired(tmp_path):
    a, b = [0, 1, 1, 0, 1], [1, 1, 1, 0, 1]
    found = compare(written(tmp_path / "a", a), written(tmp_path / "b", b))["t"]["acc"]
    steps = [1, 0, 0, 0, 0]
    mean = 0.2
    error = math.sqrt(sum((d - mean) ** 2 for d in steps) / 4 / 5)
    assert (found["a"], found["b"]) == (0.6, 0.8)
    assert found["difference"] == pytest.approx(mean)
    assert found["stderr"] == pytest.approx(error)
    assert found["low"] == pytest.approx(mean - 1.959964 * error)
    assert found["high"] == pytest.approx(mean + 1.959964 * error)


def test_a_ratio_of_sums_is_compared_per_unit(tmp_path):
    """Log-likelihoods of texts of 10 and 30 words: in nats a word, not a text."""
    a, b = [[-20, 10], [-60, 30]], [[-10, 10], [-60, 30]]
    one = written(tmp_path / "a", a, "word_perplexity")
    two = written(tmp_path / "b", b, "word_perplexity")
    found = compare(one, two)["t"]["word_perplexity"]
    assert (found["a"], found["b"]) == (-2, -70 / 40)
    assert found["difference"] == pytest.approx(10 / 40)
    rest = [10 - 0.25 * 10, 0 - 0.25 * 30]
    error = math.sqrt(sum(r * r for r in rest) / 1 / 2) / 20
    assert found["stderr"] == pytest.approx(error)


def test_one_sample_has_no_error():
    assert mean_and_error([(3.0, 2.0)]) == (1.5, None)


def test_a_perplexity_has_the_error_of_its_logarithm():
    """exp(-m): by the delta method its error is that of m times itself."""
    values = [-1.0, -2.0, -4.0]
    samples = [
        {"doc_id": i, "doc_hash": "h", "target": "t", "resps": [[(v, False)]],
         "metrics": ["perplexity"], "perplexity": v}
        for i, v in enumerate(values)
    ]  # fmt: skip
    value = math.exp(7 / 3)
    found = {
        "results": {"t": {"perplexity,none": value, "perplexity_stderr,none": 1e9,
                          "alias": "t", "sample_len": 3}},
        "samples": {"t": samples}, "n-shot": {"t": 0}, "versions": {"t": 1},
    }  # fmt: skip
    written = results_of(found, {}).document["tasks"]["t"]["metrics"]["perplexity"]
    assert written["value"] == value
    assert written["stderr"] == pytest.approx(value * mean_and_error([(v, 1) for v in values])[1])


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"values": [1, 0]}, "task t: 3 and 2 samples are not the same ones"),
        ({"values": [1, 0, 1], "task": "u"}, "share no task"),
        ({}, "results.json cannot be read: No such file"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, other, said):
    a = written(tmp_path / "a", [1, 1, 0])
    b = written(tmp_path / "b", **other) if other else tmp_path / "none.d" / "results.json"
    assert main(["eval", "compare", str(a), str(b)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_samples_whose_text_changed_are_refused(tmp_path):
    a, b = written(tmp_path / "a", [1, 0]), written(tmp_path / "b", [1, 0])
    file = b / "samples-t.jsonl"
    file.write_text(file.read_text().replace("h1", "other"))
    with pytest.raises(ValueError, match="task t: sample 1 has another text"):
        compare(a, b)


def test_the_command_prints_and_writes_the_difference(tmp_path, capsys):
    a, b = written(tmp_path / "a", [0] * 40), written(tmp_path / "b", [1] * 30 + [0] * 10)
    out = tmp_path / "deep" / "d.json"
    words = ["eval", "compare", str(a), str(b / "results.json"), "--out", str(out)]
    assert main(words) == 0
    assert "+0.7500" in capsys.readouterr().out
    assert json.loads(out.read_text())["tasks"]["t"]["acc"]["samples"] == 40
