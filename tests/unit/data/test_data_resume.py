"""A killed run goes on and ends with the bytes of a run nobody killed, on any number of workers."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mone.data.errors import DataError
from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.shards import tokenize_shard
from megatron_mone.data.workers import locked_folder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def inputs(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for index in range(5):
        (folder / f"{index}.txt").write_text(f"text {index} ü\n\n" * (50 + index))
    rows = [json.dumps({"text": f"row {i} " * 9}) for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join([*rows, "{bad"]))
    return folder


def output_bytes(prefix: Path) -> list[bytes]:
    outputs = OutputPaths(prefix)
    return [
        p.read_bytes() for p in (outputs.bin, outputs.idx, outputs.tokenizer / "tokenizer.json")
    ]


def test_two_workers_write_what_one_writes(tmp_path, run_prepare, inputs):
    options = {"tokenizer": "bpe:300", "shard_bytes": 3000}
    one = run_prepare([inputs], tmp_path / "one", workers=1, **options)
    two = run_prepare([inputs], tmp_path / "two", workers=2, **options)
    assert output_bytes(tmp_path / "one") == output_bytes(tmp_path / "two")
    assert one.bad_lines_named == two.bad_lines_named == [f"{inputs}/rows.jsonl:201: {_REASON}"]
    assert (one.bin.sha256, one.idx.sha256) == (two.bin.sha256, two.idx.sha256)
    assert one.unigram_loss == two.unigram_loss


_REASON = "invalid JSON: Expecting property name enclosed in double quotes at column 2"


def test_kill_9_anywhere_then_resume_is_byte_identical(tmp_path):
    """SIGKILL before every single rename, and at random times with 1 and 2 workers."""
    seed = str(random.SystemRandom().randrange(10**6))
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_runner.py"), tmp_path, seed],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout.splitlines()[-1])
    assert findings["wrong"] == []
    assert findings["half"] == []
    assert findings["mixed"] == []
    assert findings["renames"] >= 15
    assert findings["timed"] >= 1


def test_finished_shards_are_not_made_again(tmp_path, run_prepare, inputs, monkeypatch):
    made = []

    def dies_at_third(job):
        made.append(job.index)
        if len(made) == 3:
            raise KeyboardInterrupt
        return tokenize_shard(job)

    monkeypatch.setattr("megatron_mone.data.workers.tokenize_shard", dies_at_third)
    with pytest.raises(KeyboardInterrupt):
        run_prepare([inputs], tmp_path / "out", shard_bytes=800)
    monkeypatch.undo()
    work = tmp_path / "out.work"
    before = {p.name: p.stat().st_mtime_ns for p in work.glob("shard-*")}
    assert len(before) == 6  # two finished shards of three files
    seen = {}
    monkeypatch.setattr(
        "megatron_mone.data.prepare.merge_shards",
        lambda *_: (
            seen.update({p.name: p.stat().st_mtime_ns for p in work.glob("shard-*")}) or 1 / 0
        ),
    )
    with pytest.raises(ZeroDivisionError):
        run_prepare([inputs], tmp_path / "out", shard_bytes=800)
    assert before.items() <= seen.items()


def test_changed_input_starts_afresh(tmp_path, run_prepare, read_back, monkeypatch):
    path = tmp_path / "x.txt"
    path.write_text("old")
    monkeypatch.setattr("megatron_mone.data.prepare.publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_prepare([path], tmp_path / "out")
    monkeypatch.undo()
    path.write_text("new")
    run_prepare([path], tmp_path / "out")
    assert read_back(tmp_path / "out") == ["new"]


def test_same_command_again_changes_nothing_another_needs_overwrite(
    tmp_path, run_prepare, read_back
):
    path = tmp_path / "x.txt"
    path.write_text("text")
    first = run_prepare([path], tmp_path / "out")
    stamp = OutputPaths(tmp_path / "out").bin.stat().st_mtime_ns
    assert run_prepare([path], tmp_path / "out") == first
    assert OutputPaths(tmp_path / "out").bin.stat().st_mtime_ns == stamp
    path.write_text("other")
    with pytest.raises(DataError, match="--overwrite"):
        run_prepare([path], tmp_path / "out")
    assert read_back(tmp_path / "out") == ["text"]
    run_prepare([path], tmp_path / "out", overwrite=True)
    assert read_back(tmp_path / "out") == ["other"]
    assert not (tmp_path / "out.work").exists()


def test_second_process_on_one_output_is_refused(tmp_path, run_prepare):
    path = tmp_path / "x.txt"
    path.write_text("text")
    with locked_folder(tmp_path / "out.work"):
        with pytest.raises(DataError, match="another process"):
            run_prepare([path], tmp_path / "out")
    run_prepare([path], tmp_path / "out")
