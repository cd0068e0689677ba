"""Bands around predictions, from the errors of the published runs that an efficiency is fitted to.

A band holds nine of ten, if errors are normal: 1.64 times the errors' root mean square, of runs
with experts or of dense ones, corrected for the numbers that were fitted to as many runs, and wider
the further a job is from all of them. Where nothing was fitted it is an assumption. Bands of two
layouts of one model overlap where the planner cannot tell which is better: `tied`. Touches nothing.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_mone.planning.cost.rank_memory import RankMemory
from megatron_mone.planning.tracing.job_facts import JobFacts

NINE_OF_TEN = 1.64
LEAST, LEAST_MEMORY = 0.02, 0.004
"""Errors of a prediction that no fit makes smaller: software and machines differ."""
UNFITTED, UNTESTED, UNFITTED_MEMORY = 0.35, 0.2, 0.03
"""Half a band, as a logarithm, where nothing was fitted, where as many numbers were fitted as there
are runs, and of memory where nothing is known. Assumptions."""
ALLOWANCES = 0.5
"""Share by which buffers, context and fragmentation may be off. An assumption."""
_DOUBLINGS = 4.0  # so far from all runs a band is 1.4 times as wide
_OTHER_KIND = 2.0  # doublings, of another precision, and of a model with experts from one without


@dataclass(frozen=True)
class Band:
    """What a prediction is taken to lie in.

    Attributes:
        low, high: in the prediction's unit.
    """

    low: float
    high: float

    @classmethod
    def around(cls, value: float, half: float) -> "Band":
        """From value / e^half to value x e^half."""
        return cls(value * math.exp(-half), value * math.exp(half))


def tied(first: Band, second: Band) -> bool:
    """Whether two predictions' bands overlap, so that they decide nothing."""
    return first.low <= second.high and second.low <= first.high


@dataclass(frozen=True)
class FittedRun:
    """A run that an efficiency was fitted to.

    Attributes:
        name: of its file.
        place: see `place_of`.
        error: size of the logarithm of its predicted over its published time.
    """

    name: str
    place: tuple[float, ...]
    error: float


def place_of(facts: JobFacts) -> tuple[float, ...]:
    """Where a job stands among others, in doublings: with experts, in fp8, tokens of a sample and
    of a device's micro-batch, and the sizes of its tensor, pipeline and expert parallel groups."""
    tokens = facts.micro_batch_size * facts.seq_length / (facts.tp * facts.cp)
    sizes = (facts.seq_length, tokens, facts.tp, facts.pp, max(1, facts.ep))
    return (
        _OTHER_KIND * bool(facts.num_experts),
        _OTHER_KIND * bool(facts.fp8),
        *(math.log2(size) for size in sizes),
    )


def time_band(seconds: float, facts: JobFacts, runs: Sequence[FittedRun], numbers: int) -> Band:
    """Of a step's time.

    Args:
        seconds: predicted.
        facts: of the job.
        runs: that the efficiency was fitted to.
        numbers: that were fitted.
    """
    return Band.around(seconds, _half(place_of(facts), runs, numbers))


def _half(place: tuple[float, ...], runs: Sequence[FittedRun], numbers: int) -> float:
    if not runs:
        return UNFITTED
    far = min(math.dist(place, run.place) for run in runs) / _DOUBLINGS
    wider = math.sqrt(1 + far * far)
    if len(runs) <= numbers:
        return UNTESTED * wider
    alike = [run for run in runs if run.place[0] == place[0]] or runs
    square = sum(run.error**2 for run in alike) / len(alike) * len(runs) / (len(runs) - numbers)
    return NINE_OF_TEN * max(LEAST, math.sqrt(square)) * wider


def memory_band(memory: RankMemory, errors: Sequence[float]) -> Band:
    """Of one rank's bytes at their peak.

    Args:
        memory: predicted.
        errors: sizes of the logarithm of predicted over published allocated bytes.
    """
    half = UNFITTED_MEMORY
    if errors:
        square = sum(error**2 for error in errors) / len(errors)
        half = NINE_OF_TEN * max(LEAST_MEMORY, math.sqrt(square))
    allocated = Band.around(memory.allocated, half)
    allowances = memory.peak - memory.allocated
    return Band(
        allocated.low + (1 - ALLOWANCES) * allowances,
        allocated.high + (1 + ALLOWANCES) * allowances,
    )
