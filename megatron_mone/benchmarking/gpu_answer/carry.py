"""What a machine with torch and triton alone lacks, as one folder to copy there.

May touch: the folder it is given, and the installed packages, which it reads.
"""

import shutil
from importlib import metadata
from pathlib import Path

from megatron_mone.common.places import PACKAGE, ROOT

PACKAGES = (
    "pydantic", "pydantic-core", "annotated-types", "typing-inspection", "typing-extensions",
    "typer", "shellingham", "annotated-doc",
)  # fmt: skip
"""Beside numpy, which torch's users have. rich is for typer's colours, and is not needed."""
MOST = 64 << 20


def carry(out: Path) -> int:
    """Copy the project's code and PACKAGES to a folder; its bytes.

    Args:
        out: a folder that is not there, or empty.

    Raises:
        ValueError: one line; the folder has files, a package is not installed, or it grew too big.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--carry {out} has files: name a new folder")
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    for source in (PACKAGE, ROOT / "tools"):
        shutil.copytree(source, out / source.name, ignore=ignore)
    for name in PACKAGES:
        try:
            files = metadata.files(name) or []
        except metadata.PackageNotFoundError as error:
            raise ValueError(
                f"--carry needs {name}, which is not installed: pip install it"
            ) from error
        for file in files:
            if ".." in file.parts or "__pycache__" in file.parts:
                continue
            target = out / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(file.locate()), target)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    if size > MOST:
        raise ValueError(f"--carry {out} has {size >> 20} MiB, over {MOST >> 20}")
    return size
