"""Flags that Megatron takes and then fails on, each with the line that a user sees.

A row of docs/REFUSALS.md each; add one to CASES. tests/integration/test_refusals.py provokes them
on one or two ranks and compares the table. In flags and lines {data} is a folder of small datasets
and {tmp} one of the case's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.training_cases import MOCK, TINY

BASE = (*TINY, *MOCK, "--train-iters", "2")


@dataclass(frozen=True)
class Refusal:
    """One way to fail.

    Attributes:
        name: of the row.
        says: what Megatron itself says, and where.
        flags: after BASE, of which they take the place.
        line: what our line says, a part of it.
        by_check: whether a check of ours finds it, before the job is submitted too; else the net.
        world: ranks that the job is told it has; two at most are started, for a check needs no
            more.
        status: that the ranks end with.
        prepare: called on each rank before the run; it may patch what cannot be had by flags.
    """

    name: str
    says: str
    flags: tuple[str, ...]
    line: str
    by_check: bool = True
    world: int = 2
    status: int = 2
    prepare: Callable[[], None] | None = None

    @property
    def ranks(self) -> int:
        """How many are started."""
        return min(self.world, 2)


CASES: tuple[Refusal, ...] = (
    Refusal(
        "WSD without its decay",
        "optimizer_param_scheduler: `assert self.wsd_decay_steps is not None`",
        ("--lr-decay-style", "WSD"),
        "wsd_decay_steps is not None",
        by_check=False,
    ),
)
