"""Studies as Slurm sweeps: what is written, submitted and read; a planner and an sbatch that are
made up."""

import json
import os
import re
from pathlib import Path

import pytest

from launch.runs.kept_runs import TrainingError
from launch.runs.run_manifest import begin_attempt, end_attempt
from launch.spec import planned_cost
from launch.spec.planned_cost import PlannedCost, cost_key, memory_gib
from megatron_mone.commands.app import main
from megatron_mone.reporting.page.events import Histogram
from megatron_mone.reporting.page.results import LayerLoad, RunResult
from megatron_mone.studies.catalogue import study_of
from megatron_mone.studies.catalogue.large import LIMITS
from megatron_mone.studies.catalogue.ratio import RATIOS, mone
from megatron_mone.studies.command import PAGE, RESULTS
from megatron_mone.studies.document import StudyResults
from megatron_mone.studies.on_slurm import costs, sweeps
from megatron_mone.studies.on_slurm.costs import CellCost, PlannedStep, StudyCost
from megatron_mone.studies.on_slurm.planned import CLUSTER, TEXT, grids, planned_steps, with_costs
from megatron_mone.studies.on_slurm.swept import COST, COST_PAGE, JOBS, Swept, swept_study

DATA = ["--data-path", "/far/text_document", "--tokenizer-model", "/far/tokenizer"]
SITE = "gpus_per_node: 4\nplanner_cluster: h100-ndr\npartition: gpu\ntime_limit: 1-0\n"
CELLS = 9


@pytest.fixture
def planned(monkeypatch) -> list[str]:
    """Names of the runs that were planned, each at 0.5 s a step and 40 GiB."""
    names: list[str] = []

    def planned_costs(jobs, gpus, cluster, say):
        for name, values in jobs:
            names.append(name)
            assert values["vocab_size"] == 32_000
            yield PlannedCost(0.5, values["global_batch_size"] * values["seq_length"], 40.0)

    monkeypatch.setattr(costs, "planned_costs", planned_costs)
    return names


