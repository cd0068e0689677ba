"""Slurm's own commands, one function each: submit, cancel, requeue, update, and what lists jobs.

Starts sbatch, scancel, scontrol, squeue and sacct, never through a shell; reads and writes nothing
else. Every error is one line: `SlurmRefused` where Slurm answered no (the request must change),
`SlurmUnavailable` where it gave no answer (the same request may work later).
"""

import os
import re
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.slurm.answers import json_answer, shown, submitted_id
from launch.slurm.environment import client_environment

# Slurm's clients give up after 9 s on a controller that is dead; one that hangs would hold them
# for minutes. A request that changes something is given longer: cut short, it may still be done.
READ_SECONDS = 18.0
CHANGE_SECONDS = 60.0

PACKAGES = "run this on a login node of the cluster, or install Slurm's client commands (Debian: "
PACKAGES += "slurm-client, Red Hat: slurm)"

# What Slurm says (a part of it) -> what to do; the first that matches is used.
FIXES = {
    "Invalid partition name": "`sinfo -s` lists the partitions",
    "invalid partition specified": "`sinfo -s` lists the partitions",
    "Invalid account": "`sacctmgr show assoc user=$USER` lists the accounts you may use",
    "Invalid qos": "`sacctmgr show assoc user=$USER format=account,qos` lists those you may use",
    "Invalid feature specification": "`sinfo -o '%N %f'` lists the features for a constraint",
    "reservation is invalid": "`scontrol show reservation` lists the reservations",
    "Invalid node name": "`sinfo -N` lists the nodes",
    "Invalid generic resource": "`sinfo -o '%P %G'` lists the GPUs and their names",
    "Memory specification": "ask for less memory: `sinfo -o '%P %m'` lists MiB per node",
    "node configuration is not available": "ask for fewer nodes, GPUs, CPUs or less memory: "
    "`sinfo -o '%P %D %G %c %m'` lists nodes, GPUs, CPUs and MiB per partition",
    "partition configuration not available": "`sinfo -s` shows whether the partition is up",
    "Node count specification invalid": "`sinfo -o '%P %D %s'` lists what a partition allows",
    "More processors requested": "`sinfo -o '%P %D %c'` lists nodes and CPUs per partition",
    "time limit is invalid": "`sinfo -o '%P %l'` lists the time limits",
    "Invalid --time": "write minutes, HH:MM:SS or D-HH:MM:SS",
    "accounting/QOS policy": "you reached a limit of your account or QOS: let jobs end, or ask the "
    "cluster's staff",
    "dependency problem": "the job it depends on must exist, or have ended lately",
    "Invalid job array": "write 0-7, 0-7%2 or 1,3,5, below `scontrol show config`'s MaxArraySize",
    "Invalid job id": "it ended a while ago, or the number is wrong: `squeue --me` lists yours",
    "already finished": "nothing is left to change",
    "already completing": "nothing is left to change",
    "Access/permission denied": "only the job's owner may do this",
    "does not look like a batch script": "its first line must start with #!",
    "Batch script is empty": "its first line must start with #!",
    "Unable to open file": "give the path of a script that you can read",
    "unrecognized option": "`sbatch --help` lists the options of this Slurm",
}
# What says that nobody answered, rather than that the answer is no.
NO_ANSWER = {
    "Unable to contact slurm controller": "slurmctld is down or unreachable: try again later",
    "slurm_load_jobs": "slurmctld is down or unreachable: try again later",
    "Zero Bytes were transmitted": "munged or slurmctld is down: try again later",
    "Socket timed out": "slurmctld is overloaded: try again later",
    "authentication": "check that munged runs on this host and that clocks agree",
    "munge": "check that munged runs on this host and that clocks agree",
    "configuration source": "check SLURM_CONF, or run this on a login node of the cluster",
    "configuration file": "check SLURM_CONF, or run this on a login node of the cluster",
    "slurmdbd": "the accounting database is down: try again later",
    "Connection refused": "the accounting database is down: try again later",
}
PREFIXES = re.compile(
    r"(\w+: )?((error|fatal|warning): )?((Batch job submission failed|slurm_load_jobs error): )?"
)
JOB_ID = re.compile(r"\d+(_\d+|_\[[\d,%:-]+\])?")
NO_JSON = re.compile(r"json|serializer|openapi|data_parser", re.IGNORECASE)


class SlurmRefused(ValueError):
    """Slurm answered no: says what it said, and the fix."""


class SlurmUnavailable(RuntimeError):
    """Slurm gave no answer: it is not installed here, or its controller cannot be reached."""


class Unreadable(SlurmUnavailable):
    """An answer, or a record, of a form not known here: an error, for no state is guessed."""


