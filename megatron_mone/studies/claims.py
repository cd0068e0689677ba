"""What is claimed or asked of MoNE, and what the published studies found: the README's table."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mone.studies.catalogue import balance, block, finetune, ratio, scale, split
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import nats, share
from megatron_mone.studies.forgetting import NEW, OLD
from megatron_mone.studies.statistics import Estimate


@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        study: that answers it.
        words: the claim, and whose it is.
        found: of the results, a few words with numbers.
        differences: that it rests on.
    """

    study: str
    words: str
    found: Callable[[StudyResults], str]
    differences: Callable[[StudyResults], list[Estimate]]

    def sure(self, results: StudyResults) -> str:
        """How sure: of the sign at the size of the runs; none of them says much of another."""
        seeds = {len(cell.runs) for cell in results.cells}
        count = f"{min(seeds)} seeds" if seeds else "given models"
        tokens = max(
            (run.steps * run.tokens_per_step for cell in results.cells for run in cell.runs),
            default=0,
        )
        size = f", {tokens / 1e6:.1f} M tokens" if tokens else ""
        found = self.differences(results)
        ties = [max(-one.low, one.high) for one in found if not one.is_clear]
        here = "clear here" if not ties else f"a tie here, within {max(ties):.3f} nats"
        if 0 < len(ties) < len(found):
            here = f"clear here but for a tie within {max(ties):.3f} nats"
        return f"{here} ({count}{size}); low at scale"


def _against(*pairs: tuple[str, str]) -> Callable[[StudyResults], str]:
    """Differences of pairs of cells, as text."""
    return lambda results: "; ".join(
        f"{one} against {other}: {nats(results.difference(one, other))}" for one, other in pairs
    )


def _differences(*pairs: tuple[str, str]) -> Callable[[StudyResults], list[Estimate]]:
    return lambda results: [results.difference(*pair) for pair in pairs]


def _compared(study: str, words: str, *pairs: tuple[str, str]) -> Claim:
    return Claim(study, words, _against(*pairs), _differences(*pairs))


_MAIN = ratio.mone(ratio.MAIN)
_SPARSEST = ratio.mone(ratio.RATIOS[-1])


def _dead(results: StudyResults) -> str:
    names = (balance.NONE, "raw, 0.1", balance.DEFAULT)
    told = "; ".join(f"{name}: {share(results.cell(name))}" for name in names)
    return f"never kept at the end, {told}; {_against((balance.DEFAULT, balance.NONE))(results)}"


def _tuned(results: StudyResults) -> str:
    """What fine-tuning does to MoNE beside the dense MoE of the same size."""
    gained, lost = (nats(finetune.beside(results, of, ratio.TOTAL)) for of in (NEW, OLD))
    return f"{_MAIN} against {ratio.TOTAL}, by fine-tuning: new text {gained}; first text {lost}"


CLAIMS = (
    _compared("ratio", "Paper: half the activated parameters, the same quality",
              (_MAIN, ratio.TOTAL), (_MAIN, ratio.ACTIVE)),
    _compared("ratio", "Paper: quality falls only past 90% dropped", (_SPARSEST, ratio.TOTAL)),
    _compared("ratio", "Reviewer: is it only a dense GLU of that size?",
              (_MAIN, ratio.DENSE), (ratio.ONE, ratio.DENSE)),
    Claim("balance", "Paper: the balance loss keeps neurons in use", _dead,
          _differences((balance.DEFAULT, balance.NONE))),
    _compared("block", "Ours: neurons chosen in blocks cost little",
              ("B = 16", block.SINGLE), ("B = 64", block.SINGLE)),
    _compared("split", "Open: few neurons of each expert, or smaller experts, at equal operations?",
              (split.MAIN.name, split.BUDGETS[split.MAIN.operations][-1].name)),
    _compared("scale", "Open: does it hold as models grow, against equal total?",
              scale.pair(scale.WIDTHS[0]), scale.pair(scale.WIDTHS[-1])),
    Claim("finetune", "Reviewer: does it fine-tune as well, and what is forgotten?", _tuned,
          lambda results: [finetune.beside(results, of, ratio.TOTAL) for of in (NEW, OLD)]),
)  # fmt: skip
