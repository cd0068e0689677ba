"""Ranks that start in a second: a server imports Megatron once and forks each rank.

`python -m tests.integration.crash_ranks` reads one JSON command a line from stdin, forks the ranks
of one `megatron_mone.pretrain` run, answers {"pids": [...]}, waits for them and answers
{"statuses": [...]} (-9: killed by SIGKILL). No launcher stands between: the statuses are the
ranks' own. Every answer names its kind, for a status taken for a process id would signal the
driver's own group (0) or every process there is (1). Every rank writes `iteration loss` in hex,
one unbuffered line a step, to NAME.RANK.loss, so that a killed rank's losses are known up to its
last step.
"""

import contextlib
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.training_cases import MOCK, MONE, ROOT, TINY

STEPS = 12
RANKS = 2


EP = ("--expert-model-parallel-size", str(RANKS))
ENGINES = {
    "Megatron": (*EP, "--use-distributed-optimizer"),
    "ZeRO 1": (*EP, "--engine", "deepspeed", "--zero-stage", "1"),
    "ZeRO 3": ("--engine", "deepspeed", "--zero-stage", "3"),
}
"""Each shards the optimizer over the ranks."""


def flags(save: Path, *more: str, engine: str = "Megatron") -> list[str]:
    """A tiny MoNE run of one of ENGINES that saves every second step."""
    return [
        *(*TINY, *MONE, *MOCK, *ENGINES[engine]),
        *("--global-batch-size", "4", "--train-iters", str(STEPS)),
        *("--save", str(save), "--load", str(save), "--save-interval", "2", *more),
    ]


class RankServer:
    """The driver's end: start runs, kill ranks, collect exit statuses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        environment = {
            **os.environ,
            **{"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)},
        }
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.integration.crash_ranks"],
            cwd=ROOT, env=environment, text=True, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self._running: list[int] = []
        self._answer("ready")

    def start(
        self,
        name: str,
        argv: list[str],
        ends_others: bool = True,
        trouble: str = "",
    ) -> list[int]:
        """Fork the ranks; their output goes to NAME.RANK.log, there from the start.

        A run that nobody waited for, since its test failed, is ended first.

        Args:
            name: of the run's files in this server's folder.
            argv: flags of megatron_mone.pretrain.
            ends_others: a rank that fails takes the others with it, as under torchrun.
            trouble: "RANK FUNCTION": a function of this file that this rank calls first.

        Returns:
            Process ids by rank.
        """
        command = {
            "name": str(self.folder / name),
            "argv": argv,
            "ends_others": ends_others,
            "trouble": trouble,
        }
        self.end()
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(command) + "\n")
        self._server.stdin.flush()
        self._running = self._answer("pids")
        return list(self._running)

    def wait(self) -> list[int]:
        """Exit statuses by rank, once all have ended."""
        statuses = self._answer("statuses")
        self._running = []
        return statuses

    def end(self) -> None:
        """Kill the run that nobody has waited for, if there is one."""
        for pid in self._running:
            _kill_rank(pid)
        if self._running:
            self.wait()

    def run(self, name: str, argv: list[str], **options: Any) -> list[int]:
        """`start` and `wait`."""
        self.start(name, argv, **options)
        return self.wait()

    def losses(self, name: str) -> dict[int, str]:
        """{iteration: loss as float.hex} of a run, which must be the same on all its ranks."""
        found: dict[int, str] = {}
        for path in self.folder.glob(f"{name}.*.loss"):
            for line in path.read_text().splitlines():
                iteration, loss = line.split()
                assert found.setdefault(int(iteration), loss) == loss, (name, line)
        return found

    def log(self, name: str) -> str:
        """What all ranks of a run printed."""
        paths = sorted(self.folder.glob(f"{name}.*.log"))
        return "\n".join(path.read_text(errors="replace") for path in paths)

    def errors(self, name: str) -> list[str]:
        """The lines of a run that a user is meant to read."""
        lines = self.log(name).splitlines()
        return [line for line in lines if line.startswith("megatron-mone: error:")]

    def close(self) -> None:
        """End the server and what it still runs."""
        self.end()
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=30)

    def _answer(self, kind: str) -> list[int]:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, "the rank server ended"
        ((found, numbers),) = json.loads(line).items()
        assert found == kind, f"the rank server answered {line.strip()}, not with {kind}"
        return numbers


def wait_for(condition, seconds: float = 60, pause: float = 0.001) -> bool:
    """Poll until `condition()`; False when the time is up."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
    return True


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # for what the imports print
    importlib.import_module("tests.rank_imports")
    from megatron_mone import pretrain
    from megatron_mone.deepspeed.package import package

    package()  # a second of each rank's start
    print(json.dumps({"ready": []}), file=answers)
    for line in sys.stdin:
        command = json.loads(line)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        ranks = []
        for rank in range(RANKS):
            Path(f"{command['name']}.{rank}.log").touch()
            pid = os.fork()
            if pid == 0:
                answers.close()
                _rank(rank, port, command, pretrain)
            ranks.append(pid)
        print(json.dumps({"pids": ranks}), file=answers)
        print(json.dumps({"statuses": _reap(ranks, command["ends_others"])}), file=answers)


