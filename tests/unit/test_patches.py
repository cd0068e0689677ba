"""Megatron and torch are changed for good by one table alone, and each entry is still needed.

A module attribute is changed for a while by `Replaced`, which puts it back.
"""

import ast
import inspect
from collections.abc import Iterator

import pytest

from megatron_mone import cpu_emulation
from megatron_mone.common import patch
from megatron_mone.common.patch import Patch, Replaced, megatron_source
from megatron_mone.common.places import ROOT
from megatron_mone.model.patches import PATCHES

FOREIGN = ("torch", "megatron")
SOURCES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for top in ("megatron_mone", "launch")
    for path in (ROOT / top).rglob("*.py")
}


def foreign_names(tree: ast.AST) -> set[str]:
    """Names that stand for a module of torch or Megatron, or for what one holds."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {
                (a.asname or a.name).split(".")[0]
                for a in node.names
                if a.name.split(".")[0] in FOREIGN
            }
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {alias.asname or alias.name for alias in node.names}
    # And what is taken from them without a call: `for entry in registry.ENTRIES.values()`.
    for node in ast.walk(tree):
        taken: list[tuple[ast.expr, ast.expr]] = []
        if isinstance(node, ast.For | ast.comprehension):
            taken = [(node.target, node.iter)]
        elif isinstance(node, ast.Assign):
            taken = [(target, node.value) for target in node.targets]
        for target, value in taken:
            values = value.elts if isinstance(value, ast.Tuple) else [value]
            if isinstance(target, ast.Name) and any(root(v) in found for v in values):
                found.add(target.id)
    return found


def root(node: ast.expr) -> str | None:
    """`registry` of registry.ENTRIES["muon"].values(); None where anything else is called."""
    while True:
        match node:
            case ast.Name():
                return node.id
            case ast.Attribute() | ast.Subscript():
                node = node.value
            case ast.Call(func=ast.Attribute(attr="values" | "items" | "keys")):
                node = node.func
            case _:
                return None


def changes(tree: ast.AST) -> Iterator[ast.AST]:
    """Where an attribute or item of torch's or Megatron's is set, and what wraps or rebinds one."""
    names = foreign_names(tree)
    for node in ast.walk(tree):
        match node:
            case (
                ast.Attribute(ctx=ast.Store() | ast.Del())
                | ast.Subscript(ctx=ast.Store() | ast.Del())
            ):
                changed = root(node) in names
            case ast.Call(func=ast.Name(id="rebind")):
                changed = True
            case ast.Call(func=ast.Name(id="setattr" | "delattr" | "wrap"), args=[owner, *_]):
                changed = root(owner) in names
            case ast.ImportFrom(module="unittest.mock"):
                changed = True  # two helpers would be one too many
            case _:
                changed = False
        if changed:
            yield node


def applied(tree: ast.Module) -> list[ast.AST]:
    """What runs as a Patch's `apply` only: those functions, and what nothing but they call."""
    found: list[ast.AST] = []
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id == "Patch"
        ):
            found += [keyword.value for keyword in node.keywords if keyword.arg == "apply"]
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    before = -1
    while before != len(found):
        before = len(found)
        inside = {id(node) for part in found for node in ast.walk(part)}
        for function in functions:
            uses = [
                node for node in ast.walk(tree)
                if isinstance(node, ast.Name) and node.id == function.name
            ]  # fmt: skip
            if function not in found and uses and all(id(node) in inside for node in uses):
                found.append(function)
    return found


def lasting(source: str) -> list[int]:
    """Lines that change torch or Megatron outside a Patch."""
    tree = ast.parse(source)
    allowed = {id(node) for part in applied(tree) for node in ast.walk(part)}
    return [node.lineno for node in changes(tree) if id(node) not in allowed]


def test_nothing_is_changed_outside_the_tables():
    found = [f"{path}:{line}" for path, source in SOURCES.items() for line in lasting(source)]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "torch.cuda.device_count = lambda: 1",
        "training.save_checkpoint = held(training.save_checkpoint)",
        "layers._DEFAULTS['a'] = None",
        "setattr(layers, name, None)",
        "wrap(training, 'save_checkpoint', held)",
        "from unittest.mock import patch",
        "for entry in layers.ENTRIES.values():\n        entry.kind = None",
        "for module in (layers, training):\n        module.name = None",
    ],
)
def test_a_change_is_seen_outside_a_patch_and_not_in_one(line):
    head = (
        "import torch\nfrom megatron.core.x import layers\nfrom megatron.training import training\n"
    )
    source = f"{head}def change():\n    helper()\ndef helper():\n    {line}\n"
    assert lasting(source)
    assert not lasting(f"{source}PATCHES = (Patch(name='n', apply=change),)\n")
    assert lasting(f"{source}PATCHES = (Patch(name='n', apply=change),)\nhelper()\n")


def test_what_is_no_change_of_theirs_is_not():
    assert not lasting(
        "from megatron.training import get_args\nargs = get_args()\nargs.save = None\n"
        "self.step = 1\nwith Replaced(torch, 'zeros', empty):\n    pass\n"
    )


@pytest.mark.parametrize("entry", PATCHES, ids=lambda entry: entry.name)
def test_each_is_still_needed_and_its_check_can_say_no(entry, monkeypatch):
    file, _, name = entry.needed_by.partition(".py: ")
    assert name
    assert entry.why
    assert file.startswith("torch/") or megatron_source(f"{file.removeprefix('megatron/')}.py")
    assert entry.still_needed(), f"{entry.name} is no longer needed: remove the patch"
    monkeypatch.setattr(patch, "megatron_source", lambda path: "")
    monkeypatch.setattr(inspect, "getsource", lambda code: "")
    assert not entry.still_needed()


def test_names_are_unique():
    names = [entry.name for entry in (*PATCHES, *cpu_emulation.PATCHES)]
    assert len(set(names)) == len(names)


def test_a_patch_is_applied_once_in_a_process():
    done = []
    entry = Patch("once", "here.py: f", "", lambda: done.append(1), lambda: True)
    patch.install((entry, entry))
    patch.install((entry,))
    assert done == [1]


def test_what_was_replaced_is_as_it_was():
    class Base:
        inherited = staticmethod(lambda: 1)

    class Owner(Base):
        own = staticmethod(lambda: 2)

    before = dict(vars(Owner))
    with Replaced(Owner, "inherited", lambda: 3), Replaced(Owner, "own", lambda: 4):
        assert (Owner.inherited(), Owner.own()) == (3, 4)
    assert dict(vars(Owner)) == before
    with pytest.raises(AttributeError), Replaced(Owner, "absent", None):
        pass
