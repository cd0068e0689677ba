"""Studies with runs that are made up: intervals, what is trained, and where a page's numbers are
from."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launch.runs.kept_runs import TrainingError
from launch.spec.file import read_fields
from launch.spec.training_job import training_job
from megatron_mone.commands.app import main
from megatron_mone.studies.catalogue import MODULES, models_of, study_of
from megatron_mone.studies.catalogue.ratio import ACTIVE, DENSE, ONE, TOTAL
from megatron_mone.studies.command import PAGE, RESULTS, run_study, write_page
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.runs import RANKS, values_of, wanted, write_config
from megatron_mone.studies.statistics import difference, estimate
from megatron_mone.studies.study import Section
from megatron_mone.studies.tasks import Task, measure_missing


def run(name: str, folder: Path, names: list[str], *, preset="cpu", seeds=3, stop_after=None):
    def train(one) -> None:
        if stop_after is not None and len(names) >= stop_after:
            raise KeyboardInterrupt
        names.append(one.name)

    return run_study(
        study_of(name), preset, seeds, folder / "data", folder, ["megatron-mone study"],
        lambda *said: None, train, lambda task: [],
    )  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_a_study_trains_each_cell_once_a_seed(tmp_path, trained, name):
    results = run(name, tmp_path, trained)
    cells = study_of(name).grid(study_of(name).presets["cpu"])
    assert len(trained) == len({*trained}) == 3 * len(cells)
    assert [cell.name for cell in results.cells] == [cell.name for cell in cells]
    assert {run.seed for cell in results.cells for run in cell.runs} == {1, 2, 3}
    assert results.reference in {cell.name for cell in results.cells}
    again = run(name, tmp_path, trained)
    assert len(trained) == 3 * len(cells)  # nothing twice
    assert again == results


@pytest.mark.parametrize("name", MODULES)
def test_a_run_is_named_before_its_file_is_written_and_is_what_the_launcher_reads(
    tmp_path, trained, name
):
    study = study_of(name)
    preset = study.presets["cpu"]
    found = wanted(study.grid(preset), preset, 1, tmp_path / "data", tmp_path)
    for one in found[:1] + found[1:][-1:]:
        assert not one.config.exists()
        write_config(one)
        words, spec = one.run.job.config["arguments"], one.run.job.spec
        site = {**read_fields("local"), "tasks_per_node": RANKS}
        folder = Path(spec.folder).parent
        assert training_job(one.config, spec.name, folder, words, (), site) == one.run.job


def test_a_stopped_study_goes_on_where_it_was(tmp_path, trained):
    with pytest.raises(KeyboardInterrupt):
        run("block", tmp_path, trained, stop_after=4)
    before = list(trained)
    assert 1 <= len(before) <= 4
    assert not (tmp_path / "block-cpu" / RESULTS).exists()
    run("block", tmp_path, trained)
    assert len(trained) == len({*trained})
    assert trained[: len(before)] == before


def test_two_studies_share_the_runs_that_are_the_same(tmp_path, trained):
    one = run("ratio", tmp_path, trained)
    count = len(trained)
    other = run("balance", tmp_path, trained)
    shared = one.cell("MoNE, r = 1/4"), other.cell("selected, 0.1")
    assert [run.run for run in shared[0].runs] == [run.run for run in shared[1].runs]
    assert len(trained) - count == 3 * (len(other.cells) - 1)
    assert shared[0].losses() == shared[1].losses()


def test_a_run_that_fails_is_told_and_stops_the_others(tmp_path, trained):
    def train(one) -> None:
        raise TrainingError(f"{one.name}: no")

    with pytest.raises(TrainingError, match="no"):
        run_study(
            study_of("ratio"), "cpu", 1, tmp_path / "d", tmp_path, [], lambda *said: None, train
        )


def test_the_controls_activate_what_mone_does():
    study = study_of("ratio")
    preset = study.presets["cpu"]
    values = {cell.name: values_of(cell, preset, 1) for cell in study.grid(preset)}

    def active(one: dict) -> float:
        """Neurons of three whole projections that a token passes."""
        if "num_experts" not in one:
            return one["ffn_hidden_size"]
        share = (1 + 2 * one.get("mone_neuron_ratio", 1.0)) / 3
        return one["moe_router_topk"] * one["moe_ffn_hidden_size"] * share

    wanted = active(values["MoNE, r = 1/4"])
    assert [active(values[name]) for name in (ACTIVE, DENSE, ONE)] == [wanted] * 3
    assert active(values[TOTAL]) == active(values["MoNE, r = 1"]) == 2 * wanted
    assert not any(name.startswith("mone") for name in values[TOTAL])


def test_intervals_widen_when_seeds_differ():
    near, far = estimate([3.0, 3.01, 2.99]), estimate([3.0, 3.1, 2.9])
    assert near.mean == pytest.approx(far.mean) == pytest.approx(3.0)
    assert far.half_width == pytest.approx(10 * near.half_width)
    assert near.half_width == pytest.approx(4.303 * 0.01 / 3**0.5, rel=1e-3)
    assert estimate([3.0]).half_width is None
    assert not estimate([3.0]).is_clear


def test_a_difference_is_paired_by_seed():
    """Seeds far apart, always the same difference: its interval is narrow, those of means not."""
    one, other = {1: 3.0, 2: 4.0, 3: 5.0}, {1: 2.9, 2: 3.9, 3: 4.9, 4: 9.0}
    found = difference(one, other)
    assert found.mean == pytest.approx(0.1)
    assert found.half_width == pytest.approx(0.0, abs=1e-6)
    assert found.is_clear
    assert found.count == 3
    with pytest.raises(ValueError, match="share no seed"):
        difference({1: 3.0}, {2: 3.0})


def test_the_pages_numbers_are_those_of_the_results(tmp_path, trained):
    run("ratio", tmp_path, trained)
    folder = tmp_path / "ratio-cpu"
    results = StudyResults.read(folder / RESULTS, "run it again")
    page = (folder / PAGE).read_text()
    for cell in results.cells:
        assert f"{cell.loss.mean:.4f} \u00b1 {cell.loss.half_width:.4f}" in page
        if cell.name != TOTAL:
            found = results.difference(cell.name, TOTAL)
            assert f"{found.mean:+.4f} \u00b1 {found.half_width:.4f}" in page
    assert "25.0%" in page  # 2 of 8 neurons were never kept
    document = json.loads((folder / RESULTS).read_text())
    for one in document["cells"][0]["runs"]:
        one["validation"][-1]["loss"] = 9.0 + one["seed"] / 10
    changed = StudyResults.of(document, folder / RESULTS)
    write_page(study_of("ratio"), changed, folder)
    page = (folder / PAGE).read_text()
    assert "9.2000 \u00b1 0.2484" in page
    assert "higher (worse)" in page


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ratoi"], "study 'ratoi' is none (did you mean 'ratio'?)"),
        (["ratio", "--preset", "gpu"], "--preset gpu: ratio has tiny, cpu"),
        (["ratio", "--seeds", "0"], "--seeds"),
        (["ratio", "--model", "."], "--model .: ratio measures only what it trains"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, words, said):
    try:
        status = main(["study", *words])
    except SystemExit as error:
        status = error.code
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert len(lines) == 1
    assert said in lines[0]


def test_what_is_measured_is_measured_once_and_shared(tmp_path):
    """Also by another name: what is asked decides, not whose it is."""
    asked: list[str] = []

    def perform(task):
        asked.append(task.cell)
        return [("loss", [1, 2], [len(asked), 0.5])]

    said = []
    one, other = Task("a", 1, "f:g", {"run": "r1"}), Task("b", 2, "f:g", {"run": "r2"})
    first = measure_missing([one, other], tmp_path, lambda *words: said.append(words), perform)
    assert sorted(asked) == ["a", "b"]
    assert [(each.of, each.cell, each.seed, each.x) for each in first] == [
        ("loss", "a", 1, [1, 2]), ("loss", "b", 2, [1, 2])
    ]  # fmt: skip
    assert said[-1][:2] == (2, 2)
    again = measure_missing(
        [replace(one, cell="c", seed=7)], tmp_path, lambda *words: None, perform
    )
    assert len(asked) == 2
    assert [(each.cell, each.seed, each.y) for each in again] == [("c", 7, first[0].y)]


def test_a_measurement_that_fails_is_told_in_one_line(tmp_path):
    task = Task("a", 1, "choices:nothing", {})
    with pytest.raises(TrainingError, match="AttributeError"):
        measure_missing([task], tmp_path, lambda *words: None)
    assert not list((tmp_path / "measurements").glob("*.json"))


def test_a_study_reads_measures_and_shows_its_own_sections(tmp_path, trained, monkeypatch):
    study = replace(
        study_of("ratio"),
        read=lambda one, preset: [("steps", [one.seed], [one.result.steps])],
        tasks=lambda runs, models, preset: [
            Task(one.cell.name, one.seed, "f:g", {"run": one.folder.name}) for one in runs
        ],
        sections=lambda results: [
            Section("Twice", [f"{results.curve('twice', TOTAL)[0][1].mean}"])
        ],
    )
    results = run_study(
        study, "cpu", 3, tmp_path / "data", tmp_path, [], lambda *said: None,
        lambda one: trained.append(one.name), lambda task: [("twice", [0.0], [2.0 * task.seed])],
    )  # fmt: skip
    assert [one.y for one in results.measured("steps", TOTAL).values()] == [[240.0]] * 3
    ((x, found),) = results.curve("twice", TOTAL)
    assert (x, found.mean, found.count) == (0, 4, 3)
    assert found.half_width == pytest.approx(4.303 * 2 / 3**0.5, rel=1e-3)
    assert results.who("twice") == [cell.name for cell in results.cells]
    page = (tmp_path / "ratio-cpu" / PAGE).read_text()
    assert "Twice" in page
    assert "4.0" in page


def test_given_models_have_names_of_their_own(tmp_path):
    (tmp_path / "one").mkdir()
    study = replace(study_of("ratio"), takes_models=True)
    folder = str(tmp_path / "one")
    assert models_of(study, [folder, f"two={folder}"]) == {"one": Path(folder), "two": Path(folder)}
    for words, said in [([folder, folder], "two models are called one"),
                        ([f"{folder}-no"], "is no folder")]:  # fmt: skip
        with pytest.raises(ValueError, match=said):
            models_of(study, words)


def test_given_models_are_measured_before_anything_is_trained(tmp_path, trained):
    """A wrong one is told at once."""
    study = replace(
        study_of("ratio"),
        takes_models=True,
        tasks=lambda runs, models, preset: [Task(name, 0, "f:g", {"of": name}) for name in models],
    )

    def perform(task):
        assert not trained
        raise TrainingError(f"{task.cell}: no model")

    with pytest.raises(TrainingError, match="wrong: no model"):
        run_study(
            study, "cpu", 1, tmp_path / "data", tmp_path, [], lambda *said: None,
            lambda one: trained.append(one.name), perform, {"wrong": tmp_path},
        )  # fmt: skip
    assert not trained
