"""manifest.json of a run folder: what was run, from which code and data, and every attempt at it.

    runs/NAME/manifest.json              {"schema", "name", "config", "config_sha256", "data",
                                          "starts": [...], "attempts": [...]}
    runs/NAME/attempts/ID.start.json     written when an attempt begins, by the job itself
    runs/NAME/attempts/ID.end.json       and when it ends; without it the attempt runs or was lost
    runs/NAME/cases/CASE/attempts/       the same for the elements of a grid

Attempts have files of their own, so that a job on a compute node needs no lock. May touch: the run
folder, git.
"""

import fcntl
import hashlib
import json
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, Field, model_validator

from launch.spec.extension import extends
from megatron_mone.common.documents import AnyText, Document, Text
from megatron_mone.common.files import write_json
from megatron_mone.common.places import IS_CHECKOUT, ROOT
from megatron_mone.data.manifest import load_manifest, manifest_path, sha256_of

MANIFEST = "manifest.json"
LOCK = ".manifest.lock"


class RunManifest(
    Document, schema="megatron-mone/launch/1", again="choose another --name", indent=1
):
    """manifest.json; what another version writes beside these fields is kept."""

    model_config = ConfigDict(extra="allow")

    name: AnyText = ""
    config: Any = None
    """All that decides the result, as JSON."""
    config_sha256: Text
    data: dict[AnyText, dict[AnyText, AnyText] | None] = Field(default_factory=dict)
    """Prefix of a dataset -> its checksums; null where it has no manifest."""
    starts: list[dict[str, Any]]
    """Of each start or submission the time, the code, and a job's id where there is one."""
    attempts: list[dict[str, Any]] = Field(default_factory=list)
    """As `attempts` finds them."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        return value


def open_run(folder: Path, name: str, config: Any, data: Sequence[str]) -> None:
    """Write the manifest of a run that has not begun, so that a job is never without one.

    A submission that was refused leaves a manifest without a start; it stands in nobody's way.

    Args:
        folder: run folder; made where it is not there.
        name: of the run.
        config: JSON value with all that decides the result.
        data: prefixes of the datasets.

    Raises:
        ValueError: the folder holds a run of another config than this or a shorter one, or its
            manifest cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        _opened(folder, name, config, data).write(folder / MANIFEST)


