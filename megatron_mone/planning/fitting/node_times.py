"""work.json and times.json of `megatron-mone calibrate`, as the classes that write and read them.

docs/PLANNER.md has the fields. planning/fitting/node_work.py says what is timed of a job,
benchmarking/node_times times it, planning/fitting/node_fit.py makes an efficiency of the times.
Touches nothing but the files it is given.
"""

from pathlib import Path

from pydantic import model_validator

from megatron_mone.common.checked_json import Fault
from megatron_mone.common.documents import (
    AnyText,
    AtLeast1,
    Document,
    Number,
    Part,
    Positive,
    Text,
    Whole,
    Words,
)
from megatron_mone.planning.cost.collectives import OPERATIONS
from megatron_mone.planning.tracing.trace import Collective, Op

_AGAIN = "run megatron-mone calibrate with another --out"
WORK, TIMES = "work.json", "times.json"
ITSELF, EXPERTS = "itself", "the experts' kernels"
PRODUCT, GROUPED, ATTENTION = "a product", "a grouped product", "attention"
CHOICE, COPY = "a choice of the largest", "a copy of its bytes"
"""What runs in an operator's place, where it is not it itself."""


class Operator(Part):
    """An operator of the trace."""

    name: Text
    inputs: list[list[Whole]]
    """shapes"""
    outputs: list[list[Whole]]
    dtype: Text
    """of the first output"""
    bytes_read: Whole
    bytes_written: Whole
    flops: Whole
    phase: Text
    """in which it is first"""

    def op(self) -> Op:
        """As the cost model has it."""
        return Op(
            self.name, tuple(map(tuple, self.inputs)), tuple(map(tuple, self.outputs)), self.dtype,
            self.bytes_read, self.bytes_written, self.flops, self.phase, "forward",
        )  # fmt: skip


class Link(Part):
    """A collective over a group of the layout."""

    kind: Text
    group: Text
    """first that has it; others of as many ranks that sit alike count as the same"""
    ranks: AtLeast1
    stride: AtLeast1
    """between neighbours"""
    bytes: Whole
    """that a rank puts in"""

    @model_validator(mode="after")
    def _known(self) -> "Link":
        if self.kind not in OPERATIONS:
            raise Fault(f"{self.kind!r} is none of {', '.join(OPERATIONS)}", "kind")
        return self

    def collective(self) -> Collective:
        """As the cost model has it."""
        return Collective(
            self.kind, self.bytes, self.group, self.ranks, self.stride, "other", "forward"
        )


class OperatorWork(Part):
    """One of the operators to be timed."""

    operator: Operator
    share: Number
    """of the price of all, as it was before anything was timed; 0: of a small job's alone"""


class LinkWork(Part):
    """One of the collectives to be timed."""

    link: Link
    share: Number
    """likewise; 0: another size of a group, to draw a line through"""


class CalibrationJob(Part):
    """What is calibrated for."""

    model: Text
    gpus: AtLeast1
    layout: Text
    flags: list[AnyText]
    """Megatron's, by which two jobs are told apart"""
    cluster: Text
    device: Text
    """of the cluster"""
    neuron_block: AtLeast1
    """neurons that are chosen together"""
    kept_of: Whole
    """neurons of an expert; 0 without MoNE"""


def check_same_job(path: Path, known: CalibrationJob, now: CalibrationJob) -> None:
    """Refuse a folder in which another job was timed.

    Args:
        path: of the file that says so.
        known: the job there.
        now: the one that is asked for.

    Raises:
        ValueError: one line; the first field that differs.
    """
    was, wanted = known.plain(), now.plain()
    for name, value in wanted.items():
        if was[name] == value:
            continue
        words = f"{str(was[name])[:80]}, not {str(value)[:80]}"
        if name == "flags":
            alone = sorted(set(value) ^ set(was[name]))[:4]
            words = f"another's, with {' '.join(alone)} in one of them alone"
        raise ValueError(f"{path}: job.{name} is {words}: give another --out for another job")


class Place(Part):
    """Where the ranks of a group sit."""

    group: Text
    ranks: AtLeast1
    stride: AtLeast1
    """between neighbours"""


class SmallJob(Part):
    """A few layers of the model, whose step is timed."""

    flags: list[AnyText]
    ranks: AtLeast1
    launches: AtLeast1
    """kernels of a step's passes"""
    operators: list[Operator]
    """of a step, in each of their phases"""
    counts: list[Number]
    """of each of them, mean over ranks"""
    groups: list[Place]
    """of one stage, over which it sends"""


class Work(Document, schema="megatron-mone/calibration-work/2", again=_AGAIN, indent=1):
    """What is timed of a job, the most expensive first; small jobs' before the cheapest."""

    job: CalibrationJob
    ranks: AtLeast1
    """that were said to time it: the small job is of no more"""
    operators: list[OperatorWork]
    links: list[LinkWork]
    small: SmallJob | None
    """in the job's layout, with its tokens a rank; null where the model has none: `notes`"""
    launch: SmallJob | None
    """of one rank and few tokens, where what the host does shows; null on CPU ranks"""
    notes: list[Words]


class OperatorTime(Part):
    """An operator, timed."""

    operator: Operator
    seconds: Positive
    """of one, mean over ranks that time it at once"""
    by: Text
    """what ran: itself, or what stood for it"""
    share: Number
    """as in work.json"""


class LinkTime(Part):
    """A collective, timed."""

    link: Link
    seconds: Positive
    """of one, mean over ranks; all groups of its kind at once"""
    share: Number
    """as in work.json"""


class CallTime(Part):
    """Collectives of a step that are alike."""

    kind: Text
    group: Text
    bytes: Whole
    """that a rank puts into one"""
    calls: Number
    ms: Number
    """of all of them, waiting included"""


class StepTime(Part):
    """A step of a small job; mean over ranks."""

    step_ms: Positive
    phases_ms: dict[Text, Number]
    """of each phase, without its collectives"""
    collectives: list[CallTime]


class Times(Document, schema="megatron-mone/calibration-times/2", again=_AGAIN, indent=1):
    """What was timed; whole after every row."""

    job: CalibrationJob
    processor: Text
    device: Text
    """the GPU, or the processor"""
    on_cpu: bool
    ranks: AtLeast1
    """that timed"""
    load: Number
    """processes running or waiting as it began"""
    date: Text
    operators: list[OperatorTime]
    links: list[LinkTime]
    small_job: StepTime | None
    """null until it is timed"""
    launch_job: StepTime | None
    """likewise; null on CPU ranks"""
    notes: list[Words]
    """what was not timed, and why"""
