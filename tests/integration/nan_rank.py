"""A training run in which expert 3, on rank 1 of two, breaks in layer 2 at its fifth forward."""

import os

from megatron_mone import pretrain
from megatron_mone.moe import faults
from megatron_mone.moe.experts import MoNEExperts

forward = MoNEExperts.forward
calls = {"forwards": 0}


def breaking_forward(self, *args, **kwargs):
    """Both layers call it in turn, so that layer 2 makes the even calls."""
    calls["forwards"] += 1
    if os.environ["RANK"] == "1" and calls["forwards"] == 10:
        self.linear_fc2.data[1] = float("nan")
    return forward(self, *args, **kwargs)


faults.DEFER = os.environ["DEFER"] == "True"
MoNEExperts.forward = breaking_forward
pretrain.main()
