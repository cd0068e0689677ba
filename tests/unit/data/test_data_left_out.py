"""Every file behind --input is read or named with its reason, and few documents are said to be."""

import gzip
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_mone.commands.prepare import main
from megatron_mone.data.discovery import discover
from megatron_mone.data.errors import DataError

ROW = '{"text": "a row"}\n'


def parquet(path: Path, column: pa.Array, name: str = "text") -> None:
    pq.write_table(pa.table({name: column}), path)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def bytes_of(data: bytes):
    return lambda path: path.write_bytes(data)


# name: (how it is made, what is said of it in a folder; None is read)
FILES = {
    "a.jsonl": (bytes_of(ROW.encode()), None),
    "b.JSON": (bytes_of(b'[{"text": "a"}]'), None),
    "c.Txt": (bytes_of(b"text"), None),
    "d.ndjson": (bytes_of(ROW.encode()), None),
    "e.parquet": (lambda path: parquet(path, pa.array(["a"])), None),
    "f.v1.jsonl.gz": (bytes_of(gzip.compress(ROW.encode())), None),
    "README": (bytes_of(b"read me"), "no extension: rename it if it holds text"),
    "notes.md": (bytes_of(b"x"), "unknown extension '.md': rename it if it holds text"),
    "x.jsonl.lz4": (bytes_of(b"x"), "unknown extension '.lz4', a compression that is not read"),
    "x.jsonl.br": (bytes_of(b"x"), "unknown extension '.br', a compression that is not read"),
    "x.tar.gz": (bytes_of(b"x"), "unknown extension '.gz', an archive of files: unpack it"),
    "x.tgz": (bytes_of(b"x"), "unknown extension '.tgz', an archive of files: unpack it"),
    "x.ZIP": (bytes_of(b"PK"), "unknown extension '.ZIP', an archive of files: unpack it"),
    "x.csv": (bytes_of(b"text\na\n"), "unknown extension '.csv', a table: write it as .parquet"),
    "x.tsv.gz": (bytes_of(b"x"), "unknown extension '.gz', a table"),
    "x.bin": (bytes_of(b"x"), "unknown extension '.bin'"),
    "g.jsonl": (bytes_of(b""), None),
    "h.txt": (bytes_of(b""), None),
    "empty.parquet": (bytes_of(b""), "is no whole Parquet file (0 bytes)"),
    "empty.jsonl.gz": (bytes_of(b""), "damaged archive (it does not begin as gzip does)"),
    "utf16.txt": (bytes_of("text".encode("utf-16")), "UTF-16, not UTF-8: convert it"),
    "utf32.jsonl": (bytes_of(ROW.encode("utf-32")), "convert it (iconv -f UTF-32 -t UTF-8)"),
    "packed16.jsonl.gz": (bytes_of(gzip.compress(ROW.encode("utf-16"))), "UTF-16, not UTF-8"),
    "utf16le.jsonl": (bytes_of(ROW.encode("utf-16-le")), "UTF-16 without a byte order mark"),
    "plain.jsonl.gz": (bytes_of(ROW.encode()), "damaged archive (it does not begin as gzip does)"),
    "plain.txt.zst": (bytes_of(b"text"), "damaged archive (it does not begin as Zstandard does)"),
    "word.json": (bytes_of(b"text"), "begins with 't', not with a JSON object or array"),
    "short.parquet": (bytes_of(b"PAR1xxxx"), "is no whole Parquet file (8 bytes)"),
    "half.parquet": (bytes_of(b"PAR1" + b"x" * 90), "is no whole Parquet file (94 bytes)"),
    "rubbish.parquet": (bytes_of(b"PAR1" + b"x" * 90 + b"PAR1"), "cannot be read as Parquet ("),
    "other.parquet": (
        lambda path: parquet(path, pa.array(["a"]), "body"),
        "has no column 'text', of 'body'; name one with --json-key",
    ),
    "lists.parquet": (
        lambda path: parquet(path, pa.array([["a"]])),
        "column 'text' is list<element: string>, not string",
    ),
    "numbers.parquet": (
        lambda path: parquet(path, pa.array([1])),
        "column 'text' is int64, not string",
    ),
    "none.parquet": (lambda path: parquet(path, pa.array([], pa.string())), "holds no row"),
    "x.parquet.gz": (bytes_of(gzip.compress(b"PAR1")), "Parquet is compressed inside"),
    "pipe.txt": (pipe, "a pipe, and input is read more than once: write it to a file"),
    "socket.txt": (listening, "a socket"),
    "nothing.txt": (lambda path: path.symlink_to("no such file"), "a link to nothing"),
    "loop.txt": (lambda path: path.symlink_to(path), "a link to nothing"),
    ".hidden.txt": (bytes_of(b"text"), "hidden"),
    "y_text_document.idx": (bytes_of(b"x"), "part of a prepared dataset"),
    "y.manifest.json": (bytes_of(b"{}"), "part of a prepared dataset"),
    "new\nline.md": (bytes_of(b"x"), "unknown extension '.md'"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all") / "texts"
    folder.mkdir()
    for name, (make, _) in FILES.items():
        make(folder / name)
    return folder


def test_every_file_of_a_folder_is_read_or_named(folder, capfd):
    expected = {name for name, (_, reason) in FILES.items() if reason is None}
    found = discover([folder], folder)
    assert {source.name for source in found.sources} == expected
    assert len(found.sources) + len(found.left_out) == len(FILES)
    for entry in found.left_out:
        assert FILES[entry.name.replace("\\n", "\n")][1] in entry.reason
        assert "\n" not in str(entry)
    prefix = folder.parent / "out"
    assert main(["--input", str(folder), "--output-prefix", str(prefix)]) == 0
    captured = capfd.readouterr()
    assert f"inputs         8 files read, {len(FILES) - 8} left out\n" in captured.out
    assert f"note: {folder}/g.jsonl gave no document" in captured.err
    assert captured.err.count("left out ") == 20
    assert f"... and {len(FILES) - 28} more left out, see {prefix}.manifest.json" in captured.err
    manifest = json.loads(prefix.with_name("out.manifest.json").read_text())
    assert manifest["left_out"] == len(manifest["left_out_named"]) == len(FILES) - 8
    assert {Path(entry["name"]).name: entry["documents"] for entry in manifest["inputs"]} == (
        dict.fromkeys(expected, 1) | {"g.jsonl": 0, "h.txt": 0}
    )


BY_NAME = ("hidden", "part of a prepared dataset")


@pytest.mark.parametrize("name", [n for n, (_, why) in FILES.items() if why and why not in BY_NAME])
def test_given_by_its_own_name_it_is_an_error(folder, name):
    """A socket, a link and so on among them; a link to nothing is no file at all."""
    reason = "no such file" if "a link" in FILES[name][1] else FILES[name][1]
    with pytest.raises(DataError) as error:
        discover([folder / name])
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_strict_stops_at_a_file_that_should_be_read(folder, tmp_path, capfd):
    shutil.copytree(
        folder, tmp_path / "in", ignore=lambda _, names: {*names} - {"a.jsonl", "x.csv"}
    )
    strict = ["--output-prefix", str(tmp_path / "o"), "--strict", "--input", str(tmp_path / "in")]
    assert main(strict) == 0
    (tmp_path / "in" / "z.parquet").write_bytes(b"PAR1xxxx")
    assert main(strict) == 2
    assert "z.parquet: is no whole Parquet file" in capfd.readouterr().err


def test_folders_in_folders_links_and_earlier_output(tmp_path):
    """Links to folders are followed, but never round; what was prepared before is no text."""
    texts = tmp_path / "texts"
    (texts / "x.txt" / ".git").mkdir(parents=True)
    (texts / "x.txt" / "a.txt").write_text("a")
    (texts / "x.txt" / "up").symlink_to(texts)
    (texts / "again.txt").symlink_to(texts / "x.txt" / "a.txt")
    os.link(texts / "x.txt" / "a.txt", texts / "z.txt")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (texts / "linked").symlink_to(tmp_path / "elsewhere")
    prefix = ["--output-prefix", str(texts / "out")]
    assert main(["--input", str(texts / "x.txt" / "a.txt"), *prefix]) == 0
    assert main(["--input", str(texts), "--output-prefix", str(texts / "new")]) == 0
    found = discover([texts], texts)
    assert [source.name for source in found.sources] == ["again.txt", "linked/b.txt"]
    assert {entry.name: entry.reason for entry in found.left_out} == {
        **{f"{made}{suffix}": "part of a prepared dataset" for made in ("new", "out") for suffix in
           ("_text_document.bin", "_text_document.idx", ".manifest.json", ".tokenizer")},
        "x.txt/.git": "hidden",
        "x.txt/up": "a link to a folder that it is in",
        "x.txt/a.txt": "the same file as again.txt, which is read",
        "z.txt": "the same file as again.txt, which is read",
    }  # fmt: skip


def test_own_output_among_the_inputs_changes_nothing(tmp_path, capfd):
    (tmp_path / "a.txt").write_text("a")
    command = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "out")]
    assert main(command) == 0
    assert main(command) == 0
    assert "left out" not in capfd.readouterr().err


