"""A save frozen at any moment leaves a newer attempt's checkpoint of the same iteration alone.

Two ranks save over and over; one of them is stopped before each of its writes in turn. Meanwhile a
newer attempt takes the lease and saves the same iteration, whole; then the rank goes on.
"""

import json
import multiprocessing
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_mone.checkpoint import ownership
from megatron_mone.checkpoint.integrity import SUMS_NAME, find_damage, read_sums
from megatron_mone.checkpoint.lease.keeper import Keeper
from megatron_mone.checkpoint.lease.lease import Holder, LeaseLostError, this_process
from megatron_mone.checkpoint.lease.taking import Contender
from megatron_mone.checkpoint.tracker import TRACKER_NAME, commit, iterations, read_tracker
from tests import forked_ranks

RANKS = 2
NEXT = Holder("42.1", "n4", 99, 5, "another boot", 3600.0)
BEFORE = {
    "a new iteration": ([4], 4),
    "one taken back": ([4, 8], 4),
    "a new run over an old folder": ([8], None),
}
"""What is there: iterations, the tracker naming the last, and which one the run came from."""
TAKEN = "was taken over by attempt 42.1"
UNDER_WAY = ".saving-0000000g-iter_0000012"
PLACES = (
    ("__0_0.distcp", "exists", ".metadata.tmp", "metadata.json", f"rename .{TRACKER_NAME}.next"),
    ("__1_0.distcp", "exists"),
)
"""Some of the moments at which each rank is stopped."""
_WRITES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.rmtree")


class Moments:
    """Counts this process's writes into a folder and its looks; before one it does something."""

    def __init__(self) -> None:
        self.folder, self.seen, self.at = "", 0, ""
        self.stop, self.meanwhile = -1, lambda: None
        sys.addaudithook(self._note)

    def watch(self, folder: Path, stop: int, meanwhile: Callable[[], None]) -> None:
        """From here on; `meanwhile()` is called before number `stop`, whose name is then `at`."""
        self.stop, self.meanwhile, self.seen, self.folder = stop, meanwhile, 0, f"{folder}/"

    def end(self) -> int:
        """How many there were."""
        self.folder = ""
        return self.seen

    def before(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, each call of which is a moment too; a look, where it is one."""

        def noted(*details: Any) -> Any:
            if self.folder and (details or ownership._keeper):
                self._come(function.__name__)
            return function(*details)

        return noted

    def _note(self, event: str, details: tuple) -> None:
        if not self.folder or (event != "open" and event not in _WRITES):
            return
        path = str(details[0])
        if event == "open" and not set(str(details[1])) & set("wxa+"):
            return
        if path.startswith(self.folder) and "/.lease-" not in path:
            self._come(f"{event} {path.removeprefix(self.folder)}")

    def _come(self, what: str) -> None:
        number, self.seen = self.seen, self.seen + 1
        if number == self.stop:
            watched, self.folder, self.at = self.folder, "", f"{number}: {what}"
            self.meanwhile()
            self.folder = watched


class Saves:
    """One rank, and what it needs to save as Megatron does."""

    def __init__(self, work: Path, case: str) -> None:
        import torch
        from megatron.core import parallel_state
        from torch.distributed.checkpoint.filesystem import FileSystem

        from megatron_mone.checkpoint import save as safe_save
        from megatron_mone.common.patch import install, wrap

        install(safe_save.PATCHES)
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel()
        self.rank = torch.distributed.get_rank()
        self.work, self.moments = work, Moments()
        wrap(ownership, "look", self.moments.before)
        wrap(FileSystem, "exists", self.moments.before)  # of .metadata, which is removed then
        self.there, self.came_from = BEFORE[case]
        self.whole = work / "whole" / "iter_0000008"

    def prepared(self, name: str) -> Path:
        """A checkpoint folder as it was before the save; this run holds it."""
        import torch
        from megatron.training import checkpointing

        from megatron_mone.checkpoint import save as safe_save

        save = self.work / name
        ownership.release()
        if self.rank == 0:
            save.mkdir()
            for iteration in self.there if self.whole.is_dir() else ():
                shutil.copytree(self.whole, save / f"iter_{iteration:07d}")
                commit(save / TRACKER_NAME, str(iteration))
            me = this_process(3600.0)
            with Contender(save, me) as contender:
                number = contender.take(0.0)
                assert number == 1
                ownership._keeper = Keeper(save, number, me, contender.touched)
        torch.distributed.barrier()
        args = Namespace(
            save=str(save), load=str(save), ckpt_format="torch_dist", async_save=False,
            checkpoint_lease_seconds=3600.0,
        )  # fmt: skip
        safe_save.get_args = lambda: args  # type: ignore[assignment]
        checkpointing._LOADED_ITERATION = self.came_from
        return save

    def save(self, folder: Path) -> None:
        """What Megatron's save_checkpoint does in this order (training/checkpointing.py)."""
        import torch
        from megatron.core import dist_checkpointing
        from megatron.training import checkpointing

        from megatron_mone.checkpoint import save as safe_save

        name = str(folder / "iter_0000008")

        def save_checkpoint() -> None:
            part = dist_checkpointing.ShardedTensor.from_rank_offsets(
                "w", torch.arange(1000.0) + self.rank, (0, self.rank, RANKS)
            )
            if self.rank == 0:
                checkpointing.ensure_directory_exists(name, check_parent=False)
            dist_checkpointing.save({"w": part, "note": "common"}, name)
            torch.distributed.barrier()
            if self.rank == 0:
                tracker = str(folder / TRACKER_NAME)
                with checkpointing.maybe_msc.open(tracker, "w") as file:
                    file.write("8")

        safe_save._held(save_checkpoint)()

    def newer(self, save: Path) -> None:
        """The next attempt: it takes the lease, saves iteration 8 and has begun another save."""
        with Contender(save, NEXT) as contender:
            assert contender.link(2)
        for left in (*save.glob(".saving-*"), *save.glob("iter_0000008")):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        shutil.copytree(self.whole, save / "iter_0000008")
        commit(save / TRACKER_NAME, "8")
        shutil.copytree(self.whole, save / UNDER_WAY)


def contents(save: Path) -> dict[str, tuple[int, bytes]]:
    """Every file of the checkpoints and the tracker: when it was last written, and its bytes."""
    files = (*save.glob("iter_*/*"), *save.glob(f"{UNDER_WAY}/*"), save / TRACKER_NAME)
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files if path.is_file()
    }


