"""What is measured: shapes by section, and each section's share of the time.

Shapes: N rows, E experts, F neurons of an expert, H hidden, S kept of a row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_mone.kernels.race_results import DTYPES

SECONDS = 570
"""Of the whole, by default: under 10 minutes."""


@dataclass(frozen=True)
class Shape:
    """The experts of one layer on one device.

    Attributes:
        counts: rows of each of E experts.
        hidden, neurons, kept: H, F, S.
        dtype: of race_results.DTYPES.
        spare: rows past the experts'; they hold NaN and must stay out of everything.
    """

    counts: tuple[int, ...]
    hidden: int
    neurons: int
    kept: int
    dtype: str = "bf16"
    spare: int = 0

    @property
    def rows(self) -> int:
        """N."""
        return sum(self.counts) + self.spare

    @property
    def experts(self) -> int:
        """E."""
        return len(self.counts)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return DTYPES[self.dtype]

    @property
    def label(self) -> str:
        """In words."""
        spare = f" + {self.spare} of none" if self.spare else ""
        return (
            f"N {sum(self.counts)}{spare}, E {self.experts}, H {self.hidden}, F {self.neurons}, "
            f"S {self.kept}, {self.dtype}"
        )

    def sizes(self) -> dict[str, Any]:
        """The fields of gpu_answer_results.Sizes."""
        return {
            "rows": self.rows, "experts": self.experts, "hidden": self.hidden,
            "neurons": self.neurons, "kept": self.kept, "dtype": self.dtype,
        }  # fmt: skip

    def keeping(self, kept: int) -> "Shape":
        """With another S."""
        return replace(self, kept=kept)


def even(
    rows: int, experts: int, hidden: int, neurons: int, kept: int, dtype: str = "bf16"
) -> Shape:
    """Every expert has as many rows."""
    return Shape((rows // experts,) * experts, hidden, neurons, kept, dtype)


@dataclass(frozen=True)
class Plan:
    """Of one run.

    Attributes:
        agree: shapes at which every kernel is checked.
        runs: that are compared bit for bit.
        timed: shapes at which every kernel is timed.
        layers: shapes of whole layers.
        variants: of a layer that are timed, at most.
        ratios: S / F of layers.
        block: B of layers with blocks, beside S / 2 and S.
        decode: shapes without gradients.
        one: shape of the checks for host waits and of the profiled layer.
        repeats: of a timed call, at least.
        peak_side, copy_bytes: of the product and the copy that find the machine's peaks.
    """

    agree: tuple[Shape, ...]
    runs: int
    timed: tuple[Shape, ...]
    layers: tuple[Shape, ...]
    variants: int
    ratios: tuple[float, ...]
    block: int
    decode: tuple[Shape, ...]
    one: Shape
    repeats: int
    peak_side: int
    copy_bytes: int


_SMALL, _LARGE = (2048, 1408, 352), (7168, 2048, 512)
FULL = Plan(
    agree=(
        Shape((130, 0, 257, 1, 64, 128, 300, 90), 2048, 1408, 352, spare=54),
        Shape((100, 40, 0, 200, 17, 128, 90, 125), 7168, 2048, 512),
        Shape((48, 0, 3, 1) * 16, 2048, 1408, 352, spare=7),
        Shape((64, 0, 200, 9), 1024, 1408, 352, "fp32", spare=5),
        Shape((33, 1, 150), 1001, 1000, 125),  # rows that TMA does not take
        Shape((1,), 512, 9216, 2304),  # too wide for one program's registers
    ),
    runs=3,
    timed=tuple(even(16_384, e, *size) for size in (_SMALL, _LARGE) for e in (8, 64)),
    layers=(even(16_384, 8, *_SMALL), even(16_384, 64, *_SMALL), even(16_384, 8, *_LARGE)),
    variants=99,
    ratios=(1 / 2, 1 / 4, 1 / 8, 1 / 16),
    block=128,
    decode=tuple(even(8 * r, 8, *size) for size in (_SMALL, _LARGE) for r in (1, 2, 4, 8)),
    one=even(16_384, 8, *_SMALL),
    repeats=20,
    peak_side=8192,
    copy_bytes=1 << 31,
)
_TINY = (16, 32, 8)
TOY = Plan(
    agree=(Shape((0, 2), *_TINY, "fp32", spare=1),),
    runs=2,
    timed=(even(2, 2, *_TINY),),
    layers=(even(2, 2, *_TINY, "fp32"),),
    variants=5,
    ratios=(1 / 4,),
    block=8,
    decode=(even(2, 2, *_TINY, "fp32"),),
    one=even(2, 2, *_TINY, "fp32"),
    repeats=1,
    peak_side=32,
    copy_bytes=1 << 12,
)
"""For the interpreter."""

SHARES = {
    "machine": 20, "agreement": 90, "kernels": 150, "layers": 120, "waits": 60, "decode": 60,
    "gaps": 30,
}  # fmt: skip
"""Section -> its part of the time; time that one leaves goes to those after it."""


def kept_of(shape: Shape, ratio: float, block: int = 1) -> int:
    """S nearest to r F in whole blocks, one block at least."""
    return max(1, round(ratio * shape.neurons / block)) * block
