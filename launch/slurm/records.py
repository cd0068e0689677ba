"""Slurm's records of jobs in one form: of squeue, scontrol and sacct, over its releases. Pure."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from launch.slurm.answers import shown
from launch.slurm.commands import Unreadable

FINISHED = frozenset((
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
    "PREEMPTED", "REVOKED", "TIMEOUT",
))  # fmt: skip
# Flags beside the state in newer JSON (a list); 22.05 and squeue print the flag for the state.
FLAGS = frozenset((
    "COMPLETING", "CONFIGURING", "LAUNCH_FAILED", "POWER_UP_NODE", "RECONFIG_FAIL", "REQUEUED",
    "REQUEUE_FED", "REQUEUE_HOLD", "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "SPECIAL_EXIT",
    "STAGE_OUT", "STOPPED",
))  # fmt: skip


@dataclass(frozen=True)
class JobState:
    """One job, or one task of an array, as Slurm knows it now. Times are seconds since the epoch.

    `state` and `reason` are Slurm's own words (squeue(1), "JOB STATE CODES", "JOB REASON CODES").
    """

    job_id: str
    """The number sbatch gave; of an array, the array's."""
    array_task: str
    """"3"; "0-2%1" for tasks that wait; empty where the job is no array."""
    name: str
    state: str
    reason: str
    """Why it waits, or why it ended; empty where Slurm says None."""
    detail: str
    """More words of Slurm's on the reason, or the dependency it waits for; may be empty."""
    exit_code: int
    """The batch script's exit status; 0 until it ended."""
    signal: int
    """The signal that ended it, or 0."""
    restarts: int
    """How often Slurm put it back in the queue and started over."""
    nodes: str
    """Slurm's host list, "n[0-3,7]"; empty while it waits."""
    start: int | None
    """When it started; while it waits, when Slurm expects to start it, if it knows."""
    end: int | None
    """When it ended; None until then."""
    time_limit_minutes: int | None
    """None: no limit, or the partition's, which Slurm fills in when it starts the job."""
    stdout: str
    """Path of the batch script's output, patterns filled in; empty where Slurm does not say."""

    @property
    def label(self) -> str:
        """The job as squeue writes it: 12, 12_3 or 12_[0-2%1]."""
        if not self.array_task:
            return self.job_id
        task = self.array_task
        return f"{self.job_id}_{task if task.isdigit() else f'[{task}]'}"

    @property
    def finished(self) -> bool:
        """Whether it ended for good: Slurm will not start it again by itself."""
        return self.state in FINISHED


def array_tasks(listed: str) -> Iterator[int]:
    """The numbers of "0,4-6,10-20:5%2", as tasks that wait are listed."""
    for part in listed.partition("%")[0].split(","):
        if found := re.fullmatch(r"(\d+)(?:-(\d+)(?::(\d+))?)?", part):
            yield from range(int(found[1]), int(found[2] or found[1]) + 1, int(found[3] or 1))


