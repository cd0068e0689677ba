"""Whatever ends a run, the next start goes on as if nothing had happened, bit for bit.

Two ranks, EP 2, distributed optimizer, a save every second step of twelve; every loss of every
interrupted run is compared with those of a run that was never stopped. Kills at random moments meet
DeepSpeed's engine as often as Megatron's.
"""

import contextlib
import datetime
import functools
import itertools
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from megatron_mone.checkpoint.integrity import find_damage, read_sums
from megatron_mone.checkpoint.tracker import TRACKER_NAME, iterations, read_tracker
from tests.integration.crash_ranks import RANKS, STEPS, RankServer, flags, wait_for

pytestmark = pytest.mark.slow
KILLS = 20
TURNS = ("Megatron", "ZeRO 1", "Megatron", "ZeRO 3")
"""Whose run each kill in turn meets."""
WHOLE = "whole-Megatron-save"
"""The checkpoints of Megatron's run that is never stopped."""
SEED = 20


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory):
    server = RankServer(tmp_path_factory.mktemp("crash"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole_of(server: RankServer) -> Callable[[str], dict[int, str]]:
    """engine -> the losses of its run that is never stopped, and leaves whole-ENGINE-save."""

    @functools.cache
    def run(engine: str) -> dict[int, str]:
        name = f"whole-{engine}"
        argv = flags(server.folder / f"{name}-save", engine=engine)
        assert server.run(name, argv) == [0] * RANKS, server.log(name)[-3000:]
        losses = server.losses(name)
        assert sorted(losses) == list(range(1, STEPS + 1))
        return losses

    return run


@pytest.fixture
def whole(whole_of) -> dict[int, str]:
    """Of Megatron's engine."""
    return whole_of("Megatron")


def pace(server: RankServer, engine: str) -> tuple[float, float]:
    """Seconds of its whole run and of the longest save, on this machine as busy as it is now."""
    folder, log = server.folder / f"whole-{engine}-save", server.folder / f"whole-{engine}.0.log"
    start = log.stat().st_ctime
    saves = []
    for number in iterations(folder):
        times = [path.stat().st_mtime for path in (folder / f"iter_{number:07d}").iterdir()]
        saves.append(max(times) - min(times))
    lines = log.read_text()
    begun = re.search(r"before library-setup\] datetime: (\S+ \S+)", lines)
    assert begun is not None
    began = datetime.datetime.fromisoformat(begun[1]).timestamp()
    return start - began, max(saves)


def agrees(server: RankServer, whole: dict[int, str], *names: str) -> set[int]:
    """Every loss of the named runs is the whole run's; returns the steps they took."""
    steps: set[int] = set()
    for name in names:
        losses = server.losses(name)
        assert losses == {step: whole[step] for step in losses}, name
        steps |= set(losses)
    return steps


def check_resumable(save: Path, since: float = 0.0) -> bool:
    """The tracker names a whole checkpoint, or none yet.

    Returns:
        Whether there is a newer one, half-written under another name or not yet named, touched
        after `since`.
    """
    text = read_tracker(save)
    if text is not None:
        folder = save / f"iter_{int(text):07d}"
        entries = read_sums(folder)
        assert entries, folder
        assert find_damage(folder, entries) is None
    newer = [save / f"iter_{n:07d}" for n in iterations(save) if n > int(text or 0)]
    for folder in newer:  # one has its name when it is whole
        entries = read_sums(folder)
        assert entries, folder
        assert find_damage(folder, entries) is None
    return any(path.stat().st_mtime >= since for path in (*newer, *save.glob(".saving-*")))


def resume(server: RankServer, whole: dict[int, str], name: str, argv: list[str]) -> set[int]:
    """Run to the end; the losses must match and the last step must be reached."""
    assert server.run(name, argv) == [0] * RANKS, server.log(name)[-3000:]
    steps = agrees(server, whole, name)
    assert max(steps) == STEPS
    return steps


def ended(pids: list[int]) -> bool:
    """Whether a rank has ended and been reaped."""
    try:
        for pid in pids:
            os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def has_begun(log: Path, saves: int, pids: list[int]) -> bool:
    """Whether the run has begun so many saves, or will begin none."""
    return log.read_text().count("] saving") >= saves or ended(pids)


def test_a_run_nobody_waited_for_is_ended_before_the_next(server):
    """Left behind, it would answer in the next one's place, statuses where pids are expected."""
    left = server.start("left", flags(server.folder / "left-save"), trouble="0 starts_late")
    assert (server.folder / "left.0.log").is_file()
    pids = server.start("next", flags(server.folder / "next-save"))
    assert all(ended([pid]) for pid in left)
    assert not ended(pids)
    server.end()
    assert all(ended([pid]) for pid in pids)
    server.end()


@dataclass
class Lineage:
    """Runs of one engine in one folder after another, each gone on with until it is finished.

    Attributes:
        engine: of `crash_ranks.ENGINES`.
        whole: losses of the run that is never stopped.
        pace: of that run, as `pace` returns it.
        finished: how many folders are.
        runs: in the folder that is not.
    """

    engine: str
    whole: dict[int, str]
    pace: tuple[float, float]
    finished: int = 0
    runs: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of the folder."""
        return f"{self.engine}-{self.finished}"


def kill_once(server: RankServer, lineage: Lineage, chance: random.Random) -> bool | None:
    """Start or resume its run and kill a rank at a random moment, most often in a save.

    Returns:
        Whether a half-written checkpoint was left; None where the run had just ended.
    """
    save = server.folder / lineage.name
    name = f"kill-{lineage.name}-{len(lineage.runs)}"
    lineage.runs.append(name)
    run_seconds, save_seconds = lineage.pace
    started = time.time()
    pids = server.start(name, flags(save, engine=lineage.engine))
    victim = chance.randrange(RANKS)
    if chance.random() < 0.7:
        log = server.folder / f"{name}.0.log"
        wait_for(functools.partial(has_begun, log, chance.choice((1, 1, 2)), pids), 300)
        time.sleep(chance.uniform(0, 1.5 * save_seconds))
    else:
        time.sleep(chance.uniform(0, run_seconds))
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids[victim], signal.SIGKILL)
    statuses = server.wait()
    agrees(server, lineage.whole, name)
    assert statuses[victim] in (0, -signal.SIGKILL), server.log(name)[-3000:]
    if statuses[1 - victim] == 1:
        said = (server.folder / f"{name}.{1 - victim}.log").read_text(errors="replace")
        assert "onnection" in said[-3000:], said[-3000:]  # gloo noticed before the server
    half_written = check_resumable(save, started) if statuses[victim] != 0 else None
    if read_tracker(save) == str(STEPS):
        assert agrees(server, lineage.whole, *lineage.runs) == set(lineage.whole)
        lineage.finished, lineage.runs = lineage.finished + 1, []
    return half_written


def test_twenty_kills(server, whole_of):
    """A rank killed at 20 random moments, most of them in a save, leaves nothing unresumable."""
    chance = random.Random(SEED)
    lineages = {
        engine: Lineage(engine, whole_of(engine), pace(server, engine))
        for engine in dict.fromkeys(TURNS)
    }
    turns = itertools.cycle(TURNS)
    left: list[bool] = []
    while len(left) < KILLS:
        lineage = lineages[next(turns)]
        while (half_written := kill_once(server, lineage, chance)) is None:
            pass
        left.append(half_written)
    print(f"{KILLS} kills, {sum(left)} left a half-written checkpoint")
    assert sum(left) >= 4
    for one in lineages.values():
        argv = flags(server.folder / one.name, engine=one.engine)
        resume(server, one.whole, f"after-kills-{one.engine}", argv)


def test_kill_at_each_stage_of_a_save(server, whole):
    """One lineage, killed in turn at every place where the state on disk changes."""
    save, runs = server.folder / "stages", []
    for rank, place in (
        (1, "dies_in_shard"),
        (0, "dies_before_mark"),
        (0, "dies_before_sums"),
        (0, "dies_in_stock_tracker_write"),
        (0, "dies_before_commit"),
    ):
        runs.append(place)
        statuses = server.run(place, flags(save), trouble=f"{rank} {place}")
        assert statuses[rank] == -signal.SIGKILL, server.log(place)[-3000:]
        assert check_resumable(save)
        assert read_tracker(save) is None
    assert [path.name for path in save.glob("iter_*")] == ["iter_0000002"]  # of the last two
    (save / "iter_0000002" / "__7_0.distcp").write_text("left by a job of eight ranks")
    resume(server, whole, "after-stages", flags(save))
    assert not (save / "iter_0000002" / "__7_0.distcp").exists()
    assert not list(save.glob(".saving-*"))
    assert agrees(server, whole, *runs) == {1, 2}


@pytest.mark.parametrize(
    ("number", "rank", "engine"),
    [
        (signal.SIGTERM, 0, "Megatron"),
        (signal.SIGUSR1, 1, "Megatron"),
        (signal.SIGTERM, 1, "ZeRO 3"),
    ],
)
def test_signal_to_one_rank(server, whole_of, number, rank, engine):
    """All ranks save at the step's end and exit 75; the rest of the run matches."""
    whole, name = whole_of(engine), f"{number.name}-{engine}"
    save = server.folder / name
    argv = flags(save, engine=engine)
    pids = server.start(name, argv, ends_others=False)
    losses = server.folder / f"{name}.{rank}.loss"
    assert wait_for(lambda: losses.is_file() and len(losses.read_text().splitlines()) >= 3, 300)
    os.kill(pids[rank], number)
    assert server.wait() == [75, 75], server.log(name)[-3000:]
    stopped = int(read_tracker(save) or 0)
    assert 3 <= stopped < STEPS
    assert stopped == max(agrees(server, whole, name))
    assert not check_resumable(save)
    steps = resume(server, whole, f"{name}-after", argv)
    assert min(steps) == stopped + 1


def test_signal_to_every_process(server, whole):
    """As Slurm does: also to the ranks' helper processes."""
    save = server.folder / "group"
    pids = server.start("group", flags(save), ends_others=False)
    assert wait_for(lambda: read_tracker(save) is not None, 300)
    for pid in pids:
        os.killpg(pid, signal.SIGTERM)
    assert server.wait() == [75, 75], server.log("group")[-3000:]
    assert not check_resumable(save)


def test_signal_before_the_first_step(server, whole):
    """One that comes while the run is being set up is kept: one step, a save, exit 75."""
    save = server.folder / "early"
    pids = server.start("early", flags(save), ends_others=False)
    log = server.folder / "early.0.log"
    assert wait_for(lambda: log.is_file() and "> number of parameters" in log.read_text(), 300)
    os.kill(pids[0], signal.SIGTERM)
    assert server.wait() == [75, 75], server.log("early")[-3000:]
    assert int(read_tracker(save) or 0) >= 1
    agrees(server, whole, "early")


@pytest.mark.parametrize("rank", range(RANKS))
def test_writer_meets_full_disk(server, whole, rank):
    """One line, status 74 on all ranks, no rank waits; the checkpoint before stays."""
    name, save = f"enospc{rank}", server.folder / f"enospc{rank}"
    statuses = server.run(name, flags(save), ends_others=False, trouble=f"{rank} disk_full")
    assert statuses == [74, 74], server.log(name)[-3000:]
    (line,) = server.errors(name)
    assert f"{save}/iter_0000004 could not be written" in line
    assert f"No space left on device on rank {rank}" in line
    assert "iter_0000002 is still there" in line
    assert read_tracker(save) == "2"
    assert not (save / "iter_0000004").exists()
    assert not list(save.glob(".saving-*"))
    assert min(resume(server, whole, f"{name}-after", flags(save))) == 3


@pytest.fixture
def small_disk(tmp_path: Path):
    """Mount a tmpfs of a given number of 4 KiB pages, if this user may."""

    def mount(pages: int, how: str = "") -> None:
        command = ["mount", "-t", "tmpfs", "-o", f"{how}size={pages * 4}k", "none", str(tmp_path)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")

    yield mount
    subprocess.run(["umount", str(tmp_path)], capture_output=True, check=False)


def test_real_full_disk(server, whole, small_disk, tmp_path):
    """Whichever of a checkpoint's files is the first that does not fit."""
    parts = server.folder / WHOLE / "iter_0000004"
    pages = {path.name: -(-path.stat().st_size // 4096) for path in parts.iterdir()}
    one = sum(pages.values())
    shards = pages["__0_0.distcp"] + pages["__1_0.distcp"]
    save = tmp_path / "save"
    for number, room in enumerate((shards - 3, shards + 3, one - 1, one)):
        name = f"full{number}"
        small_disk(one + 3 + room)  # the first checkpoint, its tracker, two small files fit
        statuses = server.run(name, flags(save), ends_others=False)
        assert statuses == [74, 74], server.log(name)[-3000:]
        (line,) = server.errors(name)
        assert re.search(r"iter_0000004 could not be written \(No space left on device on", line)
        assert read_tracker(save) == "2"
        assert not check_resumable(save)
        if room == one:
            small_disk(one * 8, "remount,")
            assert min(resume(server, whole, "full-after", flags(save))) == 3
        subprocess.run(["umount", str(tmp_path)], check=True)


def flip_bit(path: Path) -> None:
    """Change the file's middle bit, keeping its length."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_damaged_checkpoint_is_refused_and_the_one_before_resumes(server, whole):
    """Both newest are damaged, in shards of different ranks: the third newest is offered."""
    save = server.folder / "damaged"
    shutil.copytree(server.folder / WHOLE, save)
    with (save / "iter_0000012" / "__1_0.distcp").open("r+b") as file:
        file.truncate(1000)
    flip_bit(save / "iter_0000010" / "__0_0.distcp")
    assert server.run("refused", flags(save), ends_others=False) == [2, 2]
    (line,) = server.errors("refused")
    assert f"{save}/iter_0000012/__1_0.distcp is truncated: 1000 bytes, saved with" in line
    assert f"iteration 8 in {save} is whole: pass --ckpt-step 8" in line
    assert server.run("bit", flags(save, "--ckpt-step", "10"), ends_others=False) == [2, 2]
    (line,) = server.errors("bit")
    assert f"{save}/iter_0000010/__0_0.distcp is corrupted" in line
    steps = resume(server, whole, "offered", flags(save, "--ckpt-step", "8"))
    assert min(steps) == 9
    assert not check_resumable(save)


def test_kill_while_overwriting_the_newest_checkpoint(server, whole):
    """After --ckpt-step took the run back, the tracker must not name what is being replaced."""
    save = server.folder / "overwrite"
    shutil.copytree(server.folder / WHOLE, save)
    shutil.rmtree(save / "iter_0000012")
    (save / TRACKER_NAME).write_text("10")
    argv = flags(save, "--ckpt-step", "8")
    statuses = server.run("overwrite", argv, trouble="1 dies_in_shard")
    assert statuses[1] == -signal.SIGKILL
    assert check_resumable(save)
    assert read_tracker(save) == "8"
    assert min(resume(server, whole, "overwrite-after", flags(save))) == 9