class SlurmAbsent(SlurmUnavailable):
    """Its commands are not installed here, so nothing was asked."""


def submit(script: Path, *, test_only: bool = False, options: Sequence[str] = ()) -> str:
    """Hand a batch script to sbatch; returns the job id, such as "123".

    Args:
        script: path of the script, whose first line is `#!...`.
        test_only: submit nothing; returns instead Slurm's estimate, in one line
            ("Job 4 to start at 2030-01-31T12:00:00 using 8 processors on nodes n0 in ...").
        options: more options of sbatch, which win over the script's own, such as
            "--dependency=afterok:122" or "--exclude=n7".

    Raises:
        SlurmRefused: Slurm would never run it; the line says why and the fix.
        SlurmUnavailable: Slurm did not answer, or not with a number; it may have the job.
    """
    flags = ["--parsable", *(["--test-only"] if test_only else []), *options]
    done = _run("sbatch", [*flags, "--", str(Path(script).absolute())], CHANGE_SECONDS)
    if test_only:
        return _one_line(done.stderr) or _one_line(done.stdout)
    job_id = submitted_id(done.stdout)
    if job_id is None:
        raise SlurmUnavailable(
            f"sbatch: printed {shown(done.stdout)}, no job's number, though it ended well; it may "
            "have the job: look with `squeue --me` before you send it again"
        )
    return job_id


def cancel(job_id: str) -> None:
    """End a job, an array ("123") or one of its tasks ("123_4"); silent if it has ended already."""
    _run("scancel", [checked_id(job_id)], CHANGE_SECONDS)


def requeue(job_id: str) -> None:
    """Stop a job and put it back in the queue; Slurm holds it back about two minutes."""
    _run("scontrol", ["requeue", checked_id(job_id)], CHANGE_SECONDS)


def update(job_id: str, **fields: str) -> None:
    """Change fields of a job, by scontrol's names: update("123", StartTime="now+2")."""
    pairs = [f"{name}={value}" for name, value in fields.items()]
    _run("scontrol", ["update", f"JobId={checked_id(job_id)}", *pairs], CHANGE_SECONDS)


def show_job(job_id: str | None = None) -> list[str]:
    """What `scontrol show job` says, one string a record (an array has several), times in epoch s.

    Empty where Slurm no longer knows the job (some minutes after its end). Without an id: all jobs.

    Raises:
        SlurmUnavailable: no answer, or none that can be read.
    """
    arguments = ["show", "job", "--oneliner", *([] if job_id is None else [checked_id(job_id)])]
    try:
        said = _run("scontrol", arguments, READ_SECONDS).stdout
    except SlurmRefused as error:
        if "Invalid job id" in str(error):
            return []
        raise SlurmUnavailable(str(error)) from error
    # A name may hold a line feed; a record starts with its id, after a banner maybe.
    records = re.split(r"(?m)^(?=JobId=\d+ )", said)[1:]
    if not records and "No jobs in the system" not in said:
        raise SlurmUnavailable(f"scontrol: printed {shown(said)}, no job; try again later")
    return [record.strip().removesuffix("No jobs in the system") for record in records]


def queue(job_ids: Sequence[str] = ()) -> list[dict[str, Any]] | None:
    """Records of `squeue --json`, also of other jobs (22.05 ignores the filter).

    Without ids those of all jobs. None: it has no JSON, and scontrol is to be asked.

    Raises:
        Unreadable: it failed, or printed something else; scontrol may do better.
        SlurmUnavailable: also where squeue ends with status 0 and an `errors` list, which is how
            22.05 says that the controller is down.
    """
    jobs = ",".join(checked_id(job_id) for job_id in job_ids)
    try:
        done = _run("squeue", ["--json", *([f"--jobs={jobs}"] if jobs else [])], READ_SECONDS)
    except SlurmRefused as error:
        if "Invalid job id" in str(error):
            return []
        if NO_JSON.search(str(error).partition(":")[2]):
            return None
        raise Unreadable(str(error)) from error
    answer = json_answer(done.stdout)
    if answer is None:
        raise Unreadable(f"squeue: printed {shown(done.stdout)}, no JSON of jobs")
    if answer["errors"] and not answer["jobs"]:
        words = _one_line(done.stderr) or "; ".join(answer["errors"])
        raise SlurmUnavailable(str(_explained("squeue", words)))
    return answer["jobs"]


SACCT_FIELDS = [
    "JobIDRaw", "JobID", "JobName", "State", "ExitCode", "NodeList", "Start", "End",
    "TimelimitRaw", "Reason",
]  # fmt: skip
# sacct -c reads a text file: it knows fewer fields, and splits a name at its first space.
COMPLETION_FIELDS = [
    "JobID", "JobName", "State", "ExitCode", "NodeList", "Start", "End", "Timelimit",
]  # fmt: skip
UNIT_SEPARATOR = "\x1f"  # a job's name may hold any printable character


