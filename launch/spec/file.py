"""A user's launch file (configs/launch/NAME.yaml) and flags -> the fields of a LaunchSpec.

Scalars are read as the text they are: YAML's own rules would make 14400 of `4:00:00`, which Slurm
takes for minutes. May touch: files under configs/launch and the one named.
"""

import re
import typing
from collections.abc import Callable, Mapping
from dataclasses import make_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from launch.spec.launch_spec import SITE_FIELDS, Container, LaunchSpec
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.common.spelling import nearest_name
from megatron_mone.common.yaml_values import KeysOnce

FOLDER = CONFIG_ROOT / "launch"
# As sbatch reads --gpus-per-node: the type alone is one of it.
_GPUS = re.compile(r"([A-Za-z][A-Za-z0-9_.+-]*)(?::(\d+))?", re.ASCII)
_MEANT = {
    "exclusive": ", or user, mcs or topo",
    "nodes": ": the layout needs one; spare_nodes asks for more",
    "gpus_per_node": ", or a type and a number, like h100:8",
}
_HELP = {
    "nodes": "how many nodes",
    "gpus_per_node": "GPUs of a node, one rank each, like 8 or h100:8; 0: ranks without a GPU",
    "gpu_type": "their type, like h100",
    "rendezvous_suffix": "put after the first node's name: its name in the ranks' network",
    "memory": "of a node, like 64G; 0: all of it",
    "time_limit": "HOURS:MINUTES:SECONDS, DAYS-HOURS, minutes; 0 or UNLIMITED: none",
    "signal_lead_seconds": "checkpoint so long before the time limit",
    "max_failures": "give up after so many failures in a row without a new saved step",
    "backoff_seconds": "wait after a first failure, doubled with each further one",
    "backoff_limit_seconds": "the longest such wait",
    "hang_seconds": "end ranks that show no progress for so long; 0: never",
    "spare_nodes": "nodes to ask for beyond --nodes, taken in place of bad ones",
    "preflight_limits": "NAME=VALUE: what a good node must reach; may be repeated",
    "hostfile": "write DeepSpeed's hostfile into the run folder (engine: deepspeed)",
    "array": "task numbers, like 0-7%2",
    "modules": "MODULE to load; may be repeated",
    "environment": "NAME=VALUE; may be repeated",
    "sbatch": "NAME=VALUE or NAME: any other option of sbatch; may be repeated",
    "container": "KIND:IMAGE, pyxis or apptainer",
}


