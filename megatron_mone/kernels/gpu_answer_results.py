"""answer.json of `megatron-mone gpu-answer`: the classes that write it and read it.

docs/KERNELS.md has the fields. benchmarking/gpu_answer measures and shows; measured.py makes the
table of `auto` of it, planning/fitting/kernel_points.py the planner's efficiency. Touches no file
but the one it is given.
Shapes: N rows, E experts, F neurons of an expert, H hidden, S kept of a row.
"""

from typing import Annotated

from megatron_mone.common.documents import (
    AnyText,
    AtLeast1,
    Document,
    Key,
    Number,
    Part,
    Positive,
    Text,
    Whole,
    Words,
    one_of,
)

AGAIN = "an answer comes from megatron-mone gpu-answer --out DIR"
STATES = ("running", "done", "cut", "failed", "not started")
DENSE, MONE, REFERENCE, TWO_FOUR = "dense", "mone", "reference", "mone 2:4"
"""Names of layers: dense experts in torch's grouped_mm; MoNE by our kernels, by plain torch, and by
our kernels with torch's semi-structured products."""


class Agreement(Part):
    """One kernel at one shape, against float64."""

    kernel: Text
    """K number and name, as docs/KERNELS.md has them"""
    shape: Text
    error: Number | None
    """the largest of its results' relative errors, by norm; null where it is no number, or where
    integers differ"""
    tolerance: Number
    agrees: bool
    same_bits: bool
    """in all of its runs: three, in the interpreter two"""


class LaunchFacts(Part):
    """One launch, as `kernels/triton/launch.py` describes it to the planner."""

    kernel: Text
    """its name in kernels/triton/device"""
    reads: list[list[Whole]]
    """shapes; a tensor that is added to stands in both"""
    writes: list[list[Whole]]
    dtype: Text
    """of the first tensor read"""
    bytes_read: Whole
    """each tensor whole"""
    bytes_written: Whole
    flops: Whole
    """of tensor-core products"""


class Sizes(Part):
    """What ran."""

    rows: Whole
    """N"""
    experts: AtLeast1
    """E"""
    hidden: AtLeast1
    """H"""
    neurons: AtLeast1
    """F"""
    kept: AtLeast1
    """S; F where all are computed"""
    dtype: Text


class KernelTime(Sizes):
    """One kernel, or what does the same elsewhere."""

    kernel: Text
    ms: Positive
    launches: list[LaunchFacts]
    """none of another library's"""

    @property
    def flops(self) -> int:
        """Of all launches."""
        return sum(one.flops for one in self.launches)

    @property
    def bytes(self) -> int:
        """Of all launches."""
        return sum(one.bytes_read + one.bytes_written for one in self.launches)


class LayerTime(Sizes):
    """The experts of a layer, without router and dispatch; in decode without gradients."""

    name: Text
    """dense, mone, reference (MoNE in plain torch), or mone 2:4 (by the sparse24 backend)"""
    block: AtLeast1
    """B neurons chosen together"""
    balance_loss: bool
    nan_check: bool
    forward_ms: Positive
    """as Python runs it, waits of the host included"""
    forward_backward_ms: Positive | None
    """likewise; null in decode"""
    replay_ms: Positive | None
    """of the same in a CUDA graph: device time alone; null where it was not captured"""
    peak_bytes: Whole | None
    """most that was allocated beyond inputs and weights; null without a GPU"""


class Check(Part):
    """A yes or no."""

    name: Text
    passed: bool | None
    """null where it needs a GPU"""
    words: AnyText


class Gaps(Part):
    """A forward and backward pass as torch's profiler saw it."""

    name: Text
    kernels: Whole
    busy_ms: Number
    """some kernel runs"""
    span_ms: Number
    """from the first kernel's start to the last one's end"""


class Section(Document, again=AGAIN, indent=1):
    """One part of the answer, and the content of sections/NAME.json."""

    name: Text
    state: Annotated[str, one_of(STATES)]
    seconds: Number
    """spent, the start of its process included"""
    error: Words | None
    """of a section that failed or was cut"""
    notes: list[Words]
    """what did not run, and why"""
    facts: dict[Key, AnyText]
    """of the machine; of decode, the bytes of weights that are read to those of dense experts"""
    peaks: dict[Key, Positive]
    """measured: bytes or operations a second"""
    agreements: list[Agreement]
    kernels: list[KernelTime]
    layers: list[LayerTime]
    checks: list[Check]
    gaps: list[Gaps]


class GpuAnswer(Document, schema="megatron-mone/gpu-answer/1", again=AGAIN, indent=1):
    """What the first GPU at hand answered."""

    interpreter: bool
    """whether Triton's interpreter ran on a CPU, and not a GPU: then no time means anything"""
    device: Text
    """the GPU's name"""
    machine_class: Text
    """as in kernels/measured.json, sm_90 for one; "interpreter" without a GPU"""
    seconds: Positive
    """asked for"""
    sections: list[Section]

    def section(self, name: str) -> Section:
        """By name.

        Raises:
            KeyError: there is none.
        """
        return {one.name: one for one in self.sections}[name]

    @property
    def kernels(self) -> list[KernelTime]:
        """Of all sections."""
        return [row for one in self.sections for row in one.kernels]

    @property
    def layers(self) -> list[LayerTime]:
        """Of all sections."""
        return [row for one in self.sections for row in one.layers]

    def check_measured(self, what: str) -> None:
        """Refuse times of the interpreter.

        Raises:
            ValueError: one line that says what cannot be made of them.
        """
        if self.interpreter:
            raise ValueError(
                f"interpreter = true: these times are of Triton's interpreter on a CPU and make no "
                f"{what}; run megatron-mone gpu-answer on a GPU"
            )
