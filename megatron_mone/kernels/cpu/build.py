"""Build the native CPU kernels: `python megatron_mone/kernels/cpu/build.py`, or on first use.

One library `mone_cpu-<sources>-<compiler>.so`, beside the sources of a checkout, else in the
user's cache folder (native.py): both hashes are in its name, so that a changed source or compiler
is a new library and an old one is never loaded. Where there is no compiler, a library that was
built elsewhere from the same sources is used. Needs only the standard library, so that `make` and
setup.py run it before anything is installed.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = FOLDER / "src"
FLAGS = ["-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden"]
FLAGS += ["-fno-math-errno", "-ffp-contract=fast", "-Wall", "-Wno-psabi"]
# Vectors of so many floats, and the flags of each instruction set of a processor, as the compiler
# names it; chosen when the library is used.
VARIANTS: dict[str, dict[str, tuple[int, list[str]]]] = {
    "x86_64": {
        "baseline": (4, []),
        "avx2": (8, ["-mavx2", "-mfma"]),
        "avx512": (16, [f"-mavx512{part}" for part in ("f", "vl", "dq", "bw")]
                   + ["-mfma", "-mprefer-vector-width=512"]),
    },
    "aarch64": {"neon": (4, [])},
}  # fmt: skip


class BuildError(RuntimeError):
    """The library cannot be had; the message says why and what to install."""


def build(flags: tuple[str, ...] = (), folder: Path = FOLDER) -> Path:
    """The library of these sources, compiled if it is not there yet.

    Args:
        flags: added to the compiler's, for instance a sanitizer's.
        folder: where a library is kept that is not beside the sources.

    Raises:
        BuildError: no compiler, one for a processor that has no kernels, a folder that cannot be
            written, or a compiler error.
    """
    parts = [p.read_text() for p in sorted(SOURCES.iterdir())]
    sources = _hash(*parts, repr(VARIANTS), *FLAGS, *flags)
    compiler = find_compiler()
    if compiler is None:
        for place in (FOLDER, folder):
            for built in sorted(place.glob(f"mone_cpu-{sources}-*.so")):
                return built
        raise BuildError("the CPU kernels need a C++ compiler: install g++ or set CXX")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    name = f"mone_cpu-{sources}-{_hash(compiler, version)}.so"
    if (FOLDER / name).exists():
        return FOLDER / name
    if not (folder / name).exists():
        _build_locked(compiler, flags, folder / name)
    return folder / name


def find_compiler() -> str | None:
    """CXX if it is set, else g++ or c++; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++"]
    return next((path for path in map(shutil.which, names) if path), None)


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]


def _build_locked(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Ranks of one machine may get here together: one compiles, the others wait for it."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with (target.parent / ".mone_cpu.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(compiler, flags, target)
    except OSError as error:
        raise BuildError(f"the CPU kernels cannot be built: {error}") from error


def variants(compiler: str) -> dict[str, tuple[int, list[str]]]:
    """The instruction sets of the processor that the compiler compiles for.

    Raises:
        BuildError: it is none of VARIANTS.
    """
    told = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True).stdout.strip()
    machine = told.split("-")[0]
    if machine not in VARIANTS:
        known = " or ".join(VARIANTS)
        raise BuildError(f"the CPU kernels run on {known}; {compiler} compiles for {told or '?'}")
    return VARIANTS[machine]


def _compile(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    sets = variants(compiler)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        jobs = {"library": [str(SOURCES / "library.cpp")]}
        for name, (lanes, machine) in sets.items():
            jobs[name] = [
                str(SOURCES / "kernels.cpp"), f"-DMONE_TABLE=mone_{name}",
                f"-DMONE_LANES={lanes}", *machine,
            ]  # fmt: skip
        objects = [f"{scratch}/{name}.o" for name in jobs]
        running = [
            subprocess.Popen(
                [compiler, *FLAGS, *flags, *arguments, "-c", "-o", output],
                stderr=subprocess.PIPE, text=True,
            )
            for arguments, output in zip(jobs.values(), objects, strict=True)
        ]  # fmt: skip
        errors = [process.communicate()[1] for process in running]
        for process, error in zip(running, errors, strict=True):
            if process.returncode:
                raise BuildError(f"{compiler} failed on the CPU kernels:\n{error[-2000:]}")
        library = f"{scratch}/library.so"
        link = [compiler, *FLAGS, *flags, "-shared", *objects, "-o", library]
        done = subprocess.run(link, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{compiler} failed to link the CPU kernels:\n{done.stderr[-2000:]}")
        if target.parent == FOLDER:  # other versions may share a cache folder
            for stale in FOLDER.glob("mone_cpu-*.so"):
                stale.unlink(missing_ok=True)
        Path(library).replace(target)


def main() -> int:
    """Build, or say in one line why not. Status 0, or with --strict 1 for no library."""
    try:
        build()
    except BuildError as error:
        print(f"{str(error).strip()}; the reference backend (plain torch) runs without them")
        return int("--strict" in sys.argv[1:])
    return 0


if __name__ == "__main__":
    sys.exit(main())
