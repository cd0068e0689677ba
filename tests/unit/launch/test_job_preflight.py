"""The pre-flight in a job's script: ranks on good nodes only, bad ones left out or excluded."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.unit.launch.test_job_attempts import Job

# As launch.preflight: `judge` leaves the nodes that $GOOD and $BAD name, and ends with $VERDICT.
PYTHON = """printf '%s\\0' "$@" >>"$0.words"
[ "$2" = launch.preflight ] || exit 99
if [ "$3" = check ]; then
  echo "{\\"rank\\": $RANK}"
  exit "${CHECK:-0}"
fi
printf '%s' "${GOOD// /$'\\n'}" >"${4%.jsonl}.nodes"; [ -z "$GOOD" ] || echo >>"${4%.jsonl}.nodes"
printf '%s' "${BAD// /$'\\n'}" >"${4%.jsonl}.bad"; [ -z "$BAD" ] || echo >>"${4%.jsonl}.bad"
exit "${VERDICT:-0}\""""
FEW = {"GOOD": "n0", "BAD": "n1", "VERDICT": "69"}


def _job(tmp_path: Path, rank: str = "echo ran", /, **fields: Any) -> Job:
    own = {"preflight": True, "nodes": 2, "tasks_per_node": 4, "spare_nodes": 1}
    return Job(tmp_path, rank, PYTHON, **{**own, **fields})


def _start(checked: Job) -> dict[str, Any]:
    return json.loads((checked.path / "run/attempts/70000.0.start.json").read_text())


def test_the_ranks_run_on_the_nodes_that_were_chosen(tmp_path):
    checked = _job(tmp_path, 'echo "master $MASTER_ADDR"')
    done = checked.run(GOOD="n3 n5", BAD="n4")
    assert done.returncode == 0, done.stderr
    words = checked.slurm.words("srun")
    for word in ("--nodes=2", "--ntasks=8", "--ntasks-per-node=4", "--nodelist=n3,n5"):
        assert word in words
    assert "master n3\n" in done.stdout
    assert _start(checked)["left_out"] == "n4"
    assert checked.end() == (0, "finished")
    assert (tmp_path / "run/preflight/excluded").read_text() == "n4\n"


def test_the_hostfile_has_the_nodes_that_were_chosen(tmp_path):
    checked = _job(tmp_path, hostfile=True)
    assert checked.run(GOOD="n3 n5", BAD="n4").returncode == 0
    assert (tmp_path / "run/hostfile").read_text() == "n3 slots=4\nn5 slots=4\n"


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({"rendezvous_suffix": "-ib"}, "n3-ib"),
        ({"environment": {"MASTER_ADDR": "n9i"}}, "n9i"),
    ],
)
def test_they_meet_in_the_network_that_the_user_names(tmp_path, fields, address):
    checked = _job(tmp_path, 'echo "master $MASTER_ADDR"', **fields)
    assert f"master {address}\n" in checked.run(GOOD="n3 n5", BAD="n4").stdout


@pytest.mark.parametrize("good", ["", "n0"])
def test_a_judge_that_names_too_few_nodes_is_not_believed(tmp_path, good):
    checked = _job(tmp_path)
    assert checked.run(GOOD=good, BAD="").returncode == 1
    status, reason = checked.end()
    assert status == 1
    assert f"pre-flight: it named {len(good.split())} of 2 nodes; " in reason
    assert "bash" not in checked.slurm.words("srun")[-1]


def test_check_and_judge_are_given_the_files_and_limits(tmp_path):
    checked = _job(tmp_path, preflight_limits={"run_disk_gib": "5", "relative": "0"})
    checked.run(GOOD="n0 n1", BAD="", CHECK="1")
    files = f"{tmp_path}/run/preflight/70000.0"
    common = ["--hosts", f"{files}.hosts", "--limit", "run_disk_gib=5", "--limit", "relative=0"]
    check = ["-m", "launch.preflight", "check", *common]
    judge = ["-m", "launch.preflight", "judge", f"{files}.jsonl", "--need", "2", *common]
    assert checked.slurm.words("python") == check + judge
    assert Path(f"{files}.hosts").read_text() == "n0\nn1\n"
    assert Path(f"{files}.jsonl").read_text() == '{"rank": 1}\n'
    assert checked.end() == (0, "finished")  # how a check ends is for the judge to weigh


