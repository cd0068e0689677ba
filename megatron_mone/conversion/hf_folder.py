"""Weights of a Hugging Face folder: safetensors, whole or in shards, read and written by tensor.

The format: 8 bytes, the length of a JSON header; the header, name -> dtype, shape, first and last
byte; the bytes. May touch: the folder.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from megatron_mone.common.checked_json import load
from megatron_mone.common.files import sync_file, write_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5 * 10**9
_HEADER_LIMIT = 10**8
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies: its file, dtype, shape, first byte in the file, bytes."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int


class Weights:
    """The tensors of a folder; their headers are read at once, their bytes on demand.

    Raises:
        ValueError: one line: no weights, a shard that is missing, truncated or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def tensors(self) -> dict[str, Stored]:
        """Name -> where it lies."""
        if (self.folder / INDEX).is_file():
            index = load(self.folder / INDEX, "give the whole folder")
            named = index.get("weight_map") if isinstance(index, dict) else None
            if not isinstance(named, dict) or not all(map(_is_plain, named.values())):
                raise ValueError(f"{self.folder / INDEX}: weight_map is no table of file names")
            files = sorted(set(named.values()))
        else:
            files, named = [SINGLE], None
        found: dict[str, Stored] = {}
        for name in files:
            path = self.folder / name
            if named is not None and not path.is_file():
                raise ValueError(f"{path} is missing, which {INDEX} names: give the whole folder")
            found |= _header(path)
        if named is not None and set(named) != set(found):
            wrong = sorted(set(named) ^ set(found))[0]
            where = (
                "the index and not the shards" if wrong in named else "a shard and not the index"
            )
            raise ValueError(f"{self.folder / INDEX}: {wrong} is in {where}: give the whole folder")
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, a copy of its bytes."""
        stored = self.tensors[name]
        raw = bytearray(stored.size)
        with stored.path.open("rb") as file:
            file.seek(stored.start)
            if file.readinto(raw) != stored.size:
                raise ValueError(f"{stored.path}: ends within {name}: copy the file again")
        if not raw:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return torch.frombuffer(raw, dtype=stored.dtype).view(stored.shape)


def _is_plain(name: Any) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _header(path: Path) -> dict[str, Stored]:
    """The tensors of one file. Raises ValueError: one line."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if not 0 < length <= min(_HEADER_LIMIT, total - 8):
                raise ValueError(f"its header has {length} bytes, the file {total}")
            header = json.loads(file.read(length))
        found = {}
        for name, value in header.items():
            if name == "__metadata__":
                continue
            first, end = value["data_offsets"]
            dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
            start = 8 + length + first
            if end - first != dtype.itemsize * torch.Size(shape).numel() or first < 0:
                raise ValueError(f"{name} has {end - first} bytes for {shape} of {value['dtype']}")
            if 8 + length + end > total:
                raise ValueError(f"it ends within {name}: {total} bytes of {8 + length + end}")
            found[name] = Stored(path, dtype, shape, start, end - first)
        return found
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: give a folder with safetensors weights") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        said = f"dtype {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{path} is no whole safetensors file: {said}") from None


@dataclass(frozen=True)
class Planned:
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write_weights(
    folder: Path, tensors: list[Planned], data: Callable[[list[str]], Iterator[Tensor]],
    step: Callable[[int], None], shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:  # fmt: skip
    """Write safetensors shards, one tensor in memory at a time; shards that are there stay.

    Args:
        folder: of the shards.
        tensors: all, in the order of the files.
        data: of some names, their values in that order.
        step: told the bytes that were written.
        shard_bytes: at most, of one shard with more than one tensor.

    Returns:
        Name -> SHA-256 of its bytes, of what was written now.
    """
    shards = _shards(tensors, shard_bytes)
    sums: dict[str, str] = {}
    names = [SINGLE] if len(shards) == 1 else [
        f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)
    ]  # fmt: skip
    for name, shard in zip(names, shards, strict=True):
        path = folder / name
        with suppress(ValueError):
            if list(_header(path)) == [one.name for one in shard]:
                step(sum(one.size for one in shard))
                continue
        beside = path.with_suffix(".part")
        with beside.open("wb") as file:
            _write_header(file, shard)
            for one, value in zip(shard, data([one.name for one in shard]), strict=True):
                assert (tuple(value.shape), value.dtype) == (one.shape, one.dtype), one
                raw = value.contiguous().flatten().view(torch.uint8).numpy()
                sums[one.name] = hashlib.sha256(raw).hexdigest()
                file.write(raw)  # type: ignore[arg-type]
                step(one.size)
        sync_file(beside)
        beside.replace(path)
    if len(shards) > 1:
        placed = {
            one.name: name for name, shard in zip(names, shards, strict=True) for one in shard
        }
        total = sum(one.size for one in tensors)
        write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": placed})
    return sums


def _shards(tensors: list[Planned], limit: int) -> list[list[Planned]]:
    shards: list[list[Planned]] = [[]]
    used = 0
    for one in tensors:
        if shards[-1] and used + one.size > limit:
            shards.append([])
            used = 0
        shards[-1].append(one)
        used += one.size
    return shards


def _write_header(file: BinaryIO, shard: list[Planned]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for one in shard:
        header[one.name] = {
            "dtype": _NAMES[one.dtype],
            "shape": list(one.shape),
            "data_offsets": [at, at + one.size],
        }
        at += one.size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)
