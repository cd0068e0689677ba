"""`calibrate` from end to end on two CPU ranks: plan, calibrate, plan again, run, compare.

What is asserted is what stands in the files, never how near a time is: the machine is shared.
tests/calibrated_layouts.py measures that.
"""

import contextlib
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import pytest

from megatron_mone.commands import calibrate_nodes as calibrate_command
from megatron_mone.commands import compare as compare_command
from megatron_mone.commands import plan as plan_command
from megatron_mone.common.phases import ATTENTION, BALANCE_LOSS, OPTIMIZER, ROUTER
from megatron_mone.common.places import program_words
from megatron_mone.planning.against_profile import PlanAgainstProfile
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster, load_cluster
from megatron_mone.planning.cost.measured_times import operator_key
from megatron_mone.planning.cost.rank_cost import op_seconds
from megatron_mone.planning.cost.roofline import operation
from megatron_mone.planning.fitting.node_fit import fit_nodes
from megatron_mone.planning.fitting.node_times import EXPERTS, TIMES, WORK, Times, Work
from megatron_mone.planning.fitting.node_work import LEAST_SHARE
from megatron_mone.planning.plan_document import Plan
from megatron_mone.planning.tracing import trace_server
from megatron_mone.planning.tracing.stand_ins.gate_sums import ROW_SUMS, SHARE_SUMS, SLOPES
from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.reporting.plan.node_page import lines
from tests import forked_ranks
from tests.calibrated_layouts import MODEL, TRAIN, profile_words, write_inputs

pytestmark = pytest.mark.slow

PROGRAM = [sys.executable, *program_words("calibrate")]
RANKS, LAYOUT = 2, "tp=1,ep=2,use_distributed_optimizer=true"
SMALL = MODEL | {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 64, "moe_ffn_hidden_size": 48,
    "num_experts": 4, "max_position_embeddings": 32, "vocab_size": 127,
}  # fmt: skip
SHORT = TRAIN | {"seq_length": 32, "micro_batch_size": 1, "global_batch_size": 4}


@dataclass(frozen=True)
class Calibrated:
    """A calibration, stopped and gone on with.

    Attributes:
        folder: of its inputs and its output.
        job: words that plan and calibrate share.
        stopped: times.json as it was when the second turn began: without the last rows.
    """

    folder: Path
    job: tuple[str, ...]
    stopped: Times

    @property
    def out(self) -> Path:
        """Of the command."""
        return self.folder / "out"

    @property
    def work(self) -> Work:
        """What was to be timed."""
        return Work.read(self.out / WORK, "")

    @property
    def times(self) -> Times:
        """What the second turn left."""
        return Times.read(self.out / TIMES, "")

    @property
    def cluster(self) -> Cluster:
        """Of this machine."""
        return load_cluster(str(self.folder / "here.yaml"))

    def planned(self, tracer: Tracer, *words: str) -> Path:
        """The folder of a plan of the job, made in this process."""
        folder = self.folder / ("after" if words else "before")
        with patch.object(trace_server, "Tracer", lambda: contextlib.nullcontext(tracer)):
            assert plan_command.main([*self.job, *words, "--json", f"{folder}/plan.json"]) == 0
        return folder


def started(ranks: int, folder: Path, module: str, *words: str) -> str:
    """A command on ranks that are started for it; what they print if all end well.

    Raises:
        RuntimeError: the end of that.
    """
    log = folder / "ranks.log"
    status = forked_ranks.start(ranks, forked_ranks.command, (module, list(words)), log).wait(600)
    said = log.read_text(errors="replace")
    if status:
        raise RuntimeError(said[-6000:])
    return said


def forked(command: list[str], ranks: int, logs: Path) -> int:
    """As `run_ranks`, of a command of this program, on ranks that are forked."""
    assert command[: len(PROGRAM)] == PROGRAM
    started(ranks, logs.parent, "calibrate_nodes", *command[len(PROGRAM) :])
    return 0