@pytest.fixture
def site(tmp_path, monkeypatch) -> str:
    """A launch file, in a working folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("site.yaml").write_text(SITE)
    return "site.yaml"


@pytest.fixture
def sbatch(tmp_path, monkeypatch) -> Path:
    """The words of every sbatch, which answers 1, 2, ...; other programs of Slurm know nothing."""
    programs, asked = tmp_path / "bin", tmp_path / "asked"
    programs.mkdir()
    code = f'#!/bin/bash\necho "$@" >>{asked}; wc -l <{asked}\n'
    (programs / "sbatch").write_text(code)
    (programs / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr("launch.runs.sweep_cases.job_states", lambda jobs: [])
    return asked


def study(*words: str, preset: str = "cluster") -> int:
    return main(["study", "ratio", "--preset", preset, "--site", "site.yaml", *DATA, *words])


def test_gpu_hours_are_gpus_times_steps_times_seconds():
    step = PlannedStep(planned="x", tokens_per_step=1_000_000, step_seconds=1.8, peak_gib=30.0)
    other = step.model_copy(update={"step_seconds": 0.9, "peak_gib": 50.5})
    cost = StudyCost(
        study="ratio", preset="cluster", cluster="h100-ndr", gpus=8, seeds=3, vocabulary=32_000,
        limit_gib=79.6, cells=[CellCost(name="a", steps=2000, step=step),
                               CellCost(name="b", steps=1000, step=other)],
    )  # fmt: skip
    assert [cost.hours(one) for one in cost.cells] == pytest.approx([1.0, 0.25])
    assert [cost.gpu_hours(one) for one in cost.cells] == pytest.approx([8.0, 2.0])
    assert cost.runs == 6
    assert cost.total_gpu_hours == pytest.approx(30.0)
    assert cost.total_tokens == 9_000_000_000
    assert cost.peak_gib == 50.5


def test_a_study_is_written_out_without_its_data(site, planned, capsys):
    """A sweep a cell over the seeds, its config, what it costs; nothing is submitted."""
    assert study() == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("27 runs of 8 GPUs (h100-ndr): 1,431 GPU hours, 1,350B tokens, ")
    assert said[-1] == (
        "0 of 27 runs are finished; the first that is not: MoNE, r = 1, seed 1: missing"
    )
    folder = Path("out/studies/ratio-cluster")
    scripts = sorted((folder / JOBS).iterdir())
    assert len(scripts) == CELLS == len(planned)
    for script in scripts:
        text = script.read_text()
        for words in ("--array=0-2", "--nodes=2", "--gpus-per-node=4", "--partition=gpu"):
            assert words in text
        assert all(f"--seed {seed}" in text for seed in (1, 2, 3))
        (config,) = {*re.findall(r"--config (\S+)", text)}
        assert Path(config).is_file()
    cost = StudyCost.read(folder / COST, "")
    assert [cell.name for cell in cost.cells][: len(RATIOS)] == [mone(one) for one in RATIOS]
    page = (folder / COST_PAGE).read_text()
    assert "Nothing here was run on a GPU" in page
    assert "--submit" in page
    assert f"{cost.total_gpu_hours:,.0f} GPU hours" in page
    assert not (folder / RESULTS).exists()
    planned.clear()
    assert study() == 0
    assert planned == []  # what was planned for the same hardware is not planned again


@pytest.mark.parametrize(
    ("name", "preset"), [(one.name, name) for one, name, _ in grids()], ids=lambda text: text
)
def test_every_preset_on_gpus_has_distinct_jobs_and_planned_memory_fits(name, preset):
    one = study_of(name)
    chosen = one.presets[preset]
    keys = {json.dumps(costs.planned_values(cell, chosen), sort_keys=True): cell.name
            for cell in one.grid(chosen)}  # fmt: skip
    assert len(keys) == len(one.grid(chosen)) > 1
    assert (chosen.reference or one.reference) in keys.values()
    limit = memory_gib(CLUSTER)
    steps = {step.planned: step for step in planned_steps()}
    for cell in one.grid(chosen):
        values = costs.planned_values(cell, chosen)
        step = steps.get(costs.planned_digest(values))
        if step is not None:
            assert step.peak_gib < limit
            assert step.tokens_per_step == values["global_batch_size"] * values["seq_length"]


def test_the_table_of_costs_is_of_the_planned_steps():
    """After a change of either: python -m megatron_mone.commands.plan_studies."""
    text = TEXT.read_text(encoding="utf-8")
    assert with_costs(text) == text


def test_what_costs_the_same_is_planned_once():
    values = {"seed": 1, "lr": 1e-3, "hidden_size": 64, "mone_ng_loss_coeff": 0.1}
    same = {**values, "seed": 2, "lr": 1e-4, "mone_ng_loss_coeff": 1.0}
    assert cost_key(values) == cost_key(same)
    for other in ({"hidden_size": 65}, {"mone_ng_loss_coeff": 0.0}):
        assert cost_key(values) != cost_key({**values, **other})


def test_a_grid_that_is_refused_is_a_line_and_writes_nothing(site, monkeypatch, capsys):
    class Refusing:
        def __init__(self, planner):
            pass

        def plan(self, job, gpus):
            raise ValueError("num_layers = 12 cannot\nbe split")

    monkeypatch.setattr("megatron_mone.planning.composed.Composer", Refusing)
    assert study() == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "MoNE, r = 1: num_layers = 12 cannot be split" in line
    assert not Path("out").exists()


def test_memory_that_does_not_fit_is_a_line(monkeypatch):
    class Large:
        def __init__(self, planner):
            pass

        def plan(self, job, gpus):
            facts = type("F", (), {"global_batch_size": 8, "seq_length": 16})
            return type(
                "P", (), {"prediction": type("Q", (), {"seconds": 1, "peak": 2e11, "facts": facts})}
            )

    monkeypatch.setattr("megatron_mone.planning.composed.Composer", Large)
    found = planned_cost.planned_costs([("a", {})], 8, "h100-ndr", lambda *said: None)
    with pytest.raises(ValueError, match=r"a: .*186\.3 of 79\.6 GiB .* 8 GPUs: does not fit"):
        list(found)


def test_runs_are_submitted_once(site, planned, sbatch, capsys):
    assert study("--submit") == 0
    assert len(sbatch.read_text().splitlines()) == CELLS
    assert all("--array=0,1,2" in line for line in sbatch.read_text().splitlines())
    capsys.readouterr()
    for folder in Path("out/studies/sweeps").iterdir():
        for case in folder.glob("cases/00[01]*"):
            begin_attempt(case, "1_0", "1_0.0", "n0")
            end_attempt(case, "1_0.0", 0, "finished")
    assert study("--submit") == 0  # Slurm knows none of them any more
    again = sbatch.read_text().splitlines()[CELLS:]
    assert len(again) == CELLS
    assert all("--array=2 " in f"{line} " for line in again)
    assert capsys.readouterr().out.splitlines()[-1].startswith("18 of 27 runs are finished; ")


def test_finished_runs_are_read(site, planned, sbatch, monkeypatch, capsys):
    assert study("--submit", "--seeds", "2") == 0
    capsys.readouterr()
    for case in Path("out/studies/sweeps").glob("*/cases/*"):
        begin_attempt(case, "1_0", "1_0.0", "n0")
        end_attempt(case, "1_0.0", 0, "finished")

    def collect(name, folder, *, steps, fingerprint, command, load_average) -> RunResult:
        assert folder.parent.is_dir()
        load = LayerLoad(Histogram(steps, (0.5, 1.0), (6.0, 2.0)), 2.0)
        loss = 3 + int(name[-1]) / 10
        return RunResult(
            name, fingerprint, command, load_average, steps, 8, 2**20, 2e15, 1e15, [(steps, loss)],
            [(steps, loss)], [(steps, 0.5)], [(steps, 1.0)], [(steps, 1.0)], 10**9, {"1": [load]},
        )  # fmt: skip

    monkeypatch.setattr(sweeps, "collect", collect)
    assert study("--seeds", "2") == 0
    folder = Path("out/studies/ratio-cluster")
    results = StudyResults.read(folder / RESULTS, "")
    assert len(results.cells) == CELLS
    for cell in results.cells:
        assert cell.losses() == pytest.approx({1: 3.1, 2: 3.2})
    assert results.machine == "8 GPUs a run (site site)"
    page = (folder / PAGE).read_text()
    assert "8 GPUs a run" in page
    assert "Models of 2 layers" not in page
    assert LIMITS[-1] in page
    assert "wrote out/studies/ratio-cluster/report.html" in capsys.readouterr().out


def test_one_gpu_is_used_where_it_is(site, planned, monkeypatch, capsys):
    began = []

    def run_sweep(job) -> int:
        began.append(job.spec)
        return 3

    monkeypatch.setattr(sweeps, "run_sweep", run_sweep)
    assert study(preset="1gpu") == 0
    assert "no GPU here" in capsys.readouterr().out
    assert began == []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert study(preset="1gpu") == 1
    (spec,) = began
    assert (spec.nodes, spec.gpus_per_node, spec.tasks_per_node) == (1, 1, 1)
    assert "a run ended with status 3" in capsys.readouterr().err


def test_a_failed_run_here_stops_the_study(monkeypatch):
    monkeypatch.setattr(sweeps, "run_sweep", lambda job: 1)
    one = type("S", (), {"job": None, "cell": type("C", (), {"name": "a"}), "folder": "f"})
    with pytest.raises(TrainingError, match="a: a run ended with status 1"):
        sweeps.run_here([one])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--preset", "cluster"], "--data-path is missing: --preset cluster reads data"),
        (["--preset", "cluster", *DATA[:2]], "--tokenizer-model is missing"),
        (["--preset", "tiny", *DATA], "--data-path: --preset tiny prepares its own data"),
        (["--preset", "tiny", "--site", "slurm"], "--site slurm: --preset tiny is trained here"),
        (["--preset", "cluster", *DATA, "--site", "none"], "launch file 'none' is neither a file"),
        (["--preset", "cluster", *DATA, "--site", "local"], "gpus_per_node is missing"),
        (["--preset", "cluster", *DATA, "--site", "3.yaml"], "8 GPUs need whole nodes"),
        (["--preset", "cluster", *DATA, "--site", "4.yaml"], "planner_cluster is missing"),
        (["--preset", "cluster", *DATA, "--site", "5.yaml"], "planner_cluster = 'h1000'"),
    ],
)
def test_what_is_wrong_is_one_line(site, capsys, words, said):
    Path("3.yaml").write_text("gpus_per_node: 3\nplanner_cluster: h100-ndr\n")
    Path("4.yaml").write_text("gpus_per_node: 4\n")
    Path("5.yaml").write_text("gpus_per_node: 4\nplanner_cluster: h1000\n")
    assert main(["study", "ratio", *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line
    assert not Path("out").exists()


def test_a_long_run_is_queued_again_as_often_as_it_needs():
    """100 h, half as long again, in 4 h: 38 attempts."""
    site = {"time_limit": "4:00:00", "requeue": True}
    assert sweeps.with_requeues(site, 100.0, "s")["max_requeues"] == 37
    assert sweeps.with_requeues(site, 10.0, "s")["max_requeues"] == 20  # as the launcher has it
    assert sweeps.with_requeues({"time_limit": "0"}, 100.0, "s") == {"time_limit": "0"}
    assert sweeps.with_requeues(site, 2.0, "s") == site
    for short in ({"requeue": False}, {"max_requeues": 36}):
        with pytest.raises(ValueError, match=r"takes 100\.0 h .* max_requeues: 37"):
            sweeps.with_requeues({**site, **short}, 100.0, "s")
    enough = {**site, "max_requeues": 37}
    assert sweeps.with_requeues(enough, 100.0, "s") == enough


def test_a_study_on_cpu_cores_is_submitted_with_a_rank_a_run(site, tmp_path):
    Path("cpu.yaml").write_text("tasks_per_node: 1\ncpus_per_task: 1\n")
    how = Swept("cpu.yaml", DATA, 512)
    assert swept_study(study_of("ratio"), "tiny", 2, how, Path("out"), lambda *said: None) is None
    scripts = sorted(Path("out/ratio-tiny", JOBS).iterdir())
    assert len(scripts) == 2
    assert "--ntasks-per-node=1" in scripts[0].read_text()
    assert not Path("out/ratio-tiny", COST).exists()
    with pytest.raises(ValueError, match="is trained on CPU cores"):
        swept_study(study_of("ratio"), "tiny", 2, Swept(site, DATA, 512), Path("out"), print)
