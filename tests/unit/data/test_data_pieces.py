"""A few long .txt files become documents enough to validate on; nothing of them is lost."""

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.commands.prepare import main
from megatron_mone.data.text_pieces import SMALLEST, cut_pieces, piece_bytes


@settings(max_examples=150, deadline=None)
@given(
    words=st.lists(
        st.sampled_from(["a", "word ", "\n", "\n \n", "日本語", "🦉🦉", "\r\n\r\n", "x" * 90, "é"]),
        max_size=120,
    )
)
def test_pieces_are_the_text(words):
    """Together they are it to the byte; each is UTF-8 of `size` to 2 x `size` bytes."""
    text = "".join(words).encode()
    pieces = list(cut_pieces(io.BytesIO(text), SMALLEST))
    assert b"".join(pieces) == text
    for piece in pieces:
        piece.decode("utf-8")
    assert all(SMALLEST < len(piece) <= 2 * SMALLEST for piece in pieces[:-1])
    assert all(0 < len(piece) <= 2 * SMALLEST for piece in pieces[-1:])


def test_pieces_end_where_a_reader_would_end_them():
    size, rest = 64, "z" * 200
    blank = "x" * 60 + "\n" + "y" * 20 + " b\n \t\n"
    line = "x" * 60 + "\n" + "y" * 20 + " b\n"
    space = "x" * 60 + "\n" + "y" * 20 + " "
    for first in (blank, line, space, "é" * 64):
        pieces = list(cut_pieces(io.BytesIO((first + rest).encode()), size))
        assert pieces[0].decode() == first


@pytest.mark.parametrize(
    ("total", "piece"),
    [(0, 64), (3800, 64), (100_000, 1000), (1_000_000, 4096), (10**9, 10**6)],
)
def test_size_of_a_piece(total, piece):
    assert piece_bytes(total) == piece


@pytest.fixture
def prepare(tmp_path, capfd):
    def run(*arguments: str):
        prefix = tmp_path / "out"
        code = main(["--output-prefix", str(prefix), "--overwrite", *map(str, arguments)])
        captured = capfd.readouterr()
        return code, captured.out, captured.err, prefix

    return run


def test_one_long_txt_is_cut_and_that_is_said(tmp_path, prepare, read_back):
    text = "just one document. " * 200
    (tmp_path / "one.txt").write_text(text)
    code, out, error, prefix = prepare("--input", tmp_path / "one.txt")
    documents = read_back(prefix)
    assert (code, error) == (0, "")
    assert "".join(documents) == text
    assert len(documents) == 57  # enough that 950,50,0 leaves 3 for validation
    assert "documents      57 (.txt cut into pieces of about 64 bytes, at blank lines" in out
    assert "--txt-documents file cuts none" in out
    manifest = json.loads(prefix.with_name("out.manifest.json").read_text())
    assert manifest["txt_documents"] == "64"


def test_whole_if_asked_with_what_then_trains(tmp_path, prepare, read_back):
    (tmp_path / "one.txt").write_text("just one document. " * 200)
    arguments = ["--input", tmp_path / "one.txt", "--txt-documents", "file"]
    code, out, error, prefix = prepare(*arguments)
    assert (code, len(read_back(prefix))) == (0, 1)
    assert "cut" not in out
    assert "note: one document cannot be split into training and validation data" in error
    assert "--split 1,0,0 --eval-iters 0" in error


@pytest.mark.parametrize("count", [2, 10, 16, 17])
def test_few_documents_are_said_to_be_few(tmp_path, prepare, count):
    """Megatron gives a part the documents from round(N x begin) to round(N x end)."""
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n' * count)
    error = prepare("--input", tmp_path / "x.jsonl")[2]
    none_by_default = round(count * 0.969) == round(count * 0.999)
    assert (f"train with --split {count - 1},1,0" in error) == none_by_default
    assert round(count * (count - 1) / count) == count - 1


def test_what_auto_leaves_whole(tmp_path, prepare, read_back):
    """Short texts, many texts, and texts beside documents that somebody made."""
    long = "word " * 2000
    short, many, beside = (tmp_path / name for name in ("short", "many", "beside"))
    for folder in (short, many, beside):
        folder.mkdir()
    for index in range(3):
        (short / f"{index}.txt").write_text("short text")
    for index in range(20):
        (many / f"{index}.txt").write_text(long)
    (beside / "a.txt").write_text(long)
    (beside / "b.jsonl").write_text('{"text": "a"}')
    for folder, count in ((short, 3), (many, 20), (beside, 2)):
        code, out, _, prefix = prepare("--input", folder)
        assert (code, len(read_back(prefix))) == (0, count)
        assert "cut" not in out


def test_pieces_of_a_size_asked_for(tmp_path, prepare, read_back):
    """A file's byte order mark is dropped; a bad byte costs its piece alone."""
    text = "\ufeff" + "a line of text\n" * 500
    data = bytearray(text.encode())
    data[4000] = 0xFF
    (tmp_path / "x.txt").write_bytes(data)
    arguments = ["--input", tmp_path / "x.txt", "--txt-documents", "1000"]
    code, _, error, prefix = prepare(*arguments)
    documents = read_back(prefix)
    assert code == 0
    assert f"bad line {tmp_path}/x.txt:267: invalid UTF-8 (byte 0xff)" in error
    assert [len(text) for text in documents[:3]] == [1005, 1005, 1005]
    assert documents[0].startswith("a line")
    assert len("".join(documents)) == 7500 - 1005
    for wrong in ("63", "0", "-1", "1e3", "none"):
        code, _, error, _ = prepare("--input", tmp_path / "x.txt", "--txt-documents", wrong)
        assert (code, error.count("\n")) == (2, 1)
        assert f"--txt-documents {wrong}: must be one of auto, file, paragraph, or the" in error