def _known_form(program: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """A reader of one record, whose failures say which program wrote it, and what."""

    def wrap(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(read)
        def reading(record: Any) -> Any:
            try:
                return read(record)
            except (LookupError, TypeError, ValueError, AttributeError) as error:
                raise Unreadable(
                    f"{program}: a record of a form not known: {shown(str(record))} ({error!r}); "
                    "see whether its version is one of docs/SLURM_TESTS.md"
                ) from error

        return reading

    return wrap


@_known_form("squeue")
def from_json(record: dict[str, Any]) -> JobState:
    """A record of `squeue --json`, of 22.05 (plain numbers, null), 23.02 and later ({set, ...})."""
    states = record["job_state"]
    if isinstance(states, list):
        states = next((state for state in states if state in FLAGS), states[0])
    state = _word(states)
    array_id = _number(record["array_job_id"])
    task = _number(record["array_task_id"])
    exit_code, signal = _exit_of(record["exit_code"])
    reason = _plain(_text(record["state_reason"]))
    nodes = _text(record["nodes"])
    refused = state in FINISHED and not nodes  # Slurm gives it a start all the same
    tasks = _text(record["array_task_string"])
    return JobState(
        job_id=_word(str(array_id or _number(record["job_id"]) or "")),
        array_task=tasks if task is None else str(task) if array_id else "",
        name=_text(record["name"]),
        state=state,
        reason=reason,
        detail=_text(record["dependency" if reason == "Dependency" else "state_description"]),
        exit_code=exit_code,
        signal=signal,
        restarts=_number(record["restart_cnt"]) or 0,
        nodes=nodes,
        start=None if refused else _number(record["start_time"]) or None,
        end=(_number(record["end_time"]) or None) if state in FINISHED else None,
        time_limit_minutes=_number(record["time_limit"]),
        stdout="" if array_id and task is None else output_in_json(record),
    )


@_known_form("squeue")
def output_in_json(record: dict[str, Any]) -> str:
    """Path of a job's output; of array tasks that wait with the %a of the pattern.

    `squeue --json` gives sbatch's pattern as the user wrote it, relative to its folder.
    """
    array_id, task = _number(record["array_job_id"]), _number(record["array_task_id"])
    job_id = _number(record["job_id"])
    names = {
        "%": "%",
        "A": array_id or job_id,
        "J": job_id,
        "N": record["batch_host"],
        "a": task,
        "j": job_id,
        "u": record["user_name"],
        "x": record["name"],
    }
    default = "slurm-%A_%a.out" if array_id else "slurm-%j.out"
    pattern = _text(record["standard_output"]) or default
    path = _text(record.get("stdout_expanded")) or _filled(pattern, names)
    return str(Path(_text(record["current_working_directory"]), path))


def ids_in_json(record: dict[str, Any]) -> tuple[int | None, int | None]:
    """A record's own number and its array's; None where it has none that can be read."""
    found: list[int | None] = []
    for name in ("job_id", "array_job_id"):
        try:
            found.append(_number(record.get(name)))
        except (LookupError, TypeError):
            found.append(None)
    return found[0], found[1]


def _number(value: Any) -> int | None:
    """22.05: a number or null; later: {"set": bool, "infinite": bool, "number": n}."""
    if isinstance(value, dict):
        return _number(value["number"]) if value["set"] and not value["infinite"] else None
    if value is not None and not isinstance(value, int):
        raise TypeError(f"{value!r} is no number")
    return value


def _text(value: Any) -> str:
    """A text; null is an empty one."""
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value or ""


def _word(value: Any) -> str:
    """A text that no record lacks."""
    if not _text(value):
        raise ValueError("a number or a state is missing")
    return value


def _exit_of(value: Any) -> tuple[int, int]:
    """Exit status and signal: until 23.02 wait(2)'s one number, later two fields."""
    if isinstance(value, dict) and "return_code" in value:
        return _number(value["return_code"]) or 0, _number(value["signal"]["id"]) or 0
    status = _number(value) or 0
    return status >> 8, status & 0x7F


def _filled(path: str, values: dict[str, Any]) -> str:
    """Fill in sbatch's file name pattern (sbatch(1), "FILENAME PATTERN")."""

    def fill(found: re.Match[str]) -> str:
        value = values.get(found[2])
        return found[0] if value in (None, "") else str(value).rjust(int(found[1] or 0), "0")

    return re.sub(r"%(\d*)(.)", fill, path)


# The name is the one field of these with spaces of its own; what follows it comes in this order.
ONELINER = re.compile(
    r"JobId=(?P<raw>\d+) (ArrayJobId=(?P<array>\d+) ArrayTaskId=(?P<task>\S+) "
    r"(ArrayTaskThrottle=\d+ )?)?(HetJob\S+ )*JobName=(?P<name>.*?) UserId=\S+ GroupId=\S+ "
    r"MCS_label=(?P<rest>.*)",
    re.DOTALL,
)


@_known_form("scontrol")
def from_oneliner(text: str) -> JobState:
    """A record of `scontrol show job --oneliner`, times in seconds since the epoch."""
    found = _matched(text)
    rest = found["rest"].partition(" Command=")[0]
    fields = dict(re.findall(r"(\S+?)=(\S*)", rest))
    # "Nodes_required_for_job_are_DOWN,..." stands for the reason Resources.
    words = _plain(fields["Reason"]).replace("_", " ") if "," in fields["Reason"] else ""
    reason = "Resources" if words.startswith("Nodes required") else fields["Reason"].split(",")[0]
    exit_code, _, signal = fields["ExitCode"].partition(":")
    task = found["task"] or ""
    whole = not task or task.isdigit()
    nodes = _plain(fields["NodeList"])
    return JobState(
        job_id=found["array"] or found["raw"],
        array_task=task,
        name=found["name"],
        state=fields["JobState"],
        reason=_plain(reason),
        detail=_plain(fields["Dependency"]) if reason == "Dependency" else words,
        exit_code=int(exit_code),
        signal=int(signal),
        restarts=int(fields["Restarts"]),
        nodes=nodes,
        start=_seconds(fields["StartTime"]) if nodes or fields["JobState"] == "PENDING" else None,
        end=_seconds(fields["EndTime"]) if fields["JobState"] in FINISHED else None,
        time_limit_minutes=_minutes(fields["TimeLimit"]),
        # scontrol fills in the pattern, save for numbers with a width ("%4a").
        stdout=_filled(output_in_oneliner(text), {"a": task}) if whole else "",
    )


def _matched(text: str) -> re.Match[str]:
    found = ONELINER.match(text)
    if not found:
        raise ValueError("its first fields are others")
    return found


@_known_form("scontrol")
def output_in_oneliner(text: str) -> str:
    """Path of a job's output, with what scontrol leaves of a pattern; empty where there is none."""
    _, _, paths = _matched(text)["rest"].partition(" Command=")
    found = re.search(r" StdOut=(.*?)(?= Power=| TresPer| MailUser=| *$)", paths)
    return found[1] if found else ""


@_known_form("sacct")
def from_sacct(row: dict[str, str]) -> JobState:
    """A row of sacct, with or without slurmdbd."""
    job_id, _, task = row["JobID"].partition("_")
    exit_code, _, signal = row["ExitCode"].partition(":")
    state = row["State"].split()[0]  # "CANCELLED by 1000"
    return JobState(
        job_id=_word(job_id),
        array_task=task.strip("[]"),
        name=row["JobName"],
        state=state,
        reason=_plain(row.get("Reason", "")) if state == "PENDING" else "",  # else: of its wait
        detail="",
        exit_code=int(exit_code),
        signal=int(signal),
        restarts=0,
        nodes=_plain(row["NodeList"]),
        start=_seconds(row["Start"]) if _plain(row["NodeList"]) else None,
        end=_seconds(row["End"]) if state in FINISHED else None,
        time_limit_minutes=_minutes(row.get("TimelimitRaw") or row["Timelimit"]),
        stdout="",
    )


def _plain(word: str) -> str:
    return "" if word in ("None", "(null)", "None assigned", "Unknown", "N/A") else word


def _seconds(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _minutes(text: str) -> int | None:
    """Minutes of "30", "01:30:00", "2-00:00:00"; None for UNLIMITED, Partition_Limit."""
    if text.isdigit():
        return int(text)
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d):\d\d", text)
    return found and int(found[1] or 0) * 1440 + int(found[2]) * 60 + int(found[3])
