"""Where a task stands, from its environment and the host list; whom it meets on which port."""

from pathlib import Path

import pytest

from launch.preflight.place import find_host, meeting_port, place_of, read_hosts

RANK = {
    "RANK": "29", "LOCAL_RANK": "5", "LOCAL_WORLD_SIZE": "8", "MASTER_PORT": "15042",
    "SLURMD_NODENAME": "n3",
}  # fmt: skip


def test_a_rank_s_environment_is_its_place() -> None:
    place = place_of(RANK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"})
    assert (place.host, place.rank, place.local_rank, place.ranks_per_node) == ("n3", 29, 5, 8)
    assert (place.master_port, place.gpu) == (15042, "5")


@pytest.mark.parametrize("text", [None, "", "x", "-1", "²"])
def test_a_missing_number_is_named(text: str | None) -> None:
    environment = {name: value for name, value in RANK.items() if name != "LOCAL_RANK"}
    if text is not None:
        environment["LOCAL_RANK"] = text
    with pytest.raises(ValueError, match=r"^LOCAL_RANK = .* run the check as a job's rank$"):
        place_of(environment)


@pytest.mark.parametrize(
    ("environment", "gpus"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": ""}, None),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles", "SLURM_GPUS_ON_NODE": "8"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0, 1"}, ("0", "1")),
        ({"SLURM_JOB_GPUS": "0,1"}, ()),
        ({"SLURM_GPUS_ON_NODE": "8"}, ()),
        ({"SLURM_GPUS_ON_NODE": "0"}, None),
    ],
)
def test_whether_a_job_has_gpus(environment: dict[str, str], gpus: tuple[str, ...] | None) -> None:
    assert place_of(RANK | environment).gpus == gpus


def test_a_host_list_is_one_name_a_line(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("n1\nn2.cluster\n")
    assert read_hosts(path) == ("n1", "n2.cluster")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "has no host"),
        ("n1\nn1\n", "has a host twice"),
        ("n1\n$(touch x)\n", "is not a host's name"),
        ("n1\n--nodes=9\n", "is not a host's name"),
        ("\x00\n", "is not a host's name"),
    ],
)
def test_what_is_no_host_list_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text)
    with pytest.raises(ValueError, match=says):
        read_hosts(path)


def test_a_host_is_found_by_its_short_name_too() -> None:
    hosts = ("n1", "n3")
    assert find_host(place_of(RANK), hosts) == 1
    assert find_host(place_of(RANK | {"SLURMD_NODENAME": "n3.cluster.org"}), hosts) == 1
    with pytest.raises(ValueError, match=r"^node n4 is not in the host list$"):
        find_host(place_of(RANK | {"SLURMD_NODENAME": "n4"}), hosts)


def test_meeting_ports_are_apart_from_each_other_and_from_rendezvous_ports() -> None:
    ports = [meeting_port(15042, node, far) for node in range(128) for far in range(3)]
    assert len(set(ports)) == len(ports)
    assert all(30000 <= port < 32768 for port in ports)  # job scripts take 15000 to 29999
    # Two jobs with neighbouring ids on the same few nodes.
    both = [meeting_port(port, node, far) for port in (15042, 15043) for node in range(16)
            for far in range(3)]  # fmt: skip
    assert len(set(both)) == len(both)
