"""What a node has of disk, memory and software. One task a node looks.

May touch: one file of its own beside the host list, removed again.
"""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launch.preflight.limits import Limits

GIB = 2**30
_PACKAGES = ("torch", "megatron-core")
_OWN_PACKAGES = ("megatron_mone", "launch")
_SOURCES = (".py", ".cpp", ".cu", ".h", ".j2")


def run_folder_faults(folder: Path, token: str, limits: Limits) -> list[str]:
    """Whether the shared folder of a run has room and keeps what is written to it.

    Args:
        folder: where the host list is.
        token: text that no other node writes; also names the file.
        limits: `run_disk_gib`.
    """
    faults = list(_room("the run folder", folder, limits.run_disk_gib))
    path = folder / f".check-{token}"
    try:
        with path.open("x+", encoding="utf-8") as file:
            file.write(token)
            file.flush()
            os.fsync(file.fileno())
        kept = path.read_text(encoding="utf-8")
        path.unlink()
    except OSError as error:
        return [*faults, f"the run folder cannot be written: {error.strerror}"]
    if kept != token:
        faults.append("the run folder does not keep what is written")
    return faults


def temporary_folder_faults(limits: Limits) -> list[str]:
    """Whether the node's own folder for temporary files has room."""
    return list(_room("the temporary folder", Path(tempfile.gettempdir()), limits.tmp_disk_gib))


def memory_faults(text: str, limits: Limits) -> list[str]:
    """Whether enough main memory is available.

    Args:
        text: /proc/meminfo.
        limits: `memory_gib`.
    """
    lines = dict(line.partition(":")[::2] for line in text.splitlines())
    kib = lines.get("MemAvailable", "").split()
    if not kib or not kib[0].isdigit():
        return []
    return list(_at_least("of main memory", int(kib[0]) * 1024, limits.memory_gib))


def software_versions() -> dict[str, str]:
    """What must be equal on all nodes. Imports none of it: importing torch takes seconds."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "absent"
    versions["megatron-mone sources"] = sources_digest(
        [_package_folder(name) for name in _OWN_PACKAGES]
    )
    return versions


def sources_digest(folders: list[Path]) -> str:
    """Twelve hexadecimal digits that differ where a source file or its name does."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(p for p in folder.rglob("*") if p.suffix in _SOURCES):
            own = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{path.relative_to(folder)} {own}\n".encode())
    return digest.hexdigest()[:12]


def _package_folder(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def _room(what: str, folder: Path, gib: float) -> Iterator[str]:
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield f"{what} does not answer: {error.strerror}"
        return
    yield from _at_least(f"free in {what}", free, gib)


def _at_least(what: str, value: int, gib: float) -> Iterator[str]:
    if value < gib * GIB:
        yield f"{value / GIB:.1f} GiB {what}, {gib:g} are needed"
