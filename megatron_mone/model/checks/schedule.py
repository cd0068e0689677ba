"""The learning-rate schedule against the length of training. Touches nothing."""

import re
from argparse import Namespace


def check_length(args: Namespace) -> None:
    """Training must have an end.

    Raises:
        ValueError: neither iterations nor samples are given.
    """
    if not (args.train_iters or args.train_samples or args.skip_train):
        raise ValueError("train_iters is not set: give the number of steps, or --train-samples")


def check_schedule(args: Namespace) -> None:
    """Megatron asserts this without words, after it has built the model.

    Raises:
        ValueError: the learning rate or weight decay has no such course.
    """
    for unit in ("iters", "samples"):
        _check_warm_up(args, unit)
    unit = "samples" if args.train_samples else "iters"
    if args.lr_decay_style == "WSD" and getattr(args, f"lr_wsd_decay_{unit}") is None:
        raise ValueError(
            f"lr_decay_style = 'WSD' needs lr_wsd_decay_{unit}: give the length of its last part"
        )
    if args.lr is not None and args.lr_warmup_init > args.lr:
        raise ValueError(
            f"lr_warmup_init = {args.lr_warmup_init} must not be above lr = {args.lr}: lower it"
        )
    if args.lr is not None and args.min_lr > args.lr:
        raise ValueError(f"min_lr = {args.min_lr} must not be above lr = {args.lr}: lower it")
    if args.use_checkpoint_opt_param_scheduler and args.override_opt_param_scheduler:
        raise ValueError(
            "use_checkpoint_opt_param_scheduler and override_opt_param_scheduler are both given: "
            "leave one out"
        )
    _check_weight_decay(args)
    _check_phases(args)
    if args.full_validation and not args.multiple_validation_sets:
        raise ValueError(
            "full_validation = True alone fails in Megatron 0.19.2 at the first evaluation: give "
            "--eval-iters, or --multiple-validation-sets and --valid-data-path with it"
        )


def _check_phases(args: Namespace) -> None:
    phases = args.phase_transition_iterations
    if phases is None:
        return
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", str(phases)):
        raise ValueError(
            f"phase_transition_iterations = {phases!r} must be whole numbers with commas between"
        )
    if not args.train_samples:
        raise ValueError(
            f"phase_transition_iterations = {phases!r} needs train_samples, where its last phase "
            "ends: give --train-samples in place of --train-iters"
        )


def _check_warm_up(args: Namespace, unit: str) -> None:
    name = f"lr_decay_{unit}"
    end = getattr(args, name)
    if end is None:
        name = f"train_{unit}"
        end = getattr(args, name)
    warm_up = getattr(args, f"lr_warmup_{unit}")
    if end and args.lr_warmup_fraction is None and warm_up >= end:
        raise ValueError(
            f"lr_warmup_{unit} = {warm_up} must be fewer than {name} = {end}: lower it "
            f"(--lr-warmup-{unit} 0), or train longer"
        )


def _check_weight_decay(args: Namespace) -> None:
    bounds = ("start_weight_decay", "end_weight_decay")
    start, end = (getattr(args, name) for name in bounds)
    if args.weight_decay_incr_style == "constant":
        for name in bounds:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"{name} = {getattr(args, name)} is for weight_decay_incr_style linear or "
                    "cosine: give one of them, or weight_decay alone"
                )
    elif start is None or end is None or end < start:
        raise ValueError(
            f"weight_decay_incr_style = {args.weight_decay_incr_style!r} needs start_weight_decay "
            f"= {start} and a no lower end_weight_decay = {end}: give both"
        )
