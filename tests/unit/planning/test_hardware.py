"""Cluster files: the shipped ones hold what data sheets say, and a wrong one is refused."""

import copy
import dataclasses

import pytest
import torch
import yaml

from megatron_mone.common.device import HARDWARE_ROOT
from megatron_mone.model import run_config
from megatron_mone.planning.cost.hardware import cluster_names, load_cluster
from megatron_mone.profiling.peaks import published_peaks


def write(folder, **changes):
    """The H100 cluster in a file of its own with some fields ("domain.devices") changed.

    A change to None removes the field.
    """
    values = copy.deepcopy(yaml.safe_load((HARDWARE_ROOT / "h100-ndr.yaml").read_text()))
    for place, value in changes.items():
        *sections, last = place.split(".")
        part = values
        for section in sections:
            part = part[section]
        if value is None:
            del part[last]
        else:
            part[last] = value
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def refused(name: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_cluster(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_every_shipped_cluster_loads_and_names_its_sources():
    assert set(cluster_names()) >= {
        "a100-hdr",
        "b200-ndr",
        "gb200-nvl72",
        "gb300-nvl72",
        "h100-ndr",
        "h200-ndr",
        "mi300x-ndr",
    }
    for name in cluster_names():
        cluster = load_cluster(name)
        assert cluster.name == name
        parts = {"device", "node", "domain", "network", "collectives"}
        assert set(cluster.sources) == parts | ({"host"} if cluster.host else set())
        assert (cluster.host is None) == name.startswith("cpu")
        assert all(len(source) > 20 for source in cluster.sources.values())


@pytest.mark.parametrize(
    ("cluster", "torch_name"),
    [
        ("a100-hdr", "NVIDIA A100-SXM4-80GB"),
        ("h100-ndr", "NVIDIA H100 80GB HBM3"),
        ("h200-ndr", "NVIDIA H200"),
        ("b200-ndr", "NVIDIA B200"),
    ],
)
def test_planner_and_profiler_agree_on_peaks(cluster, torch_name):
    """A utilisation measured by the profiler and one planned here divide by the same peak."""
    device = load_cluster(cluster).device
    bf16 = published_peaks(torch_name, torch.bfloat16)
    fp32 = published_peaks(torch_name, torch.float32)
    assert device.peak("bf16") == bf16.flops
    assert device.peak("tf32") == fp32.flops
    assert device.memory_bandwidth == pytest.approx(bf16.bytes_per_s)


def test_units_are_bytes_and_seconds():
    """NVLink 4 gives 450 GB/s each way, NDR 50 GB/s, and 80 GB of HBM is near 80 GiB."""
    cluster = load_cluster("h100-ndr")
    assert cluster.domain.bandwidth == 450e9
    assert cluster.network.bandwidth == 50e9
    assert 79 * 2**30 < cluster.device.memory_bytes < 80 * 2**30
    assert cluster.domain.latency == pytest.approx(1.9e-6)
    assert cluster.launch_latency == pytest.approx(30e-6)
    assert cluster.leaf_devices == 32 * 8
    assert cluster.host is not None
    assert (cluster.host.bandwidth, cluster.host.memory_bytes) == (64e9, 2**38)
    assert 8 * cluster.host.memory_bandwidth == 2 * 8 * 4800e6 * 8  # sockets, channels, rate, bytes


def test_an_nvl72_domain_is_larger_than_its_node_and_a_mesh_pair_slower_than_all_links():
    rack, mesh = load_cluster("gb200-nvl72"), load_cluster("mi300x-ndr")
    assert (rack.node_devices, rack.domain.devices) == (4, 72)
    assert mesh.domain.bandwidth == 7 * mesh.domain.pair_bandwidth


def test_a_gb300_rack_is_a_gb200_rack_with_288_gb_and_twice_the_network():
    before, now = load_cluster("gb200-nvl72"), load_cluster("gb300-nvl72")
    assert now.device.memory_bytes == pytest.approx(288e9, rel=1e-5)
    assert now.network.bandwidth == 2 * before.network.bandwidth
    assert now.domain == before.domain
    assert now.device.peak("fp8") == before.device.peak("fp8")


def test_cluster_files_are_no_run_files():
    """`cluster:` of a run file lists configs/cluster/*.yaml, where hardware must not show up."""
    listed = {path.name for path in (run_config.CONFIG_ROOT / "cluster").glob("*.yaml")}
    assert not listed & {f"{name}.yaml" for name in cluster_names()}


def test_a_file_of_ones_own_by_its_path(tmp_path):
    cluster = load_cluster(write(tmp_path, **{"network.oversubscription": 2}))
    assert cluster.name == "mine"
    assert cluster.network.oversubscription == 2.0
    with pytest.raises(dataclasses.FrozenInstanceError):
        cluster.name = "other"


def test_an_unknown_cluster_names_the_nearest():
    line = refused("h100-nrd")
    assert "did you mean 'h100-ndr'" in line
    assert "mi300x-ndr" in line


def test_an_unknown_dtype_names_the_known():
    with pytest.raises(ValueError, match=r"A100.*no peak for dtype 'fp8': choose one of bf16"):
        load_cluster("a100-hdr").device.peak("fp8")


@pytest.mark.parametrize(
    ("place", "value", "fault"),
    [
        ("device.tflops.bf16", "fast", "must be a number"),
        ("device.tflops.bf16", True, "must be a number"),
        ("device.tflops.bf16", 0, "greater than 0"),
        ("device.tflops", {}, "at least one of"),
        ("device.memory_mib", float("nan"), "must be finite"),
        ("device.memory_gb_per_s", float("inf"), "must be finite"),
        ("network.gb_per_s", 10**400, "must be finite"),
        ("device.name", 7, "must be a text"),
        ("domain.devices", 8.5, "whole number"),
        ("domain.devices", 12, r"multiple of node.devices \(8\)"),
        ("domain.pair_gb_per_s", 451, r"at most gb_per_s \(450\)"),
        ("domain.efficiency", 1.2, "at most 1"),
        ("domain.latency_us", -1, "0 or more"),
        ("node.devices", 0, "1 or more"),
        ("network.oversubscription", 0.5, "1 or more"),
        ("network.rails", True, "whole number"),
        ("network.source", " ", "must be a text"),
        ("collectives.launch_latency_us", -0.1, "0 or more"),
        ("collectives.inside.all_to_all.efficiency", 0, "greater than 0"),
        ("collectives.inside.all_reduce.efficiency", 2.1, "at most 2"),
        ("collectives.inside.all_reduce.latency_us", "x", "must be a number"),
    ],
)
def test_a_wrong_value_is_refused_with_its_file_field_and_value(tmp_path, place, value, fault):
    path = write(tmp_path, **{place: value})
    with pytest.raises(ValueError, match=fault):
        load_cluster(path)
    line = refused(path)
    assert line.startswith(f"{path}: {place} = {value!r}"[: len(path) + 60])


def test_figures_inside_a_domain_are_those_of_its_file(tmp_path):
    """An all-reduce that NVLink's switches add up passes what a ring could (nccl-tests, H100)."""
    cluster = load_cluster("h100-ndr")
    assert cluster.inside["all_reduce"].domain.efficiency == pytest.approx(1.046)
    assert cluster.inside["all_to_all"].launch_latency == pytest.approx(58.2e-6)
    assert cluster.inside["all_to_all"].network == cluster.network
    assert not load_cluster("a100-hdr").inside
    wrong = write(tmp_path, **{"collectives.inside.broadcast": {"efficiency": 1}})
    assert "broadcast" in refused(wrong)


def test_a_leaf_splits_no_domain(tmp_path):
    path = write(tmp_path, **{"domain.devices": 72, "node.devices": 4})
    assert "network.leaf_nodes = 32" in refused(path)


@pytest.mark.parametrize("place", ["device.name", "domain.source", "network", "device.tflops"])
def test_a_missing_field_is_named(tmp_path, place):
    assert f"{place} is missing" in refused(write(tmp_path, **{place: None}))


@pytest.mark.parametrize(
    ("place", "near"),
    [("domain.latensy_us", "latency_us"), ("nettwork", "network"), ("device.tflops.bf61", "bf16")],
)
def test_an_unknown_field_names_the_nearest(tmp_path, place, near):
    line = refused(write(tmp_path, **{place: 1}))
    assert f"unknown field {place!r}" in line
    assert f"did you mean {near!r}" in line


@pytest.mark.parametrize(
    "text", ["[1, 2]", "", "a: [", "device: 3", "!!python/object/apply:os.getcwd []"]
)
def test_what_is_no_cluster_file_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "broken.yaml"
    path.write_text(text)
    assert str(path) in refused(str(path))
