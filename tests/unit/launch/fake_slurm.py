"""Stand-ins for Slurm's programs, so that a batch script runs without Slurm; and sbatch's reading.

`srun` runs the one task with rank 1 of 2 and writes the words it was given.
"""

import os
import subprocess
from pathlib import Path

_DUMP = """printf '%s\\0' "$@" >"$0.words"; env -0 >"$0.environment"
"""
_SRUN = """printf '%s\\0' "$@" >"$0.words"
export SLURM_PROCID=1 SLURM_LOCALID=1 SLURM_NTASKS=2 SLURM_NNODES=1
while [ "$1" != bash ]; do shift; done
exec "$@"
"""


class FakeSlurm:
    """Programs in a folder that goes first in PATH.

    Args:
        folder: an empty one.
        programs: more of them, name -> bash.
    """

    def __init__(self, folder: Path, **programs: str) -> None:
        self.folder = folder
        self.dump = folder / "dump"
        own = {"scontrol": "echo n0; echo n1", "squeue": "true", "srun": _SRUN, "dump": _DUMP}
        for name, code in {**own, **programs}.items():
            path = folder / name
            path.write_text(f"#!/bin/bash\n{code}\n")
            path.chmod(0o755)

    def run(self, script: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a batch script as slurmd would on the first node, here."""
        environment = {
            **os.environ,
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "SLURM_JOB_ID": "70000",
            "SLURM_JOB_NODELIST": "n[0-1]",
            **variables,
        }
        path = self.folder / "slurm_script"
        path.write_text(script, encoding="utf-8")
        return subprocess.run(
            ["bash", str(path)], env=environment, cwd=self.folder, capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip

    def words(self, program: str) -> list[str]:
        """What a program that keeps its words was given: srun, dump."""
        return _parts(self.folder / f"{program}.words")

    def dumped(self) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of the rank that ran `dump`."""
        pairs = (line.partition("=") for line in _parts(self.folder / "dump.environment"))
        return self.words("dump"), {name: value for name, _, value in pairs}


def _parts(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\0")[:-1]


def sbatch_words(script: str) -> list[str]:
    """The options that sbatch takes from a script, by the rules of Slurm's src/sbatch/opt.c.

    #SBATCH lines count up to the first line that is neither a comment nor blank. Blanks part the
    words; quotes of either kind hold one together; a backslash keeps the next character, in quotes
    too; a # outside of quotes ends the line.
    """
    words: list[str] = []
    for line in script.split("\n"):
        if line.startswith("#SBATCH"):
            words += _words(line.removeprefix("#SBATCH"))
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return words


def _words(line: str) -> list[str]:
    words: list[str] = []
    word, quote, kept = "", "", False
    for character in [*line, " "]:
        if kept:
            word, kept = word + character, False
        elif character == "\\":
            kept = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote = character
        elif character == "#":
            break
        elif character.isspace():
            words += [word] if word else []
            word = ""
        else:
            word += character
    assert not quote, f"sbatch: unmatched {quote} in {line}"
    return words
