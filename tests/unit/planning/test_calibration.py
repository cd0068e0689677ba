"""Calibration: planted efficiencies are found again, held-out data are held out, and what a profile
cannot tell stays as it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_mone.commands.calibrate import calibrate_command
from megatron_mone.common.phases import (
    ATTENTION,
    BACKWARD,
    BALANCE_LOSS,
    DISPATCH,
    FORWARD,
    GATE_GEMM,
    LOSS,
    OPTIMIZER,
    SELECTION,
)
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.roofline import DEFAULTS, Operation
from megatron_mone.planning.fitting import calibration
from megatron_mone.planning.fitting.calibration import calibrate, mean_operations, rank_rows
from megatron_mone.planning.fitting.calibration_result import summary
from megatron_mone.planning.fitting.curve_fit import free_parameters, least_squares, with_parameters
from megatron_mone.planning.fitting.measured_profile import check_device, read_profile
from megatron_mone.planning.fitting.phase_fit import PhaseModel, PhaseTime, fit_phases
from megatron_mone.planning.tracing.trace_server import JobDescription, TracedJob
from tests.unit.planning.made_jobs import (
    CLUSTER,
    EXACT,
    exchange,
    facts,
    gemm,
    grouped_gemm,
    move,
    product,
    trace,
)

DEVICE = CLUSTER.device
# The same with memory so fast that products are bound by their operations.
FAST = replace(DEVICE, memory_bandwidth=1e12)
MS = 1e-3
CPU = replace(CLUSTER, device=replace(DEVICE, name="AMD EPYC core (AVX2)"))
START = Efficiency().without_host()
PLANTED = replace(
    START,
    curves={
        **DEFAULTS,
        "gemm": replace(DEFAULTS["gemm"], peak_share=0.5, half_rows=300.0, launch=2e-5),
        "grouped_gemm": replace(DEFAULTS["grouped_gemm"], peak_share=0.4, sparse_loss=0.8),
        "memory": replace(DEFAULTS["memory"], bandwidth_share=0.3, launch=1e-5),
    },
)
ARGV = (
    *("--num-layers", "2", "--num-experts", "8", "--mone-neuron-ratio", "0.25"),
    *("--mone-ng-loss-coeff=0.1", "--moe-ffn-hidden-size", "64", "--data-path", "0.5", "a/b", "c"),
    *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model=x", "--save", "out", "--bf16"),
)  # fmt: skip
MODEL = {
    "num_layers": 2, "moe_ffn_hidden_size": 64, "num_experts": 8, "padded_vocab_size": 1024,
    "mone_neuron_ratio": 0.25,
}  # fmt: skip
STOCK = {name: value for name, value in MODEL.items() if name != "mone_neuron_ratio"}
PASSES = {ATTENTION: {FORWARD: 20.0, BACKWARD: 40.0}, DISPATCH: {FORWARD: 9.0}}


# What a profile holds


def run(name, model=MODEL, backend="cpu", passes=None, step_ms=100.0, rows=(), traffic=None):
    return {
        "name": name, "backend": backend, "model": model, "step_ms": step_ms,
        "passes": PASSES if passes is None else passes,
        "routing": {"layers": [{"layer": i, "rows": list(r)} for i, r in enumerate(rows, 1)]},
        "communication": traffic or {},
    }  # fmt: skip


def write(folder, *runs, **changes):
    """A profile of 4 ranks, as far as calibration reads it."""
    config = {
        "argv": list(ARGV), "machine": {"Processor": "AMD EPYC, 2 cores", "Date": "2026-11-22"},
    }  # fmt: skip
    document = {
        "schema": "megatron-mone/profile/1", "config": config, "ranks": {"world_size": 4},
        "runs": list(runs) or [run("mone")],
    }  # fmt: skip
    path = folder / "profile.json"
    path.write_text(json.dumps(document | changes))
    return path


def config(**changes):
    whole = {"argv": list(ARGV), "machine": {"Processor": "AMD EPYC, 2 cores"}}
    return {"config": whole | changes}


def test_a_run_is_the_flags_of_its_job_on_mock_data(tmp_path):
    (found,) = read_profile(write(tmp_path)).runs
    assert found.flags == (
        *("--num-layers", "2", "--num-experts", "8", "--mone-neuron-ratio", "0.25"),
        *("--mone-ng-loss-coeff=0.1", "--moe-ffn-hidden-size", "64", "--bf16", "--mock-data"),
        *("--tokenizer-type", "NullTokenizer", "--vocab-size", "1023"),
        *("--make-vocab-size-divisible-by", "1"),
    )
    assert found.step == pytest.approx(0.1)
    assert found.compute == {
        (ATTENTION, FORWARD): pytest.approx(0.02), (ATTENTION, BACKWARD): pytest.approx(0.04),
    }  # fmt: skip


def test_baselines_are_asked_for_by_what_differs(tmp_path):
    cut = run("moe-active", {**STOCK, "moe_ffn_hidden_size": 48}, "SequentialMLP")
    main, dense, active = read_profile(
        write(tmp_path, run("mone"), run("moe", STOCK, "SequentialMLP"), cut)
    ).runs
    switches = ("--mone-neuron-ratio", "0.25", "--mone-ng-loss-coeff=0.1")
    assert dense.flags == tuple(flag for flag in main.flags if flag not in switches)
    assert active.flags == (*dense.flags, "--moe-ffn-hidden-size", "48")


def test_runs_that_flags_cannot_ask_for_are_named_with_the_reason(tmp_path):
    grouped = run("grouped_mm", STOCK, "GroupedMMExperts")
    zero = run("deepspeed", {**STOCK, "engine": "deepspeed", "zero_stage": 1}, "SequentialMLP")
    found = read_profile(write(tmp_path, run("mone"), grouped, run("clipped"), zero))
    assert [one.name for one in found.runs] == ["mone"]
    assert [words.partition(":")[0] for words in found.left_out] == [
        "run grouped_mm",
        "run clipped",
        "run deepspeed",
    ]
    assert "grouped_mm" in found.left_out[0]
    assert "not among the fields of its model" in found.left_out[1]
    assert "its engine is deepspeed, which is not planned" in found.left_out[2]


def test_clipping_is_the_optimizers_in_a_plan(tmp_path):
    clipped = run("mone") | {"passes": {"clipping": {FORWARD: 2.0}, OPTIMIZER: {FORWARD: 3.0}}}
    (found,) = read_profile(write(tmp_path, clipped)).runs
    assert found.compute == {(OPTIMIZER, FORWARD): pytest.approx(0.005)}


def test_rows_are_the_mean_over_layers(tmp_path):
    (found,) = read_profile(write(tmp_path, run("mone", rows=[[10, 30], [20, 0]]))).runs
    assert found.rows == (15.0, 15.0)


@pytest.mark.parametrize(
    ("machine", "cluster_device", "same"),
    [
        ({"Processor": "AMD EPYC, 2 cores"}, "AMD EPYC core (Zen 3, AVX2)", True),
        ({"Processor": "AMD EPYC, 2 cores"}, "NVIDIA H100 SXM5 80 GB", False),
        ({"Processor": "AMD EPYC 7763 64-Core Processor, 64 cores"}, "AMD EPYC core", False),
        ({"Processor": "x", "GPU": "NVIDIA H100 80GB HBM3"}, "NVIDIA H100 SXM5 80 GB", True),
        ({"Processor": "x", "GPU": "NVIDIA A100-SXM4-80GB"}, "NVIDIA A100 80 GB", True),
        ({"Processor": "x", "GPU": "NVIDIA B200"}, "NVIDIA GB200 186 GB", False),
        ({"Processor": "x", "GPU": "NVIDIA H200"}, "NVIDIA H100 SXM5 80 GB", False),
    ],
)
def test_a_profile_of_other_devices_is_refused(tmp_path, machine, cluster_device, same):
    profile = read_profile(write(tmp_path, **config(machine=machine)))
    cluster = replace(CLUSTER, device=replace(DEVICE, name=cluster_device))
    if same:
        check_device(profile, cluster)
        return
    with pytest.raises(ValueError) as caught:
        check_device(profile, cluster)
    assert profile.device in str(caught.value)
    assert cluster_device in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"schema": "megatron-mone/plan/1"}, "another kind of file"),
        ({"runs": [run("mone", passes={DISPATCH: {FORWARD: 3.0}})]}, "has a compute phase"),
        ({"runs": [run("mone", passes={"lunch": {FORWARD: 3.0}})]}, "'lunch' is no phase"),
        ({"runs": [run("mone", passes={LOSS: {"sideways": 3.0}})]}, "'sideways' is none of"),
        ({"runs": [run("mone", step_ms=0.0)]}, "runs[0].step_ms: must be above 0"),
        ({"runs": [run("mone", rows=[[1, 2], [1]])]}, "different numbers of experts"),
        (config(argv=["--config", "run.yaml"]), "names a run file"),
        (config(argv=[1]), "config.argv: must be a list of texts"),
        ({"ranks": {}}, "has no field 'world_size'"),
    ],
)
def test_what_is_no_profile_is_refused_in_one_line(tmp_path, changes, fault):
    path = write(tmp_path, **changes)
    with pytest.raises(ValueError) as caught:
        read_profile(path)
    assert fault in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


# The fit


def works(rng, count):
    """Passes of several operations, from small ones to long ones, without seconds."""
    for place in range(count):
        rows = int(2 ** rng.uniform(4, 12))
        operations = {
            gemm(rows, 256, 512, "bf16", 2): float(rng.integers(1, 30)),
            Operation("memory", "bf16", 0.0, float(2 ** rng.uniform(14, 28))): 12.5,
            grouped_gemm([rows] * 4, 128, 64, "bf16", 2, float(rng.choice([0.25, 1.0]))): 2.0,
        }
        chosen = dict(list(operations.items())[: 1 + place % 3])
        yield PhaseTime("mone", f"phase {place}", FORWARD, 1.0, chosen)


def timed(phases, efficiency, device=FAST):
    seconds = PhaseModel(phases, device).seconds(efficiency)
    return [replace(one, seconds=float(s)) for one, s in zip(phases, seconds, strict=True)]


def ratios(phases, efficiency):
    return PhaseModel(phases, FAST).seconds(efficiency) / [one.seconds for one in phases]


def test_a_phase_is_the_sum_of_its_operations_or_its_launches():
    product_, copy = gemm(100, 100, 500, "bf16", 0), Operation("memory", "bf16", 0.0, 2e6)
    phases = [PhaseTime("r", "p", FORWARD, 1.0, {product_: 3.0, copy: 0.5})]
    assert PhaseModel(phases, DEVICE).seconds(EXACT) == pytest.approx([3 * 1e-5 + 0.5 * 2e-3])
    slow_host = replace(EXACT, kernel_seconds=1e-2)
    assert PhaseModel(phases, DEVICE).seconds(slow_host) == pytest.approx([3.5e-2])


def test_curves_planted_under_sums_are_found_again():
    phases = timed(list(works(np.random.default_rng(0), 60)), PLANTED)
    other = timed(list(works(np.random.default_rng(1), 30)), PLANTED)
    found = fit_phases(phases, FAST, START)
    assert np.abs(ratios(phases, START) - 1).max() > 0.5
    assert np.abs(ratios(phases, found) - 1).max() < 0.03
    assert np.abs(ratios(other, found) - 1).max() < 0.05
    assert found.curves["memory"].bandwidth_share == pytest.approx(0.3, rel=0.05)
    assert found.curves["grouped_gemm"].sparse_loss == pytest.approx(0.8, rel=0.1)


def test_what_no_phase_tells_stays_where_it_was():
    phases = timed(list(works(np.random.default_rng(2), 20)), PLANTED)
    found = fit_phases(phases, FAST, START)
    for kind in ("attention", "selection"):
        assert found.curves[kind] == START.curves[kind]
    assert found.kernel_seconds == 0.0
    assert found.curves["gemm"].sparse_loss == 0.0
    assert found.curves["gemm"].column_tile == START.curves["gemm"].column_tile


def test_launches_of_a_gpus_host_are_found():
    """Many small kernels: the phase lasts as long as its launches."""
    small = Operation("memory", "bf16", 0.0, 100.0)
    large = Operation("memory", "bf16", 0.0, 1e10)
    phases = [PhaseTime("mone", f"{n}", FORWARD, 1.0, {small: float(n)}) for n in (50, 100, 200)]
    phases += [PhaseTime("mone", f"large {n}", FORWARD, 1.0, {large: n}) for n in (1.0, 2.0)]
    truth = replace(EXACT, kernel_seconds=4e-5)
    found = fit_phases(timed(phases, truth), FAST, replace(START, kernel_seconds=5e-6))
    assert PhaseModel(phases, FAST).seconds(found)[:3] == pytest.approx(
        4e-5 * np.array([50, 100, 200]), rel=0.02
    )


def test_a_phase_counts_by_its_share_of_the_step():
    """Two phases of equal work that took different times: the longer one decides."""
    work = {Operation("memory", "bf16", 0.0, 1e9): 1.0}
    long, short = (PhaseTime("r", name, FORWARD, s, work) for name, s in (("a", 9.0), ("b", 1.0)))
    between = float(PhaseModel([long], DEVICE).seconds(fit_phases([long, short], DEVICE, START))[0])
    # Weighted by 9 to 1 in logarithms: 9 ** 0.9 seconds; the prior draws it a little to its start.
    assert between == pytest.approx(9**0.9, rel=0.05)


def test_parameters_survive_the_way_there_and_back():
    for curve in DEFAULTS.values():
        back = with_parameters(curve, free_parameters(curve))
        shares = {"peak_share": min(curve.peak_share, 0.99)}
        expected = replace(curve, **shares)
        for name in ("peak_share", "half_rows", "half_depth", "sparse_loss", "bandwidth_share",
                     "half_bytes", "launch", "column_tile"):  # fmt: skip
            assert getattr(back, name) == pytest.approx(getattr(expected, name)), name


def test_least_squares_of_a_line():
    """Residuals linear in the parameters: the normal equations' answer."""
    rng = np.random.default_rng(3)
    matrix, right = rng.normal(size=(9, 3)), rng.normal(size=9)
    found = least_squares(lambda free: matrix @ free - right, np.zeros(3))
    assert found == pytest.approx(np.linalg.lstsq(matrix, right)[0], abs=1e-5)


