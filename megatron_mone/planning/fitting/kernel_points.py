"""A GPU's answer.json as calibration's input: each timed kernel is a phase of its own launches.

Fits the curves of grouped products, of selection and of memory; the others, what the host costs and
what overlap costs stay assumptions: a graph's replay has no host in it, and nothing here measures
attention, dense products or collectives. Touches nothing.
"""

from dataclasses import replace

from megatron_mone.common.phases import UP_DOWN_GEMM
from megatron_mone.kernels.gpu_answer_results import GpuAnswer, KernelTime, LaunchFacts
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.roofline import Operation, operation
from megatron_mone.planning.fitting.phase_fit import PhaseModel, PhaseTime, fit_phases
from megatron_mone.planning.tracing.trace import Op

Fitted = list[tuple[PhaseTime, float]]


def fit_kernels(answer: GpuAnswer, cluster: Cluster) -> tuple[Efficiency, Fitted]:
    """The efficiency of a cluster's device by the times of its kernels.

    Returns:
        The efficiency, and each measured kernel with the seconds that it predicts.

    Raises:
        ValueError: one line; the answer is the interpreter's, or has no timed kernel.
    """
    answer.check_measured("calibration")
    phases = [_phase(row) for row in answer.kernels if row.launches]
    if not phases:
        raise ValueError("sections: no kernel of ours was timed; run megatron-mone gpu-answer")
    start = Efficiency()
    # Replays launch nothing from the host; what that costs stays as it is assumed.
    fitted = fit_phases(phases, cluster.device, start.without_host())
    predicted = PhaseModel(phases, cluster.device).seconds(fitted)
    worst = max(
        abs(float(seconds) / one.seconds - 1)
        for one, seconds in zip(phases, predicted, strict=True)
    )
    source = (
        f"fitted to {len(phases)} kernels of {answer.device}, replayed in graphs, worst off by "
        f"{worst:.0%}: grouped products, selection and memory; the rest is assumed"
    )
    efficiency = replace(start, curves=fitted.curves, source=source)
    return efficiency, [(one, float(s)) for one, s in zip(phases, predicted, strict=True)]


def table(fitted: Fitted) -> str:
    """Measured and fitted milliseconds of each kernel, as lines."""
    lines = [f"{'kernel':28} {'shape':34} {'measured':>9} {'fitted':>9} {'off':>6}"]
    for one, seconds in fitted:
        lines.append(
            f"{one.phase:28} {one.run:34} {one.seconds * 1e3:6.3f} ms {seconds * 1e3:6.3f} ms "
            f"{seconds / one.seconds - 1:6.0%}"
        )
    return "\n".join(lines)


def _phase(row: KernelTime) -> PhaseTime:
    operations: dict[Operation, float] = {}
    for one in row.launches:
        made = operation(_op(one))
        operations[made] = operations.get(made, 0.0) + 1.0
    shape = f"N {row.rows} E {row.experts} H {row.hidden} F {row.neurons} S {row.kept}"
    return PhaseTime(shape, row.kernel, "", row.ms / 1e3, operations)


def _op(one: LaunchFacts) -> Op:
    """As the tracer takes the same launch down (stand_ins/op.py); its phase does not count."""
    return Op(
        "mone." + one.kernel.split(".")[-1], tuple(map(tuple, one.reads)),
        tuple(map(tuple, one.writes)), one.dtype, one.bytes_read, one.bytes_written, one.flops,
        UP_DOWN_GEMM, "forward",
    )  # fmt: skip
