"""Options of sbatch that a launch file passes on: which have a field, and which break the script.

What stands in neither table is passed on as it is: sbatch judges it. Nothing here reads files.
"""

import re
from collections.abc import Mapping

from launch.spec.launch_spec import LaunchSpec
from megatron_mone.common.spelling import nearest_name

OPTION_FIELDS = {
    "job-name": "name",
    "nodes": "nodes and spare_nodes",
    "ntasks": "nodes and tasks_per_node",
    "ntasks-per-node": "tasks_per_node",
    "tasks-per-node": "tasks_per_node",
    "ntasks-per-socket": "tasks_per_node",
    "gpus-per-node": "gpus_per_node",
    "gpus": "nodes and gpus_per_node",
    "gpus-per-socket": "gpus_per_node",
    "cpus-per-task": "cpus_per_task",
    "mem": "memory",
    "time": "time_limit",
    "account": "account",
    "partition": "partition",
    "qos": "qos",
    "constraint": "constraint",
    "reservation": "reservation",
    "exclusive": "exclusive",
    "mail-user": "mail_user",
    "mail-type": "mail_type",
    "array": "array",
    "dependency": "dependency",
    "kill-on-invalid-dep": "dependency",
    "signal": "signal_lead_seconds",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "container": "container",
    "export-file": "environment",
    "chdir": "--runs, which says where the run folder is",
    "output": "--runs, which says where the logs are",
    "error": "--runs, which says where the logs are",
    "open-mode": "--runs, which says where the logs are",
    "wrap": "a program after --",
    "test-only": "--test-only before --",
}
"""Options of sbatch that a field stands for; `sbatch` may not set them a second time."""
_ONE_DEVICE = (
    "each rank would see one device, while rank N of a node uses device N: give gpus_per_node, "
    "which has a rank a GPU"
)
BREAKS = {
    "gpus-per-task": _ONE_DEVICE,
    "gpu-bind": _ONE_DEVICE,
    "ntasks-per-gpu": _ONE_DEVICE,
    "tres-per-task": _ONE_DEVICE,
    "tres-bind": _ONE_DEVICE,
    "wait": "submit does not wait for the job's end; `python -m launch status` shows it",
    "quiet": "sbatch would not say the job's number; leave it out",
    "clusters": "the other commands would ask another cluster; set SLURM_CLUSTERS",
    "no-kill": "a job that lost a node is started again (requeue); leave it out",
    "help": "sbatch would submit nothing; leave it out",
    "usage": "sbatch would submit nothing; leave it out",
    "version": "sbatch would submit nothing; leave it out",
}
"""Options that break what the script relies on, and why."""
EXCLUDED_BY = {
    "mem-per-cpu": "memory",
    "mem-per-gpu": "memory",
    "cpus-per-gpu": "cpus_per_task",
    "oversubscribe": "exclusive",
    "share": "exclusive",
}
"""Options that say another thing of the same as a field: not both."""
_OTHERS = """
acctg-freq bb bbf batch begin cluster-constraint comment contiguous core-spec cores-per-socket
cpu-freq deadline delay-boot distribution exclude export extra extra-node-info get-user-env gid
gpu-freq gres gres-flags hint hold ignore-pbs input licenses mcs-label mem-bind mincpus network nice
nodefile nodelist ntasks-per-core overcommit parsable power prefer priority profile propagate reboot
segment sockets-per-node spread-job switches thread-spec threads-per-core time-min tmp uid umask
use-min-nodes verbose wait-all-nodes wckey
"""
_KNOWN = sorted({*OPTION_FIELDS, *BREAKS, *EXCLUDED_BY, *_OTHERS.split()})
_OPTION = re.compile(r"[a-z][a-z0-9-]+", re.ASCII)


def check_options(spec: LaunchSpec) -> None:
    """Refuse an option that a field stands for, that contradicts one, or that breaks the script.

    Raises:
        ValueError: one line naming the option, its value and the field.
    """
    for name, value in spec.sbatch.items():
        said = f"sbatch: {name} = {value!r}"
        _check_name(name)
        if own := OPTION_FIELDS.get(name):
            raise ValueError(f"{said} has a field of its own: give {own}")
        if why := BREAKS.get(name):
            raise ValueError(f"{said}: {why}")
        if name.startswith("container-"):
            raise ValueError(f"{said} would put the batch script into it: give container")
        field = EXCLUDED_BY.get(name)
        if field and getattr(spec, field):
            raise ValueError(f"{said} and {field} = {getattr(spec, field)!r}: leave one out")
        if name.endswith("-per-gpu") and not spec.gpus_per_node:
            raise ValueError(f"{said} without gpus_per_node: there is no GPU to count by")
        if name == "export" and value.upper() not in ("ALL", "NONE"):
            raise ValueError(f"{said}: give ALL or NONE, and variables of the ranks in environment")
        if name == "gres" and (gpus := _gpus(value)):
            raise ValueError(f"{said} asks for GPUs: give gpus_per_node = {gpus}")
        if name == "distribution" and value.lower().split(":")[0] not in ("block", "*"):
            raise ValueError(
                f"{said}: ranks are numbered node by node: give block, or leave it out"
            )


def without_gpus(options: Mapping[str, str]) -> dict[str, str]:
    """Options of sbatch for a job without GPUs."""
    return {name: value for name, value in options.items() if "gpu" not in name}


def _check_name(name: str) -> None:
    if not _OPTION.fullmatch(name):
        hint = nearest_name(name.lstrip("-").replace("_", "-"), _KNOWN)
        raise ValueError(
            f"sbatch: {name!r} is not an option of sbatch: write its long name without dashes{hint}"
        )
    # sbatch takes the begin of a name for the whole, so that it would pass the tables above.
    if name not in _KNOWN and (whole := [known for known in _KNOWN if known.startswith(name)]):
        raise ValueError(f"sbatch: {name!r} is short for {whole[0]!r}: write it whole")


def _gpus(gres: str) -> str:
    """The GPUs that --gres asks for, "h100:8", as gpus_per_node has them; empty for none."""
    for part in gres.split(","):
        words = part.removeprefix("gres:").replace("/", ":").split(":")
        if words[0] == "gpu":
            return ":".join(words[1:]) or "1"
    return ""
