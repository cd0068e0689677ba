"""What is claimed or asked of MoNE, and what the published studies found: the README's table."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mone.studies.catalogue import balance, block, ratio
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import nats, share
from megatron_mone.studies.statistics import Estimate


@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        study: that answers it.
        words: the claim, and whose it is.
        found: of the results, a few words with numbers.
        clear: whether the results tell a difference from none, at their size.
    """

    study: str
    words: str
    found: Callable[[StudyResults], str]
    clear: Callable[[StudyResults], bool]

    def sure(self, results: StudyResults) -> str:
        """How sure: of the sign at the size of the runs; none of them says much of another."""
        seeds = {len(cell.runs) for cell in results.cells}
        count = f"{min(seeds)} seeds" if seeds else "given models"
        tokens = max(
            (run.steps * run.tokens_per_step for cell in results.cells for run in cell.runs),
            default=0,
        )
        size = f", {tokens / 1e6:.1f} M tokens" if tokens else ""
        word = "clear at this size" if self.clear(results) else "not to be told at this size"
        return f"{word} ({count}{size}); low of others"


def _against(*pairs: tuple[str, str]) -> Callable[[StudyResults], str]:
    """Differences of pairs of cells, as text."""
    return lambda results: "; ".join(
        f"{one} against {other}: {_told(results.difference(one, other))}" for one, other in pairs
    )


def _told(found: Estimate) -> str:
    word = "" if found.is_clear else ", cannot be told from 0"
    return nats(found) + word


def _clear(*pairs: tuple[str, str]) -> Callable[[StudyResults], bool]:
    return lambda results: all(results.difference(*pair).is_clear for pair in pairs)


def _compared(study: str, words: str, *pairs: tuple[str, str]) -> Claim:
    return Claim(study, words, _against(*pairs), _clear(*pairs))


_MAIN = ratio.mone(ratio.MAIN)
_SPARSEST = ratio.mone(ratio.RATIOS[-1])


def _dead(results: StudyResults) -> str:
    names = (balance.NONE, "raw, 0.1", balance.DEFAULT)
    told = "; ".join(f"{name}: {share(results.cell(name))}" for name in names)
    return f"never kept at the end, {told}; {_against((balance.DEFAULT, balance.NONE))(results)}"


CLAIMS = (
    _compared("ratio", "Paper: half the activated parameters, the same quality",
              (_MAIN, ratio.TOTAL), (_MAIN, ratio.ACTIVE)),
    _compared("ratio", "Paper: quality falls only past 90% dropped", (_SPARSEST, ratio.TOTAL)),
    _compared("ratio", "Reviewer: is it only a dense GLU of that size?",
              (_MAIN, ratio.DENSE), (ratio.ONE, ratio.DENSE)),
    Claim("balance", "Paper: the balance loss keeps neurons in use", _dead,
          _clear((balance.DEFAULT, balance.NONE))),
    _compared("block", "Ours: neurons chosen in blocks cost little",
              ("B = 16", block.SINGLE), ("B = 64", block.SINGLE)),
)  # fmt: skip
