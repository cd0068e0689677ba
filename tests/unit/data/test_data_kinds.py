"""Every kind of file and archive gives the same documents; damage is never a short read."""

import bz2
import gzip
import io
import json
import lzma
import struct
import sys
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.data import compressed, documents, json_text
from megatron_mone.data.discovery import discover
from megatron_mone.data.documents import BadLine, read_unit
from megatron_mone.data.errors import DataError
from megatron_mone.data.sources import scan

TEXTS = ["plain", "naïve café 日本語 🦉", "a\r\nb\n\n c\t", 'say "}" [x] \\', " "]


def read(path: Path, key: str = "text", mode: str = "file") -> list[str | BadLine]:
    found = scan(discover([path], json_key=key).sources[0], mode, 1 << 20, lambda _: None)
    assert sum(unit.size for unit in found.units) == found.size == path.stat().st_size
    return [document for unit in found.units for document in read_unit(unit, key, mode)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zstd_skippable(data: bytes) -> bytes:
    """pzstd and the seekable format put such frames between the others."""
    return b"\x51\x2a\x4d\x18" + struct.pack("<I", len(data)) + data


COMPRESS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("kind", [".jsonl", ".json", ".JSONL", ".txt"])
def test_archives_of_several_streams(tmp_path, suffix, kind):
    """`cat a.gz b.gz`, with the padding that tapes and pzstd leave between."""
    compress, path = COMPRESS[suffix], tmp_path / f"x{kind}{suffix.upper()}"
    data = lines(TEXTS)
    pieces = [compress(data[:50]), compress(b""), compress(data[50:])]
    gap = zstd_skippable(b"index") if suffix == ".zst" else b"\0" * 512
    path.write_bytes(gap.join(pieces) + (gap if suffix != ".bz2" else b""))
    assert read(path) == ([data.decode()] if kind == ".txt" else TEXTS)


DAMAGE = {
    "truncated": lambda data: data[:-9],
    "trailing bytes": lambda data: data + b"and more text",
    "half a second stream": lambda data: data + data[: len(data) // 2],
    "flipped": lambda data: data[: len(data) // 2] + b"\xaa\x55\xaa" + data[len(data) // 2 + 3 :],
}


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_archive_is_an_error(tmp_path, suffix, damage):
    path = tmp_path / f"x.jsonl{suffix}"
    texts = [f"document {number * 7919 % 1000}" for number in range(3000)]
    compress = COMPRESS[suffix]
    if suffix == ".zst":  # without its optional checksum nothing can tell a flipped byte
        compress = zstandard.ZstdCompressor(write_checksum=True).compress
    path.write_bytes(DAMAGE[damage](compress(lines(texts))))
    with pytest.raises(DataError, match=r"x\.jsonl\.\w+: damaged archive .*; copy the file again"):
        read(path)


def test_a_long_window_is_no_damage(tmp_path):
    """`zstd --long=31` asks for 2 GiB; what asks for more is told so, with its size."""
    for log in (28, 31):
        parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=False)
        stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
        data = lines(TEXTS)
        packed = stream.compress(data) + stream.flush()  # no size in the header, as from a pipe
        (tmp_path / "x.jsonl.zst").write_bytes(packed)
        assert read(tmp_path / "x.jsonl.zst") == TEXTS
        assert zstandard.get_frame_parameters(packed).window_size == 1 << log
    path = tmp_path / "longer.jsonl.zst"
    path.write_bytes(b"\x28\xb5\x2f\xfd\x00" + bytes([(32 - 10) << 3]) + b"\x01\x00\x00" * 9)
    with pytest.raises(DataError, match=r"a window of 4,096 MiB .* gets 2,048 MiB at most; pack"):
        read(path)


def test_an_xz_that_needs_more_memory_is_no_damage(tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.xz").write_bytes(lzma.compress(lines(TEXTS)))
    monkeypatch.setattr(compressed, "_MOST_MEMORY", 1 << 20)
    with pytest.raises(DataError, match="needs more memory to be unpacked") as error:
        read(tmp_path / "x.jsonl.xz")
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("suffix", [".zst", ".bz2", ".gz", ".xz"])
def test_a_small_archive_that_unpacks_to_a_huge_one_never_stands_in_memory(tmp_path, suffix):
    size, block = 160 << 20, b" " * (1 << 20)
    path = tmp_path / f"x.jsonl{suffix}"
    if suffix == ".zst":
        stream = zstandard.ZstdCompressor().compressobj()
        path.write_bytes(
            b"".join([*(stream.compress(block) for _ in range(size >> 20)), stream.flush()])
        )
    else:
        path.write_bytes(COMPRESS[suffix](block) * (size >> 20))
    tracemalloc.start()
    with compressed.open_source(path, suffix) as stream:
        assert sum(len(piece) for piece in iter(lambda: stream.read(1 << 20), b"")) == size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 110 << 20


LAYOUTS = {
    "array": lambda rows: json.dumps(rows),
    "indented array": lambda rows: json.dumps(rows, indent=2),
    "array, a row a line": lambda rows: "[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n",
    "lines": lambda rows: "\n".join(map(json.dumps, rows)),
    "lines, CRLF": lambda rows: "".join(json.dumps(row) + "\r\n\r\n" for row in rows),
    "indented objects": lambda rows: "\n".join(json.dumps(row, indent=1) for row in rows),
    "objects without a break": lambda rows: "".join(map(json.dumps, rows)),
    "two arrays": lambda rows: json.dumps(rows[:1]) + "\n" + json.dumps(rows[1:]),
    "not ASCII": lambda rows: json.dumps(rows, ensure_ascii=False),
    "byte order mark": lambda rows: "\ufeff " + json.dumps(rows, indent=0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_json_in_any_layout(tmp_path, monkeypatch, layout, chunk):
    monkeypatch.setattr(json_text, "_CHUNK", chunk)
    rows = [
        {"id": [i, {"text": "not this"}], "text": text, "n": None} for i, text in enumerate(TEXTS)
    ]
    path = tmp_path / "x.json"
    path.write_bytes(LAYOUTS[layout](rows).encode())
    assert read(path) == TEXTS


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(["text", "a", "b"]),
            st.recursive(
                st.none() | st.text(max_size=8) | st.floats(),
                lambda inner: st.lists(inner, max_size=3),
                max_leaves=5,
            ),
        ),
        min_size=1,
        max_size=6,
    ),
    indent=st.sampled_from([None, 0, 2]),
    chunk=st.integers(1, 40),
)
def test_any_array_is_split_where_python_splits_it(rows, indent, chunk):
    class Trickle(io.StringIO):
        def read(self, size: int = -1) -> str:
            return super().read(min(size, chunk))

    text = json.dumps(rows, indent=indent)
    found = list(json_text.split_values(Trickle(text), 1 << 20))
    assert repr([json.loads(value) for _, value in found]) == repr(rows)
    starts = [text.count("\n", 0, text.index(value)) + 1 for _, value in found[:1]]
    assert [line for line, _ in found[:1]] == starts


def test_one_bad_value_of_an_array_costs_no_other(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(
        b'[\n{"text": "one"},\n{"text": nope},\n{"text": "\xff"},\n"bare", {"text": "two"},\n'
        b'{"text": {"a": [1]}},{"text": "\\ud800"},\n\n{"body": 1}, {"text": "three"}]\n]'
    )
    found = read(path)
    assert [d for d in found if isinstance(d, str)] == ["one", "two", "three"]
    bad = {d.line: d.reason for d in found if isinstance(d, BadLine) and d.line != 6}
    assert bad[3].startswith("invalid JSON: Expecting value at column 10")
    assert bad[4] == "invalid UTF-8 (byte 0xff)"
    assert bad[5] == "not a JSON object but str"
    assert bad[8] == "key 'text' is missing (there: 'body')"
    assert bad[9].startswith("invalid JSON")
    assert [d.reason for d in found if isinstance(d, BadLine) and d.line == 6] == [
        "key 'text' is not a string but dict",
        "key 'text' holds a lone surrogate",
    ]


@pytest.mark.parametrize("text", ['[{"text": "a"},\n {"text": "b', '[{"text": "a"}', '{"text":\n1'])
def test_a_json_file_that_breaks_off_is_an_error(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x\.json:\d: the file ends inside a value"):
        read(path)


@pytest.mark.parametrize(
    ("name", "mode", "what"),
    [
        ("x.jsonl", "file", "a line"),
        ("x.jsonl.gz", "file", "a line"),
        ("x.txt", "file", "a document"),
        ("x.txt", "paragraph", "a paragraph"),
    ],
)
def test_what_no_document_may_be_is_not_held(tmp_path, monkeypatch, name, mode, what):
    monkeypatch.setattr(documents, "LONGEST_DOCUMENT", 1000)
    text = "\n".join(["word " * 15] * 30)
    content = text if name == "x.txt" else '{"text": ' + json.dumps(text) + "}\n"
    data = content.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(DataError, match=rf"{name}:? ?.*{what} of more than .*; cut it"):
        read(tmp_path / name, mode=mode)


def test_two_workers_read_every_kind_as_one_does(tmp_path, run_prepare):
    folder = tmp_path / "in"
    folder.mkdir()
    rows = [f"{text} {number}" for number in range(60) for text in TEXTS]
    (folder / "a.json").write_text(json.dumps([{"text": text} for text in rows]))
    (folder / "b.jsonl.xz").write_bytes(lzma.compress(lines(rows)))
    (folder / "c.json").write_bytes(lines(rows) + b"{bad}\n")
    write_parquet(folder / "d.parquet", pa.array(rows), row_group_size=50)
    (folder / "e.parquet").write_bytes(b"PAR1xxxx")
    one, two = (
        run_prepare([folder], tmp_path / str(count), workers=count, shard_bytes=2000)
        for count in (1, 2)
    )
    assert one.documents == two.documents == 4 * len(rows)
    assert (one.bin.sha256, one.inputs) == (two.bin.sha256, two.inputs)
    assert one.bad_lines_named == two.bad_lines_named
    assert one.left_out_named == two.left_out_named == [str(folder / "e.parquet") + SHORT_PARQUET]


SHORT_PARQUET = ": is no whole Parquet file (8 bytes); copy it again"


def test_a_value_longer_than_any_document_may_be(monkeypatch):
    monkeypatch.setattr(json_text, "_CHUNK", 64)
    stream = io.StringIO('[{"text": "a"},\n{"text": "' + "b" * 5000 + '"}]')
    with pytest.raises(json_text.JsonFileError, match=r"^2: a value of more than 1,000 characters"):
        list(json_text.split_values(stream, 1000))


DEEP = "[" * 50_000 + "]" * 50_000
GOOD = {
    "5,000 digits": '{"n": ' + "7" * 5000 + ', "text": "t"}',
    "a negative one": '{"text": "t", "n": [-' + "7" * 5000 + "]}",
    "a huge exponent": '{"text": "t", "n": 1e999999}',
    "NaN and Infinity": '{"text": "t", "n": [NaN, -Infinity]}',
    "nested deeply": '{"deep": ' + DEEP + ', "text": "t"}',
    "objects nested deeply": '{"text": "t", "a": ' + '{"text": ' * 50_000 + "1" + "}" * 50_001,
    "the key inside too": '{"text": "t", "meta": {"text": "other"}, "s": "\\"text\\": 1"}',
    "a mark in the middle": '\ufeff{"text": "t"}',
    "spaces": ' \t{"text" : "t"} \r',
    "an escaped key": '{"te\\u0078t": "t"}',
}


@pytest.mark.parametrize("case", GOOD)
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_good_text_survives_whatever_stands_beside_it(tmp_path, case, suffix):
    limits = sys.getrecursionlimit(), sys.get_int_max_str_digits()
    path = tmp_path / f"x{suffix}"
    path.write_text('{"text": "first"}\n' + GOOD[case] + '\n{"text": "last"}', encoding="utf-8")
    assert read(path) == ["first", "t", "last"]
    assert (sys.getrecursionlimit(), sys.get_int_max_str_digits()) == limits


NO_TEXT = {
    '{"text": null}': "key 'text' is not a string but NoneType",
    '{"text": 5' + "0" * 5000 + "}": "key 'text' is not a string but int",
    '{"text": ["a"]}': "key 'text' is not a string but list",
    '{"text": ' + DEEP + "}": "key 'text' is not a string but list",
    '{"content": "a", "id": 3}': "key 'text' is missing (there: 'content', 'id')",
    "{}": "key 'text' is missing",
    '{"text": "a", "text": "b"}': "key 'text' is given more than once",
    '{"text": "a"}{"text": "b"}': "invalid JSON: Extra data at column 14",
    "[" * 50_000: "invalid JSON: Expecting value at column 3",
}


@pytest.mark.parametrize("line", NO_TEXT, ids=lambda line: line[:24])
def test_a_line_without_a_text_says_why(tmp_path, line):
    path = tmp_path / "x.jsonl"
    path.write_text(f"{line}\n", encoding="utf-8")
    assert read(path) == [BadLine(str(path), 1, NO_TEXT[line])]


PARQUET_TYPES = {
    "string": pa.string(),
    "large": pa.large_string(),
    "view": pa.string_view(),
    "binary": pa.binary(),
    "dictionary": pa.dictionary(pa.int32(), pa.string()),
}


def write_parquet(path: Path, column: pa.Array, name: str = "text", **options) -> Path:
    table = pa.table({"id": pa.array(range(len(column))), name: column})
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("kind", PARQUET_TYPES)
@pytest.mark.parametrize("compression", ["none", "zstd", "snappy"])
def test_parquet(tmp_path, kind, compression):
    texts = TEXTS * 70
    column = pa.array(texts).cast(PARQUET_TYPES[kind])
    path = write_parquet(tmp_path / "x.PARQUET", column, row_group_size=30, compression=compression)
    assert read(path) == texts
    units = scan(discover([path]).sources[0], "file", 1, lambda _: None).units
    assert [unit.first_line for unit in units] == list(range(1, 351, 30))
    half = scan(discover([path]).sources[0], "file", path.stat().st_size // 2, lambda _: None).units
    assert [(u.start, u.end) for u in half] == [(0, 6), (6, 12)]
    assert sum(unit.size for unit in half) == path.stat().st_size


def test_parquet_of_another_column_with_nulls_and_bad_bytes(tmp_path):
    rows = [b"one", None, b"caf\xe9", b"", b"two"]
    path = write_parquet(tmp_path / "x.parquet", pa.array(rows, pa.binary()), "a.b")
    assert read(path, "a.b") == [
        "one",
        BadLine(str(path), 2, "column 'a.b' is null"),
        BadLine(str(path), 3, "invalid UTF-8 (byte 0xe9)"),
        "",
        "two",
    ]


@pytest.mark.parametrize("where", [0.6, 0.9])
def test_a_parquet_file_with_flipped_bytes_is_one_line(tmp_path, where):
    texts = [f"text {number * 7919 % 100_000}" for number in range(4000)]
    path = write_parquet(tmp_path / "x.parquet", pa.array(texts), write_page_checksum=True)
    data = bytearray(path.read_bytes())
    begin = int(len(data) * where) if where < 0.9 else len(data) - 60
    data[begin : begin + 40] = b"\xff" * 40
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet: .*copy (it|the file) again") as error:
        read(path)
    assert "\n" not in str(error.value)
