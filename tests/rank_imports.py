"""Imported once by a process that forks ranks: what a training run imports, and its mock data.

Importing it installs the CPU emulation and starts no thread and no process group.
"""

import gc
import importlib
import os

BEFORE = dict(os.environ)

from megatron_mone.common.child_processes import end_with_starter  # noqa: E402

end_with_starter()  # a fork server would live as long as any process below it

import torch  # noqa: E402

from megatron_mone import cpu_emulation  # noqa: E402
from tests.training_cases import prepare_ahead  # noqa: E402

cpu_emulation.install()
for late in (
    *("megatron.core.tokenizers.text", "megatron.training.training", "torch.utils.tensorboard"),
    *(
        "megatron_mone.model.gpt_training",
        "megatron_mone.model.layer_spec",
        "megatron_mone.moe.metrics",
    ),
    *("megatron_mone.model.checks", "megatron_mone.pretrain", "megatron_mone.profiling.attach"),
    *("megatron_mone.checkpoint.save", "megatron_mone.checkpoint.signals"),
    "megatron_mone.checkpoint.verify",
):
    importlib.import_module(late)
prepare_ahead()
assert not torch.distributed.is_initialized()
# What the imports put into the environment, which a rank must find there as well.
SET_BY_IMPORTS = {k: v for k, v in os.environ.items() if BEFORE.get(k) != v}
gc.collect()
gc.freeze()  # nothing here is garbage: a rank's collections need not look at it