def record_start(folder: Path, name: str, config: Any, data: Sequence[str], start: Any) -> None:
    """Note that a run was started or submitted, in a manifest that is new or of the same run.

    Args:
        folder: run folder; made where it is not there.
        name: of the run.
        config: JSON value with all that decides the result.
        data: prefixes of the datasets.
        start: JSON mapping about this start; the time and the code are added.

    Raises:
        ValueError: as `open_run`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / LOCK):
        _append(folder, _opened(folder, name, config, data), stamped(start))


def add_start(folder: Path, start: Mapping[str, Any]) -> None:
    """Note a start in the manifest that is there.

    Args:
        folder: run folder.
        start: as `stamped` made it.

    Raises:
        ValueError: no manifest there, or one that cannot be read.
    """
    with locked(folder / LOCK):
        _append(folder, _read_there(folder), start)


def stamped(start: Mapping[str, Any]) -> dict[str, Any]:
    """A start with its time, in seconds since 1970, and the code of this checkout."""
    return {"time": int(time.time()), **code_facts(), **start}


def check_config(folder: Path, config: Any) -> None:
    """Refuse to start in the folder of another run.

    Raises:
        ValueError: as `open_run`.
    """
    manifest = _read(folder)
    if manifest is not None and _has_begun(folder, manifest):
        _check_config(folder, manifest, config)


def gather(folder: Path) -> RunManifest:
    """The manifest of a run with all attempts so far, written back.

    A job whose submission was cut short before it was noted (its launcher's machine died) is known
    by its attempts, and becomes a start like others; while it waits, submission.py finds it.

    Raises:
        ValueError: no manifest there, or one that cannot be read.
    """
    with locked(folder / LOCK):
        manifest = _read_there(folder)
        found = attempts(folder)
        if found != manifest.attempts:
            starts = [*manifest.starts, *_unnoted_starts(folder, manifest.starts, found)]
            manifest = manifest.model_copy(update={"attempts": found, "starts": starts})
            manifest.write(folder / MANIFEST)
    return manifest


def attempts(folder: Path) -> list[dict[str, Any]]:
    """Every attempt, oldest first: job_id, attempt, node_list, start, and end, status, reason.

    Times are seconds since 1970; `end`, `status` and `reason` are None while it runs, and for ever
    where it was lost with its node. `case` names the element of a grid, `left_out` the nodes, with
    commas between, that its pre-flight found bad; without a pre-flight it is not there.
    """
    found = []
    for path in sorted(folder.glob("attempts/*.start.json")) + sorted(
        folder.glob("cases/*/attempts/*.start.json")
    ):
        beside = path.with_name(path.name.removesuffix("start.json") + "end.json")
        end = {"end": None, "status": None, "reason": None}
        if beside.exists():
            end = read_mapping(beside)
        case = {} if path.parent.parent == folder else {"case": path.parent.parent.name}
        found.append({**case, **read_mapping(path), **end})
    return sorted(found, key=lambda attempt: attempt["start"])


def begin_attempt(folder: Path, job_id: str, attempt: str, node_list: str) -> None:
    """Write the start of an attempt, as a job's script does it."""
    (folder / "attempts").mkdir(parents=True, exist_ok=True)
    start: dict[str, Any] = {"job_id": job_id, "attempt": attempt, "node_list": node_list}
    start |= {"start": int(time.time())}
    write_json(folder / "attempts" / f"{attempt}.start.json", start)


def end_attempt(folder: Path, attempt: str, status: int, reason: str) -> None:
    """Write the end of an attempt, as a job's script does it."""
    end = {"end": int(time.time()), "status": status, "reason": reason}
    write_json(folder / "attempts" / f"{attempt}.end.json", end)


def read_record[D: Document](kind: type[D], path: Path, what: str) -> D:
    """A document of a run folder.

    Raises:
        ValueError: one line; it cannot be read, or is none.
    """
    try:
        return kind.read(path, kind.AGAIN)
    except ValueError as error:
        why = str(error).removeprefix(f"{path}: ")
        raise ValueError(f"{path} is not a {what} of schema {kind.SCHEMA}: {why}") from None


def read_mapping(path: Path) -> dict[str, Any]:
    """A JSON file of a run folder.

    Raises:
        ValueError: it cannot be read, or holds no mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a mapping")
    return value


@contextmanager
def locked(path: Path, refusal: str | None = None) -> Iterator[None]:
    """Hold a lock file; the system lets go of it when the process ends, however it ends.

    Args:
        path: made where it is not there.
        refusal: what to say when somebody else holds it; None waits for them.

    Raises:
        ValueError: `refusal`.
    """
    with path.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if refusal is None else fcntl.LOCK_NB))
        except BlockingIOError:
            raise ValueError(refusal) from None
        yield


def digest(value: Any) -> str:
    """sha256 of a JSON value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def code_facts() -> dict[str, Any]:
    """The code of this checkout: git commit, whether files differ from it, pinned packages.

    `git_commit` is None outside a git checkout; a git around an installation knows other code.
    """
    if not IS_CHECKOUT:
        return {"git_commit": None, "modified": None, "constraints_sha256": None}
    commit = _git(ROOT, "rev-parse", "HEAD")
    status = _git(ROOT, "status", "--porcelain", "--untracked-files=no")
    constraints = ROOT / "constraints.txt"
    return {
        "git_commit": commit,
        "modified": None if status is None else bool(status),
        "constraints_sha256": sha256_of(constraints) if constraints.exists() else None,
    }


def data_facts(prefixes: Sequence[str]) -> dict[str, dict[str, str] | None]:
    """Checksums of datasets from the manifests beside them; None where there is no manifest.

    Raises:
        ValueError: a manifest cannot be read.
    """
    facts: dict[str, dict[str, str] | None] = {}
    for prefix in prefixes:
        found = load_manifest(manifest_path(Path(prefix)))
        facts[prefix] = None
        if found is not None:
            facts[prefix] = {
                "bin_sha256": found.bin.sha256,
                "idx_sha256": found.idx.sha256,
                "tokenizer_sha256": found.tokenizer.sha256,
            }
    return facts


def _opened(folder: Path, name: str, config: Any, data: Sequence[str]) -> RunManifest:
    """The manifest in a folder, or a new one where no run has begun there."""
    manifest = _read(folder)
    if manifest is not None and _has_begun(folder, manifest):
        _check_config(folder, manifest, config)
        return manifest.model_copy(update={"config": config, "config_sha256": digest(config)})
    return RunManifest(
        name=name, config=config, config_sha256=digest(config), data=data_facts(data),
        starts=[], attempts=[],
    )  # fmt: skip


def _append(folder: Path, manifest: RunManifest, start: Mapping[str, Any]) -> None:
    """Write a manifest with one start more; the caller holds LOCK."""
    more = {"starts": [*manifest.starts, dict(start)], "attempts": attempts(folder)}
    manifest.model_copy(update=more).write(folder / MANIFEST)


def _has_begun(folder: Path, manifest: RunManifest) -> bool:
    return bool(manifest.starts or attempts(folder))


def _unnoted_starts(
    folder: Path, starts: Sequence[Mapping[str, Any]], tried: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    noted = {start.get("job_id") for start in starts}
    found: dict[str, dict[str, Any]] = {}
    for attempt in tried:
        job_id = str(attempt["job_id"]).partition("_")[0]
        if job_id.isdigit() and job_id not in noted and job_id not in found:
            # Which cases of a sweep it has is Slurm's to say.
            cases = sorted(int(path.name[:3]) for path in folder.glob("cases/[0-9][0-9][0-9]-*"))
            found[job_id] = {"time": attempt["start"], "job_id": job_id, "ranks": None}
            found[job_id] |= {"cases": cases} if cases else {}
    return list(found.values())


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _check_config(folder: Path, manifest: RunManifest, config: Any) -> None:
    if not (manifest.config_sha256 == digest(config) or extends(manifest.config, config)):
        raise ValueError(
            f"{folder} holds a run of another config: choose another --name, or delete the folder"
        )


def _read_there(folder: Path) -> RunManifest:
    manifest = _read(folder)
    if manifest is None:
        raise ValueError(f"{folder / MANIFEST} is missing: no run was started there")
    return manifest


def _read(folder: Path) -> RunManifest | None:
    path = folder / MANIFEST
    return read_record(RunManifest, path, "manifest") if path.exists() else None
