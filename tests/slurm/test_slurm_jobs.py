"""What a job becomes on a real Slurm, and that it is read right by every way there is."""

from pathlib import Path

import pytest

from launch.slurm import commands as slurm_commands
from launch.slurm import records as slurm_records
from launch.slurm.commands import SlurmRefused
from launch.slurm.reasons import why_waiting
from launch.slurm.state import job_states
from tests.slurm.cluster import Cluster, processes_with
from tests.slurm.jobs import submit, wait_end, wait_state, wait_until

pytestmark = pytest.mark.usefixtures("early_jobs")


def test_a_job_runs_and_completes(cluster: Cluster, tmp_path: Path) -> None:
    gate = tmp_path / "gate"
    body = f"echo $CUDA_VISIBLE_DEVICES; until [ -e {gate} ]; do sleep .1; done"
    options = ["--job-name=a b'c", "--nodes=2", "--gpus-per-node=8", "--time=90"]
    job_id = submit(tmp_path, body, *options)
    running = wait_state(job_id, "RUNNING")
    assert (running.name, running.array_task, running.restarts) == ("a b'c", "", 0)
    assert running.time_limit_minutes == 90
    assert running.nodes.startswith("n[")
    assert running.start is not None
    assert running.end is None
    assert why_waiting(running) == ""
    gate.touch()
    done = wait_end(job_id)
    assert (done.state, done.exit_code, done.signal) == ("COMPLETED", 0, 0)
    assert done.end is not None
    assert done.end >= running.start
    assert Path(done.stdout).read_text() == "0,1,2,3,4,5,6,7\n"


@pytest.mark.parametrize(
    ("body", "exit_code", "signal"),
    [("exit 3", 3, 0), ("exit 75", 75, 0), ("kill -9 $$", 0, 9), ("nosuchcommand", 127, 0)],
)
def test_how_a_job_failed(
    cluster: Cluster, tmp_path: Path, body: str, exit_code: int, signal: int
) -> None:
    state = wait_end(submit(tmp_path, body))
    assert (state.state, state.exit_code, state.signal) == ("FAILED", exit_code, signal)


def test_an_array_of_three_has_a_state_for_each_task(cluster: Cluster, tmp_path: Path) -> None:
    body = f"until [ -e {tmp_path}/gate ]; do sleep .1; done; exit $SLURM_ARRAY_TASK_ID"
    job_id = submit(tmp_path, body, "--array=0-2%1", f"--output={tmp_path}/%A-%3a.out")
    wait_state(f"{job_id}_0", "RUNNING")
    assert wait_state(f"{job_id}_2", "PENDING").label == f"{job_id}_[1-2%1]"
    waiting = {job.label: job for job in job_states([job_id])}
    assert set(waiting) == {f"{job_id}_0", f"{job_id}_[1-2%1]"}
    assert "JobArrayTaskLimit" in why_waiting(waiting[f"{job_id}_[1-2%1]"])
    (tmp_path / "gate").touch()
    wait_end(f"{job_id}_0")
    # A task has a state of its own from its start on.
    wait_until(f"{job_id}_0", lambda _: len(job_states([job_id])) == 3)
    ended = {job.array_task: wait_end(job.label) for job in job_states([job_id])}
    assert {task: job.exit_code for task, job in ended.items()} == {"0": 0, "1": 1, "2": 2}
    assert [ended[task].state for task in "012"] == ["COMPLETED", "FAILED", "FAILED"]
    assert {job.job_id for job in ended.values()} == {job_id}
    assert Path(ended["1"].stdout) == tmp_path / f"{job_id}-001.out"
    assert Path(ended["1"].stdout).exists()


def test_a_chain_runs_in_order(cluster: Cluster, tmp_path: Path) -> None:
    first = submit(tmp_path, "sleep 1; echo 1 >>order", "--job-name=first")
    second = submit(tmp_path, "echo 2 >>order", f"--dependency=afterok:{first}")
    third = submit(tmp_path, "echo 3 >>order", f"--dependency=afterany:{second}")
    said = why_waiting(wait_state(third, "PENDING"))
    assert f"waits for another job: afterany:{second}" in said
    assert wait_end(third).state == "COMPLETED"
    assert (tmp_path / "order").read_text().split() == ["1", "2", "3"]


def test_a_job_after_one_that_failed_says_that_it_never_starts(
    cluster: Cluster, tmp_path: Path
) -> None:
    failed = submit(tmp_path, "exit 1", "--begin=now+1")
    never = submit(tmp_path, "true", f"--dependency=afterok:{failed}")
    state = wait_until(never, lambda job: job.reason == "DependencyNeverSatisfied")
    assert state.state == "PENDING"
    assert "will never start" in why_waiting(state)
    slurm_commands.cancel(never)
    ended = wait_end(never)
    assert (ended.state, ended.start, ended.nodes) == ("CANCELLED", None, "")
    assert why_waiting(ended) == ""


def test_cancel_leaves_no_process(cluster: Cluster, tmp_path: Path) -> None:
    marker = str(tmp_path / "no-such-file")
    # Children in sessions of their own, which a signal to the script alone would miss.
    command = f"tail -F {marker}"
    body = f"{command} & setsid {command} & srun --ntasks=2 --overlap {command} & wait"
    job_id = submit(tmp_path, body, "--nodes=2", "--ntasks-per-node=1")
    wait_until(job_id, lambda _: len(processes_with(marker)) >= 4)
    slurm_commands.cancel(job_id)
    assert wait_end(job_id).state == "CANCELLED"
    assert not processes_with(marker)
    slurm_commands.cancel(job_id)  # again: nothing to do, and no error


