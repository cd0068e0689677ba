"""YAML run files -> Megatron command-line flags.

A run is one each of model x parallel x cluster x train, and what makes the model MoNE beside it; an
engine where it is not Megatron's own:

    model: moe-30b-a3b          # configs/model/moe-30b-a3b.yaml, a path, or the mapping itself
    mone: quarter               # mone_* fields; left out, the model is what its own file says
    parallel: ep8-node
    cluster: gpu
    train: plan-4k
    engine: deepspeed

Each part maps Megatron argument names (`num_layers`, `mone_neuron_ratio`, ...) to values. `base` in
a part names another of its folder, or a path, to start from; a model file may name its `mone` too.
Flags on the command line come later and win. May touch: files under configs/, argparse; not
Megatron state.
"""

import argparse
from pathlib import Path
from typing import Any

from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.common.spelling import nearest_name
from megatron_mone.common.yaml_values import read_mapping
from megatron_mone.model.flag_values import flag_words

PARTS = ("model", "parallel", "cluster", "train")
MONE, ENGINE = "mone", "engine"
_KEYS = ("model", MONE, *PARTS[1:], ENGINE)
_PART_OF = {MONE: "model", ENGINE: "train"}
_BASE = "base"


def find_run(path: Path) -> Path:
    """A run file: the one named, or the project's own of that name, from any folder.

    Args:
        path: a file; or `demo-mone`, `configs/demo-mone.yaml` or a name of configs/plan/.

    Returns:
        Where it is; a file that is nowhere stays as it is, for who reads it to name.

    Raises:
        ValueError: a bare name that no run of the project has.
    """
    name = str(path).removeprefix("configs/").removesuffix(".yaml")
    folders = (CONFIG_ROOT, CONFIG_ROOT / "plan")
    for candidate in (path, *(folder / f"{name}.yaml" for folder in folders)):
        if candidate.is_file():
            return candidate
    if path.suffix or len(path.parts) > 1:
        return path
    known = [file.stem for folder in folders for file in folder.glob("*.yaml")]
    raise ValueError(
        f"--config {str(path)!r} is neither a file nor a run of configs/ or configs/plan/"
        f"{nearest_name(name, known)}"
    )


def load_run(path: Path) -> dict[str, Any]:
    """The merged Megatron arguments of a run file.

    Args:
        path: a YAML file with some of the keys in PARTS.

    Returns:
        Argument name -> value. A key in two parts is an error, so that a run has one meaning.

    Raises:
        ValueError: one line naming the file, the key and the fix.
    """
    return merge_parts(read_run(path), path)


def read_run(path: Path) -> dict[str, dict[str, Any]]:
    """The parts of a run file, of PARTS, each a mapping of Megatron arguments.

    Raises:
        ValueError: one line naming the file, the key and the fix.
    """
    parts, path = {}, find_run(path)
    for part, choice in read_mapping(path).items():
        if part not in _KEYS:
            raise ValueError(
                f"{path}: unknown key {part!r}{nearest_name(str(part), list(_KEYS))}; a run file "
                f"holds {', '.join(_KEYS)}"
            )
        parts[part] = read_part(path, part, choice)
    for name, part in _PART_OF.items():
        if name in parts:
            both = {part: parts.get(part, {}), name: parts.pop(name)}
            parts[part] = merge_parts(both, path)
    return parts


def merge_parts(parts: dict[str, dict[str, Any]], source: Path) -> dict[str, Any]:
    """All arguments of some parts.

    Args:
        parts: name -> arguments.
        source: file named in errors.

    Raises:
        ValueError: one argument is set by two parts.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for part, values in parts.items():
        for name, value in values.items():
            if name in merged:
                raise ValueError(f"{source}: {name!r} is set by both {origin[name]} and {part}")
            merged[name], origin[name] = value, part
    return merged


def to_flags(values: dict[str, Any], parser: argparse.ArgumentParser, source: Path) -> list[str]:
    """Command-line flags that make `parser` produce `values`.

    Args:
        values: argument name (argparse dest) -> value; None leaves the default.
        parser: Megatron's parser with our flags.
        source: file named in errors.

    Raises:
        ValueError: an unknown argument (with the nearest known name), or a value whose kind the
            flag does not take.
    """
    by_dest: dict[str, list[argparse.Action]] = {}
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            by_dest.setdefault(action.dest, []).append(action)
    flags: list[str] = []
    for name, value in values.items():
        if name not in by_dest:
            raise ValueError(f"{source}: unknown key {name!r}{_meant(str(name), by_dest)}")
        flags += flag_words(name, value, by_dest[name], source)
    return flags


def _meant(name: str, by_dest: dict[str, list[argparse.Action]]) -> str:
    """The argument that a key stands for: of the flag by that name, or the nearest in spelling."""
    flag = f"--{name.replace('_', '-')}"
    for dest, actions in by_dest.items():
        if any(flag in action.option_strings for action in actions):
            return f" ({flag} is the flag of {dest!r}: write that)"
    return nearest_name(name, list(by_dest))


def read_part(
    run_path: Path, part: str, choice: Any, above: tuple[Path, ...] = ()
) -> dict[str, Any]:
    """The arguments of one part.

    Args:
        run_path: the run file, beside which a path may lie; named in errors.
        part: of PARTS, MONE or ENGINE.
        choice: a name under configs/, a path, or the arguments themselves.
        above: files that this one is the base of.

    Raises:
        ValueError: one line naming the part and the nearest known name.
    """
    if isinstance(choice, dict):
        return _composed(run_path, part, choice, above)
    if not isinstance(choice, str):
        raise ValueError(f"{run_path}: {part} = {choice!r} must be a name, a path or a mapping")
    for candidate in (
        CONFIG_ROOT / part / f"{choice}.yaml",
        run_path.parent / choice,
        Path(choice),
    ):
        if candidate in above:
            raise ValueError(f"{run_path}: base = {choice!r} comes back to {candidate}")
        if candidate.is_file():
            return _composed(candidate, part, read_mapping(candidate), (*above, candidate))
    known = sorted(p.stem for p in (CONFIG_ROOT / part).glob("*.yaml"))
    raise ValueError(
        f"{run_path}: {part} = {choice!r} is neither a file nor one of configs/{part}/: "
        f"{', '.join(known)}{nearest_name(choice, known)}"
    )


def _composed(
    source: Path, part: str, own: dict[str, Any], above: tuple[Path, ...]
) -> dict[str, Any]:
    """The arguments of `own`, on top of its `base` and, of a model, joined with its `mone`."""
    values = {name: value for name, value in own.items() if name not in (_BASE, MONE)}
    if _BASE in own:
        values = read_part(source, part, own[_BASE], above) | values
    if MONE in own:
        if part != "model":
            raise ValueError(f"{source}: mone stands in a run file or a model, not in {part}")
        mone = read_part(source, MONE, own[MONE])
        values = merge_parts({"model": values, MONE: mone}, source)
    for name in values:
        if part == MONE and not name.startswith("mone_"):
            raise ValueError(f"{source}: {name!r} is no mone_* field, which alone {MONE} may hold")
    return values