def test_too_few_good_nodes_are_a_failure_that_excludes_the_bad(tmp_path):
    checked = _job(tmp_path, backoff_seconds=500)
    done = checked.run(**FEW, EXCLUDED="n[7-9]")
    assert "ran\n" not in done.stdout
    assert checked.end() == (69, "pre-flight: n1 is bad, 1 of 2 nodes left; requeued")
    assert checked.asked("requeue") == ["requeue 70000"]
    # Those that the user or an earlier attempt excluded stay so.
    wait = "update JobId=70000 StartTime=now+500"
    assert checked.asked("update") == [wait, "update JobId=70000 ExcNodeList=n[7-9],n1"]


@pytest.mark.parametrize("nothing", ["", "(null)", "N/A"])
def test_slurm_s_words_for_no_exclusion_are_no_node(tmp_path, nothing):
    checked = _job(tmp_path)
    checked.run(**FEW, EXCLUDED=nothing)
    assert checked.asked("update") == ["update JobId=70000 ExcNodeList=n1"]


def test_bad_nodes_of_earlier_attempts_stay_excluded(tmp_path):
    checked = _job(tmp_path, "exit 1")
    checked.run(**FEW)
    checked.run(1, GOOD="n0 n2", BAD="n3 n4")
    assert checked.asked("update") == ["update JobId=70000 ExcNodeList=n1,n3,n4"]


def test_where_no_node_is_good_none_is_excluded(tmp_path):
    """A limit that is wrong, or a program that is missing, is not the fault of all nodes."""
    checked = _job(tmp_path)
    checked.run(GOOD="", BAD="n0 n1", VERDICT="69")
    assert checked.end() == (69, "pre-flight: n0,n1 are bad, 0 of 2 nodes left; requeued")
    assert not checked.asked("update")


def test_too_few_good_nodes_count_as_failures(tmp_path):
    checked = _job(tmp_path, max_failures=2)
    checked.run(**FEW)
    checked.run(1, **FEW)
    assert not checked.asked("requeue")
    gave_up = "pre-flight: n1 is bad, 1 of 2 nodes left; gave up: failed 2 times"
    assert checked.end(1) == (69, gave_up)


def test_without_requeue_too_few_good_nodes_are_the_end(tmp_path):
    checked = _job(tmp_path, requeue=False)
    assert checked.run(**FEW).returncode == 69
    assert checked.end() == (69, "pre-flight: n1 is bad, 1 of 2 nodes left")


def test_a_pair_that_fails_without_a_culprit_names_no_node(tmp_path):
    checked = _job(tmp_path)
    checked.run(GOOD="", BAD="", VERDICT="69")
    assert checked.end() == (69, "pre-flight: 0 of 2 nodes left; requeued")
    assert not checked.asked("update")


def test_a_judge_that_fails_stops_the_job(tmp_path):
    checked = _job(tmp_path)
    done = checked.run(GOOD="n0 n1", BAD="", VERDICT="1")
    assert "ran\n" not in done.stdout
    status, reason = checked.end()
    assert status == 1
    assert reason.startswith("pre-flight: failed with status 1; ")


def test_without_preflight_nobody_is_asked(tmp_path):
    unchecked = _job(tmp_path, preflight=False, spare_nodes=0)
    assert unchecked.run().returncode == 0
    assert not (unchecked.slurm.folder / "python.words").exists()
    assert "left_out" not in _start(unchecked)
    assert not [word for word in unchecked.slurm.words("srun") if word.startswith("--nodelist")]
