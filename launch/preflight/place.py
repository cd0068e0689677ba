"""Where a task of the check stands: its rank, its node, its GPU, and whom it meets on which port.

All of it comes from the environment that the job script gives a rank, and from the host list.
"""

import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,252}", re.ASCII)
_HOSTS_BYTES = 16 << 20
# Above the ports that job scripts take for MASTER_PORT (15000 to 29999), below those the kernel
# hands out (from 32768).
_FIRST_PORT, _PORTS = 30000, 2768


@dataclass(frozen=True)
class Place:
    """A task: `rank` of `world` ranks, `ranks_per_node` on each node."""

    host: str
    rank: int
    local_rank: int
    ranks_per_node: int
    gpus: tuple[str, ...] | None
    """Names of the GPUs that the job may use on this node, as CUDA_VISIBLE_DEVICES has them; None
    for a job without GPUs, empty where Slurm tells only that there are some."""
    master_port: int

    @property
    def gpu(self) -> str:
        """Index or UUID of this rank's GPU for nvidia-smi."""
        names = self.gpus or ()
        # One name: Slurm has bound each task to its own GPU.
        return names[self.local_rank % len(names)] if names else str(self.local_rank)


def place_of(environment: Mapping[str, str]) -> Place:
    """The place that a rank's environment tells.

    Raises:
        ValueError: a variable is missing or no number.
    """
    numbers = {}
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        text = environment.get(name, "")
        if not text.isascii() or not text.isdigit():
            raise ValueError(f"{name} = {text!r} must be a number: run the check as a job's rank")
        numbers[name] = int(text)
    return Place(
        host=environment.get("SLURMD_NODENAME") or socket.gethostname(),
        rank=numbers["RANK"],
        local_rank=numbers["LOCAL_RANK"],
        ranks_per_node=max(1, numbers["LOCAL_WORLD_SIZE"]),
        gpus=_gpus(environment),
        master_port=numbers["MASTER_PORT"],
    )


def read_hosts(path: Path) -> tuple[str, ...]:
    """The host list: one name a line, in Slurm's order.

    Raises:
        ValueError: it is empty, has a name twice, or has what is no host's name.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        names = tuple(file.read(_HOSTS_BYTES).decode(errors="replace").split())
    if not names:
        raise ValueError(f"{path} has no host: write one name a line")
    for name in names:
        if not _HOST.fullmatch(name):
            raise ValueError(f"{path}: {name[:80]!r} is not a host's name")
    if len(set(names)) < len(names):
        raise ValueError(f"{path} has a host twice: write each name once")
    return names


def find_host(place: Place, hosts: tuple[str, ...]) -> int:
    """The number of a task's node in the host list.

    Raises:
        ValueError: it is not there.
    """
    for name in (place.host, place.host.partition(".")[0]):
        if name in hosts:
            return hosts.index(name)
    raise ValueError(f"node {place.host} is not in the host list")


def meeting_port(master_port: int, node: int, distance: int) -> int:
    """The port on which a node waits for the one `distance` further; 0: for its own ranks.

    Two jobs on one node rarely meet: no job's MASTER_PORT is in this range, and those of
    neighbouring ids lie 131 ports apart. Each node's own three are different, so that all nodes may
    be on one machine, as in tests. A port that is taken all the same is waited for.
    """
    return _FIRST_PORT + (131 * master_port + 3 * node + distance) % _PORTS


def _gpus(environment: Mapping[str, str]) -> tuple[str, ...] | None:
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        names = tuple(name.strip() for name in visible.split(",") if name.strip())
        return None if names in ((), ("NoDevFiles",), ("-1",)) else names
    given = environment.get("SLURM_JOB_GPUS") or environment.get("SLURM_GPUS_ON_NODE", "")
    return () if given not in ("", "0") else None
