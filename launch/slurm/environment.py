"""What Slurm's commands see of this process's environment. Pure: takes an environment, gives one.

Inside a job, or an interactive allocation, Slurm's variables describe that job, and sbatch hands
all of its environment to the new one: that would take the outer array's numbers, task counts,
memory and CPU binding for its own. SQUEUE_FORMAT, SCANCEL_STATE and their like change what the
commands print and do. So of all these only what names the cluster is kept; a user's SBATCH_* become
fields of the job, where it is seen that they count.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_mone.common.surroundings import without_ranks

CLUSTER = frozenset(("SLURM_CONF", "SLURM_CONF_SERVER", "SLURM_CLUSTERS", "SLURM_JWT"))
"""Where the cluster is (a file, or a server that has it), which of several, who one is there."""
DEFAULTS = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_RESERVATION": "reservation",
    "SBATCH_TIMELIMIT": "time_limit",
}
"""What users set in their profile, as sbatch(1) lists it, and the field that it is a default of."""
_FOR_PEOPLE = "SLURM_TIME_FORMAT"
"""How sbatch --test-only prints its estimate."""
# _SLURM_ begins what SPANK plug-ins pass on: the container of a surrounding job, for one.
_SLURM = re.compile(
    r"_?SLURM(D|STEPD)?_.+|(SBATCH|SALLOC|SRUN|SQUEUE|SACCT|SCANCEL|SCONTROL|SINFO|SPANK)_.+"
)
# Devices are Slurm's to give, and a job's temporary folder ends with it.
_DEVICES = frozenset(
    ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "GPU_DEVICE_ORDINAL",
     "ZE_AFFINITY_MASK")
)  # fmt: skip


def client_environment(environment: Mapping[str, str], program: str) -> dict[str, str]:
    """The environment of one of Slurm's commands.

    Args:
        environment: of this process.
        program: sbatch, whose environment the job inherits; or one that is read.
    """
    left_out = {*_DEVICES, "TMPDIR"} if "SLURM_JOB_ID" in environment else _DEVICES
    kept = CLUSTER | {_FOR_PEOPLE} if program == "sbatch" else CLUSTER
    own = {
        name: value
        for name, value in without_ranks(environment).items()
        if name in kept or not (name in left_out or _SLURM.fullmatch(name))
    }
    # Times as seconds since the epoch, whatever the user set and in any time zone, and lists of
    # array tasks whole.
    read = {} if program == "sbatch" else {"SLURM_TIME_FORMAT": "%s", "SLURM_BITSTR_LEN": "0"}
    return own | read


def site_defaults(
    environment: Mapping[str, str], given: Mapping[str, Any]
) -> tuple[dict[str, str], list[str]]:
    """What SBATCH_* variables say of a job, which sbatch itself would put over the script.

    Args:
        environment: of this process.
        given: fields of the launch file and of flags, which win.

    Returns:
        Fields that nobody gave, and a line on each variable.
    """
    fields, lines = {}, []
    for variable in sorted(name for name in environment if name.startswith("SBATCH_")):
        name, value = DEFAULTS.get(variable), environment[variable]
        if name is None and "SLURM_JOB_ID" in environment:
            continue  # Slurm sets some in a job, such as SBATCH_MEM_BIND
        if name is None:
            fix = "give a field of the launch file, or `sbatch`"
            if variable == "SBATCH_CLUSTERS":
                fix = "set SLURM_CLUSTERS, which all of Slurm's commands read"
            lines.append(f"{variable}={value} is left out: {fix}")
        elif given.get(name) is None:
            fields[name] = value
            lines.append(f"{name} = {value!r} from {variable}")
        elif given[name] != value:
            lines.append(f"{variable}={value} is left out: {name} = {given[name]!r} is given")
    return {name: value for name, value in fields.items() if value}, lines