@pytest.fixture(scope="module")
def tracer(shared_tracer, cache) -> Tracer:
    """Of plans that are made here; the commands find its answers."""
    with patch.dict(os.environ, XDG_CACHE_HOME=str(cache)):
        return shared_tracer(TraceCache())


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Of all that is traced."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory, tracer) -> Calibrated:
    folder = tmp_path_factory.mktemp("calibrate")
    run, cluster = write_inputs(folder, SMALL, SHORT)
    job = ("--config", str(run), "--layout", LAYOUT, "--gpus", str(RANKS),
           "--cluster", str(cluster))  # fmt: skip
    out = folder / "out"
    words = [*job, "--out", str(out), "--seconds", "300", "--row-seconds", "0.001"]
    with (
        patch.object(trace_server, "Tracer", lambda: contextlib.nullcontext(tracer)),
        patch.dict(os.environ, OMP_NUM_THREADS="1"),
    ):
        assert calibrate_command.main([*words, "--prepare", "--ranks", str(RANKS)]) == 0
        started(RANKS, folder, "calibrate_nodes", *words, "--prepared")
        document = json.loads((out / TIMES).read_text())
        for kind in ("operators", "links"):
            document[kind] = document[kind][:-3]
        (out / TIMES).write_text(json.dumps(document))
        stopped = Times.read(out / TIMES, "")
        with patch.object(calibrate_command, "run_ranks", forked):
            assert calibrate_command.main([*words, "--ranks", str(RANKS)]) == 0
    return Calibrated(folder, job, stopped)


def test_what_is_timed_is_what_the_plan_prices(calibrated):
    """Every operator and collective of the traces, and every class of operation among them."""
    work, times = calibrated.work, calibrated.times
    asked = {operator_key(one.operator.op()) for one in work.operators}
    assert {operator_key(one.operator.op()) for one in times.operators} == asked
    found = fit_nodes(work, times, calibrated.cluster)
    assert found.covered == pytest.approx(1.0)
    assert {"gemm", "grouped_gemm", "memory"} <= set(found.kinds)
    assert all(timed == of for timed, of in found.kinds.values())
    assert {operation(one.operator.op()).kind for one in times.operators} == set(found.kinds)
    by = {one.operator.name: one.by for one in times.operators}
    assert by["mone.up_down_backward"] == EXPERTS
    assert by["aten.mm"] == "itself"
    assert {by[name] for name in (ROW_SUMS, SHARE_SUMS, SLOPES)} == {EXPERTS}
    links = {(one.link.kind, one.link.ranks) for one in work.links}
    assert {(one.link.kind, one.link.ranks) for one in times.links} == links
    assert ("all_to_all", RANKS) in links
    assert times.small_job is not None
    assert times.launch_job is None
    assert times.notes == []
    dear = [one.share for one in work.operators if one.share >= LEAST_SHARE]
    assert dear == sorted(dear, reverse=True)
    assert sum(one.share for one in work.operators) == pytest.approx(1.0)


def test_operators_of_a_phase_take_what_it_takes_in_a_step(calibrated):
    """The small job's own step comes out as it was timed, phase by phase, host and all."""
    work, times = calibrated.work, calibrated.times
    found = fit_nodes(work, times, calibrated.cluster)
    priced = sum(
        count * op_seconds(one.op(), calibrated.cluster, found.efficiency)
        for one, count in zip(work.small.operators, work.small.counts, strict=True)
        if one.phase == ATTENTION
    )
    assert priced == pytest.approx(times.small_job.phases_ms[ATTENTION] / 1e3)
    assert {ROUTER, BALANCE_LOSS, OPTIMIZER} <= set(found.efficiency.measured.phases)
    step = times.small_job
    parts = sum(step.phases_ms.values()) + sum(one.ms for one in step.collectives)
    assert parts == pytest.approx(step.step_ms, rel=1e-3)


def test_the_small_job_is_a_layer_in_the_jobs_own_layout(calibrated):
    """With its micro-batches and experts of a rank, and collectives of its groups."""
    small, flags = calibrated.work.small, calibrated.work.job.flags
    assert small.ranks == RANKS
    for name in ("--expert-model-parallel-size", "--num-experts", "--global-batch-size"):
        assert small.flags[small.flags.index(name) + 1] == flags[flags.index(name) + 1]
    assert small.flags[small.flags.index("--num-layers") + 1] == "1"
    assert flags[flags.index("--num-layers") + 1] == "2"
    calls = {(one.kind, one.group) for one in calibrated.times.small_job.collectives}
    assert {("all_to_all", "ep"), ("reduce_scatter", "dp-cp")} <= calls


