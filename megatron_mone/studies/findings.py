"""Sentences that a study says of its numbers, whoever won."""

from collections.abc import Collection

from megatron_mone.studies.document import StudyCell, StudyResults
from megatron_mone.studies.statistics import Estimate, estimate


def compared(results: StudyResults, name: str, against: str) -> str:
    """Whether one cell ends better than another, with the interval that says so."""
    found = results.difference(name, against)
    if found.half_width is None:
        return f"{name} ends {nats(found)} from {against}: one seed says nothing of the spread."
    if not found.is_clear:
        return (
            f"{name} and {against} cannot be told apart: {nats(found)}, {found.count} seeds paired."
        )
    word = "higher (worse)" if found.mean > 0 else "lower (better)"
    return f"{name} ends {word} than {against}: {nats(found)}, {found.count} seeds paired."


def signed(found: Estimate, unit: str = "", form: str = "+.4f") -> str:
    """A difference and its interval as text, the unit behind the mean."""
    if found.half_width is None:
        return f"{found.mean:{form}}{unit}"
    return f"{found.mean:{form}}{unit} [{found.low:{form}}, {found.high:{form}}]"


def nats(found: Estimate) -> str:
    """A difference of losses as text."""
    return signed(found, " nats a token")


def use(results: StudyResults, names: Collection[str]) -> list[str]:
    """What share of the neurons was never kept at the end, of some cells, a sentence a share."""
    said: dict[str, list[str]] = {}
    for cell in results.cells:
        if cell.name in names and any(run.chooses for run in cell.runs):
            said.setdefault(share(cell), []).append(cell.name)
    return [
        f"{', '.join(cells)}: {words} of the neurons were never kept in the last logging window."
        for words, cells in said.items()
    ]


def share(cell: StudyCell) -> str:
    """Neurons never kept, as text: the mean over seeds with its interval."""
    return percent(estimate([run.dead_share for run in cell.runs]))


def percent(found: Estimate) -> str:
    """A share, which is from 0 to 1, and its interval as text."""
    if found.half_width is None:
        return f"{found.mean:.1%}"
    return f"{found.mean:.1%} [{max(0.0, found.low):.1%}, {min(1.0, found.high):.1%}]"
