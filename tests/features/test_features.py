"""The feature table is whole and true; tests/parity/test_features.py runs what is trained."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.checks import flags
from tests.features import table
from tests.features.row import LAYOUTS, State
from tests.features.table import ROWS

ROOT = Path(__file__).parents[2]
ASKED = [(words, says) for row in ROWS for words, says in row.asked]


def arguments() -> dict[str, list[str]]:
    """Group of Megatron's parser -> its arguments."""
    return {
        group.title or "": [action.dest for action in group._group_actions]
        for group in flag_parser()._action_groups
    }


def without_a_row(names: list[str]) -> list[str]:
    return [name for name in names if not table.rows_of(name) and not flags.refusal(name)]


def test_every_argument_of_the_groups_has_one_row():
    found = arguments()
    assert set(table.GROUPS) <= set(found)
    names = [name for group in table.GROUPS for name in found[group]]
    names += [
        name
        for group in set(found) - set(table.GROUPS)
        for name in found[group]
        if any(flags.fnmatchcase(name, pattern) for pattern in table.ELSEWHERE.split())
    ]
    assert len(names) > 350
    assert without_a_row(names) == []
    assert without_a_row(["moe_new_flag_of_a_new_version"]) != []
    twice = {name: len(table.rows_of(name)) for name in names}
    assert {name: number for name, number in twice.items() if number > 1} == {}


def test_rows_name_arguments_alone():
    known = {name for names in arguments().values() for name in names}
    patterns = [pattern for row in ROWS for pattern in row.names]
    unknown = [p for p in patterns if not any(flags.fnmatchcase(name, p) for name in known)]
    assert unknown == []
    assert {layout for e in table.EXAMPLES.values() for layout in e.layouts} <= set(LAYOUTS)


def test_tests_that_rows_name_are_there():
    for row in ROWS:
        for place in row.shown:
            path, _, name = place.partition("::")
            tree = ast.parse((ROOT / path).read_text())
            tests = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
            assert not name or name in tests, place


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """Flags -> the line about them."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.features.said"], cwd=ROOT, timeout=300, check=True,
        input=json.dumps([words for words, _ in ASKED]), capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    lines = json.loads(done.stdout.splitlines()[-1])
    return dict(zip([words for words, _ in ASKED], lines, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("words", "says"), ASKED)
def test_what_is_refused_has_one_line_and_what_is_taken_none(said, words, says):
    line = said[words]
    assert bool(line) == bool(says), line
    assert says in line
    assert "\n" not in line


def test_the_page_is_the_table():
    assert table.PAGE.read_text() == table.page()
    assert {row.state for row in ROWS} == set(State)
