"""Documents come out as they went in, whatever the file kind, the tokenizer and the cuts."""

import gzip
import json
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_mone.data.discovery import discover
from megatron_mone.data.documents import BadLine, read_unit
from megatron_mone.data.errors import DataError
from megatron_mone.data.sources import Source, scan

TEXTS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8)
FEW = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TRICKY = ["", "plain", "naïve café 日本語 🦉", "a\r\nb\n\n c\t", "<|endoftext|>", " \n", "\x00\x7f"]


def write_jsonl(path: Path, texts: list[str], key: str = "text") -> Path:
    data = "".join(json.dumps({key: text}) + "\n" for text in texts).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        half = len(data) // 2  # two frames, as `cat a.zst b.zst` makes them
        data = zstandard.compress(data[:half]) + zstandard.compress(data[half:])
    path.write_bytes(data)
    return path


def cut_and_read(path: Path, unit_bytes: int, mode: str = "file") -> list[str | BadLine]:
    found = scan(discover([path]).sources[0], mode, unit_bytes, lambda _: None)
    assert found.size == path.stat().st_size
    return [d for unit in found.units for d in read_unit(unit, "text", mode)]


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300", "local"])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt", ".txt.zst"])
def test_round_trip_to_the_byte(
    tmp_path, run_prepare, read_back, local_tokenizer, tokenizer, suffix
):
    """Documents -> dataset -> Megatron reader -> documents is the identity, empty ones aside."""
    if suffix.startswith(".jsonl"):
        inputs = write_jsonl(tmp_path / f"x{suffix}", TRICKY)
    else:
        inputs = tmp_path / "texts"
        inputs.mkdir()
        for index, text in enumerate(TRICKY):
            data = text.encode()
            data = zstandard.compress(data) if suffix.endswith(".zst") else data
            (inputs / f"{index}{suffix}").write_bytes(data)
    spec = str(local_tokenizer) if tokenizer == "local" else tokenizer
    manifest = run_prepare([inputs], tmp_path / "out", tokenizer=spec)
    assert read_back(tmp_path / "out") == [text for text in TRICKY if text]
    assert (manifest.documents, manifest.empty_documents) == (len(TRICKY) - 1, 1)
    if tokenizer == "byte":
        assert manifest.tokens == sum(len(t.encode()) + 1 for t in TRICKY if t)


@FEW
@given(texts=TEXTS, shard_bytes=st.integers(1, 200))
def test_any_jsonl_any_cut(tmp_path_factory, run_prepare, read_back, texts, shard_bytes):
    folder = tmp_path_factory.mktemp("any")
    path = write_jsonl(folder / "x.jsonl", [*texts, "last"])
    run_prepare([path], folder / "out", shard_bytes=shard_bytes)
    assert read_back(folder / "out") == [text for text in [*texts, "last"] if text]


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.sampled_from(["", " ", "a", "b b", "é", "c\r", "\r"]), max_size=15),
    unit_bytes=st.integers(1, 20),
)
def test_paragraphs_do_not_depend_on_the_cuts(tmp_path_factory, lines, unit_bytes):
    path = tmp_path_factory.mktemp("p") / "x.txt"
    path.write_bytes(("x\n" + "\n".join(lines)).encode())
    whole = cut_and_read(path, 1 << 20, "paragraph")
    assert cut_and_read(path, unit_bytes, "paragraph") == whole
    blocks, block = [], []
    for line in [*path.read_bytes().decode().split("\n"), ""]:
        if line.strip():
            block.append(line)
        elif block:
            blocks.append("\n".join(block).removesuffix("\r"))
            block = []
    assert whole == blocks


@pytest.mark.parametrize("unit_bytes", [1, 30, 1 << 20])
def test_bad_lines_are_named(tmp_path, unit_bytes):
    """file:line of each, the same wherever the file is cut; the good lines survive."""
    path = tmp_path / "x.jsonl"
    rows = [
        b'{"text": "ok"}', b"{broken", b'{"other": "x"}', b'{"text": 7}', b"", b'["text"]',
        b'{"text": "\xff"}', b'{"text": "\\ud800"}', b"[" * 100_000, b'{"text": "fine"}',
    ]  # fmt: skip
    path.write_bytes(b"\n".join(rows))
    read = cut_and_read(path, unit_bytes)
    assert [d for d in read if isinstance(d, str)] == ["ok", "fine"]
    bad = [d for d in read if isinstance(d, BadLine)]
    assert [d.line for d in bad] == [2, 3, 4, 6, 7, 8, 9]
    wanted = ["invalid JSON", "'text' is missing", "not a string but int", "not a JSON object",
              "invalid UTF-8 (byte 0xff)", "lone surrogate", "invalid JSON"]  # fmt: skip
    assert all(reason in d.reason for reason, d in zip(wanted, bad, strict=True))
    assert str(bad[0]).startswith(f"{path}:2: ")


def test_bad_utf8_in_txt_names_its_line(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"one\n\ntwo\nthr\xe9e\n\nfour\n")
    assert [d.line for d in cut_and_read(path, 1 << 20) if isinstance(d, BadLine)] == [4]
    read = cut_and_read(path, 1, "paragraph")
    assert [d if isinstance(d, str) else d.line for d in read] == ["one", 4, "four"]


def test_byte_order_mark_is_dropped_once(tmp_path):
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbfa\n\xef\xbb\xbfb")
    assert cut_and_read(path, 1 << 20) == ["a\n\ufeffb"]


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_truncated_archive_is_an_error_not_a_short_read(tmp_path, suffix):
    path = write_jsonl(tmp_path / f"x.jsonl{suffix}", [f"document {i}" for i in range(500)])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"x\.jsonl.*damaged archive"):
        cut_and_read(path, 1 << 20)


def test_directories_are_walked_in_order_and_names_follow_the_root(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.txt", "a.txt", "b/1.jsonl", "notes.md", ".hidden.txt"):
        (tmp_path / name).write_text("x")
    found = discover([tmp_path], tmp_path).sources
    assert [s.name for s in found] == ["a.txt", "b/1.jsonl", "b/2.txt"]
    assert isinstance(found[0], Source)