def accounting(job_ids: Sequence[str]) -> list[dict[str, str]] | None:
    """Rows of sacct, oldest first, one for each start of a job; None without slurmdbd.

    Columns rather than `sacct --json`: the columns kept their names and meaning over Slurm's
    releases, while 22.05's JSON says SUCCESS of a job that failed.
    """
    jobs = ",".join(checked_id(job_id) for job_id in job_ids)
    arguments = ["--duplicates", "--allocations", f"--jobs={jobs}"]
    try:
        return _sacct(arguments, SACCT_FIELDS)
    except SlurmRefused as error:
        if "accounting storage is disabled" in str(error):
            return None
        raise SlurmUnavailable(str(error)) from error


def completions(job_ids: Sequence[str]) -> list[dict[str, str]]:
    """Rows of `sacct --completion`, the file of ended jobs that needs no slurmdbd; may be empty.

    It knows no array: a row's JobID is the plain number of a task.
    """
    jobs = ",".join(checked_id(job_id) for job_id in job_ids)
    try:
        return _sacct(["--completion", f"--jobs={jobs}"], COMPLETION_FIELDS)
    except SlurmRefused:
        # Without the plug-in, a file we may read, or a parser that stands the file's names (22.05
        # dies of a line feed in one), there is no such record, and that is all it means.
        return []


def checked_id(job_id: str) -> str:
    """The job id, or ValueError: anything else could be read as an option."""
    if not JOB_ID.fullmatch(job_id):
        raise ValueError(f"job id {job_id!r}: give Slurm's number, as 123, or 123_4 for an array")
    return job_id


def _sacct(arguments: Sequence[str], fields: Sequence[str]) -> list[dict[str, str]]:
    layout = ["--parsable2", "--noheader", f"--delimiter={UNIT_SEPARATOR}"]
    columns = f"--format={','.join(fields)}"
    said = _run("sacct", [*layout, columns, *arguments], READ_SECONDS).stdout
    lines = [line for line in said.split("\n") if UNIT_SEPARATOR in line]  # others are a banner
    rows = [line.split(UNIT_SEPARATOR) for line in lines]
    for line, row in zip(lines, rows, strict=True):
        if len(row) != len(fields):
            raise SlurmUnavailable(
                f"sacct: printed {shown(line)}, {len(row)} columns where {len(fields)} were asked "
                "for; try again later"
            )
    return [dict(zip(fields, row, strict=True)) for row in rows]


def _run(
    program: str, arguments: Sequence[str], seconds: float
) -> subprocess.CompletedProcess[str]:
    try:
        done = subprocess.run(
            [program, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
            env=client_environment(os.environ, program),
            # 22.05's clients die of SIGPIPE where a busy controller closes the connection; with it
            # ignored, as Python has it, they try again or say what happened.
            restore_signals=False,
            check=False,
        )
    except FileNotFoundError:
        raise SlurmAbsent(f"{program}: not found: {PACKAGES}") from None
    except OSError as error:
        raise SlurmAbsent(f"{program}: cannot be started ({error.strerror}): {PACKAGES}") from error
    except subprocess.TimeoutExpired:
        fix = "try again later"
        if seconds == CHANGE_SECONDS:
            fix = "it may still be done: look with `squeue --me` before you send it again"
        raise SlurmUnavailable(f"{program}: no answer from Slurm in {seconds:g} s; {fix}") from None
    if done.returncode < 0:
        number = -done.returncode
        name = next((one.name for one in signal.Signals if one == number), f"signal {number}")
        raise SlurmUnavailable(f"{program}: ended by {name}; try again later")
    if done.returncode:
        words = _one_line(done.stderr) or _one_line(done.stdout)
        raise _explained(program, words or f"ended with status {done.returncode}")
    return done


def _explained(program: str, words: str) -> SlurmRefused | SlurmUnavailable:
    for part, fix in FIXES.items():
        if part in words:
            return SlurmRefused(f"{program}: {words}; {fix}")
    for part, fix in NO_ANSWER.items():
        if part in words:
            return SlurmUnavailable(f"{program}: {words}; {fix}")
    return SlurmRefused(f"{program}: {words}")


def _one_line(said: str) -> str:
    lines = [PREFIXES.sub("", line.strip(), count=1) for line in said.splitlines()]
    kept = [line.rstrip(".") for line in dict.fromkeys(lines) if line and "--help" not in line]
    return "; ".join(kept)