# A job's operations


def traced(*stages, **changes):
    """A job of as many stages, each the records of its one trace."""
    traces = {(p, 0): trace(*records) for p, records in enumerate(stages)}
    return TracedJob(facts(pp=len(stages), **changes), traces, 1.0, 1)


def test_operations_of_a_step_are_means_over_stages_and_ranks():
    first = traced([product(10)], [product(10, count=3), move(3, phase=OPTIMIZER)])
    second = traced([product(30)], [product(10), move(3, phase=OPTIMIZER)])
    found = mean_operations([first, second])
    phases = [
        PhaseTime("r", *key, 1.0, operations) for key, operations in found.items()
    ]  # fmt: skip
    seconds = dict(zip(found, PhaseModel(phases, DEVICE).seconds(EXACT), strict=True))
    # 4 micro-batches: rank 1's stages are 10 and 30 ms each, rank 2's 30 and 10 ms.
    assert seconds[ATTENTION, FORWARD] == pytest.approx(4 * (10 + 30 + 30 + 10) / 4 * MS)
    assert seconds[OPTIMIZER, FORWARD] == pytest.approx((0 + 3 + 0 + 3) / 4 * MS)


@pytest.mark.parametrize("ep", [1, 4, 16])
def test_every_rank_sees_its_own_experts_first(ep):
    experts = 16
    rows = np.random.default_rng(4).integers(1, 100, experts)
    of = facts(ep=ep, num_experts=experts, seq_length=4096)
    seen = rank_rows(tuple(float(one) for one in rows), of)
    own = np.array([sum(order[: experts // ep]) for order in seen])
    assert len(seen) == min(ep, calibration.MOST_RANKS)
    assert own[0] == own.max()
    assert {sum(order) for order in seen} == {4096 * of.topk}
    if ep <= calibration.MOST_RANKS:  # all ranks: their experts are all experts
        assert own.sum() == 4096 * of.topk


def test_a_dense_model_has_one_balanced_trace():
    assert rank_rows((), facts(num_experts=0)) == [None]


# The whole calibration


class MadeTracer:
    """Answers with what is given: with MoNE's switch the first job, without the last."""

    def __init__(self, *jobs):
        self.jobs = jobs

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        pass

    def _job(self, flags):
        return self.jobs[0 if "--mone-neuron-ratio" in flags else -1]

    def describe(self, flags, world_size):
        assert world_size == 4
        return JobDescription(self._job(flags).facts, (), ())

    def trace(self, flags, world_size, rows):
        return self._job(flags)


def experts(milliseconds, kept, pass_=FORWARD):
    """MoNE's gate and up/down of 4 experts, of which a share is kept."""
    rows, depth = round(4e3 * milliseconds), 64
    width = 128
    op = product(1, pass_, GATE_GEMM)
    return replace(
        op, name="mone.up_down", inputs=((rows, depth), (rows,), (4, width, depth)),
        outputs=((rows, depth),), flops=round(4 * rows * width * depth * kept), bytes_read=10_000,
    )  # fmt: skip


COMMON = (
    product(8), product(16, BACKWARD), move(6, phase=LOSS), move(3, BACKWARD, LOSS, count=4),
    move(2, phase=OPTIMIZER, count=5), product(5, phase=LOSS),
)  # fmt: skip
MONE_JOB = traced([*COMMON, experts(4, 0.25), experts(9, 0.25, BACKWARD)], micro_batches=2)
MOE_JOB = traced([*COMMON, product(12, phase=GATE_GEMM)], micro_batches=2)


def measured(job, off=1.0, efficiency=PLANTED):
    """Its passes under an efficiency, in ms, `off` times as long."""
    operations = mean_operations([job])
    phases = [PhaseTime("r", *key, 1.0, ops) for key, ops in operations.items()]
    passes = {}
    for one, seconds in zip(phases, PhaseModel(phases, DEVICE).seconds(efficiency), strict=True):
        passes.setdefault(one.phase, {})[one.pass_] = 1e3 * off * float(seconds)
    return passes


def made_profile(folder, **changes):
    extra = {DISPATCH: {FORWARD: 9.0}, SELECTION: {FORWARD: 4.0}}
    return write(
        folder,
        run("mone", passes={**measured(MONE_JOB), **extra}, step_ms=200.0),
        run("moe", STOCK, "SequentialMLP", measured(MOE_JOB), step_ms=150.0),
        **changes,
    )


def test_a_profile_under_planted_efficiencies_is_fitted(tmp_path):
    found = calibrate(read_profile(made_profile(tmp_path)), CPU, MadeTracer(MONE_JOB, MOE_JOB))
    assert {one.run for one in found.phases} == {"mone", "moe"}
    assert found.summary("fitted")["worst"] < 0.02
    assert found.summary("fitted")["count"] == len(found.phases)
    assert found.fitted_kinds == ("gemm", "grouped_gemm", "memory")
    assert "profiled on 4 ranks of AMD EPYC" in found.efficiency.source
    assert found.left_out == (
        "run mone, 4.5% of its step, not compute of the device: dispatch",
        "run mone, 2.0% of its step, no operator of it in the trace: selection forward",
    )


def test_what_is_held_out_is_predicted_without_it(tmp_path):
    """The passes of `moe` take three times what curves say: the fit to `mone` does not know, and
    a phase's held-out prediction is that of a fit to the others."""
    path = write(
        tmp_path,
        run("mone", passes=measured(MONE_JOB)),
        run("moe", STOCK, "SequentialMLP", measured(MOE_JOB, off=3.0)),
    )
    found = calibrate(read_profile(path), CPU, MadeTracer(MONE_JOB, MOE_JOB))
    for one in found.phases:
        if one.run == "moe" and one.phase != GATE_GEMM:
            assert one.without_run == pytest.approx(one.measured / 3, rel=0.05)
            assert one.fitted > 1.2 * one.without_run
    shares = [one for one in found.phases if one.phase == LOSS]
    everything = {
        name: [PhaseTime(name, *key, 1.0, ops) for key, ops in mean_operations([job]).items()]
        for name, job in (("mone", MONE_JOB), ("moe", MOE_JOB))
    }
    known = {(one.run, one.phase, one.pass_): one.measured for one in found.phases}
    others = [
        replace(one, seconds=known[one.run, one.phase, one.pass_])
        for one in everything["mone"] + everything["moe"]
    ]
    fit = fit_phases([one for one in others if one.phase != LOSS], DEVICE, START)
    model = PhaseModel([one for one in others if one.phase == LOSS], DEVICE)
    assert [one.without_phase for one in shares] == pytest.approx(model.seconds(fit))


def test_one_run_of_one_phase_has_nothing_to_hold_out(tmp_path):
    job = traced([product(8)])
    path = write(tmp_path, run("mone", passes={ATTENTION: {FORWARD: 64.0}}))
    found = calibrate(read_profile(path), CPU, MadeTracer(job))
    (one,) = found.phases
    assert (one.without_run, one.without_phase) == (None, None)
    assert one.fitted == pytest.approx(0.064, rel=0.01)
    assert found.summary("without_run") is None
    assert found.steps[0].without_run is None


def test_the_whole_step_is_what_the_planner_predicts(tmp_path):
    found = calibrate(read_profile(made_profile(tmp_path)), CPU, MadeTracer(MONE_JOB, MOE_JOB))
    mone, moe = found.steps
    planned = predict(MOE_JOB.traces, MOE_JOB.facts, CPU, found.efficiency)
    assert moe.fitted == planned.seconds
    assert (mone.measured, moe.measured) == (0.2, 0.15)
    compute = sum(ms for passes in measured(MOE_JOB).values() for ms in passes.values())
    assert moe.covered == pytest.approx(compute / 150)


def test_communication_is_shown_beside_the_cluster_file(tmp_path):
    """2 micro-batches of an all-to-all of 5 ms on the paper cluster."""
    job = traced([product(8), exchange(5)], micro_batches=2)
    sent = {"all_to_all ep": {"calls": 2.0, "bytes": 1.0, "ms": 25.0}}
    path = write(tmp_path, run("mone", passes={ATTENTION: {FORWARD: 30.0}}, traffic=sent))
    (one,) = calibrate(read_profile(path), CPU, MadeTracer(job)).communication
    assert (one.run, one.collective) == ("mone", "all_to_all ep")
    assert one.measured == pytest.approx(25 * MS)
    assert one.predicted == pytest.approx(10 * MS)


def test_errors_by_hand():
    assert summary([(1.0, 1.5), (4.0, 3.0), (5.0, 5.0), (9.0, None)]) == {
        "median": pytest.approx(0.25), "worst": pytest.approx(0.5),
        "of_time": pytest.approx(1.5 / 10), "count": 3,
    }  # fmt: skip


def test_a_gpus_host_is_fitted_and_a_cpus_is_not(tmp_path):
    machine = {"Processor": "AMD EPYC, 2 cores"}
    tracer = MadeTracer(MONE_JOB, MOE_JOB)
    on_cpu = calibrate(read_profile(made_profile(tmp_path)), CPU, tracer)
    path = made_profile(tmp_path, **config(machine={**machine, "GPU": "NVIDIA H100"}))
    h100 = replace(CPU, device=replace(DEVICE, name="NVIDIA H100"))
    on_gpu = calibrate(read_profile(path), h100, tracer)
    assert on_cpu.efficiency.kernel_seconds == 0.0
    assert on_gpu.efficiency.kernel_seconds > 0.0


@pytest.mark.parametrize(
    "error", [ValueError("no such layout"), RuntimeError("Traceback\nit died")]
)
def test_a_job_that_cannot_be_traced_is_one_line(tmp_path, monkeypatch, error):
    def fails(*_args):
        raise error

    tracer = MadeTracer(MONE_JOB)
    monkeypatch.setattr(tracer, "trace", fails)
    with pytest.raises(ValueError) as caught:
        calibrate(read_profile(made_profile(tmp_path)), CPU, tracer)
    last = str(error).splitlines()[-1]
    assert str(caught.value).endswith(f"run mone cannot be traced: {last}")
    assert "\n" not in str(caught.value)


def test_measured_phases_without_operators_are_refused(tmp_path):
    path = write(tmp_path, run("mone", passes={BALANCE_LOSS: {FORWARD: 3.0}}))
    with pytest.raises(ValueError, match="no measured phase has operators"):
        calibrate(read_profile(path), CPU, MadeTracer(MONE_JOB))


@pytest.fixture
def clusters(monkeypatch):
    named = {"cpu": CPU, "paper": CLUSTER}
    monkeypatch.setattr("megatron_mone.commands.calibrate.load_cluster", named.__getitem__)


@pytest.mark.usefixtures("clusters")
def test_the_command_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        "megatron_mone.commands.calibrate.Tracer", lambda: MadeTracer(MONE_JOB, MOE_JOB)
    )
    out = tmp_path / "made" / "efficiency.json"
    calibrate_command(made_profile(tmp_path), "cpu", out)
    efficiency = Efficiency.read(out)
    document = json.loads(out.with_name("efficiency-fit.json").read_text())
    printed = capsys.readouterr().out
    assert efficiency.source == document["source"]
    assert efficiency.source in printed
    for one in document["phases"]:
        assert one["fitted"] == pytest.approx(one["measured"], rel=0.02)
        (line,) = (x for x in printed.splitlines() if
                   x.startswith(f"{one['run']:11}{one['phase']} {one['pass']} "))  # fmt: skip
        assert f"{1e3 * one['measured']:.1f}" in line
    names = {path.name for path in out.parent.iterdir()}
    assert names == {"efficiency.json", *(f"efficiency-fit.{x}" for x in ("json", "png", "svg"))}


@pytest.mark.usefixtures("clusters")
def test_the_command_refuses_before_it_traces(tmp_path, monkeypatch):
    monkeypatch.setattr("megatron_mone.commands.calibrate.Tracer", lambda: pytest.fail("traced"))
    profile = made_profile(tmp_path)
    with pytest.raises(ValueError, match=r"must end in \.json"):
        calibrate_command(profile, "cpu", Path("efficiency.yaml"))
    with pytest.raises(ValueError, match="was measured on AMD EPYC"):
        calibrate_command(profile, "paper", tmp_path / "efficiency.json")
