"""A document is read and written by one class; every fault of a file is one line that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pytest
from pydantic import model_validator

from megatron_mone.commands.write_schemas import with_tables
from megatron_mone.common.checked_json import Fault
from megatron_mone.common.documents import (
    Column,
    Document,
    Key,
    Kind,
    Number,
    Part,
    Text,
    Whole,
    check_lengths,
    check_names,
    one_of,
)
from megatron_mone.common.places import ROOT


class _Run(Part):
    name: Text
    steps: Column
    times: dict[Key, Column]

    @model_validator(mode="after")
    def _check(self) -> _Run:
        check_lengths(len(self.steps), [(("times", key), one) for key, one in self.times.items()])
        return self


class _Trip(Document, schema="megatron-mone/trip/2", again="travel again"):
    kind: Annotated[str, one_of(("long", "short"))]
    runs: list[_Run]
    free: dict[Key, Any]
    done: bool
    most: Number | None
    count: Whole = 3

    @model_validator(mode="after")
    def _check(self) -> _Trip:
        check_names([run.name for run in self.runs], "run")
        return self


class _Bare(Document, again="say again", indent=1):
    count: Whole


RUN = {"name": "a", "steps": [1, 2], "times": {"x y": [0.1, 2e-07]}}
TRIP: dict[str, Any] = {
    "schema": "megatron-mone/trip/2", "kind": "long", "runs": [RUN],
    "free": {"k": [None, {"odd": 1.0}]}, "done": True, "most": 3,
}  # fmt: skip


def test_what_is_read_is_written_byte_for_byte(tmp_path):
    text = json.dumps(TRIP, separators=(",", ":")) + "\n"
    (tmp_path / "a.json").write_text(text)
    trip = _Trip.read(tmp_path / "a.json", "look elsewhere")
    assert isinstance(trip.runs[0].steps, np.ndarray)
    assert (trip.runs[0].steps.dtype, trip.count) == (np.int64, 3)
    trip.write(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]
    _Bare(count=2).write(tmp_path / "b.json")
    assert (tmp_path / "b.json").read_text() == '{\n "count": 2\n}\n'


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"schema": "megatron-mone/trip/1"},
         "schema is megatron-mone/trip/1, this version reads /2: it was made by another"),
        ({"schema": "megatron-mone/trap/2"},
         "schema is megatron-mone/trap/2, not megatron-mone/trip/2: it is another kind of file"),
        ({"schema": 2}, "schema: must be a text"),
        ({"kind": "wide"}, "kind: 'wide' is none of long, short"),
        ({"kind": "\x1b[2J"}, "kind: '\\x1b[2J' is not a printable text of 1 to 500 characters"),
        ({"runs": {}}, "runs: must be a list"),
        ({"runs": [3]}, "runs[0]: must be an object"),
        ({"runs": [{"name": "a", "steps": []}]}, "runs[0]: has no field 'times'"),
        ({"runs": [{**RUN, "odd\n": 1}]}, "runs[0]: 'odd\\n' is none of name, steps, times"),
        ({"runs": [RUN, RUN]}, "runs[1].name: 'a' is the name of two runs"),
        ({"runs": [{**RUN, "steps": [1, "2"]}]}, "runs[0].steps: must be a list of numbers"),
        ({"runs": [{**RUN, "steps": [1, -2]}]},
         "runs[0].steps: has a value that is not a finite number of 0 or more"),
        ({"runs": [{**RUN, "steps": [1]}]},
         "runs[0].times.x y: has 2 values where there should be 1"),
        ({"free": {"\x1b": 1}}, "free: has the key '\\x1b', which is no short printable text"),
        ({"done": 1}, "done: must be true or false"),
        ({"most": True}, "most: must be a number"),
        ({"most": 10**400}, f"most: {'1' + 39 * '0'} is not a finite number of 0 or more"),
        ({"count": 2.0}, "count: must be a whole number"),
        ({"count": 2**63}, f"count: {2**63} is not a whole number from 0 to {2**63 - 1}"),
    ],
)  # fmt: skip
def test_a_fault_is_one_line_with_file_place_and_fix(change, words):
    with pytest.raises(ValueError) as caught:
        _Trip.of({**TRIP, **change}, Path("t.json"))
    assert str(caught.value) == f"t.json: {words}; travel again"


def test_a_file_with_very_many_faults_is_left_at_the_first():
    counted = []

    def check(value):
        counted.append(value)
        raise Fault("is wrong")

    class Many(Document, again="count again"):
        runs: list[dict[str, Annotated[int, Kind("number", check)]]]

    with pytest.raises(ValueError, match=r"m\.json: runs\[0\]\.a: is wrong; count again"):
        Many.of({"runs": [{"a": 1, "b": 2}] * 100}, Path("m.json"))
    assert counted == [1]


def test_what_is_no_object_or_no_json_is_refused_too(tmp_path):
    with pytest.raises(ValueError, match=r"t\.json: must be an object; travel again"):
        _Trip.of([], Path("t.json"))
    with pytest.raises(ValueError, match=r"t\.json: has no field 'schema'; travel again"):
        _Trip.of({}, Path("t.json"))
    with pytest.raises(ValueError, match=r"absent: cannot be read .*; look elsewhere"):
        _Trip.read(tmp_path / "absent", "look elsewhere")


def test_the_docs_have_the_fields_of_the_classes():
    """After a change of a class: python -m megatron_mone.commands.write_schemas."""
    for name, tables in (("PLANNER.md", 4), ("PROFILER.md", 3), ("KERNELS.md", 2)):
        text = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert text.count("<!-- fields of ") == text.count("| field | kind | meaning |") == tables
        assert with_tables(text) == text
