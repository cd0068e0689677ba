"""A cluster as the planner sees it: device, node, NVLink domain and network, from a YAML file.

configs/cluster/hardware/NAME.yaml holds one cluster, in the units of data sheets (TFLOP/s, GB/s,
MiB, microseconds), with the source of every published figure beside it; here all is in bytes,
seconds and their quotients. A user's cluster is a file of the same form. May touch: those files,
read by safe loading.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from megatron_mone.common.checked_yaml import Section, read_yaml
from megatron_mone.common.device import EXAMPLE, HARDWARE_ROOT, Device, read_device
from megatron_mone.common.spelling import nearest_name

RING_LIKE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all")
"""Collectives whose figures inside a domain a file may give apart."""
_MOST_EFFICIENT = 2.0  # a switch that adds up halves what a ring of many sends


@dataclass(frozen=True)
class Domain:
    """Devices that reach each other over NVLink or xGMI; may be larger than a node (NVL72).

    Attributes:
        devices: in one domain.
        bandwidth: bytes a second that one device sends (and receives) to all others together.
        pair_bandwidth: the most of it that two devices can use: all behind a switch, one link in
            a mesh.
        latency: seconds a hop.
        efficiency: share of the bandwidth that long messages reach, in (0, 1].
    """

    devices: int
    bandwidth: float
    pair_bandwidth: float
    latency: float
    efficiency: float


@dataclass(frozen=True)
class Network:
    """What joins the domains.

    Attributes:
        bandwidth: bytes a second each device sends (and receives) through its network card.
        latency: seconds a message.
        rails: separate switch planes; the i-th device of every node is on plane i modulo rails.
            Messages between planes first move inside the domain (NCCL's PXN).
        leaf_nodes: nodes under one leaf switch (of each plane).
        oversubscription: bandwidth into a leaf from its devices over the bandwidth above it; 1 is
            non-blocking.
        efficiency: share of the bandwidth that long messages reach, in (0, 1].
    """

    bandwidth: float
    latency: float
    rails: int
    leaf_nodes: int
    oversubscription: float
    efficiency: float


@dataclass(frozen=True)
class Host:
    """What one device has of its node's host.

    Attributes:
        bandwidth: bytes a second that the device copies to the host's memory, and from it.
        memory_bytes: of the host's memory, the device's share.
        memory_bandwidth: likewise, bytes a second read and written.
        efficiency: share of either bandwidth that is reached, in (0, 1].
    """

    bandwidth: float
    memory_bytes: float
    memory_bandwidth: float
    efficiency: float


@dataclass(frozen=True)
class Cluster:
    """Equal nodes of equal devices; rank r runs on device r, node after node.

    Attributes:
        name: of its file.
        device, domain, network: see there.
        node_devices: devices of one node; divides domain.devices or is equal to it.
        launch_latency: seconds any collective takes before its first byte moves.
        sources: section -> where its figures come from.
        host: None where the file has none; nothing is offloaded then.
        inside: collective -> the cluster as groups of it within one domain find it, where its
            latencies and efficiency were measured; of an all-reduce that switches add up the
            efficiency may pass 1.
    """

    name: str
    device: Device
    node_devices: int
    domain: Domain
    network: Network
    launch_latency: float
    sources: dict[str, str]
    host: Host | None = None
    inside: Mapping[str, "Cluster"] = field(default_factory=dict)

    @property
    def leaf_devices(self) -> int:
        """Devices under one leaf of the network (all rails of it together)."""
        return self.network.leaf_nodes * self.node_devices


def cluster_names() -> list[str]:
    """Names of the clusters in configs/cluster/hardware/, sorted."""
    return sorted(path.stem for path in HARDWARE_ROOT.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """A cluster by its name or by the path of a YAML file.

    Args:
        name: one of `cluster_names()`, or a path that ends in .yaml.

    Raises:
        ValueError: one line naming the file, the field, its value and the fix.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else HARDWARE_ROOT / f"{name}.yaml"
    if not path.is_file():
        known = cluster_names()
        raise ValueError(
            f"cluster {name!r} is neither a YAML file nor one of {', '.join(known)}"
            f"{nearest_name(name, known)}"
        )
    return _cluster(read_yaml(path, EXAMPLE))


def _cluster(file: Section) -> Cluster:
    file.only("device", "node", "domain", "network", "collectives", "host")
    names = ["device", "node", "domain", "network", *(["host"] if "host" in file.values else [])]
    parts = {name: file.section(name) for name in names}
    collectives = file.section("collectives")
    collectives.only("launch_latency_us", "inside", "source")
    parts["node"].only("devices", "source")
    cluster = Cluster(
        name=file.path.stem,
        device=read_device(parts["device"]),
        node_devices=parts["node"].whole("devices"),
        domain=_domain(parts["domain"]),
        network=_network(parts["network"]),
        launch_latency=1e-6 * collectives.number("launch_latency_us", least=0.0),
        sources={
            name: part.text("source")
            for name, part in {**parts, "collectives": collectives}.items()
        },
        host=_host(parts["host"]) if "host" in parts else None,
    )
    if cluster.domain.devices % cluster.node_devices:
        parts["domain"].fail(
            "devices", f"must be a multiple of node.devices ({cluster.node_devices})"
        )
    if cluster.leaf_devices % cluster.domain.devices:
        parts["network"].fail(
            "leaf_nodes",
            f"times node.devices ({cluster.node_devices}) must be "
            f"a multiple of domain.devices ({cluster.domain.devices})",
        )
    if "inside" not in collectives.values:
        return cluster
    return replace(cluster, inside=_inside(collectives.section("inside"), cluster))


def _inside(part: Section, cluster: Cluster) -> dict[str, Cluster]:
    part.only(*RING_LIKE)
    found = {}
    for name in part.values:
        one = part.section(name)
        one.only("efficiency", "latency_us", "launch_latency_us")
        domain = replace(
            cluster.domain,
            efficiency=one.number("efficiency"),
            latency=1e-6 * one.number("latency_us", least=0.0),
        )
        if domain.efficiency > _MOST_EFFICIENT:
            one.fail("efficiency", f"must be at most {_MOST_EFFICIENT}")
        launch = 1e-6 * one.number("launch_latency_us", least=0.0)
        found[name] = replace(cluster, domain=domain, launch_latency=launch)
    return found


def _domain(part: Section) -> Domain:
    part.only("devices", "gb_per_s", "pair_gb_per_s", "latency_us", "efficiency", "source")
    domain = Domain(
        devices=part.whole("devices"),
        bandwidth=1e9 * part.number("gb_per_s"),
        pair_bandwidth=1e9 * part.number("pair_gb_per_s"),
        latency=1e-6 * part.number("latency_us", least=0.0),
        efficiency=part.share("efficiency"),
    )
    if domain.pair_bandwidth > domain.bandwidth:
        part.fail("pair_gb_per_s", f"must be at most gb_per_s ({part.values['gb_per_s']})")
    return domain


def _network(part: Section) -> Network:
    part.only(
        "gb_per_s", "latency_us", "rails", "leaf_nodes", "oversubscription", "efficiency", "source"
    )
    return Network(
        bandwidth=1e9 * part.number("gb_per_s"),
        latency=1e-6 * part.number("latency_us", least=0.0),
        rails=part.whole("rails"),
        leaf_nodes=part.whole("leaf_nodes"),
        oversubscription=part.number("oversubscription", least=1.0),
        efficiency=part.share("efficiency"),
    )


def _host(part: Section) -> Host:
    part.only("gb_per_s", "memory_mib", "memory_gb_per_s", "efficiency", "source")
    return Host(
        bandwidth=1e9 * part.number("gb_per_s"),
        memory_bytes=2**20 * part.number("memory_mib"),
        memory_bandwidth=1e9 * part.number("memory_gb_per_s"),
        efficiency=part.share("efficiency"),
    )
