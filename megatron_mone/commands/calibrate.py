"""`--calibrate` of the planner: fit a device to a profile, and write how well that went.

May touch: the files asked for; the tracer's processes and cache.
"""

from pathlib import Path

from megatron_mone.common.files import write_json
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.fitting.calibration import calibrate
from megatron_mone.planning.fitting.measured_profile import check_device, read_profile
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.reporting.plan import calibration as calibration_report


def calibrate_command(profile: Path, cluster_name: str, out: Path) -> None:
    """`plan --calibrate`: fit, print how well it fits, write the files.

    Args:
        profile: profile.json of a profile.
        cluster_name: as of --cluster, whose device it was measured on.
        out: efficiency file to write; STEM-fit.json, .png and .svg go beside it.

    Raises:
        ValueError: one line; a wrong input.
    """
    cluster = load_cluster(cluster_name)
    if out.suffix != ".json":
        raise ValueError(f"--json {out} must end in .json: reports go beside it")
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
