"""Disk, memory, the shared folder and the versions of a node."""

from pathlib import Path

import pytest

from launch.preflight.limits import Limits
from launch.preflight.node import (
    memory_faults,
    run_folder_faults,
    software_versions,
    sources_digest,
    temporary_folder_faults,
)

ROOMY = Limits(run_disk_gib=0, tmp_disk_gib=0, memory_gib=0)
HUGE = 1e9  # GiB that no disk has


def test_a_folder_that_keeps_what_is_written_has_no_fault(tmp_path: Path) -> None:
    assert run_folder_faults(tmp_path, "0-1", ROOMY) == []
    assert list(tmp_path.iterdir()) == []


def test_a_full_run_folder_is_named_with_both_sizes(tmp_path: Path) -> None:
    (fault,) = run_folder_faults(tmp_path, "0-1", Limits(run_disk_gib=HUGE))
    assert fault.endswith(" GiB free in the run folder, 1e+09 are needed")


def test_an_absent_run_folder_says_so(tmp_path: Path) -> None:
    assert run_folder_faults(tmp_path / "gone", "0-1", ROOMY) == [
        "the run folder does not answer: No such file or directory",
        "the run folder cannot be written: No such file or directory",
    ]


def test_another_s_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / ".check-0-1").write_text("another's")
    assert run_folder_faults(tmp_path, "0-1", ROOMY) == [
        "the run folder cannot be written: File exists"
    ]
    assert (tmp_path / ".check-0-1").read_text() == "another's"


def test_a_folder_that_gives_back_something_else_is_bad(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_args, **_kwargs: "stale")
    faults = run_folder_faults(tmp_path, "0-1", ROOMY)
    assert faults == ["the run folder does not keep what is written"]


def test_the_temporary_folder_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert temporary_folder_faults(ROOMY) == []
    (fault,) = temporary_folder_faults(Limits(tmp_disk_gib=HUGE))
    assert fault.endswith(" GiB free in the temporary folder, 1e+09 are needed")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    (fault,) = temporary_folder_faults(ROOMY)
    assert fault == "the temporary folder does not answer: No such file or directory"


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("MemTotal: 9 kB\nMemAvailable:   2097152 kB\n", []),
        ("MemAvailable:   1048576 kB\n", ["1.0 GiB of main memory, 2 are needed"]),
        ("MemFree: 1 kB\n", []),  # a kernel before 3.14 does not say
        ("", []),
    ],
)
def test_memory_is_what_the_kernel_says_is_available(text: str, faults: list[str]) -> None:
    assert memory_faults(text, Limits(memory_gib=2)) == faults


def test_versions_are_those_of_the_installed_packages() -> None:
    import torch
    from megatron.core.package_info import __version__ as megatron_version

    versions = software_versions()
    assert torch.__version__.startswith(versions["torch"])
    assert versions["megatron-core"] == megatron_version
    assert len(versions["megatron-mone sources"]) == 12


def test_the_digest_follows_contents_and_names_of_sources_only(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    first = sources_digest([tmp_path])
    (tmp_path / "notes.txt").write_text("no source")
    assert sources_digest([tmp_path]) == first
    (tmp_path / "a.py").write_text("x = 2\n")
    second = sources_digest([tmp_path])
    (tmp_path / "a.py").rename(tmp_path / "b.py")
    third = sources_digest([tmp_path])
    assert len({first, second, third}) == 3
