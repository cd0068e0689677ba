"""Where a race ran, and a digest that changes when its numbers would."""

import hashlib
import json
from typing import Any

import psutil
import torch

from megatron_mone.benchmarking import instruction_sets
from megatron_mone.common import machine
from megatron_mone.common.places import CONFIG_ROOT, PACKAGE

PEERS = ("transformers", "deepspeed", "transformer-engine", "scattermoe", "sonic-moe", "megablocks")
_SOURCES = (PACKAGE / "kernels", PACKAGE / "benchmarking", CONFIG_ROOT / "bench")


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def describe() -> dict[str, str]:
    """Label -> value: processor or GPU, its class (goals.py), threads, versions, date and load; no
    names, no paths."""
    facts = machine.facts() | instruction_sets.facts()
    if torch.cuda.is_available():
        facts["GPU"] = torch.cuda.get_device_name()
    facts["Threads"] = str(torch.get_num_threads())
    found = [f"{name} {version}" for name in PEERS if (version := machine.version(name))]
    facts["Peers"] = ", ".join(found) or "none beside torch and Megatron-Core"
    facts["Load average at the start"] = f"{machine.load_average():.2f}"
    return facts


def fingerprint(settings: dict[str, Any]) -> str:
    """Digest of machine, versions, settings and the sources of kernels and race."""
    facts = describe()
    for changing in ("Date", "Load average at the start"):
        del facts[changing]
    digest = hashlib.sha256(json.dumps([facts, settings], sort_keys=True).encode())
    for folder in _SOURCES:
        for path in sorted(folder.rglob("*")):
            if path.suffix in (".py", ".cpp", ".c", ".h", ".json"):
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def free_bytes() -> int:
    """Memory that a race may take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available
