"""A rank's record: what is written is read back, and every damage is one line that names it."""

import copy
import json
import random
import re

import pytest

from megatron_mone.common import checked_json
from megatron_mone.profiling.rank_record import read_record, write_record
from tests.unit.profiling.profile_builders import make_record, make_run


def damaged(tmp_path, text: str | bytes, name: str = "rank-00000.json") -> str:
    """The one line that reading `text` fails with."""
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError) as caught:
        read_record(path)
    line = str(caught.value)
    assert line.startswith(str(path))
    assert "\n" not in line
    assert ";" in line  # the fix follows the fault
    return line


def without(tmp_path, change) -> str:
    """The one line that reading a record fails with after `change` to it."""
    record = make_record()
    change(record)
    return damaged(tmp_path, json.dumps(record))


def test_what_is_written_is_read_back(tmp_path):
    record = make_record(1, runs=[make_run(neurons=None, memory=None), make_run("moe")])
    path = write_record(tmp_path, record)
    assert path == tmp_path / "ranks" / "rank-00001.json"
    assert read_record(path).plain() == record
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_a_record_that_the_schema_refuses_is_not_written(tmp_path):
    record = make_record(runs=[make_run(rows=float("nan"))])
    with pytest.raises(ValueError, match=re.escape("runs[0].rows")):
        write_record(tmp_path, record)
    assert not (tmp_path / "ranks").exists()


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.999])
def test_a_file_cut_short_is_unreadable(tmp_path, keep):
    text = json.dumps(make_record())
    line = damaged(tmp_path, text[: int(keep * len(text))])
    assert "cut short" in line
    with pytest.raises(checked_json.UnreadableFile):
        read_record(tmp_path / "rank-00000.json")


@pytest.mark.parametrize(
    "text",
    [b"\xff\xfe\x00", b"[" * 100_000, b'{"rank": NaN}', b'{"rank": -Infinity}', b"1" * 5000],
    ids=["no text", "deep", "NaN", "-Infinity", "long number"],
)
def test_bytes_that_are_no_json_are_unreadable(tmp_path, text):
    damaged(tmp_path, text)
    with pytest.raises(checked_json.UnreadableFile):
        read_record(tmp_path / "rank-00000.json")


def test_a_file_that_is_absent_or_too_large_is_unreadable(tmp_path, monkeypatch):
    with pytest.raises(checked_json.UnreadableFile, match="cannot be read"):
        read_record(tmp_path / "rank-00000.json")
    monkeypatch.setattr(checked_json, "LARGEST_FILE", 1 << 20)
    assert "2 MiB is over the 1 MiB" in damaged(tmp_path, b" " * (2 << 20))


def test_another_version_and_another_kind_of_file_are_told_apart(tmp_path):
    line = without(tmp_path, lambda r: r.update(schema="megatron-mone/rank-profile/2"))
    assert "schema is megatron-mone/rank-profile/2, this version reads /1" in line
    line = without(tmp_path, lambda r: r.update(schema="megatron-mone/profile/1"))
    assert "another kind of file" in line


def _paths(value, path=()):
    """The path of every field of an object whose names the schema fixes."""
    free = ("model", "communication", "bytes", "modules", "by_kind", "by_phase", "phases")
    for key, inside in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        if key not in (*free, "machine", "timeline"):
            yield from _paths(inside, (*path, key))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        yield from _paths(value[0], (*path, 0))


FIELDS = list(_paths(make_record()))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
def test_every_missing_and_every_mistyped_field_is_named(tmp_path, path):
    record = make_record()
    inside = record
    for key in path[:-1]:
        inside = inside[key]
    value = inside.pop(path[-1])
    assert f"has no field {path[-1]!r}" in damaged(tmp_path, json.dumps(record))
    inside[path[-1]] = {"a": 1} if not isinstance(value, dict) else "a text"
    assert path[-1] in damaged(tmp_path, json.dumps(record))


