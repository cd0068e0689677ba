"""Megatron's checks of a micro-batch's loss, and what a run says that ends by one.

Megatron's package makes these calls nowhere: its script pretrain_gpt.py does, and so must ours. May
touch: Megatron's rerun state machine, which runs a step again to tell a machine's fault from the
model's; what experts found in the step (moe/faults.py).
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    RerunMode,
    get_rerun_state_machine,
)
from megatron.training import get_args
from torch import Tensor

from megatron_mone.moe import faults

SPIKY_LOSS_FACTOR = 10
"""Of the largest loss so far; the factor of Megatron's pretrain_gpt.py."""


def settle_rerun_mode(args: Namespace) -> None:
    """Make rerun_mode one that the state machine has and that can run here.

    The parser calls a mode report_stats that the machine calls otherwise. And in validate_results
    Megatron runs a refused step a second time and then saves, to have the next job run it on
    another GPU (training.py, after should_checkpoint_and_exit): without `save` that ends in a
    TypeError, so the first refusal is to end the run.
    """
    if args.rerun_mode == "report_stats":
        args.rerun_mode = RerunMode.REPORT_DETERMINISM_STATS.value
    if args.rerun_mode == "validate_results" and not args.save:
        args.rerun_mode = "disabled"


def check_loss(loss: Tensor) -> None:
    """Have Megatron's rerun state machine judge this rank's loss [], before ranks average theirs.

    check_for_nan_in_loss_and_grad (Megatron's default) refuses NaN and infinity,
    check_for_spiky_loss warns of more than SPIKY_LOSS_FACTOR times the largest loss so far.

    Args:
        loss: summed over the tokens of a micro-batch.

    Raises:
        NonFiniteExpertError: it is not finite, and an expert's fault says where that began.
        RuntimeError: the loss is not finite where the step is not run again: in evaluation, with
            --rerun-mode disabled, or without --save.
    """
    args = get_args()
    machine = get_rerun_state_machine()
    if args.check_for_nan_in_loss_and_grad:
        for name, is_wrong in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {name} in local forward loss calculation"
            refuses: Any = _told_by_experts(is_wrong)
            machine.validate_result(loss, refuses, message, tolerance=0.0, fatal=True)
    if args.check_for_spiky_loss:
        is_spike = partial(
            machine.is_unexpectedly_large, threshold=SPIKY_LOSS_FACTOR, context="loss"
        )
        machine.validate_result(loss, is_spike, "Spiky loss", tolerance=0.0, fatal=False)


def _told_by_experts(is_wrong: Callable[[Tensor], Tensor]) -> Callable[[Tensor], bool]:
    """The check, that first lets experts say what they found, before Megatron runs a step again."""

    def refuses(loss: Tensor) -> bool:
        refused = bool(is_wrong(loss))
        if refused:
            faults.look(refused=True)
        return refused

    return refuses


def rejection(error: BaseException) -> str | None:
    """What to say of a run that ended because a loss or gradient was refused; None: it was not."""
    if isinstance(error, RuntimeError) and "Unexpected result" in str(error):
        return f"the loss or a gradient is not finite: {error}"
    code = getattr(error, "code", None)
    if code == EXIT_CODE_RESUME_TO_DISAMBIGUATE:
        return (
            "the loss or a gradient is not finite, and was the same when the step ran again: look "
            "for the cause in the model or the data; started again from its checkpoint on another "
            "GPU, Megatron tells whether this one computes wrongly"
        )
    if code == EXIT_CODE_FAILED_ON_RESULT_VALIDATION:
        return (
            "the loss or a gradient was not finite, and another one when the step ran again: this "
            "machine may compute wrongly; go on from the last checkpoint on another one"
        )
    return None
