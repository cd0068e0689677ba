"""What is claimed or asked of MoNE, and what the published studies found: the README's table."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_mone.studies.catalogue import (
    activation,
    analysis,
    balance,
    block,
    finetune,
    prune,
    ratio,
    scale,
    small,
    sparsity,
    split,
)
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.findings import percent, share, signed
from megatron_mone.studies.laws import Band
from megatron_mone.studies.measuring.forgetting import NEW, OLD
from megatron_mone.studies.measuring.sparsity_names import OWN
from megatron_mone.studies.statistics import Estimate, difference


@dataclass(frozen=True)
class Claim:
    """A row.

    Attributes:
        study: that answers it.
        words: the claim, and whose it is.
        found: of the results, a few words with numbers.
        differences: that it rests on.
        unit: of them, behind a number.
    """

    study: str
    words: str
    found: Callable[[StudyResults], str]
    differences: Callable[[StudyResults], Sequence[Estimate | Band]]
    unit: str = " nats"

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
        here = "clear here" if not ties else f"a tie here, within {max(ties):.3f}{self.unit}"
        if 0 < len(ties) < len(found):
            here = f"clear here but for a tie within {max(ties):.3f}{self.unit}"
        return f"{here} ({count}{size}); low at scale"


def _against(*pairs: tuple[str, str]) -> Callable[[StudyResults], str]:
    """Differences of pairs of cells, as text."""
    return lambda results: "; ".join(
        f"{one} against {other}: {signed(results.difference(one, other))}" for one, other in pairs
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


_SHRINKING = ((balance.RAW, balance.NONE), (balance.DEFAULT, balance.NONE))


def _shrunk(results: StudyResults) -> list[Estimate]:
    return [balance.gates_over(results, *pair) for pair in _SHRINKING]


def _gates(results: StudyResults) -> str:
    """What the losses did to the gates."""
    said = [
        f"{name} {signed(found, form='+.3f')}"
        for (name, _), found in zip(_SHRINKING, _shrunk(results), strict=True)
    ]
    return f"mean kept \\|gate\\| over {balance.NONE}: {'; '.join(said)}"


def _tuned(results: StudyResults) -> str:
    """What fine-tuning does to MoNE beside the dense MoE of the same size."""
    gained, lost = (signed(finetune.beside(results, of, ratio.TOTAL)) for of in (NEW, OLD))
    return f"{_MAIN} against {ratio.TOTAL}, by fine-tuning: new text {gained}; first text {lost}"


def _dropped(results: StudyResults) -> str:
    """What dropping neurons of trained models costs."""
    return "; ".join(
        f"{who} without 60% {signed(free)}, without 90% {signed(last)}"
        for who in results.who(OWN)
        for free, last in [sparsity.dropped(results, who)]
    )


def _all_dropped(results: StudyResults) -> list[Estimate]:
    return [one for who in results.who(OWN) for one in sparsity.dropped(results, who)]


_SHARED_BY = max(analysis.CHUNKS)


def _over_chance(results: StudyResults) -> list[Estimate]:
    """Neurons that neighbouring rows use less what they would if they chose apart, by layer."""
    place = analysis.CHUNKS.index(_SHARED_BY)
    found = []
    for layer in analysis.LAYERS:
        used, apart = (
            {seed: one.y[place] for seed, one in results.measured(of, analysis.MONE).items()}
            for of in (analysis.used(layer), analysis.used(layer, by_use=True))
        )
        found.append(difference(used, apart))
    return found


def _neighbours(results: StudyResults) -> str:
    said = []
    for layer, found in zip(analysis.LAYERS, _over_chance(results), strict=True):
        share = analysis.read(results, layer)[_SHARED_BY]
        said.append(
            f"layer {layer}: {_SHARED_BY} tokens read {percent(share)} of their experts' "
            f"weights; neurons used {found.mean:+.1%} against chance"
        )
    return "; ".join(said)


def _half(results: StudyResults) -> list[Estimate]:
    """Half of MoNE's neurons removed, by the formula that does best less by lot."""
    return [prune.halves(results, prune.MONE)["neurons"].over_lot]


def _pruned(results: StudyResults) -> str:
    said = [
        f"{cell} without half of its {what}: {signed(half.best)} by {half.by}, "
        f"{signed(half.lot)} by lot"
        for cell in (prune.MONE, prune.MOE)
        for what, half in prune.halves(results, cell).items()
    ]
    return "; ".join(said)


def _at_equal_operations(results: StudyResults) -> tuple[float, Band, Band]:
    by_operations = scale.ladder(results, scale.OPERATIONS)
    assert by_operations is not None  # what is published has its sizes
    return scale.at_equal_operations(by_operations)


def _laws(results: StudyResults) -> str:
    top, over, times = _at_equal_operations(results)
    return (
        f"by the fitted laws, at {top:.2g} operations: {over.text('+.4f')}; the dense MoE takes "
        f"{times.text('.2f')} times the operations to the same loss"
    )


_WIDTHS = scale.widths(small.MODEL)
_GATES = [(gate, activation.GATES[0]) for gate in activation.GATES[1:]]
CLAIMS = (
    _compared("ratio", "Paper: half the activated parameters, the same quality",
              (_MAIN, ratio.TOTAL), (_MAIN, ratio.ACTIVE)),
    _compared("ratio", "Paper: quality falls only past 90% dropped", (_SPARSEST, ratio.TOTAL)),
    _compared("ratio", "Reviewer: is it only a dense GLU of that size?",
              (_MAIN, ratio.DENSE), (ratio.ONE, ratio.DENSE)),
    Claim("balance", "Paper: the balance loss keeps neurons in use", _dead,
          _differences((balance.DEFAULT, balance.NONE))),
    Claim("balance", "Reviewer: or does that loss only shrink gates?", _gates, _shrunk, ""),
    _compared("activation", "Paper: SiLU is the gate to choose by", *_GATES),
    _compared("block", "Ours: neurons chosen in blocks, as matrix units want them, cost little",
              ("B = 16", block.SINGLE), ("B = 64", block.SINGLE), ("B = 16", ratio.ACTIVE)),
    _compared("split", "Open: few neurons of each expert, or smaller experts, at equal operations?",
              (split.MAIN.name, split.BUDGETS[split.MAIN.operations][-1].name)),
    _compared("scale", "Open: does it hold as models grow, against equal total?",
              *map(scale.pair, (_WIDTHS[0], _WIDTHS[-1]))),
    Claim("scale", "Open: does it hold as models grow, at equal operations?", _laws,
          lambda results: [_at_equal_operations(results)[1]]),
    Claim("sparsity", "Paper: 60% of a trained model's neurons can be dropped at no cost",
          _dropped, _all_dropped),
    Claim("analysis", "Open: do neighbouring tokens share neurons, which decoding would save by?",
          _neighbours, _over_chance, ""),
    Claim("prune", "Open: can neurons or experts go for good after training?", _pruned, _half),
    Claim("finetune", "Reviewer: does it fine-tune as well, and what is forgotten?", _tuned,
          lambda results: [finetune.beside(results, of, ratio.TOTAL) for of in (NEW, OLD)]),
)  # fmt: skip
