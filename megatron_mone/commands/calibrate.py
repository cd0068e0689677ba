"""`--calibrate` of the planner: fit a device to a profile, or to a GPU's answer; write how well.

May touch: the files asked for; the tracer's processes and cache.
"""

from pathlib import Path

from megatron_mone.common.checked_json import load
from megatron_mone.common.files import write_json
from megatron_mone.kernels.gpu_answer_results import GpuAnswer
from megatron_mone.planning.cost.hardware import Cluster, load_cluster
from megatron_mone.planning.fitting import kernel_points
from megatron_mone.planning.fitting.calibration import calibrate
from megatron_mone.planning.fitting.measured_profile import (
    check_device,
    check_device_name,
    read_profile,
)
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.reporting.plan import calibration as calibration_report


def calibrate_command(profile: Path, cluster_name: str, out: Path) -> None:
    """`plan --calibrate`: fit, print how well it fits, write the files.

    Args:
        profile: profile.json of a profile, or answer.json of `megatron-mone gpu-answer`.
        cluster_name: as of --cluster, whose device it was measured on.
        out: efficiency file to write; of a profile, STEM-fit.json, .png and .svg go beside it.

    Raises:
        ValueError: one line; a wrong input.
    """
    cluster = load_cluster(cluster_name)
    if out.suffix != ".json":
        raise ValueError(f"--json {out} must end in .json: reports go beside it")
    document = load(profile, "give the profile.json of tools/profile.py, or a GPU's answer.json")
    if isinstance(document, dict) and document.get("schema") == GpuAnswer.SCHEMA:
        _calibrate_by_kernels(GpuAnswer.of(document, profile), profile, cluster, out)
        return
    measured = read_profile(profile)
    check_device(measured, cluster)  # before processes start
    with Tracer() as tracer:
        found = calibrate(measured, cluster, tracer)
    out.parent.mkdir(parents=True, exist_ok=True)
    found.efficiency.write(out)
    beside = out.with_name(f"{out.stem}-fit.json")
    write_json(beside, found.to_json())
    calibration_report.draw(found, beside.with_suffix(""))
    print(calibration_report.table(found))
    print(f"wrote {out}, {beside} and {beside.with_suffix('.png')}")


def _calibrate_by_kernels(answer: GpuAnswer, path: Path, cluster: Cluster, out: Path) -> None:
    try:
        efficiency, fitted = kernel_points.fit_kernels(answer, cluster)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_device_name(path, answer.device, cluster)
    out.parent.mkdir(parents=True, exist_ok=True)
    efficiency.write(out)
    print(kernel_points.table(fitted))
    print(f"wrote {out}: {efficiency.source}")
