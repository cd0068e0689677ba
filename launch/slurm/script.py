"""LaunchSpec -> the text of a batch script for Slurm's sbatch. Pure: reads only its template.

Every value goes through a filter that quotes it, for the shell or for sbatch's own reading of
#SBATCH lines; the template cannot print one that did not.
"""

import math
import shlex
from collections.abc import Iterable
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.preflight.limits import read_limits
from launch.spec.launch_spec import LaunchSpec, Variable
from megatron_mone.common.places import ROOT

TEMPLATES = ROOT / "launch" / "templates"
PREFLIGHT_SECONDS = 600
"""So long, and three times the limit `seconds`, the pre-flight may take; then nodes that did not
answer are bad. Its checks end by themselves sooner, unless a node no longer runs anything."""
HUNG = 124
"""Status of an attempt whose ranks showed no progress: timeout(1)'s."""
STACK_SECONDS = 5
"""Hung ranks have so long to write their stacks."""
END_SECONDS = 60
"""srun has so long to end them; more than a site's KillWait."""
_PLAIN = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.,:/@+=%-")


class _Quoted(str):
    """Text that one of the filters made."""

    __slots__ = ()


def sbatch_script(spec: LaunchSpec) -> str:
    """The script of a job.

    Args:
        spec: as `spec_checks.checked` returned it.
    """
    limits = read_limits(spec.preflight_limits)
    return (
        _environment()
        .get_template("job.sbatch.j2")
        .render(
            spec=spec,
            options=sbatch_options(spec),
            variables=_variables(spec),
            mounts=_mounts(spec),
            nodes=spec.nodes + spec.spare_nodes,
            preflight_seconds=PREFLIGHT_SECONDS + 3 * math.ceil(limits.seconds),
            hung_status=HUNG,
            stack_seconds=STACK_SECONDS,
            end_seconds=END_SECONDS,
        )
    )


def sbatch_options(spec: LaunchSpec) -> list[tuple[str, str]]:
    """Options of sbatch by long name, "" as the value of one without; the log's is among them."""
    array = spec.array if not spec.cases else f"0-{len(spec.cases) - 1}"
    mapped: list[tuple[str, Any]] = [
        ("job-name", spec.name),
        ("nodes", spec.nodes + spec.spare_nodes),
        ("ntasks-per-node", spec.ranks_per_node),
        ("gpus-per-node", _gpus(spec)),
        ("cpus-per-task", spec.cpus_per_task),
        ("mem", spec.memory),
        ("time", spec.time_limit),
        ("account", spec.account),
        ("partition", spec.partition),
        ("qos", spec.qos),
        ("constraint", spec.constraint),
        ("reservation", spec.reservation),
        ("exclusive", "" if spec.exclusive is True else spec.exclusive or None),
        ("mail-user", spec.mail_user),
        ("mail-type", spec.mail_type),
        ("array", array),
        ("dependency", spec.dependency),
        # Otherwise a job waits for ever for one that failed.
        ("kill-on-invalid-dep", "yes" if spec.dependency else None),
        ("signal", f"B:USR1@{spec.signal_lead_seconds}" if spec.signal_lead_seconds else None),
        ("requeue" if spec.requeue else "no-requeue", ""),
        ("chdir", spec.workdir),
        ("output", f"{spec.folder}/logs/{'%A_%a' if array else '%j'}.log"),
        ("open-mode", "append"),  # a requeued job writes the same file
        *spec.sbatch.items(),
    ]
    return [(name, str(value)) for name, value in mapped if value is not None]


def _gpus(spec: LaunchSpec) -> str | None:
    count = str(spec.gpus_per_node) if spec.gpus_per_node else None
    return f"{spec.gpu_type}:{count}" if spec.gpu_type and count else count


def _variables(spec: LaunchSpec) -> list[Variable]:
    own = [variable for variable in spec.variables if variable.name not in spec.environment]
    users = [Variable(*item, "from the launch file or a flag") for item in spec.environment.items()]
    return own + users


def _mounts(spec: LaunchSpec) -> list[str]:
    """The container's mounts, and the folders that the job reads and writes."""
    if spec.container is None:
        return []
    own = [f"{path}:{path}" for path in dict.fromkeys((spec.workdir, spec.folder))]
    return [*own, *spec.container.mounts]


def _environment() -> Environment:
    # The output is a shell script, not HTML: quoting is the filters' work, checked by _printed.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        autoescape=False,
        finalize=_printed,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "shell": _shell,
        "shell_words": _shell_words,
        "option": _option,
        "comment": _comment,
    }
    return environment


def _printed(value: Any) -> Any:
    if not isinstance(value, _Quoted | int):
        raise TypeError(f"the template prints {value!r} without a quoting filter")
    return value


def _shell(value: str) -> _Quoted:
    """One word of the shell."""
    return _Quoted(shlex.quote(value))


def _shell_words(values: Iterable[str]) -> _Quoted:
    """Words of the shell, with a space between."""
    return _Quoted(" ".join(shlex.quote(value) for value in values))


def _option(option: tuple[str, str]) -> _Quoted:
    """`--name=value` as sbatch reads it (Slurm's src/sbatch/opt.c, _get_argument).

    Quotes hold an argument together, a backslash keeps the next character also inside them, and
    a # outside begins a comment.
    """
    name, value = option
    if not value:
        return _Quoted(f"--{name}")
    if _PLAIN.issuperset(value):
        return _Quoted(f"--{name}={value}")
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return _Quoted(f'--{name}="{escaped}"')


def _comment(text: str) -> _Quoted:
    """The rest of a comment line."""
    return _Quoted(" ".join(text.split()))
