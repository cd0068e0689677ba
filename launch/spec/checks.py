"""The checks of a LaunchSpec. Nothing here reads files or starts anything.

Text may hold quotes, spaces, `$` and any letter: the script quotes it. Line breaks and other
control characters are refused, for a line is what sbatch and the shell read.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from launch.preflight.limits import read_limits
from launch.spec.launch_spec import Case, Container, LaunchSpec, Variable
from launch.spec.sbatch_options import OPTION_FIELDS, check_options
from megatron_mone.common.spelling import nearest_name
from megatron_mone.model.trackers.flags import without_password

__all__ = ["OPTION_FIELDS", "OWN_VARIABLES", "checked", "limit_seconds"]

SECONDS_OF_NO_LIMIT = float("inf")
OWN_VARIABLES = frozenset(
    ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MEGATRON_MONE_ATTEMPT",
     "MEGATRON_MONE_PROGRESS")
)  # fmt: skip
"""What the launcher itself sets, for torch.distributed and for megatron_mone.pretrain."""
_READ_ONLY = frozenset(("BASHOPTS", "BASH_VERSINFO", "EUID", "PPID", "SHELLOPTS", "UID"))
_SECRET = re.compile(r".*(API_KEY|ACCESS_KEY|TOKEN|PASSWORD|SECRET)")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
_MODULE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+/@=:-]*", re.ASCII)
_MEMORY = re.compile(r"\d+([KMGT]B?)?", re.ASCII | re.IGNORECASE)
_MOST_LEAD = 65535
_GPU_TYPE = re.compile(r"[A-Za-z][A-Za-z0-9_.+-]*", re.ASCII)
_HOST_PART = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?", re.ASCII)
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)


def checked(spec: LaunchSpec) -> LaunchSpec:
    """`spec` with the numbers that follow from others filled in.

    Raises:
        ValueError: one line naming the field, the value and the fix.
    """
    for name, text in _texts(spec):
        _check_text(name, text)
    _check_run(spec)
    _check_sizes(spec)
    _check_attempts(spec)
    _check_forms(spec)
    _check_software(spec)
    check_options(spec)
    return replace(spec, tasks_per_node=spec.ranks_per_node)


def limit_seconds(time_limit: str) -> float:
    """A time limit of Slurm in seconds; without end for 0, as sbatch reads it.

    Raises:
        ValueError: not one of Slurm's forms.
    """
    if time_limit.lower() in ("unlimited", "infinite", "-1"):
        return SECONDS_OF_NO_LIMIT
    found = _TIME.fullmatch(time_limit)
    if found is None:
        raise ValueError(
            f'time_limit = {time_limit!r} is not a time of Slurm: write "HOURS:MINUTES:SECONDS", '
            '"DAYS-HOURS" or minutes, or UNLIMITED'
        )
    days, *parts = (int(part or 0) for part in found.groups())
    # Without days or a third number the first is minutes.
    if found.group(1) is None and found.group(4) is None:
        parts = [0, *parts[:2]]
    hours, minutes, seconds = parts
    # "A time limit of zero requests that no time limit be imposed", sbatch(1).
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds or SECONDS_OF_NO_LIMIT


def _texts(spec: LaunchSpec) -> Iterator[tuple[str, str]]:
    """Every text of a spec with the field it is in."""
    for f in fields(spec):
        yield from _texts_of(f.name, getattr(spec, f.name))


def _texts_of(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, tuple):
        for item in value:
            yield from _texts_of(name, item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield name, key
            yield f"{name}: {key}", item
    elif isinstance(value, Case | Container | Variable):
        for f in fields(value):
            yield from _texts_of(name, getattr(value, f.name))


def _check_text(name: str, text: str) -> None:
    bad = [c for c in text if (c < " " and c != "\t") or c == "\x7f" or "\ud800" <= c <= "\udfff"]
    if bad:
        raise ValueError(
            f"{name} = {text!r} has the character {bad[0]!r}: leave out line breaks, control "
            "characters and bytes that are not UTF-8"
        )


def _check_run(spec: LaunchSpec) -> None:
    if not spec.name or "/" in spec.name or spec.name.startswith((".", "-")):
        raise ValueError(
            f"name = {spec.name!r} must be a folder's name, without '/' and not beginning with "
            "'.' or '-'"
        )
    if not spec.command or not spec.command[0] or spec.command[0].startswith("-"):
        given = spec.command[0] if spec.command else ""
        raise ValueError(f"command = {given!r} is not a program: give its name or path")
    for name in ("workdir", "folder"):
        if not getattr(spec, name).startswith("/"):
            raise ValueError(f"{name} = {getattr(spec, name)!r} must be an absolute path")
    for name, path in (("folder", spec.folder), *(("case", case.folder) for case in spec.cases)):
        # Names of log files are patterns to Slurm: % begins a field, a backslash ends all fields.
        if "%" in path or "\\" in path:
            raise ValueError(
                f"{name} = {path!r}: Slurm reads '%' and '\\' in names of log files as patterns; "
                "choose a --runs folder and a name without them"
            )
    if spec.cases and spec.array is not None:
        raise ValueError(f"array = {spec.array!r}: a grid makes its own array; leave one out")
    if spec.array is not None and spec.saves_checkpoints:
        raise ValueError(
            f"array = {spec.array!r}: its elements would write one checkpoint folder; give --grid, "
            "which has a folder for each"
        )


def _check_sizes(spec: LaunchSpec) -> None:
    _check_least(spec, 1, "nodes", "tasks_per_node", "cpus_per_task", "max_requeues")
    _check_least(spec, 0, "gpus_per_node", "signal_lead_seconds")
    if spec.gpu_type is not None and not _GPU_TYPE.fullmatch(spec.gpu_type):
        raise ValueError(
            f"gpu_type = {spec.gpu_type!r} is not a GPU's type, like h100 (sinfo -o %G)"
        )
    if spec.gpu_type is not None and not spec.gpus_per_node:
        raise ValueError(f"gpu_type = {spec.gpu_type!r} without gpus_per_node: give that too")
    if spec.gpus_per_node and spec.ranks_per_node != spec.gpus_per_node:
        raise ValueError(
            f"tasks_per_node = {spec.tasks_per_node} with gpus_per_node = {spec.gpus_per_node}: "
            "a GPU has one rank; leave tasks_per_node out"
        )


def _check_least(spec: LaunchSpec, least: int, *names: str) -> None:
    for name in names:
        value = getattr(spec, name)
        if value is not None and value < least:
            raise ValueError(f"{name} = {value} must be at least {least}")


def _check_attempts(spec: LaunchSpec) -> None:
    """What decides when ranks start, end and start again."""
    if spec.max_failures < 1:
        raise ValueError(
            f"max_failures = {spec.max_failures} must be at least 1, which gives up after the "
            "first failure"
        )
    _check_least(spec, 0, "backoff_seconds", "hang_seconds", "spare_nodes")
    if spec.backoff_limit_seconds < spec.backoff_seconds:
        raise ValueError(
            f"backoff_limit_seconds = {spec.backoff_limit_seconds} is below backoff_seconds = "
            f"{spec.backoff_seconds}: lower the one or raise the other"
        )
    if spec.spare_nodes and not spec.preflight:
        raise ValueError(
            f"spare_nodes = {spec.spare_nodes} without preflight: nothing would tell which nodes "
            "to replace; give preflight too, or spare_nodes = 0"
        )
    read_limits(spec.preflight_limits)


def _check_forms(spec: LaunchSpec) -> None:
    limit = SECONDS_OF_NO_LIMIT if spec.time_limit is None else limit_seconds(spec.time_limit)
    if spec.signal_lead_seconds >= limit:
        raise ValueError(
            f"signal_lead_seconds = {spec.signal_lead_seconds} is not before the end of "
            f"time_limit = {spec.time_limit!r}: lower the one or raise the other"
        )
    if spec.signal_lead_seconds > _MOST_LEAD:
        raise ValueError(
            f"signal_lead_seconds = {spec.signal_lead_seconds} must be at most {_MOST_LEAD}, as "
            "sbatch's --signal"
        )
    if spec.memory is not None and not _MEMORY.fullmatch(spec.memory):
        raise ValueError(f"memory = {spec.memory!r} must be a number with K, M, G or T, like 64G")
    if spec.array is not None and not _ARRAY.fullmatch(spec.array):
        raise ValueError(f"array = {spec.array!r} must be task numbers, like 0-7, 1,3,5 or 0-7%2")


def _check_software(spec: LaunchSpec) -> None:
    for name in spec.modules:
        if not _MODULE.fullmatch(name):
            raise ValueError(f"modules: {name!r} is not a module's name")
    for name, value in spec.environment.items():
        if _SECRET.fullmatch(name) or without_password(value) != value:
            raise ValueError(
                f"environment: {name} holds a secret, which would stand in the job's script: "
                "export it where you submit, whose environment the job gets, and leave it out"
            )
        if not _VARIABLE.fullmatch(name):
            raise ValueError(f"environment: {name!r} is not a variable's name")
        if name in OWN_VARIABLES | _READ_ONLY or name.startswith("SLURM_"):
            raise ValueError(
                f"environment: {name} is set by Slurm, the shell or the launcher; leave it out"
            )
    _check_rendezvous(spec)
    if spec.container is None:
        return
    if spec.virtual_environment is not None:
        raise ValueError(
            f"virtual_environment = {spec.virtual_environment!r} and container are both given: "
            "leave one out"
        )
    kinds = ("pyxis", "apptainer")
    if spec.container.kind not in kinds:
        kind = spec.container.kind
        raise ValueError(
            f"container: kind = {kind!r} must be pyxis or apptainer{nearest_name(kind, [*kinds])}"
        )
    if not spec.container.image or spec.container.image.startswith("-"):
        raise ValueError(f"container: image = {spec.container.image!r} is not an image's name")
    for path in (*spec.container.mounts, spec.workdir, spec.folder):
        if "," in path or not path:
            raise ValueError(f"container: mount {path!r} must be a path without a comma")
    for path in (spec.workdir, spec.folder):
        if ":" in path:
            raise ValueError(f"container: {path!r} cannot be mounted: ':' ends a mount's path")


def _check_rendezvous(spec: LaunchSpec) -> None:
    """Where the ranks meet: a name and a port of the user's own win."""
    address, port = (spec.environment.get(name) for name in ("MASTER_ADDR", "MASTER_PORT"))
    if spec.rendezvous_suffix is not None and not _HOST_PART.fullmatch(spec.rendezvous_suffix):
        raise ValueError(
            f"rendezvous_suffix = {spec.rendezvous_suffix!r} is not the end of a host's name, like "
            "-ib or .hsn.cluster"
        )
    if address is not None and spec.rendezvous_suffix is not None:
        raise ValueError(
            f"environment: MASTER_ADDR = {address!r} and rendezvous_suffix = "
            f"{spec.rendezvous_suffix!r}: leave one out"
        )
    if address is not None and not address:
        raise ValueError("environment: MASTER_ADDR is empty: name a host, or leave it out")
    if port is not None and not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ValueError(f"environment: MASTER_PORT = {port!r} must be a port, 1 to 65535")
