"""Ranks on this machine: the environment, records and statuses of a job, and the stop signals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.runs.local import check_local, run_local, running
from launch.spec.launch_spec import Case, Container, LaunchSpec, Variable
from tests.unit.launch.hostile_text import CANARY, HOSTILE
from tests.unit.launch.launch_cases import job


def _local(tmp_path: Path, code: str, **fields: Any) -> LaunchSpec:
    (tmp_path / "work").mkdir()
    needed = {"workdir": str(tmp_path / "work"), "folder": str(tmp_path / "run")}
    return job(**{**needed, "command": ("bash", "-c", code), **fields})


def _logs(folder: Path) -> list[str]:
    return [path.read_text() for path in sorted(folder.glob("logs/*/rank-*.log"))]


def _end(folder: Path) -> dict:
    (path,) = folder.glob("attempts/*.end.json")
    return json.loads(path.read_text())


def test_ranks_get_place_environment_and_numbers(tmp_path):
    spec = _local(
        tmp_path,
        'echo "$RANK $WORLD_SIZE $PWD $A $B $C ${PATH%%:*} $VIRTUAL_ENV"',
        tasks_per_node=2,
        virtual_environment="/venv",
        variables=(Variable("A", "set", "why"), Variable("B", "overridden", "why")),
        environment={"B": "$(touch x)", "C": "d e"},
    )
    assert run_local(spec) == 0
    seen = f"2 {tmp_path}/work set $(touch x) d e /venv/bin /venv\n"
    assert _logs(tmp_path / "run") == [f"0 {seen}", f"1 {seen}"]


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_text_arrives_as_given(tmp_path, kind):
    text = HOSTILE[kind]
    program = tmp_path / "a=b"
    program.write_text("""#!/bin/bash\nprintf '%s\\n' "$A" "$@"\n""")
    program.chmod(0o755)
    spec = _local(tmp_path, "", command=(str(program), text), environment={"A": text})
    assert run_local(spec) == 0
    assert _logs(tmp_path / "run") == [f"{text}\n{text}\n"]
    assert not list(tmp_path.rglob(CANARY))


def test_the_attempt_is_recorded_as_a_job_s_is(tmp_path):
    assert run_local(_local(tmp_path, "exit 7")) == 7
    end = _end(tmp_path / "run")
    assert (end["status"], end["reason"]) == (7, "failed with status 7")
    (path,) = (tmp_path / "run/attempts").glob("*.start.json")
    start = json.loads(path.read_text())
    assert set(start) == {"job_id", "attempt", "node_list", "start"}


def test_the_cases_of_a_grid_run_one_after_another_up_to_a_failure(tmp_path):
    cases = tuple(Case(str(tmp_path / f"run/cases/{n}"), (f"{n}",)) for n in range(3))
    spec = _local(tmp_path, 'echo "case $0"; exit "$0"', cases=cases)
    assert run_local(spec) == 1
    assert _logs(tmp_path / "run/cases/0") == ["case 0\n"]
    assert _logs(tmp_path / "run/cases/1") == ["case 1\n"]
    assert not (tmp_path / "run/cases/2").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_stop_signal_reaches_every_rank(tmp_path, number):
    """Each rank waits for the signal, notes it and exits 75, as one does after a checkpoint."""
    name = signal.Signals(number).name.removeprefix("SIG")
    code = f"trap 'echo > ../got-$RANK; sleep 0.5; exit 75' {name}; echo > ../up-$RANK; "
    code += "for i in $(seq 100); do sleep 0.1; done"
    spec = _local(tmp_path, code, tasks_per_node=2)
    starter = subprocess.Popen(
        [sys.executable, "-c", f"""
from launch.spec.launch_spec import LaunchSpec
from launch.runs.local import run_local
raise SystemExit(run_local(LaunchSpec(name="x", command={spec.command!r},
    workdir={spec.workdir!r}, folder={spec.folder!r}, tasks_per_node=2)))
"""], stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list(tmp_path.glob("up-*"))) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    starter.send_signal(number)
    assert starter.wait(120) == 75
    assert len(list(tmp_path.glob("got-*"))) == 2
    assert _end(tmp_path / "run")["reason"] == "stopped after a checkpoint"


def test_the_handlers_are_given_back(tmp_path):
    before = signal.getsignal(signal.SIGUSR1)
    run_local(_local(tmp_path, "true"))
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_run_is_run_once(tmp_path):
    with running(tmp_path / "run"):
        with pytest.raises(ValueError, match="is run by another process"):
            with running(tmp_path / "run"):
                pass


def test_a_lock_ends_with_its_process(tmp_path):
    code = "import os, sys; from pathlib import Path; from launch.runs.local import running\n"
    code += "with running(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], env=dict(os.environ))
    with running(tmp_path / "run"):
        pass


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"nodes": 2}, "nodes = 2"),
        ({"array": "0-1"}, "array = '0-1'"),
        ({"container": Container("pyxis", "x")}, "container = pyxis"),
        ({"modules": ("cuda",)}, "modules = cuda"),
        ({"rendezvous_suffix": "i"}, "rendezvous_suffix = 'i': ranks of run meet on this machine"),
        ({"hostfile": True}, "hostfile = True: ranks of run are on this machine"),
        ({"environment": {"MASTER_ADDR": "x"}}, "MASTER_ADDR = 'x': ranks of run meet on this"),
    ],
)
def test_what_needs_a_cluster_is_refused(fields, said):
    with pytest.raises(ValueError) as refusal:
        check_local(job(**fields))
    assert said in str(refusal.value)


def test_the_ranks_know_their_attempt_and_where_to_show_progress(tmp_path):
    code = 'echo "$MEGATRON_MONE_ATTEMPT $MEGATRON_MONE_PROGRESS"; touch "$MEGATRON_MONE_PROGRESS"'
    spec = _local(tmp_path, code + "; exit 76")
    assert run_local(spec) == 76
    (path,) = (tmp_path / "run/attempts").glob("*.progress")
    attempt = path.name.removesuffix(".progress")
    assert (tmp_path / f"run/attempts/{attempt}.start.json").exists()
    assert _logs(tmp_path / "run") == [f"{attempt} {path}\n"]
    assert _end(tmp_path / "run")["reason"] == "another attempt took over"
