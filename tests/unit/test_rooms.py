"""The house: each room imports only from rooms above it in ROOMS, and nothing goes round.

Imports inside functions count too. `layer_spec` is a name kept for stock scripts; `config_checks`
are config's for those who do not wait for Megatron.
"""

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from megatron_mone.common.places import PACKAGE, ROOT

ROOMS = (
    *(
        "common",
        "kernels",
        "config_checks",
        "config",
        "moe",
        "checkpoint",
        "data",
        "cpu_emulation",
        "deepspeed",
        "model",
        "conversion",
        "evaluation",
    ),
    *("profiling", "planning", "reporting"),
    *("benchmarking", "demo", "studies", "commands"),
    *("pretrain", "layer_spec", "__main__"),
)
COPIED = (
    "megatron_mone.conversion.hf_model"  # its files name each other as in the folders they go to
)
LAUNCHES = ("demo", "studies", "commands")  # alone may import `launch`
NEITHER = {name: ("kernels",) for name in ("config_checks", "config")}  # though it stands above
TOP = ("megatron_mone", "launch", "tools")


def files(*folders: Path) -> dict[str, Path]:
    """Module name -> its file."""
    found = {}
    for folder in folders:
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = files(*(ROOT / name for name in TOP))


def imported(source: str, module: str = "") -> Iterator[str]:
    """Every module, or name of a module, that a module's source imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            copied = node.level == 1 and module.rpartition(".")[0] == COPIED
            assert not node.level or copied, "imports are absolute"
            place = f"{COPIED}.{node.module}" if copied else node.module
            yield from (f"{place}.{alias.name}" for alias in node.names)


def modules_of(source: str, module: str = "") -> set[str]:
    """The modules of this project that a module's source imports."""
    found = set()
    for name in imported(source, module):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        found.add(name)
    return found - {""}


def room(module: str) -> str:
    """`common` of megatron_mone.common.files, `launch` of launch.runs.local."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "megatron_mone" else top


def faults(module: str, source: str) -> list[str]:
    """What a module of the package imports that it may not."""
    here = room(module)
    found = []
    for name in modules_of(source, module):
        there = room(name)
        if there == "launch":
            allowed = here in LAUNCHES
        elif there in ("", here):
            allowed = True
        else:
            above = set(ROOMS[: ROOMS.index(here)]) - set(NEITHER.get(here, ()))
            allowed = there in above
        if not allowed:
            found.append(f"{module} imports {name}")
    return found


GRAPH = {
    module: modules_of(path.read_text(encoding="utf-8"), module) for module, path in MODULES.items()
}


def test_every_module_stands_in_a_room():
    standing = {room(module) for module in MODULES if module.startswith("megatron_mone.")}
    assert standing == set(ROOMS)


def test_a_contributor_is_shown_every_room_in_this_order():
    tour = re.findall(r"(?m)^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    assert tuple(tour[: len(ROOMS)]) == ROOMS
    folders = (path.name for path in (ROOT / "launch").iterdir() if path.is_dir())
    assert sorted(tour[len(ROOMS) :]) == sorted(name for name in folders if name[0] != "_")


@pytest.mark.parametrize("where", ROOMS)
def test_a_room_imports_only_from_rooms_above(where):
    assert [
        fault
        for module, path in MODULES.items()
        if module.startswith("megatron_mone.") and room(module) == where
        for fault in faults(module, path.read_text(encoding="utf-8"))
    ] == []


def test_nobody_imports_in_a_circle():
    try:
        TopologicalSorter({m: names - {m} for m, names in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_only_commands_and_launch_know_planning_and_reporting():
    both = {
        room(module)
        for module, names in GRAPH.items()
        if {"planning", "reporting"} <= {room(name) for name in names}
    }
    assert both <= {"commands", "launch", "reporting"}
    assert not any(room(n) == "reporting" for m in GRAPH if room(m) == "planning" for n in GRAPH[m])


def test_kernels_and_common_know_no_megatron():
    for module, path in MODULES.items():
        if room(module) in ("kernels", "common"):
            names = set(imported(path.read_text(encoding="utf-8")))
            assert not [name for name in names if name.split(".")[0] == "megatron"], module


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("megatron_mone.moe.layer", "from megatron_mone.profiling import clock"),
        ("megatron_mone.common.files", "import megatron_mone.config"),
        ("megatron_mone.config", "def f():\n    from megatron_mone.kernels import choice"),
        ("megatron_mone.model.arguments", "from launch.runs import local"),
        ("megatron_mone.commands.plan", "import megatron_mone.pretrain"),
    ],
)
def test_a_wrong_import_is_seen(module, source):
    assert faults(module, source)
    assert not faults(
        module,
        "from megatron_mone.common import spelling" if "common" not in module else "import os",
    )


def test_tools_are_doors():
    """What they do stands in a room; demo.py, until it has one, is the last of another kind."""
    for path in (ROOT / "tools").glob("[!_]*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        door = len(lines) < 12 and lines[-1].startswith("    sys.exit(main(")
        assert door or path.stem == "demo", path


def test_packages_are_whole():
    """A folder of modules without an __init__ would be left out of a wheel."""
    folders = {path.parent for path in MODULES.values()}
    assert {folder for folder in folders if not (folder / "__init__.py").is_file()} == set()
    assert PACKAGE in folders
