"""What is checked of a job before it is submitted: what is said, what is refused, what passes."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from launch.spec import pre_submit
from launch.spec.pre_submit import (
    PreSubmitChecks,
    Refused,
    check_before_submit,
    pre_submit_checks,
    together,
)
from launch.spec.training_job import Job, program_job, training_job
from megatron_mone.planning import fixes
from megatron_mone.planning.cost.rank_memory import RankMemory
from megatron_mone.profiling.baselines import run_specs

ROOT = Path(__file__).resolve().parents[3]
DEMO = ROOT / "configs/demo-mone.yaml"
LARGE = ROOT / "configs/plan/moe-30b-a3b-mone-128.yaml"
GIB = 2.0**30
TINY = ["--num-layers", "2", "--num-experts", "8", "--hidden-size", "256", "--seq-length", "64",
        "--num-attention-heads", "4", "--num-query-groups", "2", "--global-batch-size", "16",
        "--max-position-embeddings", "64"]  # fmt: skip


def memory(held: float, rest: float) -> RankMemory:
    """GiB that stay and GiB that come and go, in two unequal parts each."""
    return RankMemory(held * GIB / 4, held * GIB / 4, held * GIB / 2, rest * GIB / 4,
                      rest * GIB * 3 / 4, 0.0, 0.0, 0.0)  # fmt: skip


class Planner:
    """A planner whose answers are given: name of a job -> memory of each stage's rank."""

    def __init__(self, limit: float, **stages: list[RankMemory]) -> None:
        self.cluster = SimpleNamespace(device=SimpleNamespace(memory_bytes=limit * GIB))
        self.stages = stages

    def plan(self, job, gpus, progress):
        stages = self.stages.get(job.name)
        if stages is None:
            raise ValueError("softmax_type = 'x' cannot be traced: use 'vanilla'")
        prediction = SimpleNamespace(memory_P=stages, seconds=1.25, peak=stages[0].peak)
        return SimpleNamespace(job=job, prediction=prediction)


def checks_of(planner: Planner, tracer=None) -> PreSubmitChecks:
    checks = PreSubmitChecks(tracer, lambda done, total, what: None)
    checks._planners["h100-ndr"] = planner
    return checks


def job_of(tmp_path, config=LARGE, words=(), grid=(), **site) -> Job:
    site = {"gpus_per_node": 8, "nodes": 2, "planner_cluster": "h100-ndr", **site}
    return training_job(config, "run", tmp_path, list(words), grid, site)


def stated(checks: PreSubmitChecks, job: Job, *words: str):
    return checks.stated("run", job.config["values"], [*job.config["arguments"], *words])


def test_models_in_one_process_keep_their_state_and_take_turns_with_the_rest():
    one = SimpleNamespace(memory_P=[memory(10, 5), memory(8, 1)])
    two = SimpleNamespace(memory_P=[memory(4, 2), memory(4, 9)])
    assert together([one]).peak == pytest.approx(15 * GIB)
    both = together([one, two])
    assert (both.peak, both.stage) == (pytest.approx(21 * GIB), 1)


def test_what_fits_is_said_in_a_line(tmp_path, capsys):
    job, checks = job_of(tmp_path), checks_of(Planner(80, run=[memory(10, 5), memory(40, 20)]))
    checks.memory({"mone": stated(checks, job)}, job.spec, "r=1/2")
    assert capsys.readouterr().err == (
        "planner (h100-ndr), r=1/2: 60.0 of 80.0 GiB on the fullest rank (stage 1), 1,250 ms a "
        "step predicted: fits\n"
    )


def test_what_does_not_fit_is_refused_with_the_cheapest_change(tmp_path, monkeypatch):
    job, checks = job_of(tmp_path), checks_of(Planner(80, run=[memory(60, 40)]))
    asked = []

    def cheapest_fix(planner, planned, gpus, progress):
        asked.append(gpus)
        fitting = SimpleNamespace(peak=70 * GIB, seconds=2.0)
        fixed = planned.job.with_layout({"recompute_granularity": "full", "micro_batch_size": 1})
        return "recompute full", SimpleNamespace(job=fixed, prediction=fitting)

    monkeypatch.setattr(fixes, "cheapest_fix", cheapest_fix)
    with pytest.raises(Refused) as caught:
        checks.memory({"mone": stated(checks, job, "--micro-batch-size", "2")}, job.spec)
    assert str(caught.value) == (
        "planner (h100-ndr): 100.0 of 80.0 GiB on the fullest rank (stage 0), 1,250 ms a step "
        "predicted: does not fit; recompute full makes it fit (70.0 GiB, 2,000 ms a step): add "
        "--micro-batch-size 1 --recompute-granularity full after --, or submit it all the same "
        "with --force"
    )
    assert asked == [16]
    monkeypatch.setattr(fixes, "cheapest_fix", lambda *arguments: None)
    with pytest.raises(Refused, match="no single change makes it fit: use more GPUs"):
        checks.memory({"mone": stated(checks, job)}, job.spec)


