"""What nvidia-smi says -> what is wrong with a GPU, through a stand-in that answers by field."""

from pathlib import Path

import pytest

from launch.preflight.gpu import NoAnswer, ask_gpus, gpu_faults, gpu_versions
from launch.preflight.limits import Limits
from launch.preflight.place import Place
from tests.unit.launch_preflight import fake_smi
from tests.unit.launch_preflight.fake_smi import gpus, uuid, write_table

ECC = "ecc.errors.uncorrected.volatile.total"
LIFETIME = "ecc.errors.uncorrected.aggregate.total"


def place(local_rank: int = 5, names: tuple[str, ...] = tuple("01234567")) -> Place:
    return Place("n3", 29, local_rank, 8, names, 15000)


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an nvidia-smi of eight healthy H100."""
    programs = fake_smi.install(tmp_path, gpus(8))
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    monkeypatch.setenv("SLURMD_NODENAME", "n3")
    return tmp_path


def faults(limits: Limits | None = None, where: Place | None = None) -> list[str]:
    limits, where = limits or Limits(), where or place()
    return gpu_faults(ask_gpus(where, limits), where, limits)


def test_a_healthy_gpu_has_no_fault(smi: Path) -> None:
    assert faults(Limits(ecc_errors_lifetime=0, temperature_c=80)) == []
    assert gpu_versions(ask_gpus(place(), Limits())) == {
        "GPU driver": "550.90.07",
        "GPU model": "NVIDIA H100 80GB HBM3",
        "GPU max MHz": "1980",
    }


@pytest.mark.parametrize(
    ("changes", "limits", "says"),
    [
        ({ECC: "12"}, Limits(), "has 12 uncorrected ECC errors"),
        ({ECC: "12"}, Limits(ecc_errors=12), None),
        ({LIFETIME: "3"}, Limits(), None),
        (
            {LIFETIME: "3"},
            Limits(ecc_errors_lifetime=2),
            "has 3 uncorrected ECC errors in its life",
        ),
        (
            {"retired_pages.pending": "Yes"},
            Limits(),
            "waits for a reset to retire bad pages of memory",
        ),
        (
            {"clocks_event_reasons.hw_slowdown": "Active",
             "clocks_event_reasons.hw_thermal_slowdown": "Active"},
            Limits(),
            "is slowed down by its hardware (hw_slowdown, hw_thermal_slowdown) to 345 of 1980 MHz",
        ),
        (
            {"clocks_event_reasons.hw_power_brake_slowdown": "Active"},
            Limits(),
            "is slowed down by its hardware (hw_power_brake_slowdown) to 345 of 1980 MHz",
        ),
        ({"pcie.link.width.current": "8"}, Limits(), "has 8 of 16 PCIe lanes"),
        ({"temperature.gpu": "91"}, Limits(), None),
        ({"temperature.gpu": "91"}, Limits(temperature_c=90), "is at 91 degrees Celsius"),
        ({"memory.used": "1024"}, Limits(), None),
        ({"memory.used": "1025"}, Limits(used_mib=1025), None),
        ({"temperature.gpu": "[GPU is lost]"}, Limits(), "does not answer: [GPU is lost]"),
        ({ECC: "[Unknown Error]"}, Limits(), "does not answer: [Unknown Error]"),
    ],
)  # fmt: skip
def test_a_fault_of_a_gpu_is_named_with_its_value(
    smi: Path, changes: dict[str, str], limits: Limits, says: str | None
) -> None:
    write_table(smi, "gpu.n3", gpus(8, gpu5=changes))
    assert faults(limits) == ([f"GPU 5 {says}"] if says else [])
    assert faults(limits, place(local_rank=4)) == []  # each rank speaks of its own


@pytest.mark.parametrize("other", [gpus(8, fake_smi.GEFORCE), [{"index": "0", "uuid": uuid(0)}]])
def test_what_a_gpu_does_not_have_is_no_fault(smi: Path, other: list[dict[str, str]]) -> None:
    """A GeForce without ECC; a version of nvidia-smi that knows hardly any field."""
    write_table(smi, "gpu", other)
    (smi / "remapped-rows").unlink()
    limits = Limits(gpus=len(other), temperature_c=80, ecc_errors_lifetime=0)
    assert faults(limits, place(local_rank=0)) == []


def test_drivers_before_535_name_the_slowdown_otherwise(smi: Path) -> None:
    rows = gpus(8, gpu5={"clocks_event_reasons.hw_slowdown": "Active"})
    older = [
        {name.replace("_event_", "_throttle_"): text for name, text in row.items()} for row in rows
    ]
    write_table(smi, "gpu", older)
    assert faults() == ["GPU 5 is slowed down by its hardware (hw_slowdown) to 345 of 1980 MHz"]


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("remapped_rows.pending", "waits for a reset to remap bad rows of memory"),
        ("remapped_rows.failure", "has no rows left to remap bad ones to"),
    ],
)
@pytest.mark.parametrize("yes", ["1", "Yes"])
def test_rows_that_could_not_be_remapped(smi: Path, field: str, says: str, yes: str) -> None:
    rows = fake_smi.healthy_rows(8)
    rows[5][field] = yes
    write_table(smi, "remapped-rows", rows)
    assert faults() == [f"GPU 5 {says}"]
    assert faults(where=place(local_rank=4)) == []


def test_memory_that_somebody_takes_is_named_with_the_process(smi: Path) -> None:
    write_table(smi, "gpu", gpus(8, gpu5={"memory.used": "70312"}))
    says = "GPU 5 has 70312 MiB taken by"
    process = {"pid": "4711", "process_name": "python", "used_memory": "70000"}
    write_table(smi, "compute-apps", [{"gpu_uuid": uuid(4), **process}])
    assert faults() == [f"{says} somebody else"]
    write_table(smi, "compute-apps", [{"gpu_uuid": uuid(5), **process}])
    assert faults() == [f"{says} python (4711)"]


def test_missing_gpus_are_counted(smi: Path) -> None:
    write_table(smi, "gpu", gpus(7))
    assert faults() == ["7 of 8 GPUs are there"]
    assert faults(Limits(gpus=7)) == []
    assert faults(Limits(gpus=7), place(7)) == ["GPU 7 is not among those of nvidia-smi"]


@pytest.mark.parametrize(
    ("names", "own"),
    [
        (("4", "5", "6", "7"), "GPU 6"),  # four of eight GPUs, without cgroups
        ((), "GPU 2"),  # with cgroups, and no list
        (("7",), "GPU 7"),  # each task bound to its own
        (tuple(uuid(i) for i in range(8)), "GPU 2"),
        (tuple(uuid(i)[:12] for i in range(8)), "GPU 2"),
    ],
)
def test_a_rank_finds_its_own_gpu(smi: Path, names: tuple[str, ...], own: str) -> None:
    slow = {"pcie.link.width.current": "1"}
    write_table(smi, "gpu", gpus(8, **{f"gpu{i}": slow for i in range(8)}))
    assert faults(where=place(2, names)) == [f"{own} has 1 of 16 PCIe lanes"]


def test_a_slice_of_a_gpu_is_not_looked_for(smi: Path) -> None:
    assert faults(where=place(0, ("MIG-5c89852c-d268-c3f3-1b07-005d5ae1dc3f",))) == []


def test_without_nvidia_smi_there_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoAnswer, match=r"^nvidia-smi cannot be started: No such file"):
        ask_gpus(place(), Limits())


def test_an_nvidia_smi_that_fails_says_why(smi: Path) -> None:
    (smi / "gpu").unlink()
    with pytest.raises(NoAnswer, match=r"^nvidia-smi failed with status 15: .*GPU is lost"):
        ask_gpus(place(), Limits())
