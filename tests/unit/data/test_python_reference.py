"""The text of a second domain: no paragraph twice, the same every time, in ids of any tokenizer."""

import json
import sys
from collections import Counter

import pytest

from megatron_mone.commands.app import main
from megatron_mone.data.errors import DataError
from megatron_mone.data.python_reference import sections, write_reference
from megatron_mone.data.tokenizers import Encoder


def texts(file) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text("utf-8").splitlines()]


def test_no_paragraph_stands_twice_and_no_order_of_topics_matters():
    one, other = "\n".join("a" * 1500), "the same\n\n" * 3
    topics = {"b": f"{other}only here\n\n{one}", "a": f"{one}\n\n{other}", "c": "last"}
    found = sections(topics)
    paragraphs = [part for text in found for part in text.split("\n\n")]
    assert Counter(paragraphs) == Counter([one, "the same", "only here", "last"])
    assert sections(dict(reversed(topics.items()))) == found
    assert len(found) == 2


def test_the_reference_of_this_python_is_the_same_every_time(tmp_path):
    (file,) = write_reference(tmp_path)
    found = texts(file)
    before = file.stat().st_mtime_ns
    assert write_reference(tmp_path) == [file]
    assert file.stat().st_mtime_ns == before
    assert sum(map(len, found)) > 300_000
    assert max(map(len, found)) < 20_000
    file.write_text("changed")
    assert texts(*write_reference(tmp_path)) == found


def test_a_python_without_it_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"has no pydoc_data\.topics: install") as error:
        write_reference(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_trained_on_another_text_spells_all_of_it(tmp_path, capsys):
    other = tmp_path / "other.txt"
    other.write_text("the old tree and a stone of light. " * 400)
    first = ["--input", str(other), "--output-prefix", str(tmp_path / "other")]
    assert main(["prepare", *first, "--tokenizer", "bpe:300"]) == 0
    tokenizer = tmp_path / "other.tokenizer"
    words = ["--output-prefix", str(tmp_path / "reference"), "--cache-dir", str(tmp_path)]
    words += ["--corpus", "python-reference", "--tokenizer", str(tokenizer)]
    assert main(["prepare", *words]) == 0
    encoder = Encoder(tokenizer)
    for text in texts(*write_reference(tmp_path)):
        assert encoder.decode(encoder.encode(text)) == text
