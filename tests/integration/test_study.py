"""A study's runs are jobs of the launcher: trained for real, once, and measured."""

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from megatron_mone.commands.app import main
from megatron_mone.studies.catalogue import small, study_of
from megatron_mone.studies.catalogue.ratio import DENSE, mone
from megatron_mone.studies.command import RESULTS, run_study
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.study import Preset

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    text, prefix = folder / "text.txt", folder / "text"
    text.write_text("the old tree and a stone of light. " * 4000)
    words = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", "byte"]
    assert main(["prepare", *words, "--txt-documents", "2000"]) == 0
    return prefix


def test_a_run_is_trained_by_the_launcher_and_measured(data, tmp_path):
    """One with experts that choose, one without experts."""
    cell = mone(Fraction(1, 4))
    values = {**small.training(2), "hidden_size": 32, "seq_length": 32, "eval_iters": 1,
              "max_position_embeddings": 32, "moe_ffn_hidden_size": 48}  # fmt: skip
    study = replace(
        study_of("ratio"), presets={"one": Preset(values, only=(cell, DENSE))}, reference=cell
    )
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
    assert said[-1][:2] == (2, 2)
