"""A save of a run that lost its folder ends without a trace, whatever else went wrong."""

import signal
from argparse import Namespace
from pathlib import Path

import pytest

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.integrity import read_sums
from megatron_mone.checkpoint.lease.lease import LeaseLostError
from megatron_mone.checkpoint.signals import StopHandler, arm
from megatron_mone.checkpoint.tracker import TRACKER_NAME, read_tracker

LOST = "checkpoint folder X was taken over"
pytestmark = pytest.mark.usefixtures("one_rank")


class LostKeeper:
    """Stands in for a Keeper whose lease is gone, from look `after` + 1 on."""

    def __init__(self, after: int = 0) -> None:
        self.looks_left, self.saves = after, 0

    @property
    def lost(self) -> str | None:
        return None if self.looks_left > 0 else LOST

    def look(self) -> str | None:
        lost, self.looks_left = self.lost, self.looks_left - 1
        return lost

    def begin_save(self) -> None:
        if self.look():
            raise LeaseLostError(LOST)
        self.saves += 1

    def extend_save(self) -> None:
        self.saves += 1

    def end_save(self) -> None:
        self.saves -= 1


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint of iteration 4 that the tracker names, and Megatron's arguments of the run."""
    from megatron_mone.checkpoint import save as safe_save

    folder = tmp_path / "iter_0000004"
    folder.mkdir()
    (folder / "__0_0.distcp").write_text("the new owner's")
    (tmp_path / TRACKER_NAME).write_text("4")
    args = Namespace(save=str(tmp_path), load=None, checkpoint_lease_seconds=60.0, async_save=False)
    monkeypatch.setattr(safe_save, "get_args", lambda: args)
    return tmp_path


def under_way(save: Path, monkeypatch: pytest.MonkeyPatch, name: str = "iter_0000004") -> Path:
    """The folder of a save whose shard is written."""
    from megatron_mone.checkpoint import save as safe_save

    mine = save / f".saving-123-{name}"
    mine.mkdir()
    (mine / "__0_0.distcp").write_text("ours")
    monkeypatch.setattr(safe_save, "_under_way", {save / name: mine})
    return mine


def untouched(save: Path) -> bool:
    shard = save / "iter_0000004" / "__0_0.distcp"
    return shard.read_text() == "the new owner's" and read_tracker(save) == "4"


