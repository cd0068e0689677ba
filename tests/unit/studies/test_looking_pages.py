"""Pages and findings of the studies that look into checkpoints, from choices and losses that are
made up."""

import pytest
import torch

from megatron_mone.studies.catalogue import analysis, prune
from megatron_mone.studies.document import Measure, Point, StudyCell, StudyResults, StudyRun
from megatron_mone.studies.measuring import analyse
from megatron_mone.studies.measuring.analyse import Layer
from megatron_mone.studies.measuring.token_classes import CLASSES
from megatron_mone.studies.page import study_page

TEXTS = ["\n", " a", "b", "."]


def results_of(study: str, measures: list[Measure]) -> StudyResults:
    def cell(name: str) -> StudyCell:
        runs = [
            StudyRun(seed=seed, run=f"r{seed}", steps=4, tokens_per_step=8, dead_share=0.0,
                     active_flops_per_step=1.0, executed_flops_per_step=1.0, chooses=False,
                     validation=[Point(step=4, loss=3.0)])
            for seed in (1, 2)
        ]  # fmt: skip
        return StudyCell(name=name, meaning="made up", values={}, runs=runs)

    return StudyResults(
        study=study, preset="cpu", reference=prune.MOE, commands=["megatron-mone study"],
        machine="2 cores", seconds=1.0, cells=[cell(prune.MONE), cell(prune.MOE)],
        measures=measures,
    )  # fmt: skip


def measures(cell: str, seed: int, found) -> list[Measure]:
    return [Measure(of=of, cell=cell, seed=seed, x=[*x], y=[*y]) for of, x, y in found]


def layer(seed: int, picks: bool) -> Layer:
    """Of 64 tokens, each with two of four experts of eight neurons."""
    generator = torch.Generator().manual_seed(seed)
    expert_TK = torch.rand(64, 4, generator=generator).topk(2).indices
    used = torch.zeros(64, 4, 8, dtype=torch.bool)
    kept_TKS = torch.rand(64, 2, 8, generator=generator).topk(2 if picks else 8).indices
    for token in range(64):
        for place, expert in enumerate(expert_TK[token]):
            used[token, expert, kept_TKS[token, place]] = True
    return Layer(used, torch.randn(4, 8, 6, generator=generator), picks)


def looked(seed: int, picks: bool):
    """What `analyse.measure` gives of two checkpoints."""
    rows_RS = torch.randint(4, (4, 17), generator=torch.Generator().manual_seed(seed))
    before, last = (
        {number: layer(10 * seed + at + number, picks) for number in (1, 2)} for at in (0, 5)
    )
    found = analyse._at_the_end(last, rows_RS, TEXTS)
    for number in (1, 2):
        early, late = (
            dict(analyse._now(one[number], last[number], rows_RS[:, :-1].flatten()))
            for one in (before, last)
        )
        found += [(f"{of}, layer {number}", [2, 4], [early[of], late[of]]) for of in late]
    return found


def test_what_was_chosen_last_is_there_at_last():
    found = {of: y for of, _, y in looked(1, picks=True)}
    assert found["router saturation, layer 1"][1] == found["mask saturation, layer 2"][1] == 1
    assert found["router saturation, layer 1"][0] == pytest.approx(0.5, abs=0.1)
    assert found["mask saturation, layer 1"][0] == pytest.approx(0.25, abs=0.12)
    assert found["used by neighbours, layer 1"][0] == pytest.approx(2 * 2 / 32)
    assert found["used by an expert's rows, layer 1"][0] == pytest.approx(2 / 8)
    assert sum(found["share of tokens by class"]) == pytest.approx(1)
    stock = {of for of, _, _ in looked(1, picks=False)}
    assert not any(of.startswith(("mask", "neurons", "used by an expert's")) for of in stock)


def test_the_page_of_analysis_is_of_its_measures(tmp_path):
    made = [
        one
        for cell, picks in ((prune.MONE, True), (prune.MOE, False))
        for seed in (1, 2)
        for one in measures(cell, seed, looked(seed, picks))
    ]
    results = results_of("analysis", made)
    page = study_page(analysis.STUDY, results, tmp_path)
    for section in analysis.sections(results):
        assert section.heading in page
    share = analysis.read(results, 1)
    assert share[1].mean == pytest.approx((1 + 2 * 2 / 8) / 3)  # two of eight neurons an expert
    assert share[16].mean > share[4].mean > share[1].mean
    assert analysis.percent(share[16]) in page
    said = analysis.findings(results)
    assert len(said) == 2 * (3 + 2 + 1 + 1)
    assert all(CLASSES[n] in page for n in (0, 1, 2, 3))
    bare = results.model_copy(update={"measures": []})
    assert analysis.findings(bare) == [] == list(analysis.sections(bare))


def pruned(seed: int):
    """Losses that rise by ten times the share removed; REAP's and |gate|'s by five times."""

    def curve(of: str, shares, slope: float):
        return of, shares, [3 + seed / 10 + slope * share for share in shares]

    shares = [0, 0.25, 0.5, 0.75]
    for name in (*prune.EXPERTS, prune.RANDOM):
        yield curve(f"experts by {name}", shares, 5 if name == "REAP" else 10)
    for name in (*prune.NEURON_CRITERIA, prune.RANDOM):
        yield curve(f"neurons by {name}", prune.NEURONS, 5 if name == "|gate|" else 10)
    for of, at in ((prune.BY_SCORE, prune.SCORE_SHARES), (prune.BY_USE, prune.USE_SHARES)):
        yield curve(of, at, 1)
        yield prune.SKIPPED + of, at, [share / 2 for share in at]
    for number in (1, 2):
        losses = [3 + seed / 10 + rise for rise in (0.1, 0.2, 0.3, 0.2 * (1 + 5 * (number == 2)))]
        yield f"{prune.ALONE}, layer {number}", range(4), losses
        yield f"{prune.LARGEST}, layer {number}", range(4), [1.0, 2.0, 3.0, 4.0 * number]


def test_the_page_of_prune_is_of_its_measures(tmp_path):
    made = [
        one
        for cell in (prune.MONE, prune.MOE)
        for seed in (1, 2)
        for one in measures(cell, seed, pruned(seed))
    ]
    results = results_of("prune", made)
    rise = prune.rise(results, "experts by REAP", prune.MOE, 0.5)
    assert (rise.mean, rise.half_width) == (pytest.approx(2.5), pytest.approx(0, abs=1e-9))
    said = prune.findings(results)
    assert "without half of its experts: +2.5000 nats" in said[0]
    assert "by REAP, the best of 6 criteria" in said[0]
    assert "+5.0000 nats" in said[0]
    assert "without half of its neurons" in said[1]
    assert "by |gate|, the best of 5" in said[1]
    assert "25% of the routed rows left out" in said[2]
    assert "layer 1 +0.2000 nats" in said[3]
    assert "layer 2 +0.4500 nats" in said[3]
    assert "4.0 times as much as the next (mean of 2 seeds): 2 of 2 models" in said[3]
    page = study_page(prune.STUDY, results, tmp_path)
    for section in prune.sections(results):
        assert section.heading in page
    assert "2, 4" in page  # the expert that is missed most
    assert "+1.2000" in page
    bare = results.model_copy(update={"measures": []})
    assert prune.findings(bare) == [] == prune.sections(bare)
