"""Sentences that a study says of its numbers, whoever won."""

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


def nats(found: Estimate) -> str:
    """A difference as text."""
    if found.half_width is None:
        return f"{found.mean:+.4f} nats a token"
    return f"{found.mean:+.4f} nats a token [{found.low:+.4f}, {found.high:+.4f}]"


def use(results: StudyResults) -> list[str]:
    """What share of the neurons was never kept at the end, of cells that choose among any."""
    return [
        f"{cell.name}: {share(cell)} of the neurons were never kept in the last logging window."
        for cell in results.cells
        if any(run.chooses for run in cell.runs)
    ]


def share(cell: StudyCell) -> str:
    """Neurons never kept, as text: the mean over seeds with its interval."""
    found = estimate([run.dead_share for run in cell.runs])
    if found.half_width is None:
        return f"{found.mean:.1%}"
    return f"{found.mean:.1%} [{max(0.0, found.low):.1%}, {found.high:.1%}]"
