"""The check as real processes: pairs over gloo, partners that die or never come, broken nodes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.preflight import check as check_module
from launch.preflight import gpu
from launch.preflight.bandwidth import all_reduce_gb_per_s, last_moment, stage_groups
from launch.preflight.check import check, fitting
from launch.preflight.limits import Limits
from launch.preflight.lines import task_lines
from launch.preflight.pairs import pair_rounds
from launch.preflight.place import Place, meeting_port
from tests.slurm.cluster import _is_free
from tests.unit.launch_preflight import fake_smi

ROOT = Path(__file__).parents[3]
CHECK = [sys.executable, "-m", "launch.preflight", "check"]
# Joins the first group of node 1 and ends before the all-reduce.
DIES = """
import os, sys
from pathlib import Path
import torch.distributed as dist
from launch.preflight import bandwidth
from launch.preflight.limits import Limits
from launch.preflight.place import place_of, read_hosts
dist.barrier = lambda: os._exit(9)
hosts = read_hosts(Path(sys.argv[1]))
place = place_of(os.environ)
_, group = bandwidth.stage_groups(place, hosts, 1, "gloo")[0]
bandwidth.all_reduce_gb_per_s(group, place, "gloo", 1, 60)
"""


@pytest.fixture(scope="module")
def master_port() -> int:
    for port in range(15000 + os.getpid() % 10000, 30000):
        wanted = [meeting_port(port, node, far) for node in range(4) for far in range(3)]
        if all(_is_free(number) for number in wanted):
            return port
    raise AssertionError("no MASTER_PORT has free meeting ports")


@pytest.fixture
def start(tmp_path: Path, master_port: int) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`start(node, *hosts, command=CHECK, limits=...)`: one process a node, killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def begin(
        node: int, *hosts: str, command: list[str] | None = None, hide_gpus: bool = False,
        **limits: Any,
    ) -> subprocess.Popen[str]:  # fmt: skip
        path = tmp_path / "hosts"
        path.write_text("\n".join(hosts) + "\n")
        words = ["--hosts", str(path), "--limit", "megabytes=1"]
        words += [f"{name}={value}" for name, value in limits.items()]
        environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
        environment |= {
            "RANK": str(node), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_PORT": str(master_port), "SLURMD_NODENAME": hosts[node],
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        if hide_gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        whole = [*CHECK, *words] if command is None else [*command, str(path)]
        process = subprocess.Popen(whole, stdout=subprocess.PIPE, text=True, env=environment)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.wait()


def line_of(process: subprocess.Popen[str]) -> dict[str, Any]:
    """The one line of a check that ended with status 0."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    (text,) = said.splitlines()
    return json.loads(text)


def test_two_nodes_measure_their_link(start: Callable[..., Any]) -> None:
    hosts = ("127.0.0.1", "127.0.0.2")
    both = [start(node, *hosts) for node in range(2)]
    for node, line in enumerate(map(line_of, both)):
        assert line["faults"] == []
        ((partner, value),) = line["pairs"].items()
        assert partner == str(1 - node)
        assert 0 < value < 1000  # GB/s
        assert set(line["versions"]) == {
            "python",
            "torch",
            "megatron-core",
            "megatron-mone sources",
        }


def test_a_rank_whose_torch_sees_no_gpu_blames_itself(start: Callable[..., Any]) -> None:
    """At once: its partner has not come, and need not to."""
    hosts = ("127.0.0.1", "127.0.0.2")
    line = line_of(start(0, *hosts, backend="nccl", hide_gpus=True))
    assert line["faults"] == ["all-reduce: RuntimeError: torch sees no GPU"]
    assert line["pairs"] == {}
    assert {"cuda", "nccl"} < set(line["versions"])


def test_a_partner_that_dies_is_a_failed_pair(start: Callable[..., Any]) -> None:
    hosts = ("127.0.0.1", "127.0.0.2")
    check, dies = start(0, *hosts), start(1, *hosts, command=[sys.executable, "-c", DIES])
    line = line_of(check)
    assert dies.wait() == 9
    assert line["faults"] == []
    assert isinstance(line["pairs"]["1"], str)
    assert "no answer" not in line["pairs"]["1"]  # gloo notices; the deadline was far


@pytest.mark.parametrize("node", [0, 1])
def test_a_partner_that_never_comes_is_a_failed_pair(start: Callable[..., Any], node: int) -> None:
    line = line_of(start(node, "127.0.0.1", "127.0.0.2", seconds=6))
    assert line["faults"] == []
    assert isinstance(line["pairs"][str(1 - node)], str)