def frozen_everywhere(work: Path, case: str, frozen: int) -> None:
    """Rank `frozen` of two, stopped before each of its writes in turn."""
    import torch

    saves = Saves(work, case)
    mine = saves.rank == frozen
    saves.save(saves.prepared("whole"))
    save = saves.prepared("counted")
    if mine:
        saves.moments.watch(save, -1, lambda: None)
    saves.save(save)
    count = [saves.moments.end() if mine else None]
    torch.distributed.broadcast_object_list(count, src=frozen)
    moments: Any = count[0]
    wrong, seen = [], []
    for number in range(moments):
        save = saves.prepared(f"frozen{number}")
        after: dict[str, tuple[int, bytes]] = {}

        def meanwhile(save: Path = save, after: dict = after) -> None:
            saves.newer(save)
            after.update(contents(save))

        if mine:
            saves.moments.watch(save, number, meanwhile)
        said = None
        try:
            saves.save(save)
        except LeaseLostError as error:
            said = str(error)
        except OSError as error:
            said = repr(error)
        saves.moments.end()
        now = contents(save) if mine else {}
        changed = [name for name in {*after, *now} if after.get(name) != now.get(name)]
        if changed or bool(after) != mine or (saves.rank == 0 and TAKEN not in str(said)):
            wrong.append((number, saves.moments.at, said, changed))
        torch.distributed.barrier()
        seen.append(saves.moments.at)
    assert wrong == [], "\n".join(map(str, wrong))
    assert multiprocessing.active_children() == []  # a save of its own process needs no other
    if mine:
        (work / "moments.json").write_text(json.dumps(seen))


@pytest.mark.parametrize(
    ("case", "frozen"), [*((case, 0) for case in BEFORE), ("a new iteration", 1)]
)
def test_frozen_before_any_write_it_leaves_the_newer_checkpoint_alone(tmp_path, case, frozen):
    log = tmp_path / "log"
    launch = forked_ranks.start(RANKS, frozen_everywhere, (tmp_path, case, frozen), log)
    assert launch.wait(600) == 0, log.read_text()[-30000:]
    moments = "\n".join(json.loads((tmp_path / "moments.json").read_text()))
    for place in PLACES[frozen]:
        assert place in moments, moments
    whole = tmp_path / "counted"
    assert iterations(whole)[0] == 8
    assert read_tracker(whole) == "8"
    entries = read_sums(whole / "iter_0000008")
    assert entries
    assert find_damage(whole / "iter_0000008", entries) is None
    assert {p.name for p in (whole / "iter_0000008").iterdir()} == {*entries, SUMS_NAME}
    assert not list(whole.glob(".saving-*"))
