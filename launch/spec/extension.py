"""Whether a run goes on under its name: with the config it was started with, or with more steps.

Whether its learning-rate schedule allows more is looked at where the checkpoint is (Megatron's own
flags say which schedule is meant). Touches nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.spec.megatron_flags import stated

LENGTHS = ("train_iters", "train_samples")
"""May grow."""
SCHEDULE = ("lr_decay_iters", "lr_decay_samples", "lr_wsd_decay_iters", "lr_wsd_decay_samples")
"""May change with them."""
CHOICES = ("override_opt_param_scheduler", "use_checkpoint_opt_param_scheduler")
"""Flags without a value, which say whose schedule is meant."""


def extends(old: Any, new: Any) -> bool:
    """Whether two configs of runs are the same, or differ in the length of training alone.

    Args:
        old: config in a run's manifest.
        new: of a run under the same name.

    Raises:
        ValueError: the new one is shorter.
    """
    if not (_is_training(old) and _is_training(new)) or _rest(old) != _rest(new):
        return False
    for name in LENGTHS:
        before, now = (stated(name, c["values"], c["arguments"]) for c in (old, new))
        if before is not None and (now is None or int(now) < int(before)):
            raise ValueError(
                f"{name} = {now} is fewer than the {before} that the run was started with: give "
                "as many or more, or another --name"
            )
    return True


def _is_training(config: Any) -> bool:
    """One training run: a sweep goes by its cases, and of another program nothing is known."""
    return isinstance(config, Mapping) and "values" in config and not config.get("sweep")


def _rest(config: Mapping[str, Any]) -> dict[str, Any]:
    free = (*LENGTHS, *SCHEDULE, *CHOICES)
    values = {name: value for name, value in config["values"].items() if name not in free}
    return {**config, "values": values, "arguments": _without(config["arguments"])}


def _without(words: Sequence[str]) -> list[str]:
    """Words without the flags that may change, and their values."""
    flags = {f"--{name.replace('_', '-')}": name for name in (*LENGTHS, *SCHEDULE, *CHOICES)}
    kept, skip = [], False
    for word in words:
        name = flags.get(word.partition("=")[0])
        if name is None and not skip:
            kept.append(word)
        skip = name is not None and name not in CHOICES and "=" not in word
    return kept
