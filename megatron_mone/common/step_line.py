"""The line that Megatron's `training_log` prints of a step, read back. Pure."""

import re

_STEP = re.compile(
    r"\biteration\s+(\d+)/\s*(\d+) \|.*?lm loss: ([-+.\dEe]+|nan|inf)(?!\S)", re.DOTALL
)


def step_of(line: str) -> tuple[int, int, float] | None:
    """(step, of how many, training loss in nats) of a line of a log; None: it is of no step."""
    found = _STEP.search(line)
    return None if found is None else (int(found[1]), int(found[2]), float(found[3]))