def test_who_waited_in_vain_is_not_late_for_the_others(start: Callable[..., Any]) -> None:
    """Node 1 of four is absent: its three partners wait, and still meet each other."""
    hosts = tuple(f"127.0.0.{node + 1}" for node in range(4))
    lines = {node: start(node, *hosts, seconds=30) for node in (0, 2, 3)}
    found = {node: line_of(process)["pairs"] for node, process in lines.items()}
    well = {
        (node, int(other))
        for node, pairs in found.items()
        for other, value in pairs.items()
        if isinstance(value, float)
    }
    assert well == {(0, 2), (2, 0), (2, 3), (3, 2)}
    assert all(isinstance(pairs["1"], str) for pairs in found.values())


def test_a_port_that_is_taken_is_waited_for(start: Callable[..., Any], master_port: int) -> None:
    hosts = ("127.0.0.1", "127.0.0.2")
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("0.0.0.0", meeting_port(master_port, 0, 1)))
        other.listen()
        first = start(0, *hosts, seconds=60)
        with pytest.raises(subprocess.TimeoutExpired):
            first.wait(timeout=8)
    second = start(1, *hosts, seconds=60)
    assert isinstance(line_of(first)["pairs"]["1"], float)
    assert isinstance(line_of(second)["pairs"]["0"], float)


