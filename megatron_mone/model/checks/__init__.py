"""Checks made before anything expensive starts, each a file: what it judges stands at its head.

`check_run` works on Megatron's parsed arguments, `check_layout` and `check_checkpoint` on its
validated ones. Each failure is a ValueError of one line that names the flag or file, the value and
the fix.
"""

import os
from argparse import Namespace
from pathlib import Path

from megatron_mone.config import check_doors
from megatron_mone.deepspeed.supported import (
    check_engine,
    check_files,
    check_package,
    check_settings,
)
from megatron_mone.kernels.measured import check_table
from megatron_mone.model import routing_files
from megatron_mone.model.checks.combinations import check_combinations
from megatron_mone.model.checks.files import (
    check_checkpoint,
    check_data,
    check_tokenizer,
    check_writable,
)
from megatron_mone.model.checks.hybrid import check_pattern
from megatron_mone.model.checks.layout import check_layout
from megatron_mone.model.checks.machine import check_machine
from megatron_mone.model.checks.optimizer import check_optimizer, check_optimizer_package
from megatron_mone.model.checks.schedule import check_length, check_schedule
from megatron_mone.model.checks.sharded_weights import check_sharded_weights
from megatron_mone.model.checks.sizes import check_sizes
from megatron_mone.model.trackers.flags import check_trackers
from megatron_mone.moe.masks.trace import recorded_steps

__all__ = [
    "check_checkpoint",
    "check_layout",
    "check_length",
    "check_run",
    "check_settings",
    "check_values",
]


def check_run(args: Namespace) -> None:
    """Files and folders, before Megatron opens any. Cheap: index headers, one tokenizer file."""
    check_machine(args)
    check_table()
    check_values(args)
    check_optimizer_package(args)
    check_package(args)
    check_files(args)
    check_data(args)
    routing_files.check_files(args)
    if args.mone_replay_masks:
        recorded_steps(Path(args.mone_replay_masks))
    for flag in ("save", "tensorboard_dir", "mone_record_masks", "mone_profile_dir"):
        if getattr(args, flag) and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            check_writable(flag, Path(getattr(args, flag)))


def check_values(args: Namespace) -> None:
    """What can be judged away from the run's machine: no dataset or folder is looked for."""
    check_doors(args)
    check_sizes(args)
    check_tokenizer(args)
    check_schedule(args)
    check_optimizer(args)
    check_sharded_weights(args)
    check_engine(args)
    check_combinations(args)
    routing_files.check_combination(args)
    check_pattern(args)
    check_trackers(args)
