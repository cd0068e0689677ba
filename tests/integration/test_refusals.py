"""Whatever Megatron fails on before the first step is one line and exit status 2.

.venv/bin/python -m tests.integration.test_refusals      # writes docs/REFUSALS.md anew
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from launch.spec.checked_flags import NOT_FLAGS
from tests import forked_ranks
from tests.integration import refusal_ranks
from tests.refusal_cases import CASES, CHECK, LOAD, NET, Refusal
from tests.training_cases import MONE

TABLE = Path(__file__).parents[2] / "docs" / "REFUSALS.md"
LINE = re.compile(r"^megatron-mone: error: (.*)$", re.MULTILINE)
_LOG = re.compile(r"; the traceback is in (\S+)$")
HEAD = """\
# What is refused, and how

Megatron finds some mistakes only after its argument parser: in process groups, the model,
datasets, schedules, a checkpoint. Each row provokes one on one or two CPU ranks; the exit status
and the line are what was seen. *check*: a check of ours finds it from the flags, at the start, in
`launch submit` and in the planner. *load*: it is found at the start, from data or a checkpoint,
which may lie on the cluster alone. *net*: it happens on a rank before its first step has ended; the
traceback is in a file that the line names. No row prints a traceback. DATA, RUN and TMP stand for
folders.

`.venv/bin/python -m tests.integration.test_refusals` writes this file; the test of that name holds
it to what is seen.

| mistake | Megatron's own | by | exit | line |
| --- | --- | --- | --: | --- |
"""


def ended(case: Refusal, places: dict[str, str], tmp: Path) -> tuple[str, str, int]:
    """(who found it, the line without paths, exit status) of a case.

    Args:
        case: to provoke.
        places: the folders that words of its flags stand for.
        tmp: folder for temporary files, empty.

    Raises:
        AssertionError: no line or several, a traceback, or other words before the job is submitted.
    """
    places = {**places, "TMP": str(tmp)}
    log = tmp / "ranks.log"
    arguments = (case.name, case.all_flags(places), str(tmp))
    job = forked_ranks.start(case.ranks, refusal_ranks.run, arguments, log)
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
    elsewhere = (tmp / refusal_ranks.ELSEWHERE).read_text()
    if any(words in elsewhere for words in NOT_FLAGS):
        elsewhere = ""  # of plans alone: the job is submitted
    by = CHECK if elsewhere else LOAD
    if netted := _LOG.search(lines[0]):
        by = NET
        assert "Traceback" in Path(netted[1]).read_text()
    assert elsewhere in ("", " ".join(lines[0].split())), (elsewhere, lines[0])
    line = _LOG.sub("", lines[0])
    for word, place in sorted(places.items(), key=lambda item: -len(item[1])):
        line = line.replace(place, word)
    return by, line, int(status[0])


def row(case: Refusal, by: str, line: str, status: int) -> str:
    """The case's row of the table."""
    return " | ".join(
        ("|", case.name, case.says, by, str(status), line.replace("|", "\\|"), "|")
    ).replace("| |", "|")


def make_datasets(folder: Path) -> None:
    """Datasets of a few documents of one line, and their tokenizers."""
    from megatron_mone.data.plan import PrepareConfig
    from megatron_mone.data.prepare import prepare

    text = "To be, or not to be, that is the question."
    for name, documents in (("ten", 10), ("one", 1), ("a", 40), ("b", 40)):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(f'{{"text": "{n} {text}"}}\n' for n in range(documents)))
        prepare(PrepareConfig((source,), folder / name, tokenizer="byte"))


def make_places(folder: Path) -> dict[str, str]:
    """The datasets and the checkpoint that cases read, by the words that stand for them."""
    make_datasets(folder)
    places = {"DATA": str(folder), "RUN": str(folder / "run"), "CHOSEN": str(folder / "mone")}
    for place, flags in (("RUN", ()), ("CHOSEN", MONE)):
        log = folder / f"{place}.log"
        job = forked_ranks.start(2, refusal_ranks.save_base, (places[place], *flags), log)
        assert job.wait(timeout=300) == 0, log.read_text()[-3000:]
    return places


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """As `make_places`."""
    return make_places(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_one_line(case: Refusal, places: dict[str, str], tmp_path: Path):
    """The line, the status and who finds it are as the case and the table have them."""
    by, line, status = ended(case, places, tmp_path)
    assert case.line in line
    assert (by, status) == (case.by, case.status)
    text = row(case, by, line, status)
    assert text in TABLE.read_text().splitlines(), f"not in {TABLE.name}:\n{text}"


def main(names: list[str]) -> None:
    """Write the table anew, or the rows of some cases."""
    old = {line.split(" | ")[0].removeprefix("| "): line for line in TABLE.read_text().splitlines()}
    with tempfile.TemporaryDirectory() as folder:
        places, rows = make_places(Path(folder)), []
        for number, case in enumerate(CASES):
            tmp = Path(folder, str(number))
            tmp.mkdir()
            if names and case.name not in names and case.name in old:
                rows.append(old[case.name])
                continue
            try:
                found = ended(case, places, tmp)
            except (AssertionError, OSError) as error:
                print(f"{case.name}: {error}", file=sys.stderr)
                continue
            rows.append(row(case, *found))
            if case.line not in found[1] or found[::2] != (case.by, case.status):
                print(f"not as the case says: {rows[-1]}", file=sys.stderr)
    TABLE.write_text(HEAD + "\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