def test_a_second_turn_goes_on_where_the_first_one_stopped(calibrated):
    stopped, times = calibrated.stopped, calibrated.times
    assert times.small_job == stopped.small_job
    for kind in ("operators", "links"):
        before = [one.plain() for one in getattr(stopped, kind)]
        after = [one.plain() for one in getattr(times, kind)]
        assert after[: len(before)] == before
        assert len(after) == len(before) + 3


def test_the_plan_takes_the_efficiency_and_changes_with_it(calibrated, tracer):
    path = calibrated.out / "efficiency.json"
    folders = calibrated.planned(tracer), calibrated.planned(tracer, "--efficiency", str(path))
    before, plan = (Plan.read(folder / "plan.json", "") for folder in folders)
    assumed, after = before.models[0], plan.models[0]
    assert plan.efficiency == Efficiency.read(path).source
    assert plan.efficiency.startswith(f"timed on {RANKS} ranks of ")
    assert after.step_ms != assumed.step_ms
    assert after.memory_gib == assumed.memory_gib
    waited = {
        (one.kind, one.group, one.bytes): one.ms / one.calls
        for one in calibrated.times.small_job.collectives
    }
    exchange = next(one for one in after.collectives if one.kind == "all_to_all")
    assert exchange.ms == pytest.approx(waited["all_to_all", "ep", round(exchange.bytes)])


def test_the_page_and_the_lines_say_what_was_timed(calibrated):
    found = fit_nodes(calibrated.work, calibrated.times, calibrated.cluster)
    assert found.efficiency == Efficiency.read(calibrated.out / "efficiency.json")
    page, said = (calibrated.out / "report.html").read_text(), lines(found)
    for words in ("mone.up_down_backward", "operators timed", "small job: a step", "all_to_all ep"):
        assert words in page
        assert words in said
    assert found.efficiency.source in said
    assert (calibrated.out / "plots" / "operators.svg").is_file()


def test_the_run_stands_beside_its_plan(calibrated, tracer, tmp_path, capsys):
    plan = calibrated.planned(tracer, "--efficiency", str(calibrated.out / "efficiency.json"))
    profile = tmp_path / "profile"
    steps = ("--steps", "3", "--windows", "1", "--warm-up", "1", "--routing", "balanced")
    words = profile_words(plan / "mone.run.yaml")
    started(RANKS, tmp_path, "profile", *steps, "--out", str(profile), *words)
    out = tmp_path / "difference.json"
    assert compare_command.main([str(plan), str(profile), "--json", str(out)]) == 0
    found = PlanAgainstProfile.read(out, "")
    assert "explains: " in capsys.readouterr().out
    assert {"attention", "up/down GEMM", "loss"} <= {one.name for one in found.phases}
    assert all(one.planned > 0 for one in found.phases if one.name == "attention")
    for name in ("weights", "gradients", "optimizer"):
        [one] = [one for one in found.memory_gib if one.name == name]
        assert one.measured == pytest.approx(one.planned, rel=0.01)


def test_another_jobs_folder_is_refused(calibrated, tracer, capsys):
    words = [word.replace("ep=2", "ep=1") for word in calibrated.job]
    with patch.object(trace_server, "Tracer", lambda: contextlib.nullcontext(tracer)):
        assert calibrate_command.main([*words, "--out", str(calibrated.out)]) == 2
    error = capsys.readouterr().err
    assert "job.layout is tp=1,pp=1,ep=2" in error
    assert "give another --out for another job" in error
    assert calibrated.work.job.layout.startswith("tp=1,pp=1,ep=2")


def test_nodes_of_another_device_are_refused(calibrated, cache, tmp_path):
    """By a rank that srun started, which has traced the job, before it times anything."""
    words = [word.replace(str(calibrated.folder / "here.yaml"), "a100-hdr")
             for word in calibrated.job]  # fmt: skip
    with (
        patch.dict(os.environ, XDG_CACHE_HOME=str(cache)),
        pytest.raises(RuntimeError, match=r"was measured on .*, cluster a100-hdr has NVIDIA A100"),
    ):
        started(1, tmp_path, "calibrate_nodes", *words, "--out", str(tmp_path))
    assert Work.read(tmp_path / WORK, "").job.cluster == "a100-hdr"
    assert not (tmp_path / TIMES).exists()
