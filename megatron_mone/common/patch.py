"""What one redirection is: a named entry, with the code of Megatron that forces it; and what holds
for a while only.

Nothing here is specific to a patch. `still_needed` functions run in a process where nothing has
been patched, so the helpers for them read source text instead of importing Megatron (4 s).
"""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One redirection of Megatron or torch."""

    name: str
    """Short and unique; the test of the patch carries it."""
    needed_by: str
    """`megatron/...py: function or text` (or torch's) that does not do what is needed."""
    why: str
    """What goes wrong without it."""
    apply: Callable[[], None]
    """Installs it. Called once per process."""
    still_needed: Callable[[], bool]
    """True while the installed Megatron or torch still has the problem; call it unpatched."""


_installed: set[Patch] = set()
_ABSENT = object()


def install(patches: Iterable[Patch]) -> None:
    """Apply those that this process has not applied yet, in their order."""
    for patch in patches:
        if patch not in _installed:
            patch.apply()
            _installed.add(patch)


def wrap(owner: Any, name: str, wrapper: Callable[[Any], Any]) -> None:
    """Put `wrapper(what is there)` in the place of an attribute of a module or class, for good."""
    setattr(owner, name, wrapper(getattr(owner, name)))


def wrapping(
    name: str,
    where: str,
    wrapper: Callable[[Any], Any],
    *,
    why: str,
    needed_while: str | Callable[[], bool],
) -> Patch:
    """The patch that puts `wrapper(what is there)` in the place of names of one Megatron module.

    Args:
        name, why: as of Patch.
        where: "megatron.training.training: save_checkpoint, ...", attributes of attributes too.
        wrapper: of each.
        needed_while: a text in the module's file, or a `still_needed`.
    """
    module, _, names = where.partition(": ")
    file = f"{module.replace('.', '/')}.py"

    def apply() -> None:
        holder = importlib.import_module(module)
        for path in names.split(", "):
            owner, _, last = path.rpartition(".")
            wrap(attrgetter(owner)(holder) if owner else holder, last, wrapper)

    if isinstance(needed_while, str):
        needed_while = in_source(file.removeprefix("megatron/"), needed_while)
    return Patch(name, f"{file}: {names}", why, apply, needed_while)


class Replaced(AbstractContextManager[None]):
    """While it lasts an attribute of a module, class or instance is another.

    Several go on a contextlib.ExitStack, whose `close` undoes them where no block holds their time.

    Raises:
        AttributeError: on entering; there is none of that name.
    """

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._owner, self._name, self._new = owner, name, new

    def __enter__(self) -> None:
        getattr(self._owner, self._name)
        self._own = vars(self._owner).get(self._name, _ABSENT)
        setattr(self._owner, self._name, self._new)

    def __exit__(self, *failure: object) -> None:
        if self._own is _ABSENT:
            delattr(self._owner, self._name)
        else:
            setattr(self._owner, self._name, self._own)


def in_source(path: str, *texts: str) -> Callable[[], bool]:
    """A `still_needed`: whether `megatron_source(path)` holds all the texts."""
    return lambda: all(text in megatron_source(path) for text in texts)


def megatron_source(path: str) -> str:
    """Return the text of an installed Megatron file, `path` like `core/optimizer/clip_grads.py`.

    Returns "" when the file is gone, so that a patch whose target moved reads as not needed.
    """
    spec = importlib.util.find_spec("megatron")
    for root in (spec.submodule_search_locations or []) if spec else []:
        file = Path(root) / path
        if file.is_file():
            return file.read_text()
    return ""


def raises(call: Callable[[], object]) -> bool:
    """Whether `call()` raises any exception; how a `still_needed` asks torch for its behaviour."""
    try:
        call()
    except Exception:
        return True
    return False


def rebind(old: Any, new: Any) -> None:
    """Point every name in the loaded Megatron modules that holds `old` at `new`.

    Megatron's modules take functions by name (`from x import f`, or
    `dist_all_gather_func = torch.distributed.all_gather_into_tensor`), and some are loaded before
    `install()`.
    """
    for module_name, module in list(sys.modules.items()):
        if module is None or not module_name.startswith("megatron."):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
