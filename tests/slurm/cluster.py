"""A real Slurm on this machine's loopback, without systemd: munged, slurmctld and N slurmd.

Writes one short temporary folder and starts processes, each in namespaces of its own (a "box"), so
that killing a box is a power cut to everything below it. Boxes die with this process too, however
it ends, and `Cluster.stop` removes the rest. docs/SLURM_TESTS.md says what is real and what is not.
"""

from __future__ import annotations

import getpass
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import psutil

TEMPLATE = Path(__file__).with_name("slurm.conf.in")
# Debian keeps daemons where only root looks.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])
PROGRAMS = ("sbatch", "srun", "slurmctld", "slurmd", "munged", "unshare", "setpriv")
# Own user, pid, mount, host name and ipc. Not root: in a user namespace that keeps the user's id.
NAMESPACES = ["-mupif", "--kill-child", "--mount-proc"]
if os.getuid():
    NAMESPACES = ["-c", "--keep-caps", *NAMESPACES]
# A box that outlives the tests would keep ports and processes: it gets SIGKILL when we end.
UNSHARE = ["setpriv", "--pdeathsig", "KILL", "unshare", *NAMESPACES]
IN_BOX = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; "$@"; exit $?'
BOOT_SECONDS = 60.0


@cache
def why_unavailable() -> str:
    """Why no Slurm can be booted here, in one line; empty where it can."""
    missing = [name for name in PROGRAMS if not shutil.which(name, path=SEARCH_PATH)]
    if missing:
        return f"Slurm is not installed ({', '.join(missing)} missing): .ci/slurm.sh installs it"
    tried = subprocess.run(
        [*UNSHARE, "bash", "-c", IN_BOX, "box", "try", "/etc/hosts", "true"],
        capture_output=True,
        text=True,
        env=os.environ | {"PATH": SEARCH_PATH},
        check=False,
    )
    if tried.returncode:
        said = " ".join(tried.stderr.split())
        return f"Slurm's daemons need namespaces, which are forbidden here ({said})"
    return ""