def test_baselines_count_too(tmp_path):
    planner = Planner(80, run=[memory(30, 20)], moe=[memory(40, 5)])
    job, checks = job_of(tmp_path), checks_of(planner)
    both = checks.compared(stated(checks, job), run_specs(["moe"])[1:])
    with pytest.raises(Refused, match=r"90\.0 of 80\.0 GiB .* with 2 models in it: does not fit"):
        checks.memory(both, job.spec)
    checks.memory({"mone": both["mone"]}, job.spec)


def test_what_cannot_be_planned_is_said_and_passes(tmp_path, capsys):
    job, checks = job_of(tmp_path), checks_of(Planner(80))
    checks.memory({"mone": stated(checks, job)}, job.spec)
    assert capsys.readouterr().err == (
        "planner (h100-ndr): no verdict on memory: softmax_type = 'x' cannot be traced: use "
        "'vanilla'\n"
    )
    checks.memory({"mone": stated(checks, job, "--transformer-impl", "local")}, job.spec)
    assert "planned for CPU ranks only" in capsys.readouterr().err
    own = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "/nowhere"]
    unknown = stated(checks, job_of(tmp_path, DEMO), *own, "--transformer-impl",
                     "transformer_engine")  # fmt: skip
    checks.memory({"mone": unknown}, job.spec)
    assert "the tokenizer is not on this machine" in capsys.readouterr().err


def test_without_a_cluster_there_is_no_verdict_and_a_line_says_so(tmp_path, capsys):
    checks = checks_of(Planner(80))
    assert not checks.plans(job_of(tmp_path, planner_cluster=None).spec)
    assert "names no planner_cluster" in capsys.readouterr().err
    assert not checks.plans(job_of(tmp_path, gpus_per_node=0).spec)
    assert checks.plans(job_of(tmp_path).spec)
    assert capsys.readouterr().err == ""


def test_a_cluster_that_nobody_knows_is_refused(tmp_path, tracer):
    job = job_of(tmp_path, planner_cluster="h100-ndx")
    checks = PreSubmitChecks(tracer, lambda done, total, what: None)
    with pytest.raises(ValueError, match=r"planner_cluster = 'h100-ndx': .*h100-ndr"):
        checks.memory({"mone": stated(checks, job)}, job.spec)


def test_a_gpu_job_is_planned_as_it_would_run(tmp_path, tracer, capsys):
    """No stand-in: Megatron's model is built for a rank and costed."""
    checks = PreSubmitChecks(tracer, lambda done, total, what: None)
    checks.training(job_of(tmp_path, words=TINY))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("planner (h100-ndr): ")
    assert line.endswith(" ms a step predicted: fits")


def test_each_case_of_a_grid_is_checked(tmp_path, tracer, capsys):
    site = {"gpus_per_node": 0, "tasks_per_node": 2, "nodes": 1}
    grid = ["mone_neuron_ratio=0.5,0.3"]
    job = job_of(tmp_path, DEMO, ["--mock-data"], grid, **site)
    with pytest.raises(Refused, match=r"^001-\S*=0\.3: mone_neuron_ratio = 0\.3 is not allowed"):
        PreSubmitChecks(tracer, lambda done, total, what: None).training(job)
    assert capsys.readouterr().err == ""


def test_data_of_the_cluster_are_named(tmp_path, tracer, capsys):
    site = {"gpus_per_node": 0, "tasks_per_node": 2, "nodes": 1}
    job = job_of(tmp_path, DEMO, ["--data-path", "/nowhere/corpus"], **site)
    PreSubmitChecks(tracer, lambda done, total, what: None).training(job)
    assert capsys.readouterr().err == "data /nowhere/corpus is not on this machine: not checked\n"


def test_force_prints_what_it_passes_over(capsys):
    with pre_submit_checks(force=True):
        raise Refused("too large")
    assert capsys.readouterr().err == "megatron-mone: warning: too large\n"
    with pytest.raises(Refused):
        with pre_submit_checks(force=False):
            raise Refused("too large")


def test_without_megatron_here_nothing_is_checked_and_a_line_says_so(monkeypatch, capsys):
    monkeypatch.setattr(pre_submit, "find_spec", lambda name: None if name == "megatron" else name)
    with pre_submit_checks(force=False) as checks:
        assert checks is None
    assert capsys.readouterr().err == (
        "flags and memory are not checked: megatron is not installed here\n"
    )


def test_without_a_cache_folder_nothing_is_checked(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pre_submit_checks(force=False) as checks:
        assert checks is None
    assert "cannot be made" in capsys.readouterr().err


def test_other_programs_pass(tmp_path, monkeypatch):
    monkeypatch.setattr(pre_submit, "pre_submit_checks", None)
    check_before_submit(program_job("x", tmp_path, ["true"], {"gpus_per_node": 8}), force=False)
