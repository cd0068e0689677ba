"""No code from a checkpoint: its `.metadata` is looked through before torch unpickles it.

torch.distributed.checkpoint reads `.metadata` with plain `pickle.load` (FileSystemReader
.read_metadata) and objects in shards with `torch.load(weights_only=False)` (DefaultLoadPlanner
.load_bytes); Megatron's torch_dist load uses both, so a checkpoint from elsewhere could run any
function. Here the pickle is read once by an unpickler that knows only the classes that torch and
Megatron put there, and torch is told to load the objects with weights_only.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

METADATA_NAME = ".metadata"
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        *("BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex"),
        *("StorageMeta", "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.planner": {
        *("BytesIOWriteData", "SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata", "MCoreSavePlan"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath"},
    "builtins": {"set", "frozenset", "slice"},
}


class _KnownClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch":
            found = getattr(torch, name, None)
            if name == "Size" or isinstance(found, torch.dtype):
                return found
        if name in ALLOWED.get(module, ()):  # whole: protocol 4 would follow "a.b"
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


_last: list[tuple[Any, Any]] = []
"""The file that was read last, as `_state` knows it, and what it held."""


def _state(path: Path) -> Any:
    found = path.stat()
    return path.absolute(), found.st_ino, found.st_size, found.st_mtime_ns


def forget_metadata() -> None:
    """Let go of what was read last: of a large checkpoint it is many megabytes."""
    _last.clear()


def read_metadata(folder: Path) -> Any:
    """The torch.distributed.checkpoint Metadata of a checkpoint folder; None: no such file.

    Read once by those who ask one after another; nobody is to change it.

    Raises:
        ValueError: one line with the file and what it names beside checkpoint classes, or how it
            is broken.
    """
    path = folder / METADATA_NAME
    if not path.is_file():
        return None
    try:
        state = _state(path)
        if not _last or _last[0][0] != state:
            with path.open("rb") as file:
                _last[:] = [(state, _KnownClasses(file).load())]
        return _last[0][1]
    except Exception as error:  # a broken pickle raises nearly anything
        raise ValueError(f"checkpoint file {path} is not plain metadata ({error}): it is not "
                         "loaded; give another --load") from error  # fmt: skip


_FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load_weights_only() -> None:
    """Have every torch.load of this process refuse objects that are not registered as safe."""
    os.environ[_FORCED] = "1"


@contextmanager
def loading_weights_only() -> Iterator[None]:
    """`load_weights_only` while it lasts."""
    before = os.environ.get(_FORCED)
    load_weights_only()
    try:
        yield
    finally:
        os.environ.pop(_FORCED)
        if before is not None:
            os.environ[_FORCED] = before
