"""What --load must name for --moe-use-upcycling, and which checkpoint a started-again run reads."""

from argparse import Namespace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter, save

from megatron_mone.checkpoint.tracker import TRACKER_NAME
from megatron_mone.checkpoint.upcycling import begin

DENSE, EXPERTS = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.router.weight"


def written(folder, *keys):
    state = {key: torch.zeros(2, 2 * 24, 4) for key in keys}
    (folder / "release").mkdir(parents=True)
    save(state, storage_writer=FileSystemWriter(folder / "release"), no_dist=True)
    (folder / "release" / "metadata.json").write_text("{}")
    (folder / TRACKER_NAME).write_text("release")
    return str(folder)


def asked(folder, load, **more):
    given = {
        "moe_use_upcycling": True, "load": load, "save": str(folder / "run"), "ckpt_step": None,
        "pretrained_checkpoint": None, "ckpt_format": "torch_dist", "no_load_optim": True,
        "no_load_rng": True, "moe_upcycling_granularity": 2, "moe_ffn_hidden_size": 12,
    }  # fmt: skip
    return Namespace(**{**given, **more})


GIVEN = Namespace(no_load_optim=None, no_load_rng=None)


def test_a_dense_checkpoint_is_what_the_run_starts_from(tmp_path):
    args = asked(tmp_path, written(tmp_path / "dense", DENSE))
    begin(args, GIVEN, elsewhere=False)
    assert (args.pretrained_checkpoint, args.load) == (str(tmp_path / "dense"), args.save)
    assert args.upcycles
    assert not any((args.moe_use_upcycling, args.no_load_optim, args.no_load_rng))


def test_what_the_run_has_saved_is_read_as_any_other(tmp_path):
    args = asked(tmp_path, written(tmp_path / "dense", DENSE))
    written(tmp_path / "run", EXPERTS)
    begin(args, GIVEN, elsewhere=False)
    assert not hasattr(args, "upcycles")
    assert not args.no_load_optim


@pytest.mark.parametrize(
    ("keys", "more", "line"),
    [
        ((), {}, "finds no torch_dist checkpoint in load = .*: give --load"),
        ((DENSE, EXPERTS), {}, "has experts already: leave it out"),
        ((DENSE,), {"moe_ffn_hidden_size": 24}, "moe_upcycling_granularity = 2 .* FFN of 24 "),
    ],
)
def test_another_is_refused_in_a_line(tmp_path, keys, more, line):
    load = written(tmp_path / "dense", *keys) if keys else str(tmp_path / "none")
    with pytest.raises(ValueError, match=line) as error:
        begin(asked(tmp_path, load, **more), GIVEN, elsewhere=False)
    assert "\n" not in str(error.value)
    begin(asked(tmp_path, load, **more), GIVEN, elsewhere=True)
