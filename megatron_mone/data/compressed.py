"""Reading plain, gzip and Zstandard files as one kind of byte stream."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

import zstandard

from megatron_mone.data.errors import DataError

_CHUNK = 1 << 18


class _ZstdStream(io.RawIOBase):
    """Zstandard frames, one after the other. Unlike the library's own reader, a file that stops
    in the middle of a frame is an error here and not a short read: no text is lost in silence."""

    def __init__(self, raw: BinaryIO) -> None:
        self._raw = raw
        self._frame: Any = None
        self._pending = b""
        self._ready = b""

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
        """Decompress one more chunk; False at the end of the file."""
        data = self._pending or self._raw.read(_CHUNK)
        self._pending = b""
        if not data:
            if self._frame is not None:
                raise EOFError("the file ends in the middle of a Zstandard frame")
            return False
        if self._frame is None:
            self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._ready = self._frame.decompress(data)
        if self._frame.eof:
            self._pending, self._frame = self._frame.unused_data, None
        return True


def open_source(path: Path, compression: str) -> BinaryIO:
    """A readable stream of the plain bytes of `path`; `compression` is "", ".gz" or ".zst"."""
    if compression == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if compression == ".zst":
        return cast(BinaryIO, io.BufferedReader(_ZstdStream(path.open("rb")), _CHUNK))
    return path.open("rb")


@contextmanager
def decompression_errors(name: str) -> Iterator[None]:
    """Turn a damaged archive inside the block into a DataError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError) as error:
        raise DataError(f"--input {name}: damaged archive ({error}); copy the file again") from None
