"""The learning-rate schedule against the length of training. Touches nothing."""

from __future__ import annotations

from argparse import Namespace


def check_schedule(args: Namespace) -> None:
    """Megatron asserts this without words, after it has built the model.

    Raises:
        ValueError: the learning rate would still rise when its decay, or training, ends.
    """
    for unit in ("iters", "samples"):
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