@pytest.mark.parametrize(
    ("place", "change"),
    [
        ("runs[0].windows", lambda run: run["windows"].pop()),
        ("runs[0].step_ms", lambda run: run["step_ms"].pop()),
        ("runs[0].rows", lambda run: run["rows"].append(1)),
        ("runs[0].phases.attention.forward", lambda r: r["phases"]["attention"]["forward"].pop()),
        (
            "runs[0].communication.all_to_all ep.ms",
            lambda run: run["communication"]["all_to_all ep"]["ms"].pop(),
        ),
        (
            "runs[0].neurons.layers[0].histogram",
            lambda run: run["neurons"]["layers"][0]["histogram"].pop(),
        ),
        (
            "runs[0].memory.timeline.weights",
            lambda run: run["memory"]["timeline"]["weights"].pop(),
        ),
        ("runs[0].memory.timeline.phase", lambda run: run["memory"]["timeline"]["phase"].pop()),
        ("runs[0].step_ms: has a step of 0", lambda run: run["step_ms"].__setitem__(1, 0)),
        ("runs[0].step_ms", lambda run: run["step_ms"].__setitem__(1, -1.0)),
        ("runs[0].rows", lambda run: run["rows"].__setitem__(1, -1)),
        ("runs[0].step_ms", lambda run: run["step_ms"].__setitem__(1, "1.5")),
        ("runs[0].step_ms", lambda run: run["step_ms"].__setitem__(1, [1.5])),
        ("runs[0].step_ms", lambda run: run["step_ms"].__setitem__(1, None)),
        ("runs[0].steps", lambda run: run["steps"].__setitem__(1, 2)),
        ("runs[0].steps", lambda run: run["steps"].__setitem__(1, 4.5)),
        ("runs[0].phases", lambda run: run["phases"].update(lunch={})),
        ("runs[0].phases.other", lambda run: run["phases"]["other"].update(sideward=[1] * 4)),
        ("runs[0].flops.peak_flops", lambda run: run["flops"].update(peak_flops=10**400)),
        ("runs[0].flops.peak_flops", lambda run: run["flops"].update(peak_flops=True)),
        ("runs[0].memory.peak_bytes", lambda run: run["memory"].update(peak_bytes=-1)),
        ("runs[0].memory.peak_phase", lambda run: run["memory"].update(peak_phase="lunch")),
        ("runs[0].routing.layers[0].rows", lambda r: r["routing"]["layers"][0].update(rows=[])),
        (
            "runs[0].routing.layers[0].first_expert",
            lambda run: run["routing"]["layers"][0].update(first_expert=10**9),
        ),
        ("runs[0].name", lambda run: run.update(name="\x1b[2J")),
        ("runs[0].name", lambda run: run.update(name="x" * 10_000)),
    ],
)
def test_wrong_values_of_a_run_are_named(tmp_path, place, change):
    line = without(tmp_path, lambda record: change(record["runs"][0]))
    assert f": {place}" in line
    assert len(line) < 1000


def test_a_number_over_the_range_of_floats_is_refused(tmp_path):
    text = json.dumps(make_record()).replace('"step_ms": [10.0', '"step_ms": [1e999')
    assert "runs[0].step_ms: has a value that is not a finite" in damaged(tmp_path, text)


def test_wrong_ranks_and_runs_are_named(tmp_path):
    assert "rank: 2 is outside world_size 2" in without(tmp_path, lambda r: r.update(rank=2))
    assert "rank:" in without(tmp_path, lambda r: r.update(rank=-1))
    assert "whose file is rank-00001.json" in without(tmp_path, lambda r: r.update(rank=1))
    line = without(tmp_path, lambda r: r["runs"].append(copy.deepcopy(r["runs"][0])))
    assert "runs[1].name: 'mone' is the name of two runs" in line
    assert "runs: is empty" in without(tmp_path, lambda r: r.update(runs=[]))
    line = without(tmp_path, lambda r: r.update(runs=[make_run(steps=0)]))
    assert "runs[0].steps: is empty" in line


def test_an_incomplete_record_may_have_no_steps(tmp_path):
    record = make_record(runs=[make_run(steps=0)], complete=False)
    assert read_record(write_record(tmp_path, record)).plain() == record


def test_random_damage_never_ends_in_anything_but_one_line(tmp_path):
    """Bytes flipped at random: read as they are, or refused in one line."""
    good = json.dumps(make_record()).encode()
    generator = random.Random(1)
    path = tmp_path / "rank-00000.json"
    lines = []
    for _ in range(400):
        bad = bytearray(good)
        for _ in range(generator.randint(1, 3)):
            bad[generator.randrange(len(bad))] = generator.randrange(256)
        path.write_bytes(bytes(bad))
        try:
            read_record(path)
        except ValueError as error:
            lines.append(str(error))
    assert len(lines) > 100
    assert all(line.startswith(f"{path}: ") and line.isprintable() for line in lines)