def test_a_name_that_is_no_text(tmp_path, capfd):
    folder = tmp_path / "in"
    folder.mkdir()
    with open(os.fsencode(folder) + b"/caf\xe9.txt", "w") as stream:  # noqa: PTH123
        stream.write("a")
    assert main(["--input", str(folder), "--output-prefix", str(tmp_path / "o")]) == 0
    manifest = json.loads((tmp_path / "o.manifest.json").read_text())
    assert manifest["inputs"][0]["name"].endswith("caf\\udce9.txt")


def test_a_folder_that_may_not_be_read_is_one_line(tmp_path, monkeypatch, capfd):
    """As root nothing is forbidden, so the refusal is the operating system's by proxy."""
    (tmp_path / "in" / "secret").mkdir(parents=True)
    (tmp_path / "in" / "a.txt").write_text("a")
    real = os.listdir

    def refuse(path):
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "listdir", refuse)
    assert main(["--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "o")]) == 2
    assert capfd.readouterr().err == f"error: {tmp_path}/in/secret: Permission denied\n"


def test_without_pyarrow_one_line_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"e\.parquet: .* pyarrow: pip install .*\[parquet\]"):
        discover([folder / "e.parquet"])
    with pytest.raises(DataError, match="pyarrow"):
        discover([folder])
    assert discover([folder / "a.jsonl"]).sources


def test_a_folder_of_nothing_readable_names_the_first(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    (tmp_path / "y.md").write_text("")
    with pytest.raises(DataError, match=r"no \.txt.*can be read \(.*x\.csv: unknown.*, \.\.\.\)"):
        discover([tmp_path])
    (tmp_path / "y.txt").write_text("")
    with pytest.raises(DataError, match="all its 1 files are empty"):
        discover([tmp_path])


def test_notes_of_files_that_gave_nothing_or_the_same(tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text(ROW * 20)
    (tmp_path / "b.json").write_text(ROW * 20)
    (tmp_path / "c.jsonl").write_text('{"body": "a"}\n\n')
    command = ["--input", str(tmp_path), "--output-prefix", str(tmp_path / "o")]
    assert main(command) == 0
    error = capfd.readouterr().err.splitlines()
    assert error == [
        f"bad line {tmp_path}/c.jsonl:1: key 'text' is missing (there: 'body')",
        f"note: {tmp_path}/b.json has the same bytes as {tmp_path}/a.jsonl; "
        "both are in the dataset",
        f"note: {tmp_path}/c.jsonl gave no document",
    ]