def test_a_rank_that_measures_nothing_does_not_import_torch(tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("n0\nn1\n")
    code = (
        "import sys\nfrom launch.preflight.__main__ import main\n"
        f"assert main(['check', '--hosts', {str(tmp_path / 'hosts')!r}]) == 0\n"
        "assert 'torch' not in sys.modules\n"
    )
    environment = os.environ | RANK | {"LOCAL_RANK": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["local_rank"] == 1


RANK = {
    "RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "15000",
    "SLURMD_NODENAME": "n0",
}  # fmt: skip


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The first rank of a job of one node without GPUs; the path of its host list."""
    for name in ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_GPUS", "SLURM_GPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "hosts"
    path.write_text("n0\n")
    return path


def said(hosts: Path, **limits: Any) -> list[str]:
    """The faults of a check here; its line is one that `judge` takes."""
    text = check(hosts, Limits(backend="gloo", **limits))
    assert "\n" not in text
    (line,) = task_lines(iter([text.encode()]), ["n0"])
    return list(line.faults)


def test_a_node_alone_has_nobody_to_meet(alone: Path) -> None:
    assert said(alone) == []


def test_gpus_without_nvidia_smi_are_a_fault(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("PATH", str(alone.parent))
    (fault,) = said(alone)
    assert fault.startswith("GPUs: nvidia-smi cannot be started: No such file")


def test_a_gpu_s_fault_is_in_the_line(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes = {"pcie.link.width.current": "4"}
    programs = fake_smi.install(alone.parent / "smi", fake_smi.gpus(8, gpu0=lanes))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    assert said(alone) == ["GPU 0 has 4 of 16 PCIe lanes"]
    assert said(alone, gpus=9) == ["8 of 9 GPUs are there", "GPU 0 has 4 of 16 PCIe lanes"]


@pytest.mark.parametrize("limit", ["inner", "outer"])
def test_an_nvidia_smi_that_hangs_is_a_fault(
    alone: Path, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    name = (gpu, "COMMAND_SECONDS") if limit == "inner" else (check_module, "_GPU_SECONDS")
    monkeypatch.setattr(*name, 0.5)
    programs = alone.parent / "bin"
    programs.mkdir()
    (programs / "nvidia-smi").write_text("#!/bin/sh\nexec sleep 30\n")
    (programs / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    (fault,) = said(alone)
    assert fault.startswith("GPUs: TimeoutExpired" if limit == "inner" else "GPUs: no answer in")


def test_a_check_that_hangs_or_raises_leaves_the_others_their_say(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang() -> dict[str, str]:
        os.kill(os.getpid(), 19)  # SIGSTOP
        return {}

    def fail(_limits: Limits) -> list[str]:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(check_module, "_CALL_SECONDS", 3.0)
    monkeypatch.setattr(check_module, "software_versions", hang)
    monkeypatch.setattr(check_module, "temporary_folder_faults", fail)
    first, second, third = said(alone, memory_gib=1e9)
    assert first.startswith("the temporary folder: FileNotFoundError: no usable")
    assert second.endswith("GiB of main memory, 1e+09 are needed")
    assert third == "versions: no answer in 3 s"


def test_a_host_list_that_cannot_be_read_is_a_fault(alone: Path) -> None:
    alone.unlink()
    (fault,) = said(alone)
    assert fault.startswith("the host list: FileNotFoundError")


def test_a_node_that_is_not_in_the_host_list_says_so(alone: Path) -> None:
    alone.write_text("n7\n")
    assert said(alone) == ["the check failed: ValueError: node n0 is not in the host list"]


def test_without_ranks_there_is_still_a_line(alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK")
    line = json.loads(check(alone, Limits()))
    assert line["host"] == "n0"
    assert line["faults"][0].startswith("the check failed: ValueError: RANK = ''")


def test_a_line_fits_into_what_srun_hands_on_in_one_piece() -> None:
    line = {
        "host": "h" * 253, "time": 1, "rank": 1, "local_rank": 0, "ranks_per_node": 8,
        "faults": ["\u20ac" * 300] * 100, "versions": {f"{i}" * 20: "v" * 20 for i in range(9)},
        "pairs": {str(i): "p" * 300 for i in range(4)},
    }  # fmt: skip
    text = fitting(line)
    assert len(text.encode()) + 1 < 1024
    assert json.loads(text)["host"] == line["host"]
    assert fitting({"host": "n0", "faults": ["x"]}) == '{"host":"n0","faults":["x"]}'


def test_a_rank_s_stages_are_its_pairs_and_with_gpus_its_node() -> None:
    hosts = tuple(f"n{node}" for node in range(5))
    stages = stage_groups(Place("n2", 17, 1, 8, (), 15000), hosts, 2, "nccl")
    assert len(stages) == 1 + len(pair_rounds(5))
    (alone, within), *pairs = stages
    assert (alone, within.rank, within.size, within.address) == (None, 1, 8, "127.0.0.1")
    assert [stage and (stage[0], stage[1].rank, stage[1].address) for stage in pairs] == [
        (3, 1, "n2"), (1, 9, "n1"), (0, 9, "n0"), (4, 1, "n2"),
    ]  # fmt: skip
    assert all(group.size == 16 for _, group in pairs)
    gloo = stage_groups(Place("n2", 16, 0, 8, None, 15000), hosts, 2, "gloo")
    assert [(partner, group.rank, group.size) for partner, group in gloo] == [
        (3, 0, 2), (1, 1, 2), (0, 1, 2), (4, 0, 2),
    ]  # fmt: skip


def test_both_ends_of_each_pair_have_one_port_and_one_store() -> None:
    hosts = tuple(f"n{node}" for node in range(7))
    every = [
        stage_groups(Place(host, node, 0, 1, None, 15000), hosts, node, "gloo")
        for node, host in enumerate(hosts)
    ]
    for node, stages in enumerate(every):
        for number, stage in enumerate(stages):
            if stage is not None:
                other = every[stage[0]][number][1]
                assert every[stage[0]][number][0] == node
                assert (stage[1].label, stage[1].address, stage[1].port) == (
                    other.label, other.address, other.port,
                )  # fmt: skip
                assert {stage[1].rank, other.rank} == {0, 1}


def test_each_stage_may_last_longer_than_the_one_before() -> None:
    moments = [last_moment(100.0, Limits(seconds=60), stage) for stage in range(3)]
    assert moments == [160.0, 190.0, 220.0]


def test_bus_bandwidth_is_twice_the_share_that_a_rank_sends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of 4 ranks: 2 x 3/4 x 8 MB in 0.25 s are 0.048 GB/s, the fastest of all but the first."""
    from types import SimpleNamespace

    import torch

    from launch.preflight import bandwidth
    from launch.preflight.bandwidth import Group

    took = iter([0.01, *[0.5] * (bandwidth.REPEATS - 1), 0.25])
    clock = [0.0]

    def reduce(data: torch.Tensor) -> None:
        clock[0] += next(took)
        data.fill_(4)

    monkeypatch.setattr(
        bandwidth,
        "dist",
        SimpleNamespace(
            init_process_group=lambda *_args, **_named: None,
            PrefixStore=lambda *_args: None,
            barrier=lambda: None,
            all_reduce=reduce,
        ),
    )
    monkeypatch.setattr(
        bandwidth, "time", SimpleNamespace(perf_counter=lambda: clock[0], monotonic=lambda: 0.0)
    )
    monkeypatch.setattr(bandwidth, "_store", lambda *_args: None)
    monkeypatch.setattr(bandwidth, "_leave", lambda *_args: None)
    group, place = Group("x", 1, 4, "", 0), Place("n0", 0, 0, 4, None, 15000)
    assert all_reduce_gb_per_s(group, place, "gloo", 8, 1) == pytest.approx(0.048)
    monkeypatch.setattr(bandwidth.dist, "all_reduce", lambda data: data.fill_(3))
    with pytest.raises(RuntimeError, match="wrong sum"):
        all_reduce_gb_per_s(group, place, "gloo", 8, 1)
