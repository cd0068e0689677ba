"""What one redirection is: a named entry, with the code of Megatron that forces it.

Nothing here is specific to a patch. `still_needed` functions run in a process where nothing has
been patched, so the helpers for them read source text instead of importing Megatron (4 s).
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Patch:
    """One redirection of Megatron or torch."""

    name: str
    """Short and unique; the test of the patch carries it."""
    needed_by: str
    """`megatron/...py: function or text` (or torch's) that cannot run on CPU ranks."""
    why: str
    """What goes wrong without it."""
    apply: Callable[[], None]
    """Installs it. Called once per process."""
    still_needed: Callable[[], bool]
    """True while the installed Megatron or torch still has the problem; call it unpatched."""


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
