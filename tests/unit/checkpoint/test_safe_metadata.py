"""A checkpoint's `.metadata` cannot run code: what it names is refused before it is called."""

import io
import os
import pickle
import pickletools
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, save

from megatron_mone.checkpoint import safe_metadata
from megatron_mone.checkpoint.choice import saved_choice
from megatron_mone.checkpoint.safe_metadata import read_metadata
from megatron_mone.checkpoint.vocabulary import EMBEDDING, saved_size
from megatron_mone.moe.stored_choice import CHOICE


def test_what_torch_writes_is_accepted(tmp_path):
    state = {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.bfloat16), "c": [1, "x"]}
    save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    read_metadata(tmp_path)
    read_metadata(tmp_path / "nowhere")


def test_it_is_read_once_until_the_file_is_another(tmp_path, monkeypatch):
    """By the choice, the vocabulary and the verification of one start."""
    read = []
    known = safe_metadata._KnownClasses
    monkeypatch.setattr(safe_metadata, "_KnownClasses", lambda file: read.append(1) or known(file))
    monkeypatch.setattr(
        FileSystemReader, "read_metadata", lambda *_: pytest.fail("torch unpickled it again")
    )
    key = f"decoder.layers.mlp.experts.{CHOICE}/shard_0_1"
    for rows in (3, 4):
        choice = io.BytesIO()
        torch.save([{"mone_activation": "silu"}], choice)
        state = {EMBEDDING: torch.ones(rows), key: choice}
        save(state, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
        for _ in range(2):
            assert saved_choice(tmp_path) == {"mone_activation": "silu"}
            assert saved_size(tmp_path) == rows
        read_metadata(tmp_path)
    assert len(read) == 2
    safe_metadata.forget_metadata()
    read_metadata(tmp_path)
    assert len(read) == 3


class Runs:
    def __init__(self, call, *arguments):
        self.call = call, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_call_is_refused_and_not_made(tmp_path, protocol):
    mark = tmp_path / "ran"
    for value in (Runs(os.mkdir, str(mark)), Runs(eval, f"open({str(mark)!r}, 'w')")):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(value, protocol=protocol))
        with pytest.raises(ValueError, match=r"\.metadata is not plain metadata \(it names"):
            read_metadata(tmp_path)
    assert not mark.exists()


def test_no_way_round_through_attributes(tmp_path):
    """Protocol 4 resolves dotted names: filesystem.os.system must not be reached."""
    module, name = "torch.distributed.checkpoint.filesystem", "os.getcwd"
    data = (
        pickle.PROTO
        + b"\x04"
        + b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    )
    data += pickle.STACK_GLOBAL + pickle.EMPTY_TUPLE + pickle.REDUCE + pickle.STOP
    assert [op.name for op, _, _ in pickletools.genops(data)][-3:-1] == ["EMPTY_TUPLE", "REDUCE"]
    (Path(tmp_path) / ".metadata").write_bytes(data)
    with pytest.raises(ValueError, match=r"it names .*os\.getcwd"):
        read_metadata(tmp_path)


def test_a_cut_pickle_is_one_line(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1})[:-4])
    with pytest.raises(ValueError, match=r"\.metadata is not plain metadata"):
        read_metadata(tmp_path)
