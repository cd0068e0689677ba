"""A torch_dist checkpoint written and read tensor by tensor, by one process without a model.

torch.distributed.checkpoint's format: files `__0_N.distcp` that hold one torch.save after another,
and `.metadata`, a pickle that says for every key its shape, the chunks it is stored in, and where
each lies. A part here is one such file; while others are missing a JSON beside it says what it
holds, and a part that is there is not written again. May touch: the checkpoint's folder.
"""

import io
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_mone.checkpoint.integrity import own_files, sum_files, write_sums
from megatron_mone.checkpoint.safe_metadata import METADATA_NAME, read_metadata
from megatron_mone.common.files import sync_file, write_json

CONFIG = "metadata.json"
_VERSION = "1.0.0"  # of torch.distributed.checkpoint's files


def place(piece: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Where a ShardedTensor lies in its whole: offsets and sizes along all axes of the key."""
    return tuple(piece.global_offset), (1,) * piece.prepend_axis_num + tuple(piece.local_shape)


class Writer:
    """Writes a checkpoint folder part by part.

    Args:
        folder: of the iteration; parts that are whole there are taken as they are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._parts: list[int] = []

    def has(self, part: int) -> bool:
        """Whether a part is there already; it then counts as written."""
        listing = self._listing(part)
        if not listing.is_file():
            return False
        size = json.loads(listing.read_text(encoding="utf-8"))["size"]
        if self._file(part).stat().st_size != size:
            return False
        self._parts.append(part)
        return True

    def write(self, part: int, pieces: Iterable[Any]) -> None:
        """One part: Megatron's ShardedTensors, and ShardedObjects with their data."""
        entries = []
        beside = self._file(part).with_suffix(".part")
        with beside.open("wb") as file:
            for piece in pieces:
                start = file.tell()
                entry: dict[str, Any] = {"start": start}
                if hasattr(piece, "unique_key"):
                    torch.save([piece.data], file)
                    entry["key"] = piece.unique_key
                else:
                    offsets, sizes = place(piece)
                    torch.save(piece.data.reshape(sizes).clone(), file)
                    entry |= {
                        "key": piece.key, "whole": list(piece.global_shape),
                        "offsets": offsets, "sizes": sizes,
                        "dtype": str(piece.data.dtype).removeprefix("torch."),
                    }  # fmt: skip
                entries.append(entry | {"length": file.tell() - start})
            size = file.tell()
        sync_file(beside)
        beside.replace(self._file(part))
        write_json(self._listing(part), {"size": size, "entries": entries})
        self._parts.append(part)

    def finish(self) -> None:
        """All parts are there: write what makes them a checkpoint."""
        from torch.distributed.checkpoint.filesystem import _StorageInfo

        keys: dict[str, Any] = {}
        storage: dict[MetadataIndex, Any] = {}
        for part in sorted(set(self._parts)):
            listing = json.loads(self._listing(part).read_text(encoding="utf-8"))
            for entry in listing["entries"]:
                key, offsets = entry["key"], None
                if "sizes" in entry:
                    offsets = torch.Size(entry["offsets"])
                    chunk = ChunkStorageMetadata(offsets, torch.Size(entry["sizes"]))
                    if key not in keys:
                        dtype = getattr(torch, entry["dtype"])
                        whole = torch.Size(entry["whole"])
                        properties = TensorProperties(dtype)
                        keys[key] = TensorStorageMetadata(properties, whole, [])
                    keys[key].chunks.append(chunk)
                else:
                    keys[key] = BytesStorageMetadata()
                where = _StorageInfo(self._file(part).name, entry["start"], entry["length"])
                storage[MetadataIndex(key, offsets)] = where
        found = Metadata(keys, None, storage, StorageMeta(), _VERSION)
        (self.folder / METADATA_NAME).write_bytes(pickle.dumps(found))
        write_json(
            self.folder / CONFIG, {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        )
        for path in self.folder.glob(".part-*.json"):
            path.unlink()
        write_sums(self.folder, sum_files(self.folder, own_files(self.folder, 0)))

    def _file(self, part: int) -> Path:
        return self.folder / f"__0_{part}.distcp"

    def _listing(self, part: int) -> Path:
        return self.folder / f".part-{part}.json"


class Reader:
    """Reads tensors of a checkpoint folder.

    Args:
        folder: of an iteration.

    Raises:
        ValueError: one line: no torch_dist checkpoint, or one that would run code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = read_metadata(folder)
        if self._metadata is None:
            raise ValueError(f"{folder / METADATA_NAME} is missing: give a torch_dist checkpoint")
        self._last: tuple[Any, Tensor] | None = None

    @property
    def keys(self) -> dict[str, Any]:
        """Key -> what is stored of it."""
        return self._metadata.state_dict_metadata

    def fill(self, piece: Any) -> Tensor:
        """The values of a ShardedTensor, of its local shape, in the dtype they are stored in.

        Raises:
            ValueError: the key is missing, of another shape, or not stored whole.
        """
        stored = self.keys.get(piece.key)
        if stored is None or isinstance(stored, BytesStorageMetadata):
            raise ValueError(f"{self.folder}: tensor {piece.key} is missing")
        whole = tuple(piece.global_shape)
        if tuple(stored.size) != whole and not piece.allow_shape_mismatch:
            raise ValueError(
                f"{self.folder}: {piece.key} is {list(stored.size)}, the model has {list(whole)}"
            )
        offsets, sizes = place(piece)
        out = torch.zeros(sizes, dtype=stored.properties.dtype)
        left = out.numel()
        for chunk in stored.chunks:
            first = [max(a, b) for a, b in zip(offsets, chunk.offsets, strict=True)]
            end = [
                min(a + n, b + m)
                for a, n, b, m in zip(offsets, sizes, chunk.offsets, chunk.sizes, strict=True)
            ]
            if any(a >= b for a, b in zip(first, end, strict=True)):
                continue
            here = tuple(slice(a - o, b - o) for a, b, o in zip(first, end, offsets, strict=True))
            there = tuple(
                slice(a - o, b - o) for a, b, o in zip(first, end, chunk.offsets, strict=True)
            )
            out[here].copy_(self._chunk(MetadataIndex(piece.key, chunk.offsets))[there])
            left -= out[here].numel()
        if left and not piece.allow_shape_mismatch:
            raise ValueError(f"{self.folder}: {piece.key} is not stored whole")
        return out.view(tuple(piece.local_shape))

    def _chunk(self, index: MetadataIndex) -> Tensor:
        if self._last is None or self._last[0] != index:
            raw = io.BytesIO(self._bytes(index))
            self._last = index, torch.load(raw, map_location="cpu", weights_only=True)
        return self._last[1]

    def _bytes(self, index: MetadataIndex) -> bytes:
        where = self._metadata.storage_data[index]
        path = self.folder / where.relative_path
        if Path(where.relative_path).name != where.relative_path:
            raise ValueError(f"{self.folder / METADATA_NAME} names a file elsewhere: {path}")
        try:
            with path.open("rb") as file:
                file.seek(where.offset)
                raw = file.read(where.length)
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from None
        if len(raw) != where.length:
            raise ValueError(f"{path} is truncated: copy the checkpoint again")
        return raw
