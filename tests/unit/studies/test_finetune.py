"""Runs that start from others, and what is said of what they gain and forget."""

from dataclasses import replace

import pytest

from megatron_mone.studies.catalogue import study_of
from megatron_mone.studies.catalogue.finetune import ACTIVE, CORPUS, MONE, TOTAL, tuned
from megatron_mone.studies.claims import CLAIMS
from megatron_mone.studies.document import Measure, StudyResults
from megatron_mone.studies.measuring.forgetting import NEW, OLD
from megatron_mone.studies.page import rows, study_page
from megatron_mone.studies.runs import train_missing, wanted
from tests.unit.studies.made_up import made_up

STUDY = study_of("finetune")
CPU = STUDY.presets["cpu"]
SEEDS = (1, 2, 3)


def runs_of(folder, preset=CPU, cells=None, study=STUDY) -> dict:
    """(cell, seed) -> run."""
    cells = cells or study.grid(preset)
    found = wanted(cells, preset, 2, folder / "data" / "shakespeare", folder)
    return {(one.cell.name, one.seed): one for one in found}


def test_the_bases_are_the_runs_of_ratio(tmp_path, trained):
    ratio = study_of("ratio")
    there = runs_of(tmp_path, ratio.presets["cpu"], study=ratio)
    for key, one in runs_of(tmp_path).items():
        if not one.cell.after:
            assert one.run == there[key].run


def test_a_run_starts_from_its_bases_last_weights_on_its_own_text(tmp_path, trained):
    found = runs_of(tmp_path)
    for (name, seed), one in found.items():
        if not one.cell.after:
            continue
        base = found[one.cell.after, seed]
        words = one.run.job.config["arguments"]
        assert name == tuned(base.cell.name)
        assert one.base is base
        assert words[words.index("--pretrained-checkpoint") + 1] == str(
            base.run.folder / "checkpoints"
        )
        assert f"{tmp_path / 'data' / CORPUS}_text_document" in words
        assert one.run.steps == base.run.steps // 4
        assert one.run.command[-len(words) :] == tuple(words)


def test_a_runs_name_is_also_of_what_its_base_is_made_from(tmp_path, trained):
    cells = STUDY.grid(CPU)
    other = [
        replace(one, values={**one.values, "clip_grad": 2.0}) if one.name == MONE else one
        for one in cells
    ]
    before, after = runs_of(tmp_path), runs_of(tmp_path, cells=other)
    changed = {key for key in before if before[key].run.name != after[key].run.name}
    assert changed == {(name, seed) for name in (MONE, tuned(MONE)) for seed in (1, 2)}


def test_bases_are_trained_first(tmp_path, trained):
    found = runs_of(tmp_path)
    order: list[str] = []
    train_missing(
        [*reversed(found.values())], lambda *said: None, lambda one: order.append(one.name)
    )
    for one in found.values():
        if one.base:
            assert order.index(one.base.run.name) < order.index(one.run.name)
    assert len(order) == len(found)


@pytest.mark.parametrize("only", [(tuned(MONE),), (tuned(MONE), TOTAL)])
def test_a_base_that_does_not_stand_before_is_one_line(tmp_path, trained, only):
    with pytest.raises(ValueError, match=f"after = '{MONE}' is no cell before it: ") as error:
        runs_of(tmp_path, replace(CPU, only=only))
    assert "\n" not in str(error.value)


def results_of(forgets: dict[str, list[float]], gains: dict[str, list[float]]) -> StudyResults:
    """By cell, nats forgotten and gained by seed; before, both losses are 3 and 5."""
    measures = [
        Measure(of=of, cell=tuned(name), seed=seed, x=[0, 60], y=[start, start + sign * value])
        for of, start, sign, changes in ((OLD, 3.0, 1, forgets), (NEW, 5.0, -1, gains))
        for name, values in changes.items()
        for seed, value in zip(SEEDS, values, strict=True)
    ]
    names = [name for one in (MONE, TOTAL, ACTIVE) for name in (one, tuned(one))]
    results = made_up(STUDY, {name: dict.fromkeys(SEEDS, 3.5) for name in names})
    return results.model_copy(update={"measures": measures})


def test_who_forgets_and_gains_more_is_said_with_the_interval():
    results = results_of(
        {MONE: [0.5, 0.6, 0.7], TOTAL: [0.3, 0.4, 0.51], ACTIVE: [0.5, 0.7, 0.7]},
        {MONE: [1.0, 1.1, 1.2], TOTAL: [1.2, 1.31, 1.4], ACTIVE: [0.9, 1.0, 1.11]},
    )
    found = STUDY.findings(results)
    text = " ".join(found)
    assert f"{MONE} forgets more than {TOTAL} by it: +0.1967" in text
    assert f"{MONE} gains less than {TOTAL} by it: +0.2033" in text
    assert f"{MONE} gains more than {ACTIVE} by it: -0.0967" in text
    assert f"forgets more or less than {ACTIVE} by it cannot be told: -0.0333" in text
    assert found[0].startswith(f"{tuned(MONE)}: -1.1000 nats a token")
    assert "+0.6000 nats a token" in found[0]
    (claim,) = (one for one in CLAIMS if one.study == "finetune")
    assert "new text +0.2033" in claim.found(results)
    assert "first text +0.1967" in claim.found(results)


def test_losses_of_two_texts_are_not_compared(tmp_path):
    equal = {key: [0.5, 0.6, 0.7] for key in (MONE, TOTAL, ACTIVE)}
    results = results_of(equal, equal)
    table = {row[0]: row[2] for row in rows(results)}
    assert table[MONE] == "+0.0000 \u00b1 0.0000"
    assert [table[tuned(name)] for name in (MONE, TOTAL, ACTIVE)] == [""] * 3
    page = study_page(STUDY, results, tmp_path)
    assert f"{tuned(TOTAL)}: {CORPUS}" in page
    assert "+0.6000 \u00b1 0.2484" in page
    assert "3.6000 \u00b1 0.2484" in page
