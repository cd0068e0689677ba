"""The sums find every kind of damage and name the file; the tracker moves in one step or not."""

import json
from pathlib import Path

import pytest

from megatron_mone.checkpoint import tracker
from megatron_mone.checkpoint.integrity import (
    SUMS_NAME,
    find_damage,
    own_files,
    read_sums,
    sum_files,
    write_sums,
)

FILES = ("__0_0.distcp", "__1_0.distcp", "__11_3.distcp", ".metadata", "metadata.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint folder of five files, summed."""
    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    for number, name in enumerate(FILES):
        (folder / name).write_bytes(bytes([number]) * (1000 + number))
    write_sums(folder, sum_files(folder, FILES))
    return folder


def damage(folder: Path, sums: bool = True) -> str | None:
    entries = read_sums(folder)
    assert entries is not None
    return find_damage(folder, entries, sums)


def test_whole(folder):
    entries = read_sums(folder)
    assert entries is not None
    assert sorted(entries) == sorted(FILES)
    assert damage(folder) is None


def test_every_file_has_one_owner(folder):
    """A rank sums what it wrote; rank 0 also what carries no rank; nobody sums the sums."""
    owned = [own_files(folder, rank) for rank in range(12)]
    assert owned[1] == ["__1_0.distcp"]
    assert owned[11] == ["__11_3.distcp"]
    assert sorted(name for names in owned for name in names) == sorted(FILES)


@pytest.mark.parametrize("name", FILES)
def test_each_kind_of_damage_names_the_file(folder, name):
    path, data = folder / name, (folder / name).read_bytes()
    path.write_bytes(data[:-1])
    assert damage(folder, sums=False) == (
        f"checkpoint file {path} is truncated: {len(data) - 1} bytes, saved with {len(data)}"
    )
    path.write_bytes(data + b"x")
    assert f"{path} is too long" in (damage(folder, sums=False) or "")
    path.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    assert damage(folder, sums=False) is None
    assert f"{path} is corrupted" in (damage(folder) or "")
    path.unlink()
    assert f"{path} is missing" in (damage(folder, sums=False) or "")


def test_damage_to_the_sums_is_not_blamed_on_a_file(folder):
    path = folder / SUMS_NAME
    text = path.read_text()
    first = json.loads(text)["files"]["metadata.json"]
    other = ("0" if first[0] != "0" else "1") + first[1:]
    for broken in (text[:100], text.replace(first, other), "[]", ""):
        path.write_text(broken)
        with pytest.raises(ValueError, match=f"{path} is corrupted"):
            read_sums(folder)


def test_no_name_leads_out_of_the_folder(folder):
    (folder / SUMS_NAME).write_text(
        json.dumps({"algorithm": "sha256", "files": {"../../etc/passwd": "00"}})
    )
    with pytest.raises(ValueError, match="points out of the folder"):
        read_sums(folder)


def test_megatron_reads_our_sums_and_we_read_megatrons(folder):
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.dist_checkpointing.validation import (
        _verify_integrity_manifest_impl,
        save_integrity_manifest,
    )

    _verify_integrity_manifest_impl(str(folder))
    (folder / SUMS_NAME).unlink()
    save_integrity_manifest(str(folder))
    assert damage(folder) is None
    (folder / "metadata.json").write_text("{}")
    assert "metadata.json is corrupted" in (damage(folder) or "")
    with pytest.raises(CheckpointingException, match=r"metadata\.json"):
        _verify_integrity_manifest_impl(str(folder))


def test_tracker_is_old_or_new_never_empty(tmp_path):
    """What Megatron would leave empty between open and write still holds the old iteration."""
    path = tmp_path / tracker.TRACKER_NAME
    storage = tracker.TrackerStorage(Path)
    tracker.commit(path, "2")
    with storage.open(str(path), "w") as file:
        assert tracker.read_tracker(tmp_path) == "2"
        file.write("4")
        assert tracker.read_tracker(tmp_path) == "2"
    assert tracker.read_tracker(tmp_path) == "4"
    file = storage.open(str(path), "w")
    file.write("6")
    file.__exit__(RuntimeError, RuntimeError(), None)
    assert tracker.read_tracker(tmp_path) == "4"


def test_commit_needs_no_new_space_after_stage(tmp_path, monkeypatch):
    path = tmp_path / tracker.TRACKER_NAME
    tracker.stage(path, "8")
    monkeypatch.setattr(tracker, "stage", None)
    tracker.commit(path, "8")
    assert tracker.read_tracker(tmp_path) == "8"
    assert [p.name for p in tmp_path.iterdir()] == [tracker.TRACKER_NAME]


def test_iterations_are_those_of_folders(tmp_path):
    for name in ("iter_0000002", "iter_0000010", "iter_x", "release"):
        (tmp_path / name).mkdir()
    (tmp_path / "iter_0000012").write_text("")
    assert tracker.iterations(tmp_path) == [10, 2]