def test_lost_before_a_save_nothing_is_emptied(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    monkeypatch.setattr(ownership, "_keeper", LostKeeper())
    held = safe_save._held(lambda *args: pytest.fail("the save began"))
    with pytest.raises(LeaseLostError, match=LOST):
        held(4)
    assert untouched(save)


def test_lost_while_the_shards_are_written_nothing_is_sealed(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    mine = under_way(save, monkeypatch)
    keeper = LostKeeper(after=1)
    monkeypatch.setattr(ownership, "_keeper", keeper)
    held = safe_save._held(lambda *args: safe_save._seal(save / "iter_0000004"))
    with pytest.raises(LeaseLostError, match=LOST):
        held(4)
    assert untouched(save)
    assert [path.name for path in (save / "iter_0000004").iterdir()] == ["__0_0.distcp"]
    assert [path.name for path in mine.iterdir()] == ["__0_0.distcp"]
    assert keeper.saves == 0


def test_a_failed_save_frees_no_space_in_a_lost_folder(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    mine = under_way(save, monkeypatch)
    monkeypatch.setattr(ownership, "_keeper", LostKeeper())
    with pytest.raises(LeaseLostError, match=LOST):
        safe_save._agree(save / "iter_0000004", "a disk was full")
    monkeypatch.setattr(ownership, "_keeper", LostKeeper(after=1))
    with pytest.raises(safe_save.SaveFailedError):
        safe_save._agree(save / "iter_0000004", "a disk was full")
    assert untouched(save)
    assert [path.name for path in mine.iterdir()] == ["__0_0.distcp"]


def test_a_failed_save_frees_its_space_in_a_folder_held(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    mine = under_way(save, monkeypatch)
    monkeypatch.setattr(ownership, "_keeper", LostKeeper(after=2))
    with pytest.raises(safe_save.SaveFailedError):
        safe_save._agree(save / "iter_0000004", "a disk was full")
    assert untouched(save)
    assert not mine.exists()
    assert not list(save.glob(".saving-*"))


def test_a_place_that_is_taken_is_left_alone(save, monkeypatch):
    """By whom is not known: the lease is held. The line names the folder."""
    from megatron_mone.checkpoint import save as safe_save

    mine = under_way(save, monkeypatch)
    monkeypatch.setattr(ownership, "_keeper", LostKeeper(after=9))
    with pytest.raises(safe_save.SaveFailedError, match=r"iter_0000004 could not .* not empty on"):
        safe_save._seal(save / "iter_0000004")
    assert untouched(save)
    assert not mine.exists()


def test_a_save_replaces_files_and_keeps_what_megatron_put_there_before(save, monkeypatch):
    """A dataloader's state, where its folder is this one; and other saves under way."""
    from megatron_mone.checkpoint import save as safe_save

    state = save / "iter_0000004" / "mp_rank_00" / "train_dataloader_dprank000.pt"
    state.parent.mkdir()
    state.write_text("the data's place")
    others = under_way(save, monkeypatch, "iter_0000002")
    left = save / ".saving-abc-iter_0000003"
    left.mkdir()
    mine = save / ".saving-def-iter_0000004"
    safe_save._under_way[save / "iter_0000004"] = mine
    safe_save._prepare(save / "iter_0000004")
    assert sorted(save.glob(".saving-*")) == sorted((mine, others))
    assert [str(path.relative_to(mine)) for path in mine.rglob("*.*")] == [
        "mp_rank_00/train_dataloader_dprank000.pt"
    ]
    assert not (save / "iter_0000004").exists()
    assert read_tracker(save) is None


def test_two_saves_in_the_background_end_each_in_its_place(save, monkeypatch):
    """The second begins before the first has ended, and leaves the first's folder alone."""
    from megatron_mone.checkpoint import save as safe_save

    class Request(list):
        add_finalize_fn = list.append

    def write(state: str, folder: str) -> Request:
        (Path(folder) / "__0_0.distcp").write_text(state)
        return Request()

    monkeypatch.setattr(ownership, "_keeper", LostKeeper(after=99))
    sealed = safe_save._sealed(write)
    folders = [save / f"iter_{number:07d}" for number in (8, 12)]
    requests = [sealed(folder.name, str(folder)) for folder in folders]
    assert len(list(save.glob(".saving-*"))) == 2
    assert not any(folder.exists() for folder in folders)
    for folder, (finish,) in zip(folders, requests, strict=True):
        finish()
        assert (folder / "__0_0.distcp").read_text() == folder.name
        assert list(read_sums(folder) or ()) == ["__0_0.distcp"]
    assert not list(save.glob(".saving-*"))
    assert untouched(save)


def test_what_follows_the_shards_goes_where_they_are(save, monkeypatch):
    """As sharded ModelOpt state does, written while the shards are in the background."""
    from megatron_mone.checkpoint import save as safe_save

    mine = under_way(save, monkeypatch)
    where = safe_save._beside_too(lambda model, checkpoint_name, form: checkpoint_name)
    assert where([], str(save / "iter_0000004"), ("torch_dist", 1)) == str(mine)
    assert where([], str(save / "iter_0000008"), ("torch_dist", 1)) == str(save / "iter_0000008")


def test_a_checkpoint_has_no_folder_before_it_is_whole(save):
    """Of its name; Megatron makes one at once, and other formats write into it."""
    from megatron_mone.checkpoint import save as safe_save

    made = []
    ensure = safe_save._not_yet(lambda name, check_parent=True: made.append(name))
    for form in ("torch_dist", "torch_dcp"):
        safe_save.get_args().ckpt_format = form
        ensure(f"{form}/iter_0000008", check_parent=False)
        ensure(f"{form}/iter_0000008/mp_rank_00/a.pt")
    assert made == [
        "torch_dist/iter_0000008/mp_rank_00/a.pt",
        "torch_dcp/iter_0000008",
        "torch_dcp/iter_0000008/mp_rank_00/a.pt",
    ]


def test_lost_at_the_last_moment_the_tracker_stays(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    storage = safe_save._HeldTrackerStorage(None)
    for keeper, text in ((LostKeeper(), "4"), (LostKeeper(after=1), "8")):
        monkeypatch.setattr(ownership, "_keeper", keeper)
        try:
            with storage.open(save / TRACKER_NAME, "w") as file:
                file.write("8")
        except LeaseLostError:
            assert text == "4"
        assert read_tracker(save) == text


@pytest.mark.parametrize("in_background", [False, True])
def test_a_background_save_ends_with_the_tracker(save, monkeypatch, in_background):
    from megatron_mone.checkpoint import save as safe_save

    keeper = LostKeeper(after=9)
    monkeypatch.setattr(ownership, "_keeper", keeper)
    safe_save.get_args().async_save = in_background
    held = safe_save._held(lambda *args: keeper.extend_save() if in_background else None)
    held(8)
    assert keeper.saves == int(in_background)
    with safe_save._HeldTrackerStorage(None).open(save / TRACKER_NAME, "w") as file:
        file.write("8")
    assert (keeper.saves, read_tracker(save)) == (0, "8")


def test_a_save_that_cannot_look_fails(save, monkeypatch):
    from megatron_mone.checkpoint import save as safe_save

    class Unreachable(LostKeeper):
        def begin_save(self) -> None:
            raise OSError(5, "Input/output error")

    monkeypatch.setattr(ownership, "_keeper", Unreachable())
    held = safe_save._held(lambda *args: pytest.fail("the save began"))
    with pytest.raises(safe_save.SaveFailedError, match=r"cannot be reached \(Input/output error"):
        held(4)


def test_the_run_stops_at_the_end_of_the_step(monkeypatch):
    """In place of the save that a stop signal asks for, though one came as well."""
    handler = StopHandler((signal.SIGUSR1,))
    handler.release()  # of the process's own signals
    monkeypatch.setattr(ownership, "_keeper", LostKeeper(after=1))
    assert handler.signals_received() == [0]
    handler._receive(0, None)
    monkeypatch.setattr(ownership, "_keeper", LostKeeper())
    with pytest.raises(LeaseLostError, match=LOST):
        handler.signals_received()
    assert not handler.stopped


def test_the_handler_of_exit_signal_handler_gives_way():
    """Megatron has its own where the flag is given; the signals are ours until `release`."""
    from megatron.training import global_vars

    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    global_vars._set_signal_handler(signal.SIGTERM)
    handler = arm(Namespace(exit_signal=signal.SIGTERM))
    try:
        assert global_vars.get_signal_handler() is handler
        assert [signal.getsignal(number) for number in numbers] == [handler._receive] * 2
    finally:
        handler.release()
        global_vars._GLOBAL_SIGNAL_HANDLER = None
    assert [signal.getsignal(number) for number in numbers] == before
