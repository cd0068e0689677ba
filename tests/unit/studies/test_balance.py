"""`balance`: neuron load of a run's histograms, the losses of shrunk gates by their formulas, and
what is said of them."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.reporting.page.events import Histogram
from megatron_mone.reporting.page.results import LayerLoad
from megatron_mone.studies.catalogue import small, study_of
from megatron_mone.studies.catalogue.balance import (
    AFTER,
    DEAD,
    DEFAULT,
    FACTORS,
    NONE,
    PUBLISHED,
    RAW,
    SHARED,
    VARIANCE,
    cells,
)
from megatron_mone.studies.document import Measure, StudyResults
from megatron_mone.studies.measuring.shrunk_gates import BALANCED, SIZE, TYPES, Gates
from megatron_mone.studies.page import study_page
from megatron_mone.studies.study import Trained
from tests.unit.studies.made_up import made_up

STUDY = study_of("balance")


def test_variance_and_dead_neurons_are_over_all_layers_window_by_window():
    """Bins [0, 0.5), [0.5, 1.5), [1.5, 2.5) stand for loads 0.25, 1 and 2."""

    def load(step: int, counts: tuple[float, ...], dead: float) -> LayerLoad:
        return LayerLoad(Histogram(step, (0.5, 1.5, 2.5), counts), dead)

    loads = {"1": [load(10, (2, 4, 2), 1), load(20, (0, 8, 0), 0)],
             "2": [load(10, (0, 8, 0), 0), load(20, (4, 0, 4), 3)]}  # fmt: skip
    run = Trained(cells(small.MODEL)[0], 1, Path(), SimpleNamespace(neuron_load=loads))
    (spread, steps, variances), (dead, same, shares) = STUDY.read(run, STUDY.presets["cpu"])
    assert (spread, dead) == (VARIANCE, DEAD)
    assert steps == same == [10, 20]
    assert variances == [(2 * 0.75**2 + 2) / 16, (4 * 0.75**2 + 4) / 16]
    assert shares == [1 / 16, 3 / 16]


def by_hand(gates: Gates, kind: str) -> float:
    """1/E * sum over experts of sum_j f_j P_j, as docs/MODEL.md has it."""
    total = 0.0
    for e in range(gates.experts):
        of = gates.expert_N == e
        size, kept = gates.gate_NF[of].abs(), gates.kept_NF[of]
        if not len(size):
            continue
        part = size if kind == "normalized" else size * kept
        share_F = (part if kind == "raw" else part / part.sum(1, keepdim=True)).mean(0)
        f_F = kept.shape[1] * kept.double().sum(0) / kept.sum()
        if kind == "entropy":
            used = share_F[share_F > 0]
            total += 1 + float((used * used.log()).sum()) / math.log(kept.shape[1])
        else:
            total += float((f_F * share_F).sum())
    return total / gates.experts


@pytest.fixture
def gates() -> Gates:
    """12 rows of 8 neurons, of 3 experts; the last has none."""
    draw = torch.Generator().manual_seed(3)
    gate_NF = torch.randn(12, 8, generator=draw, dtype=torch.float64)
    kept_NF = torch.zeros(12, 8, dtype=torch.bool).scatter(1, gate_NF.abs().topk(2).indices, True)
    return Gates(gate_NF, kept_NF, torch.tensor([0] * 5 + [1] * 7), 3)


@pytest.mark.parametrize("kind", TYPES)
def test_each_loss_is_its_formula_and_only_raw_falls_with_the_gates(gates, kind):
    whole = gates.loss(kind, 1.0)
    assert whole == pytest.approx(by_hand(gates, kind), rel=1e-9)
    for factor in FACTORS:
        want = whole * factor if kind == "raw" else whole
        assert gates.loss(kind, factor) == pytest.approx(want, rel=1e-9)


def test_an_even_load_at_the_same_gates_is_raws_floor(gates):
    """The same gates, kept equally often: then raw is what `even` says."""
    assert 0 < gates.even() < gates.loss("raw", 1.0)
    kept_NF = torch.eye(8, dtype=torch.bool).repeat(2, 1)
    even = Gates(
        torch.rand(16, 8, dtype=torch.float64), kept_NF, torch.tensor([0] * 8 + [1] * 8), 2
    )
    assert even.loss("raw", 1.0) == pytest.approx(even.even(), rel=1e-12)
    assert even.size() == pytest.approx(float(even.gate_NF[kept_NF].mean()))
    assert even.share() == 1 / 8


def results_of(raw_size: float) -> StudyResults:
    """Three seeds; raw's gates of a size, those without a loss about 0.5."""
    losses = {cell.name: {1: 3.0, 2: 3.1, 3: 3.2} for cell in cells(small.MODEL)}
    measures = []
    for seed in (1, 2, 3):
        for name in losses:
            spread = 0.9 if name == NONE else 0.5 + seed / 100
            size = raw_size if name == RAW else 0.5
            asked = [(VARIANCE, [10, 20], [1.0, spread]), (DEAD, [10, 20], [0.0, 0.01]),
                     (SIZE, [1, 2], [size + seed / 1000, size])]  # fmt: skip
            if name == NONE:
                asked += [(kind, FACTORS, [2.0 * x if kind == "raw" else 1.25 for x in FACTORS])
                          for kind in TYPES]  # fmt: skip
                asked += [(BALANCED, [1.0], [1.5])]
            measures += [Measure(of=of, cell=name, seed=seed, x=[*x], y=[*y]) for of, x, y in asked]
    return made_up(STUDY, losses).model_copy(update={"measures": measures})


def test_what_is_said_is_of_the_numbers(tmp_path):
    results = results_of(0.25)
    said = STUDY.findings(results)
    whole = "raw is 0.1250 with every gate of 'none' times 0.0625 and 2.0000 as they are"
    assert any(
        line.startswith(whole) and line.endswith("it falls with the gates.") for line in said
    )
    assert any(line.startswith("selected is 1.2500") and "does not fall" in line for line in said)
    assert any("would make raw 1.5000 of 2.0000: 75.0% of it is the gates' size" in x for x in said)
    assert any(x.startswith(f"{RAW}: mean |gate| of kept neurons lower than none's") for x in said)
    assert any(x.startswith(f"{DEFAULT}: variance of neuron load at the end lower") for x in said)
    page = study_page(STUDY, results, tmp_path)
    for shown in ("0.1250 \u00b1 0.0000", "0.2510 \u00b1 0.0012", "0.5200 \u00b1 0.0248"):
        assert shown in page
    same = STUDY.findings(results_of(0.5))
    assert any(x.startswith(f"{RAW}: mean |gate| of kept neurons not told apart") for x in same)


def test_the_published_form_is_its_three_parts():
    values = {cell.name: cell.values for cell in cells(small.MODEL)}
    assert values[PUBLISHED] == {
        **values[AFTER], **values[SHARED], "mone_ng_loss_type": "raw", "mone_ng_loss_coeff": 0.01
    }  # fmt: skip
