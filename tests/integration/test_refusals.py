"""Whatever Megatron fails on before the first step is one line and exit status 2.

.venv/bin/python -m tests.integration.test_refusals      # writes docs/REFUSALS.md anew
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests import forked_ranks
from tests.integration import refusal_ranks
from tests.refusal_cases import BASE, CASES, Refusal

TABLE = Path(__file__).parents[2] / "docs" / "REFUSALS.md"
LINE = re.compile(r"^megatron-mone: error: (.*)$", re.MULTILINE)
_LOG = re.compile(r"; the traceback is in (\S+)$")
HEAD = """\
# What is refused, and how

Megatron finds some mistakes only after its argument parser: in process groups, the model,
datasets, schedules, a checkpoint. Each row provokes one on one or two CPU ranks; the exit status
and the line are what was seen. *check*: a check of ours finds it from the flags, at the start, in
`launch submit` and in the planner. *net*: it happens on a rank before its first step has ended; the
traceback is in a file that the line names. No row prints a traceback.

`.venv/bin/python -m tests.integration.test_refusals` writes this file; the test of that name holds
it to what is seen.

| mistake | Megatron's own | by | exit | line |
| --- | --- | --- | --: | --- |
"""


def ended(case: Refusal, data: Path, tmp: Path) -> tuple[str, str, int]:
    """(who found it, the line without paths, exit status) of a case.

    Raises:
        AssertionError: no line or several, or a traceback.
    """
    words = {"data": str(data), "tmp": str(tmp)}
    flags = [*BASE, *(flag.format(**words) for flag in case.flags)]
    log = tmp / "ranks.log"
    job = forked_ranks.start(case.ranks, refusal_ranks.run, (case.name, flags, str(tmp)), log)
    try:
        job.wait(timeout=300)
    except subprocess.TimeoutExpired:
        job.kill()
        raise AssertionError(f"{case.name} hangs:\n{log.read_text()[-3000:]}") from None
    said = log.read_text(errors="replace")
    assert "Traceback" not in said, said[-6000:]
    lines = LINE.findall(said)
    assert len(lines) == 1, (lines, said[-3000:])
    status = re.findall(r"^rank \d+ ended with (-?\d+)$", said, re.MULTILINE)
    assert len(status) == 1, said[-3000:]
    netted = _LOG.search(lines[0])
    if netted:
        assert "Traceback" in Path(netted[1]).read_text()
    line = _LOG.sub("", lines[0]).replace(str(tmp), "TMP").replace(str(data), "DATA")
    return "net" if netted else "check", line, int(status[0])


def row(case: Refusal, data: Path, tmp: Path) -> str:
    """The case's row of the table."""
    by, line, status = ended(case, data, tmp)
    return f"| {case.name} | {case.says} | {by} | {status} | {line.replace('|', chr(92) + '|')} |"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small datasets."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line(case: Refusal, data: Path, tmp_path: Path):
    """The line, the status and who finds it are as the case and the table have them."""
    by, line, status = ended(case, data, tmp_path)
    assert case.line in line
    assert (by, status) == ("check" if case.by_check else "net", case.status)
    text = f"| {case.name} | {case.says} | {by} | {status} | {line.replace('|', chr(92) + '|')} |"
    assert text in TABLE.read_text().splitlines(), f"not in {TABLE.name}:\n{text}"


def main() -> None:
    """Write the table anew."""
    with tempfile.TemporaryDirectory() as folder:
        rows = []
        for number, case in enumerate(CASES):
            tmp = Path(folder, str(number))
            tmp.mkdir()
            rows.append(row(case, Path(folder), tmp))
            print(rows[-1], file=sys.stderr)
    TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
