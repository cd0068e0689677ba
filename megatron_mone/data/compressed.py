"""Reading plain, gzip, bzip2, xz and Zstandard files as one kind of byte stream."""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_mone.data.errors import DataError

_CHUNK = 1 << 18
_FED = 1 << 10
"""Bytes a decompressor gets at once: even at bzip2's and Zstandard's best ratio it answers with
less than 40 MB, so a small file that unpacks to a huge one never stands whole in memory."""
_MOST_MEMORY = 1 << 31
"""Bytes a decompressor may keep: the longest window that `zstd` makes (`--long=31`)."""


@dataclass(frozen=True)
class Compression:
    """How to open one kind of archive; `magic` are the ways its file can begin."""

    name: str
    magic: tuple[bytes, ...]
    new_stream: Callable[[], Any]
    """A decompressor of one stream (member, frame), with `eof` and `unused_data`."""


# Padding and metadata that the zstd format allows between frames begins with one of sixteen.
_ZSTD_SKIPPABLE = tuple(bytes([byte]) + b"\x2a\x4d\x18" for byte in range(0x50, 0x60))
COMPRESSIONS = {
    ".gz": Compression("gzip", (b"\x1f\x8b",), lambda: zlib.decompressobj(wbits=31)),
    ".bz2": Compression("bzip2", (b"BZh",), bz2.BZ2Decompressor),
    ".xz": Compression(
        "xz", (b"\xfd7zXZ\x00",), lambda: lzma.LZMADecompressor(memlimit=_MOST_MEMORY)
    ),
    ".zst": Compression(
        "Zstandard",
        (b"\x28\xb5\x2f\xfd", *_ZSTD_SKIPPABLE),
        lambda: zstandard.ZstdDecompressor(max_window_size=_MOST_MEMORY).decompressobj(),
    ),
}


class _Streams(io.RawIOBase):
    """Compressed streams, one after the other, as `cat a.gz b.gz` makes them.

    Unlike the libraries' own readers, a file that stops in the middle of a stream and one that
    goes on with something else are errors here, never a short read: no text is lost in silence.
    """

    def __init__(self, raw: BinaryIO, compression: Compression) -> None:
        self._raw, self._compression = raw, compression
        self._stream: Any = None
        self._pending = b""
        self._head = b""
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready and self._fill():
            pass
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _fill(self) -> bool:
        """Decompress one more piece; False at the end of the file."""
        data = self._pending or self._raw.read(_FED)
        self._pending = b""
        if not data:
            if self._stream is not None:
                raise EOFError(f"the file ends in the middle of a {self._compression.name} stream")
            return False
        if self._stream is None:
            data = data.lstrip(b"\0")  # gzip and xz files may be padded after a stream
            if not data:
                return True
            self._stream, self._head = self._compression.new_stream(), data[:6]
        try:
            self._ready = memoryview(self._stream.decompress(data))
        except (zstandard.ZstdError, lzma.LZMAError, MemoryError) as error:
            if isinstance(error, MemoryError) or "memory" in str(error).lower():
                raise _NeedsMemory(_window(self._head)) from None
            raise
        if self._stream.eof:
            self._pending, self._stream = self._stream.unused_data, None
        return True


class _NeedsMemory(Exception):
    """A whole archive that cannot be unpacked within _MOST_MEMORY, or within this machine's."""


def _window(head: bytes) -> str:
    # RFC 8878, 3.1.1.1; the library itself reads no header that asks for more than 2 GiB.
    if head[:4] != b"\x28\xb5\x2f\xfd" or len(head) < 6 or head[4] & 0x20:
        return "more memory"
    base = 1 << (10 + (head[5] >> 3))
    return f"a window of {base + (base >> 3) * (head[5] & 7) >> 20:,} MiB"


def open_source(path: Path, compression: str) -> BinaryIO:
    """A readable stream of the plain bytes of `path`; `compression` is "" or of COMPRESSIONS."""
    raw = path.open("rb")
    if not compression:
        return raw
    return cast(BinaryIO, io.BufferedReader(_Streams(raw, COMPRESSIONS[compression]), _CHUNK))


@contextmanager
def decompression_errors(name: str) -> Iterator[None]:
    """Turn an archive that cannot be unpacked in the block into a DataError naming the file."""
    try:
        yield
    except _NeedsMemory as error:
        raise DataError(
            f"--input {name}: needs {error} to be unpacked, and gets {_MOST_MEMORY >> 20:,} MiB at "
            "most; pack it again with a smaller one (zstd --long=27, xz -9), or use fewer --workers"
        ) from None
    except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError, OSError) as error:
        # bzip2 says "Invalid data stream" by an OSError without a number; a disk's has one.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise DataError(f"--input {name}: damaged archive ({error}); copy the file again") from None
