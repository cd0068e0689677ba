"""What nvidia-smi says of a node's GPUs, and what is wrong with a rank's own. Starts nvidia-smi.

Field names are those of `nvidia-smi --help-query-gpu` and `--help-query-remapped-rows`. Answers
that mean "this GPU has no such thing" are no fault.
"""

import csv
import re
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from launch.preflight.limits import Limits
from launch.preflight.place import Place

COMMAND_SECONDS = 20.0
ECC = "ecc.errors.uncorrected.volatile.total"
ECC_LIFETIME = "ecc.errors.uncorrected.aggregate.total"
_REASONS = "clocks_event_reasons."
SLOWDOWNS = (
    f"{_REASONS}hw_slowdown",
    f"{_REASONS}hw_thermal_slowdown",
    f"{_REASONS}hw_power_brake_slowdown",
)
GPU_FIELDS = (
    "index",
    "uuid",
    "name",
    "driver_version",
    "clocks.max.sm",  # MHz
    "clocks.current.sm",  # MHz
    "temperature.gpu",  # degrees Celsius
    "memory.used",  # MiB
    "pcie.link.width.current",  # lanes
    "pcie.link.width.max",
    "retired_pages.pending",
    ECC,
    ECC_LIFETIME,
    *SLOWDOWNS,
)
ROW_FIELDS = ("gpu_uuid", "remapped_rows.pending", "remapped_rows.failure")
PROCESS_FIELDS = ("gpu_uuid", "pid", "process_name", "used_memory")
_UNKNOWN_FIELD = re.compile(r'Field "([^"]+)" is not a valid field to query')
_LOST = re.compile(r"lost|requires reset|unknown error|^ERR!", re.IGNORECASE)
_NONE = ("0", "No", "Not Active")

Row = Mapping[str, str]


@dataclass(frozen=True)
class GpuFacts:
    """A row for each GPU of the node; of this rank's own GPU its remapped rows and its users."""

    gpus: Sequence[Row]
    own: Row | None
    remapped: Row
    users: Sequence[Row]


class NoAnswer(Exception):
    """nvidia-smi is absent or failed; the text says which, in one line."""


def ask_gpus(place: Place, limits: Limits) -> GpuFacts:
    """Ask nvidia-smi about the GPUs of this node.

    Raises:
        NoAnswer: it is absent or failed.
        subprocess.TimeoutExpired: it did not answer in COMMAND_SECONDS.
    """
    gpus = _query("gpu", GPU_FIELDS)
    own = next((row for row in gpus if _is_named(row, place.gpu)), None)
    uuid = "" if own is None else own.get("uuid", "")
    remapped: Row = {}
    users: list[Row] = []
    if uuid:
        remapped = next((row for row in _rows() if row.get("gpu_uuid") == uuid), {})
        if (_number(own, "memory.used") or 0) > limits.used_mib:
            processes = _query("compute-apps", PROCESS_FIELDS)
            users = [row for row in processes if row.get("gpu_uuid") == uuid]
    return GpuFacts(gpus, own, remapped, users)


def gpu_faults(facts: GpuFacts, place: Place, limits: Limits) -> list[str]:
    """What is wrong with the node's number of GPUs and with this rank's own. Pure."""
    expected = limits.gpus or place.ranks_per_node
    faults = []
    if len(facts.gpus) < expected:
        faults.append(f"{len(facts.gpus)} of {expected} GPUs are there")
    if facts.own is None:
        # nvidia-smi lists whole GPUs only.
        if not place.gpu.startswith("MIG-"):
            faults.append(f"GPU {place.gpu} is not among those of nvidia-smi")
        return faults
    label = f"GPU {facts.own.get('index', place.gpu)}"
    return faults + [f"{label} {text}" for text in _own_faults(facts, facts.own, limits)]


def gpu_versions(facts: GpuFacts) -> dict[str, str]:
    """What must be equal on all nodes."""
    if facts.own is None:
        return {}
    names = {"GPU driver": "driver_version", "GPU model": "name", "GPU max MHz": "clocks.max.sm"}
    return {name: facts.own[field] for name, field in names.items() if facts.own.get(field)}