def _reap(ranks: list[int], ends_others: bool) -> list[int]:
    left, statuses = set(ranks), dict.fromkeys(ranks, 0)
    while left:
        pid, status = os.wait()
        if pid not in left:
            continue
        left.remove(pid)
        statuses[pid] = os.waitstatus_to_exitcode(status)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # the rank's own helper processes
        if statuses[pid] != 0 and ends_others:
            for other in left:
                _kill_rank(other)
    return [statuses[pid] for pid in ranks]


def _kill_rank(pid: int) -> None:
    """A rank and its helpers; one that does not lead a group of its own yet has no helpers."""
    for kill in (os.kill, os.killpg):
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def _rank(rank: int, port: int, command: dict, pretrain: Any) -> None:
    status: Any = 1
    try:
        who, _, function = command["trouble"].partition(" ")
        if function and int(who) == rank:
            globals()[function]()
        os.setsid()
        log = os.open(f"{command['name']}.{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(0)
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        _record_losses(Path(f"{command['name']}.{rank}.loss"))
        pretrain.main(command["argv"])
        status = 0
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 1)


def starts_late() -> None:
    """Leads no group yet and has no file open when the driver has its process id."""
    time.sleep(1)


def dies_in_shard() -> None:
    """Killed with half a shard written."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    def write(transforms: Any, write_bucket: tuple, **more: Any) -> None:
        Path(write_bucket[0]).write_bytes(bytes(1000))
        os.kill(os.getpid(), signal.SIGKILL)

    FileSystemWriterAsync.write_preloaded_data = staticmethod(write)


def dies_before_mark() -> None:
    """Killed with all shards written and no metadata.json."""
    from megatron.core.dist_checkpointing import serialization

    serialization.save_config = _die


def dies_before_sums() -> None:
    """Killed with a checkpoint that Megatron takes for complete, before it is summed."""
    from megatron_mone.checkpoint import save as safe_save

    safe_save.write_sums = _die


def dies_before_commit() -> None:
    """Killed when only the tracker's rename is left."""
    from megatron_mone.checkpoint import tracker

    tracker.commit = _die


def dies_in_stock_tracker_write() -> None:
    """Killed where Megatron would have the tracker file open and nothing in it."""
    from megatron_mone.checkpoint.tracker import TrackerFile

    TrackerFile.write = _die  # type: ignore[method-assign]


def disk_full() -> None:
    """The second shard that this rank writes meets a full disk, with no file system to fill."""
    import errno

    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from torch.distributed.checkpoint import filesystem

    original, opened = filesystem._write_item, set()

    @functools.wraps(original)  # Megatron asks for its signature
    def write_item(*arguments: Any, **more: Any) -> Any:
        stream = next(a for a in arguments if hasattr(a, "fileno"))
        opened.add(stream.name)
        if len(opened) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), stream.name)
        return original(*arguments, **more)

    filesystem_async._write_item = write_item


def _die(*ignored: Any, **named: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _record_losses(path: Path) -> None:
    from megatron.training import training

    original = training.training_log
    file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def training_log(loss_dict: dict, total: dict, rate: float, iteration: int, *more, **named):
        loss = float(loss_dict["lm loss"]).hex()
        os.write(file, f"{iteration} {loss}\n".encode())
        return original(loss_dict, total, rate, iteration, *more, **named)

    training.training_log = training_log


if __name__ == "__main__":
    _serve()