def read_fields(choice: str) -> dict[str, Any]:
    """The fields that a launch file sets.

    Args:
        choice: a name of configs/launch or a path.

    Returns:
        Field -> value of the field's type.

    Raises:
        ValueError: one line naming the file, the field, the value and the fix.
    """
    path = _find(choice)
    values = _read(path)
    try:
        return _with_types({str(name): value for name, value in values.items()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def flag_fields(options: Any, below: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that flags set.

    Args:
        options: with those of SiteFlags.
        below: fields of the launch file; variables and options of sbatch are added to theirs.

    Raises:
        ValueError: one line naming the field, the value and the fix.
    """
    given: dict[str, Any] = {}
    for name in SITE_FIELDS:
        value = getattr(options, name)
        if value is None:
            continue
        if _KINDS[name] == Mapping[str, str]:
            given[name] = {**below.get(name, {}), **dict(_pair(name, text) for text in value)}
        elif isinstance(value, bool):
            given[name] = value
        elif name == "container":
            kind, _, image = value.partition(":")
            given[name] = Container(kind, image)
        else:
            given |= _with_types({name: value})
    return given


def _with_types(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of their fields' types; a GPU's type before their number is a field of its own."""
    given: dict[str, Any] = {}
    for name, value in values.items():
        if name == "gpus_per_node" and isinstance(value, str) and (found := _GPUS.fullmatch(value)):
            given |= {"gpu_type": found[1], name: int(found[2] or 1)}
        else:
            given.setdefault(name, _typed(name, value))
    return given


def _pair(name: str, text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    # Only an option of sbatch can do without a value.
    if name != "sbatch" and not equals:
        raise ValueError(f"{name}: {text!r} must be NAME=VALUE")
    return key, value


def _find(choice: str) -> Path:
    for candidate in (FOLDER / f"{choice}.yaml", Path(choice)):
        if candidate.is_file():
            return candidate
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    raise ValueError(
        f"launch file {choice!r} is neither a file nor one of configs/launch/: "
        f"{', '.join(known)}{nearest_name(choice, known)}"
    )


def _read(path: Path) -> dict[Any, Any]:
    try:
        # S506: a subclass of BaseLoader, which makes nothing but text, lists and mappings.
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_TextLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {' '.join(str(error).split())}") from error
    if values in (None, ""):
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of fields to values")
    return values


class _TextLoader(KeysOnce, yaml.BaseLoader):
    """Every scalar as text."""


def _typed(name: str, value: Any) -> Any:
    """A value of the field's type, from the text, list or mapping of a file or a flag."""
    if name not in SITE_FIELDS:
        raise ValueError(f"unknown field {name!r}{nearest_name(name, list(SITE_FIELDS))}")
    kind = _KINDS[name]
    if value in ("", "null", "~") and type(None) in typing.get_args(kind):
        return None
    return _READERS[kind](name, value)


def _integer(name: str, value: Any) -> int:
    if not isinstance(value, str) or not value.isascii() or not value.isdigit():
        raise ValueError(f"{name} = {value!r} must be a whole number{_MEANT.get(name, '')}")
    return int(value)


def _exclusive(name: str, value: Any) -> bool | str:
    """sbatch's --exclusive, with or without a value."""
    return value if value in ("user", "mcs", "topo") else _boolean(name, value)


def _boolean(name: str, value: Any) -> bool:
    if value not in ("true", "false"):
        raise ValueError(f"{name} = {value!r} must be true or false{_MEANT.get(name, '')}")
    return value == "true"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{name} = {value!r} must be text")
    return value


def _texts(name: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name} = {value!r} must be a list of texts")
    return tuple(value)


def _mapping(name: str, value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise ValueError(f"{name} = {value!r} must be a mapping of names to values")
    for key, item in value.items():
        if not isinstance(key, str) or not isinstance(item, str):
            raise ValueError(f"{name}: {key!r} = {item!r} must be a name and a text")
    return value


def _container(name: str, value: Any) -> Container:
    known = ("kind", "image", "mounts")
    if not isinstance(value, dict):
        raise ValueError(f"{name} = {value!r} must be a mapping of {', '.join(known)}")
    for key in value:
        if key not in known:
            raise ValueError(f"{name}: unknown field {key!r}{nearest_name(str(key), [*known])}")
    for key in ("kind", "image"):
        if key not in value:
            raise ValueError(f"{name}: {key} is missing")
        _text(f"{name}: {key}", value[key])
    mounts = _texts(f"{name}: mounts", value.get("mounts", []))
    return Container(value["kind"], value["image"], mounts)


_KINDS = typing.get_type_hints(LaunchSpec)
_READERS: dict[Any, Callable[[str, Any], Any]] = {
    int: _integer,
    int | None: _integer,
    bool: _boolean,
    bool | str: _exclusive,
    str | None: _text,
    tuple[str, ...]: _texts,
    Mapping[str, str]: _mapping,
    Container | None: _container,
}


def _flag(name: str) -> tuple[str, Any, None]:
    """The option of a field: name, type, default."""
    kind, flag = _KINDS[name], f"--{name.replace('_', '-')}"
    if kind in (bool, bool | str):
        switch = typer.Option(f"{flag}/--no-{flag[2:]}", show_default=False)
        return name, Annotated[bool | None, switch], None
    several = kind in (tuple[str, ...], Mapping[str, str])
    metavar = "N" if kind in (int, int | None) else "TEXT"
    option = typer.Option(flag, help=_HELP.get(name), metavar=metavar)
    return name, Annotated[list[str] | None if several else str | None, option], None


SiteFlags: Any = make_dataclass("SiteFlags", [_flag(name) for name in SITE_FIELDS])
"""A flag for each field of a launch file."""
