"""A study's runs are jobs of the launcher: trained for real, once, and measured.

Every study's `tiny`, one seed each, into one folder: most of their runs are the same. Theirs are
forked from a process that has imported Megatron.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from launch.runs.kept_runs import KeptRun
from megatron_mone import pretrain
from megatron_mone.commands.app import main
from megatron_mone.studies import tasks
from megatron_mone.studies.catalogue import MODULES, finetune, small, study_of, with_text
from megatron_mone.studies.catalogue.ratio import DENSE, mone
from megatron_mone.studies.command import PAGE, RESULTS, run_study
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.measuring.forgetting import NEW, OLD
from megatron_mone.studies.measuring.sparsity_names import AS_IT_IS, GATE, LOSS, OWN
from megatron_mone.studies.study import Cell, Preset
from megatron_mone.studies.tasks import Found, Task
from tests import forked_ranks

pytestmark = pytest.mark.slow

MONE = mone(Fraction(1, 4))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two texts: that of all runs, and that of fine-tuning."""
    folder = tmp_path_factory.mktemp("study")
    for name, words in {"text": "the old tree and a stone of light. ",
                        finetune.CORPUS: "if x: return [y for y in z] "}.items():  # fmt: skip
        text, prefix = folder / f"{name}.txt", folder / name
        text.write_text(words * 4000)
        asked = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", "byte"]
        assert main(["prepare", *asked, "--txt-documents", "2000"]) == 0
    return folder / "text"


@pytest.fixture(scope="module", autouse=True)
def _fork_server(tmp_path_factory) -> None:
    """Started here, for it ends with the thread that starts it."""
    _forked(time.sleep, (0.0,), tmp_path_factory.mktemp("fork-server") / "log")


@pytest.fixture(scope="module")
def tiny(data: Path, tmp_path_factory) -> dict[str, StudyResults]:
    """Study -> results."""
    out = tmp_path_factory.mktemp("tiny")
    found = {}
    for name in MODULES:
        study = study_of(name)
        preset = study.presets["tiny"]
        if "text" in preset.measuring:
            preset = with_text(preset, study, data.with_suffix(".txt"))
        study = replace(study, presets={"tiny": preset})
        found[name] = run_study(
            study, "tiny", 1, data, out, [], lambda *said: None, train=_train, perform=_perform
        )
    return found


def _forked(function: Callable[..., None], arguments: tuple, log: Path) -> None:
    """In a process of its own."""
    assert forked_ranks.start(1, function, arguments, log).wait(300) == 0, log.read_text()


def _train(run: KeptRun) -> None:
    """In place of `launch run`."""
    words = run.job.spec.command
    words = words[words.index(pretrain.__name__) + 1 :]
    log = run.folder.with_suffix(".log")
    _forked(pretrain.main, (words,), log)


def _perform(task: Task) -> list[Found]:
    """In place of a child process that imports all."""
    with TemporaryDirectory() as folder:
        asked, file, log = (Path(folder, name) for name in ("asked", "found", "log"))
        asked.write_text(json.dumps(tasks._asked(task)))
        _forked(tasks._child, (asked, file), log)
        measures = tasks.Measured.read(file, "").measures
    return [(one.of, one.x, one.y) for one in measures]


@pytest.mark.parametrize("name", MODULES)
def test_tiny_trains_every_cell_and_has_something_to_say(tiny, name):
    """One seed says nothing of a spread, and no sentence does."""
    results, study = tiny[name], study_of(name)
    assert [cell.name for cell in results.cells] == [
        cell.name for cell in study.grid(study.presets["tiny"])
    ]
    for cell in results.cells:
        (run,) = cell.runs
        assert 0 < run.validation[-1].loss < 8
    said = study.findings(results)
    assert said
    assert not [line for line in said if "seeds paired" in line]


def test_tiny_looks_into_what_was_chosen(tiny):
    for of in ("router saturation, layer 2", "mask saturation, layer 1"):
        one = tiny["analysis"].measured(of, MONE)[1]
        assert one.y[-1] == 1 > one.y[0]
    used = tiny["analysis"].measured("used by neighbours, layer 1", MONE)[1]
    assert used.y[0] == pytest.approx(2 / 8 * 0.25)  # two of eight experts, a quarter of neurons


def test_tiny_removes(tiny):
    """To remove none is the model as it is to the bit, however it is asked."""
    whole = {
        tiny["prune"].measured(of, MONE)[1].y[0]
        for of in ("experts by REAP", "experts by reconstruction", "neurons by frequency",
                   "neurons by lot", "skipped by router weight", "skipped by use in the sequence")
    }  # fmt: skip
    assert len(whole) == 1
    assert len({*tiny["prune"].measured("neurons by lot", MONE)[1].y}) == 10


def test_tiny_keeps_fewer_neurons(tiny):
    """At the share that was trained, a run is the model as it is."""
    found = {
        of: tiny["sparsity"].measured(of, MONE)[1] for of in (OWN, LOSS.format(GATE), AS_IT_IS)
    }
    assert found[OWN].y == [0.25]
    by_gate = zip(found[LOSS.format(GATE)].x, found[LOSS.format(GATE)].y, strict=True)
    own = [loss for share, loss in by_gate if share == 0.25]
    assert own == pytest.approx(found[AS_IT_IS].y, rel=1e-4)
    assert 0 < own[0] < 8


def test_a_run_is_trained_by_the_launcher_and_measured(data, tmp_path):
    """One with experts that choose; then, forked, one without experts, and one that starts from the
    first and learns nothing: its losses are the first's to the bit."""
    again = "again"
    values = {**small.training(2), "hidden_size": 32, "seq_length": 32, "eval_iters": 1,
              "max_position_embeddings": 32, "moe_ffn_hidden_size": 48}  # fmt: skip
    preset = Preset(values, only=(MONE, DENSE, again), measuring={"windows": 4})
    still = Cell(again, "no learning rate", {"lr": 0.0, "min_lr": 0.0}, after=MONE)
    study = replace(
        study_of("ratio"), presets={"one": preset}, reference=MONE, tasks=finetune.tasks,
        cells=lambda values: [*study_of("ratio").cells(values), still],
    )  # fmt: skip
    first = replace(study, presets={"one": replace(preset, only=(MONE,))})
    run_study(first, "one", 1, data, tmp_path, [], lambda *words: None)
    said: list[tuple] = []
    results = run_study(
        study, "one", 1, data, tmp_path, [], lambda *words: said.append(words), train=_train
    )
    assert said[0] == (1, 3, "trained before")
    (run,) = results.cell(MONE).runs
    assert (run.steps, run.tokens_per_step, run.chooses) == (2, 16 * 32, True)
    assert 0 < run.validation[-1].loss < 8
    folder = tmp_path / "runs" / run.run
    assert list((folder / "checkpoints").glob("iter_0000002"))
    assert StudyResults.read(tmp_path / "ratio-one" / RESULTS, "") == results
    assert (tmp_path / "ratio-one" / PAGE).is_file()
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
    assert said[-1][:2] == (1, 1)
