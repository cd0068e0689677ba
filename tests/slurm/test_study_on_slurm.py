"""A study handed to a real Slurm: its runs are submitted once, train, and become its results."""

from dataclasses import replace
from pathlib import Path

import pytest

from launch.runs.run_manifest import gather
from megatron_mone.commands.app import main
from megatron_mone.studies.catalogue import study_of
from megatron_mone.studies.command import PAGE, RESULTS
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.on_slurm.swept import Swept, swept_study
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import wait_end
from tests.slurm.training import ends_of_logs

SITE = """\
nodes: 1
gpus_per_node: 0
tasks_per_node: 1
cpus_per_task: 1
preflight: false
exclusive: false
memory: "0"
time_limit: 10
signal_lead_seconds: 0
"""


@pytest.mark.slow
def test_two_cells_train_and_become_results(cluster: Cluster, tmp_path: Path, capfd) -> None:
    """The same command submits, then nothing more, then reads what the jobs left."""
    text, site, out = tmp_path / "text.txt", tmp_path / "site.yaml", tmp_path / "out"
    text.write_text("the old tree and a stone of light. " * 4000)
    site.write_text(SITE)
    prefix = tmp_path / "text"
    asked = ["--input", str(text), "--output-prefix", str(prefix), "--tokenizer", "byte"]
    assert main(["prepare", *asked, "--txt-documents", "2000"]) == 0
    study = study_of("ratio")
    tiny = study.presets["tiny"]
    names = tuple(cell.name for cell in study.grid(tiny))[:2]
    study = replace(study, presets={"tiny": replace(tiny, only=names, reference=names[0])})
    flags = ["--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{prefix}.tokenizer"]
    how = Swept(str(site), flags, 258, submits=True, command="megatron-mone study ratio --submit")

    def again() -> StudyResults | None:
        return swept_study(study, "tiny", 1, how, out, lambda *said: None)

    assert again() is None
    said = capfd.readouterr().out
    assert said.count("submitted: job ") == 2
    assert "0 of 2 runs are finished; the first that is not: " in said
    assert again() is None
    assert capfd.readouterr().out.count("none is missing") == 2
    sweeps = sorted((out / "sweeps").iterdir())
    jobs = [start["job_id"] for one in sweeps for start in gather(one).starts]
    assert len(jobs) == 2
    for job in jobs:
        assert wait_end(f"{job}_0").state == "COMPLETED", ends_of_logs(out / "sweeps")
    results = again()
    assert results is not None
    assert [cell.name for cell in results.cells] == list(names)
    first, second = (cell.runs[0].validation[-1].loss for cell in results.cells)
    assert first != second
    assert StudyResults.read(out / "ratio-tiny" / RESULTS, "") == results
    assert (out / "ratio-tiny" / PAGE).is_file()