class Cluster:
    """A cluster of nodes n0, n1, ... with `gpus_per_node` GPUs that are only names.

    Args:
        nodes: how many.
        gpus_per_node: GPUs of type h100 on each.
        real: False: nodes exist for slurmctld only, which then validates jobs and runs none.
    """

    def __init__(self, nodes: int, gpus_per_node: int, *, real: bool = True) -> None:
        self.nodes, self.gpus_per_node, self.real = nodes, gpus_per_node, real
        # Short, and not pytest's: a unix socket's path may have 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
        self.conf = self.folder / "slurm.conf"
        self.boxes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Write the configuration and boot everything; RuntimeError with the logs if it fails."""
        port = _free_ports(self.nodes + 1)
        self._write_files(port)
        self.start_munged()
        self.start_slurmctld()
        if self.real:
            for node in range(self.nodes):
                self.boot(f"n{node}")
            idle = f"{self.nodes}:idle"
            self._wait("idle nodes", lambda: self._ask("sinfo", "-h", "-o", "%D:%T") == idle)

    def start_munged(self) -> None:
        """Boot the authentication daemon."""
        paths = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log")]
        socket_path = self.folder / "munge.sock"
        more = ["--seed-file=" + str(self.folder / "munge.seed"), f"--socket={socket_path}"]
        self._box("munge", "munged", "-F", "--force", *paths, *more)
        self._wait("munged", socket_path.is_socket)

    def start_slurmctld(self) -> None:
        """Boot the controller, which takes up the jobs it knew if it ran before."""
        self._box("ctld", "slurmctld", "-D", "-i")
        self._wait("slurmctld", lambda: "UP" in self._ask("scontrol", "ping"))

    def boot(self, node: str) -> None:
        """Power a node on; it joins the cluster a moment later."""
        (self.folder / f"spool.{node}").mkdir(exist_ok=True)
        self._box(node, "slurmd", "-D", "-N", node)

    def kill(self, name: str) -> None:
        """Pull the plug of a node, "ctld" or "munge": all its processes end at once."""
        box = self.boxes.pop(name)
        inside = psutil.Process(box.pid).children(recursive=True) if box.poll() is None else []
        box.kill()
        box.wait()
        psutil.wait_procs(inside, timeout=60)  # the kernel ends them; a slow machine takes a moment

    def signal(self, name: str, number: signal.Signals, *, daemon_only: bool = False) -> None:
        """Send a signal to a daemon and all that runs in its box, not to the box itself.

        With `daemon_only` the jobs on a node notice nothing: Slurm alone loses the node.
        """
        below = [self.boxes[name].pid]
        for parent in below:
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            below += [int(child) for child in children]
        # Breadth first: the box, its shell, the daemon, then what that started.
        for pid in below[2:3] if daemon_only else below[1:]:
            os.kill(pid, number)

    def stop(self) -> None:
        """End every process of the cluster and remove its folder."""
        for name in list(self.boxes):
            self.kill(name)
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def selected(self) -> Iterator[Cluster]:
        """Slurm's commands of this process, and what it starts, speak to this cluster."""
        before = dict(os.environ)
        os.environ.clear()
        # Tests may run inside a job of another Slurm.
        os.environ |= {k: v for k, v in before.items() if not k.startswith(("SLURM", "SBATCH"))}
        os.environ |= {"SLURM_CONF": str(self.conf), "PATH": SEARCH_PATH}
        try:
            yield self
        finally:
            os.environ.clear()
            os.environ |= before

    def _write_files(self, port: int) -> None:
        names = ["ctld", "munge", *(f"n{node}" for node in range(self.nodes))]
        lines = [Path("/etc/hosts").read_text(), *(f"127.0.0.1 {name}" for name in names)]
        (self.folder / "hosts").write_text("\n".join(lines) + "\n")
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        (self.folder / "state").mkdir()
        for gpu in range(self.gpus_per_node):
            (self.folder / f"gpu{gpu}").symlink_to("/dev/null")
        gpus = f"gpu:h100:{self.gpus_per_node}"
        last = self.gpus_per_node - 1
        (self.folder / "gres.conf").write_text(
            f"Name=gpu Type=h100 File={self.folder}/gpu[0-{last}]\n"
        )
        hosts = f"n[0-{self.nodes - 1}]"
        where = f"NodeAddr=127.0.0.1 Port=[{port + 1}-{port + self.nodes}]"
        node = f"NodeName={hosts} {where} CPUs=96 RealMemory=2000000 Gres={gpus}"
        values = {
            "FOLDER": self.folder,
            "PORT": port,
            "USER": getpass.getuser(),
            "NODES": node if self.real else f"{node} State=CLOUD",
        }
        text = TEMPLATE.read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", str(value))
        self.conf.write_text(text)

    def _box(self, name: str, *command: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.boxes[name] = subprocess.Popen(
                [*UNSHARE, "bash", "-c", IN_BOX, "box", name, self.folder / "hosts", *command],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env={"PATH": SEARCH_PATH, "SLURM_CONF": str(self.conf), "LANG": "C.UTF-8"},
                start_new_session=True,
            )

    def _ask(self, *command: str) -> str:
        with self.selected():
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    def _wait(self, what: str, ready: Callable[[], bool]) -> None:
        deadline = time.monotonic() + BOOT_SECONDS
        while not ready():
            gone = [name for name, box in self.boxes.items() if box.poll() is not None]
            if gone or time.monotonic() > deadline:
                logs = [p.read_text(errors="replace")[-800:] for p in self.folder.glob("*.out")]
                raise RuntimeError(f"no {what} (ended: {gone}):\n" + "\n".join(logs))
            time.sleep(0.05)


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on, below the ephemeral range."""
    for _ in range(100):
        first = random.randrange(15000, 32000 - count)
        if all(_is_free(port) for port in range(first, first + count)):
            return first
    raise RuntimeError(f"found no {count} free ports in a row from 15000 to 32000")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return probe.connect_ex(("127.0.0.1", port)) != 0


def processes_with(marker: str) -> Sequence[int]:
    """Process ids on this machine whose command line or first environment holds `marker`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            text = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
        except OSError:
            continue  # it ended meanwhile, or belongs to somebody else
        if marker.encode() in text:
            found.append(int(process.name))
    return found
