"""A run keeps the rows of the checkpoint's embedding, or one line says what would work."""

import json
import warnings
from argparse import Namespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_mone.checkpoint.vocabulary import EMBEDDING, keep_padded_vocabulary, saved_size

ROWS = 384  # vocabulary 257 on one rank, padded to a multiple of 128


@pytest.fixture
def folder(tmp_path):
    """A run's folder with one checkpoint."""
    step = tmp_path / "iter_0000002"
    save({EMBEDDING: torch.zeros(ROWS, 4)}, storage_writer=FileSystemWriter(step), no_dist=True)
    (step / "metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("2")
    return tmp_path


def kept(folder, *, given=None, derived=512, vocabulary=257, tp=2, **more):
    args = Namespace(
        load=str(folder), ckpt_format="torch_dist", vocab_size=vocabulary,
        padded_vocab_size=given or derived, tensor_model_parallel_size=tp,
        **{"ckpt_step": None, **more},
    )  # fmt: skip
    keep_padded_vocabulary(args, given)
    return args.padded_vocab_size


def test_the_checkpoints_rows_are_kept(folder):
    assert saved_size(folder / "iter_0000002") == ROWS
    assert kept(folder) == ROWS
    assert kept(folder, derived=ROWS, tp=1) == ROWS
    assert kept(folder, vocabulary=None) == ROWS
    assert kept("", pretrained_checkpoint=str(folder)) == ROWS


def test_without_a_checkpoint_it_is_megatrons(tmp_path):
    assert kept(tmp_path) == 512
    assert kept("") == 512
    assert kept(tmp_path, given=640) == 640
    assert kept(tmp_path, given=None, derived=None) is None


def test_a_checkpoint_that_lies_on_the_cluster_is_looked_at_there(tmp_path):
    """`launch submit` and the planner read the same arguments, where no folder may be seen."""
    assert kept("/nowhere/run", ckpt_step=500) == 512
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("7")
    assert kept(tmp_path) == 512


@pytest.mark.parametrize("damage", [b"", b"\x80\x04no pickle"])
def test_damaged_metadata_is_left_to_the_check_that_offers_an_earlier_one(folder, damage):
    (folder / "iter_0000002" / ".metadata").write_bytes(damage)
    assert kept(folder) == 512


@pytest.mark.parametrize(
    ("case", "wanted"),
    [
        ({"tp": 5}, "384 rows, padding included, which cannot be split over "
         "tensor_model_parallel_size = 5, and other rows would make another model: give a "
         "tensor_model_parallel_size of 1, 2, 3, 4"),
        ({"vocabulary": 500}, "384 rows, padding included, which is less than vocab_size = 500: "),
        ({"given": 300, "tp": 8}, "padded_vocab_size = 300 cannot be split over "
         "tensor_model_parallel_size = 8"),
        ({"given": 256}, "padded_vocab_size = 256 is less than vocab_size = 257: "),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_one_line(folder, case, wanted):
    with pytest.raises(ValueError) as error:
        kept(folder, **case)
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("rows", "what"), [(640, "adds rows of zeros"), (258, "cuts the last")])
def test_other_rows_asked_for_are_taken_and_said(folder, rows, what):
    with pytest.warns(UserWarning, match=f"has an embedding of 384 rows, .* {what}"):
        assert kept(folder, given=rows) == rows
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kept(folder, given=ROWS) == ROWS