def test_a_requeued_job_counts_its_restarts(cluster: Cluster, tmp_path: Path) -> None:
    body = '[ "$SLURM_RESTART_COUNT" ] && exit 0; sleep 600'
    job_id = submit(tmp_path, body)
    assert wait_state(job_id, "RUNNING").restarts == 0
    slurm_commands.requeue(job_id)
    held = wait_state(job_id, "PENDING")
    assert (held.restarts, held.reason, held.end) == (1, "BeginTime", None)
    assert "expected start" in why_waiting(held)
    slurm_commands.update(job_id, StartTime="now+2")
    done = wait_end(job_id)
    assert (done.state, done.restarts, done.exit_code) == ("COMPLETED", 1, 0)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nodes=5"], "more nodes than its partition allows"),
        (["--partition=short", "--time=11"], "time limit is above its partition's"),
        (["--hold"], "`scontrol release`"),
        (["--begin=now+3600"], "its start time has not come"),
        (["--nodelist=n3"], "down, drained or reserved (`sinfo -R`): UnavailableNodes:n3"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_job_that_cannot_start_says_why_in_one_line(
    cluster: Cluster, tmp_path: Path, options: list[str], says: str
) -> None:
    drain = ["update", "NodeName=n3", "Reason=test"]
    slurm_commands._run("scontrol", [*drain, "State=DRAIN"], 10)
    job_id = submit(tmp_path, "true", *options)
    try:
        # The first reasons may be others: Slurm looks at a job more than once.
        said = why_waiting(wait_until(job_id, lambda job: says in why_waiting(job)))
        assert "\n" not in said
        assert said.startswith(f"{job_id} does not start: ")
    finally:
        slurm_commands.cancel(job_id)
        slurm_commands._run("scontrol", [*drain, "State=RESUME"], 10)


def test_a_job_behind_another_says_that_nodes_are_taken(cluster: Cluster, tmp_path: Path) -> None:
    first = submit(tmp_path, "sleep 600", "--nodes=4", "--exclusive", "--time=60")
    try:
        wait_state(first, "RUNNING")
        second = submit(tmp_path, "true", "--nodes=4", "--exclusive", "--time=60")
        state = wait_until(second, lambda job: job.reason == "Resources" and job.start is not None)
        said = why_waiting(state)
        assert "waits for nodes to become free; expected start 20" in said
        slurm_commands.cancel(second)
    finally:
        slurm_commands.cancel(first)


def test_without_json_scontrol_answers(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Slurm built without JSON: the same cluster, less the plug-in that writes it."""
    job_id = submit(tmp_path, "exit 4", "--array=1-2", f"--output={tmp_path}/%A_%4a.out")
    plain = submit(tmp_path, "exit 5", "--job-name=x UserId=1 JobState=RUNNING y")
    wait_end(plain)
    wait_end(f"{job_id}_1")
    wait_end(f"{job_id}_2")
    with_json = job_states([job_id, plain])
    plugins = tmp_path / "plugins"
    plugins.mkdir()
    for plugin in plugin_folder().glob("*.so"):
        if plugin.name != "serializer_json.so":
            (plugins / plugin.name).symlink_to(plugin)
    conf = tmp_path / "slurm.conf"
    conf.write_text(f"{cluster.conf.read_text()}\nPluginDir={plugins}\n")
    monkeypatch.setenv("SLURM_CONF", str(conf))
    assert slurm_commands.queue([job_id]) is None
    without = job_states([job_id, plain])
    assert sorted(without, key=lambda job: job.label) == sorted(
        with_json, key=lambda job: job.label
    )
    assert {job.exit_code for job in without} == {4, 5}


def plugin_folder() -> Path:
    config = slurm_commands._run("scontrol", ["show", "config"], 10).stdout
    line = next(line for line in config.splitlines() if line.startswith("PluginDir"))
    return Path(line.partition("=")[2].strip())


def test_a_job_that_the_queue_forgot_is_found_without_slurmdbd(
    cluster: Cluster, tmp_path: Path
) -> None:
    job_id = submit(tmp_path, "exit 6", "--job-name=forgotten", "--time=30")
    ended = wait_end(job_id)
    assert slurm_commands.accounting([job_id]) is None
    (row,) = slurm_commands.completions([job_id])
    remembered = slurm_records.from_sacct(row)
    for name in ("job_id", "name", "state", "exit_code", "nodes", "end", "time_limit_minutes"):
        assert getattr(remembered, name) == getattr(ended, name), name


def test_an_unknown_job_has_no_state(cluster: Cluster) -> None:
    assert job_states(["999999"]) == []
    assert slurm_commands.show_job("999999") == []
    with pytest.raises(SlurmRefused, match=r"scontrol: .*999999; .*squeue --me"):
        slurm_commands.requeue("999999")


def test_requeueing_an_ended_job_is_refused_in_one_line(cluster: Cluster, tmp_path: Path) -> None:
    job_id = submit(tmp_path, "true")
    wait_end(job_id)
    with pytest.raises(SlurmRefused) as caught:
        slurm_commands.update(job_id, TimeLimit="5")
    assert str(caught.value).count("\n") == 0
    assert "nothing is left to change" in str(caught.value)
