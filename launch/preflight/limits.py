"""The limits of the pre-flight: what a node must have to be trained on. Standard library only."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args

from megatron_mone.common.spelling import nearest_name

BACKENDS = ("gloo", "nccl")


@dataclass(frozen=True)
class Limits:
    """Bounds of the checks; None leaves a check out, unless stated."""

    gpus: int | None = None
    """GPUs that a node must show; None: one for each rank of a job with GPUs."""
    ecc_errors: int = 0
    """Uncorrected memory errors of a GPU since its driver was loaded."""
    ecc_errors_lifetime: int | None = None
    """Uncorrected memory errors of a GPU in its life; most of them are remapped and harmless."""
    used_mib: float = 1024.0
    """MiB of a GPU's memory that may be taken before the job uses it."""
    temperature_c: float | None = None
    """Degrees Celsius of a GPU without load."""
    run_disk_gib: float = 1.0
    """GiB free where the run folder is. A checkpoint may need far more."""
    tmp_disk_gib: float = 1.0
    """GiB free in the node's temporary folder."""
    memory_gib: float = 1.0
    """GiB of main memory available on a node."""
    seconds: float = 120.0
    """How long nodes wait for each other, from the start of the check."""
    backend: str | None = None
    """Of the all-reduce, nccl or gloo; None: nccl in a job with GPUs, else gloo."""
    megabytes: float | None = None
    """Message of the all-reduce in 10^6 bytes; None: 256 with nccl, 64 with gloo."""
    node_gb_per_s: float | None = None
    """Least bus bandwidth of an all-reduce within a node, in 10^9 bytes a second."""
    pair_gb_per_s: float | None = None
    """Least bus bandwidth of an all-reduce between two nodes, in 10^9 bytes a second."""
    relative: float = 0.5
    """Least bandwidth as a share of the median over at least four results; 0: no such limit."""


_TYPES = {field.name: (get_args(field.type) or (field.type,))[0] for field in fields(Limits)}
_POSITIVE = ("gpus", "seconds", "megabytes", "node_gb_per_s", "pair_gb_per_s")


def read_limits(given: Mapping[str, str]) -> Limits:
    """Limits from text, as a launch file or `--limit NAME=VALUE` gives them.

    Raises:
        ValueError: one line naming the limit, the value and the fix.
    """
    values: dict[str, Any] = {}
    for name, text in given.items():
        if name not in _TYPES:
            raise ValueError(
                f"preflight_limits: {name!r} = {text!r} is not a limit"
                f"{nearest_name(name, [*_TYPES])}; known are {', '.join(_TYPES)}"
            )
        values[name] = _backend(text) if name == "backend" else _number(name, text)
    return Limits(**values)


def _backend(text: str) -> str:
    if text not in BACKENDS:
        raise ValueError(f"preflight_limits: backend = {text!r} must be {' or '.join(BACKENDS)}")
    return text


def _number(name: str, text: str) -> float:
    kind = int if _TYPES[name] is int else float
    least = "above 0" if name in _POSITIVE else "of 0 or more"
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or value < 0 or (value == 0 and name in _POSITIVE):
        whole = "whole " if kind is int else ""
        raise ValueError(f"preflight_limits: {name} = {text!r} must be a {whole}number {least}")
    if name == "relative" and value > 1:
        raise ValueError(f"preflight_limits: relative = {text!r} must be a share from 0 to 1")
    return value
