"""`split`: equal operations, and what is said of the best of a budget."""

import pytest

from megatron_mone.studies.catalogue import small, study_of
from megatron_mone.studies.catalogue.split import BUDGETS, MAIN, Split
from megatron_mone.studies.page import study_page
from megatron_mone.studies.runs import values_of
from megatron_mone.studies.statistics import best_shares
from tests.unit.studies.made_up import made_up

STUDY = study_of("split")
TOTAL = MAIN.experts * MAIN.width
SPLITS = [(budget, one) for budget, splits in BUDGETS.items() for one in splits]


@pytest.mark.parametrize(("budget", "split"), SPLITS, ids=[one.name for _, one in SPLITS])
def test_splits_take_equal_operations_of_equal_totals(budget, split):
    """By the arguments that a run gets: gate forward 1; up, down forward and six products backward
    of what is kept."""
    preset = STUDY.presets["cpu"]
    (cell,) = (cell for cell in STUDY.grid(preset) if cell.name == split.name)
    values = values_of(cell, preset, 1)
    width, kept = values["moe_ffn_hidden_size"], 1.0
    if "mone_neuron_ratio" in values:
        kept = values["mone_neuron_ratio"]
        assert kept * width == split.kept
    else:
        assert split.kept == width
    operations = values["moe_router_topk"] * (width + (2 + 6) * kept * width)
    assert operations == split.operations == pytest.approx(budget, rel=0.01)
    assert values["num_experts"] * width == pytest.approx(TOTAL, rel=0.01)
    assert bool(values.get("moe_router_pre_softmax")) == (split.chosen == 1)


@pytest.mark.parametrize("preset", [name for name, one in STUDY.presets.items() if one.gpus])
def test_so_do_those_of_larger_models(preset):
    """By their names, from which pages take them."""
    values = STUDY.presets[preset].values
    splits = [Split.named(cell.name) for cell in STUDY.grid(STUDY.presets[preset])]
    main = Split.named(STUDY.presets[preset].reference)
    assert main in splits
    assert main.values().items() <= values.items()
    assert [one.dense for one in splits] == [False] * (len(splits) - 1) + [True]
    for one in splits:
        assert one.operations == pytest.approx(main.operations, rel=0.02)
        assert one.experts * one.width == pytest.approx(main.experts * main.width, rel=0.01)


def test_the_main_split_is_the_run_that_other_studies_have():
    preset = STUDY.presets["cpu"]
    (cell,) = (cell for cell in STUDY.grid(preset) if cell.name == MAIN.name)
    assert values_of(cell, preset, 1) == {**small.training(small.CPU_STEPS), "seed": 1}


def test_the_best_is_told_with_how_often_and_what_is_not_told_apart(tmp_path):
    names = [one.name for one in BUDGETS[MAIN.operations]]
    losses = {name: {1: 4.5, 2: 4.6, 3: 4.4} for name in names}
    losses[names[1]] = {1: 4.0, 2: 4.1, 3: 3.9}
    losses[names[2]] = {1: 4.1, 2: 4.0, 3: 4.0}
    results = made_up(STUDY, losses)
    said = STUDY.findings(results)[0]
    assert f"lowest mean loss is that of {names[1]}, 4.0000 \u00b1 0.2484" in said
    assert f"Not told apart: {names[2]}." in said
    assert said.count(names[0]) == 1
    page = study_page(STUDY, results, tmp_path)
    shares = best_shares(losses)
    assert 0.5 < shares[names[1]] < 1
    assert f"{shares[names[1]]:.0%} of resamples" in page
    assert f"<td>{shares[names[2]]:.0%}</td>" in page


def test_shares_of_the_best_add_up_and_follow_the_seeds():
    sure = best_shares({"a": {1: 1.0, 2: 1.1}, "b": {1: 2.0, 2: 2.1}})
    assert sure == {"a": 1, "b": 0}
    split = best_shares({"a": {1: 1.0, 2: 2.1}, "b": {1: 2.0, 2: 1.0}})
    assert split["b"] == pytest.approx(0.75, abs=0.03)  # all draws but 1, 1
    assert sum(split.values()) == 1
    with pytest.raises(ValueError, match="share no seed"):
        best_shares({"a": {1: 1.0}, "b": {2: 1.0}})
