"""Seconds of what crosses between a device and its host, and of what the host does with it.

The optimizer's update as megatron-core 0.19 makes it (HybridDeviceOptimizer.step): all gradients of
the parameters that the host updates are copied to it at once; with
`overlap_cpu_optimizer_d2h_h2d`, and gradients in pinned memory, each parameter is updated as soon
as its own has come, without it all of them when all have. The host converts an updated parameter
to the model's type and sends it back before it turns to the next. The device's own part of the
update goes on beside that. Published bandwidths by an assumed share of them; fitted to nothing.
May touch: nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_mone.planning.cost.hardware import Cluster, Host
from megatron_mone.planning.tracing.trace import HOST, TO_DEVICE, TO_HOST, Op


@dataclass(frozen=True)
class HostWork:
    """Of one rank, in a step or in a pass.

    Attributes:
        to_host, to_device: bytes that cross.
        moved: bytes of the host's memory that its own operators read and write.
        pieces: copies back, one after another.
    """

    to_host: float = 0.0
    to_device: float = 0.0
    moved: float = 0.0
    pieces: int = 0

    def plus(self, other: HostWork, times: int = 1) -> HostWork:
        """Together with another's, so many times."""
        return HostWork(
            self.to_host + times * other.to_host, self.to_device + times * other.to_device,
            self.moved + times * other.moved, self.pieces + times * other.pieces,
        )  # fmt: skip

    def copying(self, host: Host) -> tuple[float, float]:
        """Seconds to the host and back, alone on the link."""
        rate = host.bandwidth * host.efficiency
        return self.to_host / rate, self.to_device / rate

    def updating(self, host: Host) -> float:
        """Seconds of the host's own operators, which its memory bounds."""
        return self.moved / (host.memory_bandwidth * host.efficiency)


NO_WORK = HostWork()


def host_work(ops: Iterable[Op]) -> HostWork:
    """What ops are of the host, or cross to it."""
    to_host = to_device = moved = 0
    pieces = 0
    for op in ops:
        if op.name == TO_HOST:
            to_host += op.count * op.bytes_read
        elif op.name == TO_DEVICE:
            to_device += op.count * op.bytes_read
            pieces += op.count
        elif op.name.startswith(HOST):
            moved += op.count * (op.bytes_read + op.bytes_written)
    return HostWork(to_host, to_device, moved, pieces)


def host_of(cluster: Cluster) -> Host:
    """The cluster's.

    Raises:
        ValueError: its file has none.
    """
    if cluster.host is None:
        raise ValueError(
            f"cluster {cluster.name!r} has no section host, which a job needs that keeps or "
            "computes on the host: add it, as in configs/cluster/hardware/h100-ndr.yaml, or "
            "choose another cluster"
        )
    return cluster.host


def update_seconds(work: HostWork, own: float, host: Host, *, overlapped: bool) -> float:
    """Seconds of an update, the device's part included.

    Args:
        work: of a step.
        own: seconds of the device's part.
        host: of the device.
        overlapped: whether a parameter is updated as soon as its gradient has come.
    """
    there, back = work.copying(host)
    rest = work.updating(host) + back
    if not overlapped:
        return there + max(own, rest)
    # Two stages one after another, of equal pieces.
    pieces = max(1, work.pieces)
    return max(own, there + rest / pieces, rest + there / pieces)
