"""A row of the feature table: flags of Megatron, what becomes of them with MoNE, and what shows it.

A row is made by one of four functions, which are its state:

- `trained`: runs on CPU ranks show that it trains and that its numbers are right;
- `unrun`: taken, and planned where the planner has it, but it needs a GPU or a package that is not
  here, so that nothing has run it;
- `refused`: a line says why, before a model is built;
- `apart`: MoNE has no part in it, in a run that trains.

Runs of a trained row (tests/parity/test_features.py), of three steps each from one checkpoint:

- `example.same`: MoNE with the flags is MoNE without them in the same layout;
- else MoNE with the flags in each of `example.layouts` is MoNE with them on one rank, to 1e-5;
- and MoNE that keeps every neuron is stock Megatron with the flags, to the bit (`example.stock`).

Touches nothing.
"""

from dataclasses import dataclass, field
from enum import StrEnum

from tests.parity.layouts import CP2, EP2, ETP1, PP2, TP2

LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, ()),
    "four ranks": (4, ()),
    "DP2": (2, ()),
    "EP2": (2, EP2),
    "TP2 ETP1": (2, (*TP2, *ETP1)),
    "TP2 ETP2": (2, TP2),
    "CP2": (2, CP2),
    "PP2": (2, PP2),
    "PP2 VPP2": (2, (*PP2, "--num-virtual-stages-per-pipeline-rank", "2")),
    "PP2 DP2": (4, PP2),
    "PP4 VPP2": (
        4,
        ("--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"),
    ),
    "EP2 PP2": (4, (*EP2, *PP2)),
    "TP2 EP2 ETP1": (2, (*TP2, *EP2, *ETP1)),
}
"""Ranks and flags."""  # fmt: skip


class State(StrEnum):
    """What becomes of a flag, as the page says it."""

    TRAINED = "trained and equal"
    UNRUN = "taken, not run on a GPU"
    REFUSED = "refused"
    APART = "no part of MoNE"


SEED = "--seed 7"
"""Another start, where no choice of a neuron hangs on the rounding of a layout."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Runs that show a row.

    Attributes:
        flags: that turn the feature on, in words.
        beside: flags of both sides of a comparison, in words, such as others that it needs.
        same: the largest relative change of any number of a run in the same layout; 0: not a bit;
            None: it is there to change them.
        layouts: of LAYOUTS; none where Megatron itself trains another model in another layout.
        stock: the layout in which stock Megatron is compared with; empty: it cannot be.
    """

    flags: str
    beside: str = ""
    same: float | None = None
    layouts: tuple[str, ...] = ("EP2", "TP2 ETP1")
    stock: str = "EP2"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the table.

    Attributes:
        names: of Megatron's arguments, patterns included.
        state: what becomes of them.
        says: to a user, one sentence.
        examples: of a trained row.
        asked: flags in words, and what the line of a refused row must hold.
        shown: file::test that shows what no example does.
    """

    names: tuple[str, ...]
    state: State
    says: str
    examples: tuple[Example, ...] = ()
    asked: tuple[tuple[str, str], ...] = ()
    shown: tuple[str, ...] = field(default=())


def trained(names: str, says: str, *examples: Example, shown: str = "") -> Row:
    """A row that runs show: of examples, or of tests elsewhere."""
    assert examples or shown, names
    return Row(
        names=tuple(names.split()), state=State.TRAINED, says=says, examples=examples,
        shown=tuple(shown.split()),
    )  # fmt: skip


def unrun(names: str, says: str, *flags: str, shown: str = "") -> Row:
    """A row that needs what is not here; no check, nor the planner, says anything to `flags`."""
    return Row(
        names=tuple(names.split()), state=State.UNRUN, says=says, shown=tuple(shown.split()),
        asked=tuple((words, "") for words in flags),
    )  # fmt: skip


def refused(names: str, says: str, *asked: tuple[str, str]) -> Row:
    """A row that ends in a line; `asked` are (flags, words of the line)."""
    assert asked, names
    return Row(names=tuple(names.split()), state=State.REFUSED, says=says, asked=asked)


def apart(names: str, says: str) -> Row:
    """A row that MoNE has nothing to do with."""
    return Row(names=tuple(names.split()), state=State.APART, says=says)
