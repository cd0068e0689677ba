"""The learning-rate schedule of a checkpoint against that of the run that loads it.

Megatron compares every number of both, also those that decide nothing: a run whose weight decay is
constant cannot be given more steps. And it looks for the optimizer's groups by their learning rate,
so that no flag lets a run go on with another. Here what decides nothing is passed over, the groups
follow --override-opt-param-scheduler and --use-checkpoint-opt-param-scheduler as the schedule does,
and what does not fit is a line that names the flag. May touch: Megatron's OptimizerParamScheduler,
the groups of a loaded state.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_mone.checkpoint.tracker import TRACKER_NAME
from megatron_mone.common.patch import wrapping

State = dict[str, Any]

_FLAGS = {
    "max_lr": "lr",
    "min_lr": "min_lr",
    "lr_warmup_steps": "lr_warmup_iters",
    "lr_decay_steps": "lr_decay_iters",
    "lr_decay_style": "lr_decay_style",
    "start_wd": "weight_decay",
    "end_wd": "end_weight_decay",
    "wd_incr_style": "weight_decay_incr_style",
    "wd_incr_steps": "train_iters",
}
"""Field of the schedule's state -> the argument it comes of."""
_IN_GROUPS = ("max_lr", "min_lr", "start_wd", "end_wd")
_STEPS = ("lr_warmup_steps", "lr_decay_steps", "wd_incr_steps")
_CHOICE = (
    "pass --override-opt-param-scheduler to go on by this run's flags, or "
    "--use-checkpoint-opt-param-scheduler to keep the checkpoint's"
)


def _fitted(load_state_dict: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(load_state_dict)
    def fitted(self: Any, state_dict: State) -> None:
        load_state_dict(self, fit_schedule(self, state_dict))

    return fitted


PATCHES = (
    wrapping(
        "schedule",
        "megatron.core.optimizer_param_scheduler: OptimizerParamScheduler.load_state_dict",
        _fitted,
        why="it stops at numbers that decide nothing, and names no flag",
        needed_while="self.wd_incr_steps = self._check_and_set(",
    ),
)


def fit_schedule(schedule: Any, saved: State) -> State:
    """The saved schedule, with this run's numbers where they decide nothing.

    Args:
        schedule: Megatron's OptimizerParamScheduler of this run.
        saved: its state in a checkpoint.

    Raises:
        ValueError: a number that decides differs, and no flag says which is meant.
    """
    fitted = dict(saved)
    for style, steps in (("lr_decay_style", "lr_decay_steps"), ("wd_incr_style", "wd_incr_steps")):
        if fitted.get(style) == getattr(schedule, style) == "constant" and steps in fitted:
            fitted[steps] = getattr(schedule, steps)
    if schedule.override_opt_param_scheduler or schedule.use_checkpoint_opt_param_scheduler:
        return fitted
    for field in _FLAGS:
        own = getattr(schedule, field)
        if field in fitted and fitted[field] != own:
            raise ValueError(_difference(field, own, fitted[field]))
    return fitted


def fit_groups(states: list[State], optimizers: list[Any], args: Namespace) -> None:
    """Give loaded groups, or this run's, the learning rates of the other, as the flags say.

    Args:
        states: the loaded ones that hold `param_groups`; changed in place.
        optimizers: of this run.
        args: Megatron's.

    Raises:
        ValueError: a learning rate differs, and no flag says which is meant.
    """
    own = [group for optimizer in optimizers for group in optimizer.param_groups]
    for saved in (group for state in states for group in state["param_groups"]):
        alike = [group for group in own if _identity(group) == _identity(saved)]
        if any(_scheduled(group) == _scheduled(saved) for group in alike) or len(alike) != 1:
            continue
        if args.override_opt_param_scheduler:
            saved.update(_scheduled(alike[0]))
        elif args.use_checkpoint_opt_param_scheduler:
            alike[0].update(_scheduled(saved))
        else:
            for field, value in _scheduled(saved).items():
                if alike[0].get(field) != value:
                    raise ValueError(_difference(field, alike[0].get(field), value))


def restart_notices(args: Namespace) -> list[str]:
    """A line for a run that leaves the optimizer's state in its checkpoint.

    Args:
        args: Megatron's, validated.
    """
    tracker = Path(args.load or "") / TRACKER_NAME
    if not args.no_load_optim or args.finetune or args.skip_train or not tracker.is_file():
        return []
    return [
        f"no_load_optim = True: training goes on from the checkpoint in {args.load}, but the "
        "optimizer's state and the learning-rate schedule begin anew, warm-up included"
    ]


def _difference(field: str, own: Any, saved: Any) -> str:
    flag = _FLAGS[field]
    unit = " samples (steps x global_batch_size)" if field in _STEPS else ""
    of = " (train_iters, where it is not given)" if field == "lr_decay_steps" else ""
    return f"{flag}{of} makes {own}{unit}, and the checkpoint was trained with {saved}: {_CHOICE}"


def _scheduled(group: State) -> State:
    return {name: group[name] for name in _IN_GROUPS if group.get(name) is not None}


def _identity(group: State) -> tuple:
    """What tells groups apart, besides the schedule; as Megatron reads it."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    keys = [key for key in param_group_identifier_keys if key not in _IN_GROUPS]
    return tuple(group.get(key, group.get(f"pre_{key}")) for key in keys)
