"""A training run in which expert 3, on rank 1 of two, breaks in layer 2 at its fifth forward."""

import os


def main(deferred: bool, flags: list[str]) -> None:
    """A rank: see `faults.DEFER` for `deferred`."""
    from megatron_mone import pretrain
    from megatron_mone.moe import faults
    from megatron_mone.moe.experts import MoNEExperts

    forward = MoNEExperts.forward
    forwards = 0

    def breaking_forward(self, *args, **kwargs):
        """Both layers call it in turn, so that layer 2 makes the even calls."""
        nonlocal forwards
        forwards += 1
        if os.environ["RANK"] == "1" and forwards == 10:
            self.linear_fc2.data[1] = float("nan")
        return forward(self, *args, **kwargs)

    faults.DEFER = deferred
    MoNEExperts.forward = breaking_forward  # type: ignore[method-assign]
    pretrain.main(flags)
