"""The lines of tasks, whoever wrote them: what is no line of ours does not exist."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launch.preflight import lines as lines_module
from launch.preflight.lines import printable, read_lines, task_lines

HOSTS = ("n0", "n1")
LINE: dict[str, Any] = {
    "host": "n1", "rank": 8, "local_rank": 0, "ranks_per_node": 8, "time": 1700000000,
    "faults": ["x"], "versions": {"torch": "2"}, "node_gb_per_s": 400.5,
    "pairs": {"0": 12.5, "1": "gone"},
}  # fmt: skip


def read(*lines: Any) -> list[lines_module.TaskLine]:
    texts = (x if isinstance(x, bytes) else json.dumps(x).encode() for x in lines)
    return task_lines(texts, HOSTS)


def test_a_line_is_read_as_written() -> None:
    (task,) = read(LINE)
    assert (task.node, task.local_rank, task.ranks_per_node) == (1, 0, 8)
    assert (task.time, task.node_gb_per_s) == (1.7e9, 400.5)
    assert (task.faults, task.versions) == (("x",), {"torch": "2"})
    assert task.pairs == {0: 12.5, 1: "gone"}


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\xff\xfe", b"{", b"[]", b"null", b"1", b'"n0"', b"[" * 50_000, b"{" * 50_000,
        b"9" * 10_000, json.dumps(LINE).encode()[:-1],
        LINE | {"host": "n9"}, LINE | {"host": ["n1"]}, LINE | {"host": None},
        LINE | {"local_rank": 8}, LINE | {"local_rank": -1}, LINE | {"local_rank": True},
        LINE | {"local_rank": "0"}, LINE | {"ranks_per_node": 0}, LINE | {"ranks_per_node": 1e9},
        LINE | {"time": float("nan")}, LINE | {"time": float("inf")}, LINE | {"time": 10**400},
        LINE | {"time": "now"}, {"host": "n1"},
    ],
    ids=lambda line: repr(line)[:40],
)  # fmt: skip
def test_what_is_no_line_is_ignored(line: Any) -> None:
    assert read(line, LINE) == read(LINE)


@pytest.mark.parametrize("value", [None, 5, "text", [None, {}], {"a": 1}, float("nan")])
@pytest.mark.parametrize("name", ["faults", "versions", "pairs", "node_gb_per_s"])
def test_a_field_of_another_kind_is_left_out(name: str, value: Any) -> None:
    (task,) = read(LINE | {name: value})
    assert task.node == 1
    kept = getattr(task, name)
    assert kept in ((), {}, None, 5.0)


def test_partners_that_are_no_nodes_are_left_out() -> None:
    pairs = {"2": 1.0, "-1": 1.0, "0x1": 1.0, "²": 1.0, "": 1.0, "9" * 5000: 1.0, "0": [1.0]}
    (task,) = read(LINE | {"pairs": pairs | {"1": -1.0}})
    assert task.pairs == {}


def test_a_full_name_is_the_listed_short_one() -> None:
    (task,) = read(LINE | {"host": "n1.cluster.org"})
    assert task.node == 1


def test_of_two_lines_of_one_task_the_first_counts() -> None:
    (task,) = read(LINE, LINE | {"faults": []})
    assert task.faults == ("x",)


def test_texts_cannot_write_on_a_terminal_and_are_bounded() -> None:
    (task,) = read(LINE | {"faults": ["\x1b[2Ja\nb\u202e" + "x" * 10_000] * 1000})
    assert len(task.faults) == 32
    assert task.faults[0].startswith("[2Ja b x")
    assert len(task.faults[0]) <= 200


@given(st.text())
def test_printable_text_is_one_line(text: str) -> None:
    clean = printable(text)
    assert clean.isprintable()
    assert len(clean) <= 200


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
                    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))  # fmt: skip
def test_any_value_in_any_field_is_survived(value: Any) -> None:
    for name in LINE:
        read(LINE | {name: value})


def test_a_file_without_end_is_read_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 200 + b"\n" + b"y" * 10 + b"\nz\n")
    monkeypatch.setattr(lines_module, "LONGEST_LINE", 100)
    assert list(read_lines(path)) == [b"x" * 100, b"x" * 100, b"", b"y" * 10, b"z"]
    monkeypatch.setattr(lines_module, "MOST_BYTES", 150)
    assert list(read_lines(path)) == [b"x" * 100, b"x" * 50]
