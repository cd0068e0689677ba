"""Why a job does not start, in one plain line. Reads a JobState and nothing else."""

import re
import time

from launch.slurm.records import JobState

WAITING = frozenset(("PENDING", "REQUEUED", "REQUEUE_HOLD", "RESV_DEL_HOLD", "SPECIAL_EXIT"))

# Slurm's reason -> in plain words, and what helps. squeue(1), "JOB REASON CODES".
REASONS = {
    "None": "Slurm has not looked at it yet",
    "Priority": "jobs of higher priority are ahead of it",
    "Resources": "it waits for nodes to become free",
    "BeginTime": "its start time has not come (a requeued job is held back about two minutes)",
    "Dependency": "it waits for another job",
    "DependencyNeverSatisfied": "the job it depends on failed or was cancelled, so it will never "
    "start: cancel it, and submit it again when that job has succeeded",
    "BadConstraints": "no nodes of this cluster can ever satisfy it: ask for fewer nodes, GPUs, "
    "CPUs or less memory, or another constraint",
    "PartitionNodeLimit": "it asks for more nodes than its partition allows or has up: ask for "
    "fewer, or another partition (`sinfo -s`)",
    "PartitionConfig": "its partition does not allow it: too many nodes or too long, or closed to "
    "you (`sinfo -s`)",
    "PartitionTimeLimit": "its time limit is above its partition's: ask for less (`sinfo -s`)",
    "PartitionDown": "its partition is down: `sinfo -s` shows the others",
    "PartitionInactive": "its partition starts no jobs now: `sinfo -s` shows the others",
    "ReqNodeNotAvail": "a node it needs is down, drained or reserved (`sinfo -R`)",
    "NodeDown": "a node it needs is down (`sinfo -R`)",
    "Reservation": "its reservation has not begun (`scontrol show reservation`)",
    "ReservationDeleted": "its reservation was deleted: cancel it, and submit it without",
    "JobHeldUser": "it is held: `scontrol release` lets it start",
    "JobHeldAdmin": "the cluster's staff hold it: ask them",
    "JobHoldMaxRequeue": "it was requeued too often and is held: read its log, then "
    "`scontrol release`",
    "launch_failed_requeued_held": "it failed to start on a node and is held: `scontrol release`",
    "JobArrayTaskLimit": "as many tasks of its array run as it allows (%N in the array)",
    "Licenses": "it waits for a licence (`scontrol show licenses`)",
    "Cleaning": "the nodes still clean up after its last start",
    "Prolog": "the nodes still prepare for it",
    "InvalidAccount": "its account is not valid: `sacctmgr show assoc user=$USER` lists yours",
    "AccountNotAllowed": "its account may not use this partition",
    "InvalidQOS": "its QOS is not valid: `sacctmgr show assoc user=$USER format=account,qos`",
    "QOSNotAllowed": "its QOS may not be used in this partition or by this account",
    "MaxMemPerLimit": "it asks for more memory than the partition allows: ask for less",
    "DeadLine": "it cannot end before its deadline",
    "SystemFailure": "Slurm, its file system or its network failed: ask the cluster's staff",
}
# What the names of limits are made of: QOSMaxJobsPerUserLimit, AssocGrpGRESMinutes, ...
LIMIT = re.compile(r"(QOS|Assoc)(Grp|Max|Min)([A-Za-z]+?)(Limit|NotSatisfied)?")
LIMITED = {
    "SubmitJob": "jobs submitted",
    "WallDuration": "time",
    "Wall": "time",
    "Job": "jobs running",
    "Node": "nodes",
    "GRES": "GPUs",
    "Cpu": "CPUs",
    "CPU": "CPUs",
    "Mem": "memory",
    "Billing": "billing units",
    "License": "licences",
}


def why_waiting(job: JobState) -> str:
    """Why a job does not start, or never could, in one plain line; empty if it started.

    Says Slurm's own word in brackets, for whom to ask or search.
    """
    # Slurm fails a job at once where no node could run it; it was given none.
    refused = job.finished and job.state != "CANCELLED" and not job.nodes and bool(job.reason)
    if job.state not in WAITING and not refused:
        return ""
    reason = job.reason or "None"
    meaning = REASONS.get(reason) or _limit_reached(reason)
    detail = job.detail.removeprefix(f"{reason}, ").replace("\n", " ")
    more = f": {detail}" if detail and detail != reason else ""
    expected = ""
    if job.start and not job.finished:
        expected = f"; expected start {time.strftime('%Y-%m-%d %H:%M', time.localtime(job.start))}"
    return f"{job.label} does not start: {meaning}{more}{expected} [{reason}]"


def _limit_reached(reason: str) -> str:
    found = LIMIT.fullmatch(reason)
    if not found:
        return "Slurm's reason is"
    owner = "its QOS" if found[1] == "QOS" else "its account"
    what = next((LIMITED[part] for part in LIMITED if found[3].startswith(part)), found[3])
    if found[2] == "Min":
        return f"{owner} asks for more {what} than this job does"
    if "Minutes" in found[3]:
        what += " x minutes"
    whose = " of all jobs together" if found[2] == "Grp" else ""
    per = re.search(r"Per(Job|Node|User|Account)", found[3])
    each = f" per {per[1].lower()}" if per else ""
    return f"{owner} limits {what}{each}{whose}, and with this job the limit would be passed"
