"""A study's runs are jobs of the launcher: trained for real, once, and measured."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_mone.commands.app import main
from megatron_mone.studies.catalogue import finetune, small, study_of
from megatron_mone.studies.catalogue.ratio import DENSE, mone
from megatron_mone.studies.command import RESULTS, run_study
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.measuring.forgetting import NEW, OLD
from megatron_mone.studies.measuring.sparsity_names import AS_IT_IS, GATE, LOSS, OWN
from megatron_mone.studies.study import Cell, Preset
from megatron_mone.studies.tasks import Task, measure_missing

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text, prefix = folder / "text.txt", folder / "text"
    text.write_text("the old tree and a stone of light. " * 4000)
    words = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", "byte"]
    assert main(["prepare", *words, "--txt-documents", "2000"]) == 0
    return prefix


def _tasks(runs, models, preset) -> list[Task]:
    """What `finetune`, `analysis` and `prune` measure; the last two of the run with experts."""
    one = runs[0]
    asked = {"checkpoints": str(one.folder / "checkpoints"), "windows": 4}
    return [
        *finetune.tasks(runs, models, preset),
        Task(one.cell.name, one.seed, "analyse:measure", asked),
        Task(one.cell.name, one.seed, "prune:measure", {**asked, "recorded": 4, "draws": 1}),
    ]


def test_a_run_is_trained_by_the_launcher_and_measured(data, tmp_path):
    """One with experts that choose, which is looked into, one without experts, and one that starts
    from the first and learns nothing: its losses are the first's to the bit."""
    cell, again = mone(Fraction(1, 4)), "again"
    values = {**small.training(2), "hidden_size": 32, "seq_length": 32, "eval_iters": 1,
              "max_position_embeddings": 32, "moe_ffn_hidden_size": 48,
              "save_interval": 1}  # fmt: skip
    preset = Preset(values, only=(cell, DENSE, again), measuring={"windows": 4})
    still = Cell(again, "no learning rate", {"lr": 0.0, "min_lr": 0.0, "save_interval": 2},
                 after=cell)  # fmt: skip
    study = replace(
        study_of("ratio"), presets={"one": preset}, reference=cell, tasks=_tasks,
        cells=lambda values: [*study_of("ratio").cells(values), still],
    )  # fmt: skip
    said = []
    results = run_study(study, "one", 1, data, tmp_path, [], lambda *words: said.append(words))
    (run,) = results.cell(cell).runs
    assert (run.steps, run.tokens_per_step, run.chooses) == (2, 16 * 32, True)
    assert 0 < run.validation[-1].loss < 8
    folder = tmp_path / "runs" / run.run
    assert list((folder / "checkpoints").glob("iter_0000002"))
    assert StudyResults.read(tmp_path / "ratio-one" / RESULTS, "") == results
    (dense,) = results.cell(DENSE).runs
    assert (dense.steps, dense.chooses, dense.dead_share) == (2, False, 0)
    assert 0 < dense.active_flops_per_step == dense.executed_flops_per_step
    (after,) = results.cell(again).runs
    assert after.run != run.run
    assert after.validation[-1] == run.validation[-1]
    for of in (OLD, NEW):
        (measured,) = results.measured(of, again).values()
        assert measured.x == [0, 2]
        assert measured.y[0] == measured.y[1] == pytest.approx(run.validation[-1].loss, abs=0.5)
    assert [done for done, of, _ in said if of == 3][-1] == 3
    assert said[-1][:2] == (3, 3)
    _check_what_was_chosen(results, cell)
    _check_what_was_removed(results, cell)
    _measures_a_runs_checkpoint(folder, data.with_suffix(".txt"), tmp_path)


def _measures_a_runs_checkpoint(run: Path, text: Path, out: Path) -> None:
    """As the study `sparsity` does: at the share that was trained, it is the model as it is."""
    asked = {"text": str(text), "tokens": 64, "length": 32, "layer_tokens": 32, "questions": 1}
    task = Task("a", 1, "neuron_needs:of_run", {"run": str(run), "answers": False, **asked})
    found = {one.of: one for one in measure_missing([task], out, lambda *words: None)}
    assert found[OWN].y == [0.25]
    by_gate = zip(found[LOSS.format(GATE)].x, found[LOSS.format(GATE)].y, strict=True)
    own = [loss for share, loss in by_gate if share == 0.25]
    assert own == pytest.approx(found[AS_IT_IS].y, rel=1e-4)
    assert 0 < own[0] < 8


def _check_what_was_chosen(results: StudyResults, cell: str) -> None:
    for of in ("router saturation, layer 2", "mask saturation, layer 1"):
        (one,) = results.measured(of, cell).values()
        assert one.x == [1, 2]
        assert one.y[1] == 1
    (used,) = results.measured("used by neighbours, layer 1", cell).values()
    assert used.y[0] == pytest.approx(2 / 8 * 0.25)  # two of eight experts, a quarter of neurons


def _check_what_was_removed(results: StudyResults, cell: str) -> None:
    """To remove none is the model as it is to the bit, however it is asked."""
    whole = {
        results.measured(of, cell)[1].y[0]
        for of in ("experts by REAP", "experts by reconstruction", "neurons by frequency",
                   "neurons by lot", "skipped by router weight", "skipped by use in the sequence")
    }  # fmt: skip
    assert len(whole) == 1
    (by_lot,) = results.measured("neurons by lot", cell).values()
    assert len({*by_lot.y}) == len(by_lot.y) == 10