def _own_faults(facts: GpuFacts, own: Row, limits: Limits) -> Iterator[str]:
    lost = {text for text in own.values() if _LOST.search(text)}
    if lost:
        yield f"does not answer: {min(lost)}"
    for field, limit, since in (
        (ECC, limits.ecc_errors, ""),
        (ECC_LIFETIME, limits.ecc_errors_lifetime, " in its life"),
    ):
        errors = _number(own, field)
        if errors is not None and limit is not None and errors > limit:
            yield f"has {errors:.0f} uncorrected ECC errors{since}"
    if _is_set(own, "retired_pages.pending"):
        yield "waits for a reset to retire bad pages of memory"
    if _is_set(facts.remapped, "remapped_rows.pending"):
        yield "waits for a reset to remap bad rows of memory"
    if _is_set(facts.remapped, "remapped_rows.failure"):
        yield "has no rows left to remap bad ones to"
    slowed = [field for field in SLOWDOWNS if _is_set(own, field)]
    if slowed:
        reasons = ", ".join(field.removeprefix(_REASONS) for field in slowed)
        clocks = [own.get(f"clocks.{which}.sm") or "?" for which in ("current", "max")]
        yield f"is slowed down by its hardware ({reasons}) to {clocks[0]} of {clocks[1]} MHz"
    width, widest = (_number(own, f"pcie.link.width.{end}") for end in ("current", "max"))
    if width is not None and widest is not None and width < widest:
        yield f"has {width:.0f} of {widest:.0f} PCIe lanes"
    heat = _number(own, "temperature.gpu")
    if heat is not None and limits.temperature_c is not None and heat > limits.temperature_c:
        yield f"is at {heat:.0f} degrees Celsius"
    used = _number(own, "memory.used")
    if used is not None and used > limits.used_mib:
        yield f"has {used:.0f} MiB taken by {_users(facts.users)}"


def _users(rows: Sequence[Row]) -> str:
    names = [f"{row.get('process_name')} ({row.get('pid')})" for row in rows]
    return ", ".join(names[:3]) or "somebody else"


def _rows() -> list[Row]:
    try:
        return _query("remapped-rows", ROW_FIELDS)
    except NoAnswer:
        return []  # GPUs before Ampere, or an older nvidia-smi


def _query(what: str, fields: Sequence[str]) -> list[Row]:
    """One table of nvidia-smi; a field that this version does not know is left out."""
    asked = {field: field for field in fields}
    while True:
        command = ["nvidia-smi", f"--query-{what}={','.join(asked.values())}"]
        try:
            done = subprocess.run(
                [*command, "--format=csv,noheader,nounits"],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=COMMAND_SECONDS,
                check=False,
            )
        except OSError as error:
            raise NoAnswer(f"nvidia-smi cannot be started: {error.strerror}") from error
        unknown = _UNKNOWN_FIELD.search(done.stdout + done.stderr)
        field = next((new for new, name in asked.items() if unknown and name == unknown[1]), None)
        if field is None:
            return _table(done, tuple(asked))
        # Drivers before 535 know the reasons by another name.
        older = field.replace("clocks_event_reasons", "clocks_throttle_reasons")
        if older != asked[field]:
            asked[field] = older
        else:
            del asked[field]


def _table(done: subprocess.CompletedProcess[str], names: Sequence[str]) -> list[Row]:
    lines = [row for row in csv.reader(done.stdout.splitlines(), skipinitialspace=True) if row]
    rows: list[Row] = [
        dict(zip(names, row, strict=True)) for row in lines if len(row) == len(names)
    ]
    if done.returncode and not rows:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[0]
        raise NoAnswer(f"nvidia-smi failed with status {done.returncode}: {said[:120]}")
    return rows


def _is_named(row: Row, name: str) -> bool:
    return row.get("index") == name or (
        name.startswith("GPU-") and row.get("uuid", "").startswith(name)
    )


def _number(row: Row | None, field: str) -> float | None:
    """A number; None for `[N/A]`, `[Not Supported]` and fields that were not asked for."""
    text = (row or {}).get(field, "")
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def _is_set(row: Row, field: str) -> bool:
    text = row.get(field, "")
    return text not in _NONE and (text.isdigit() or text in ("Yes", "Active"))
