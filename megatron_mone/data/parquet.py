"""Parquet: one document a row, from one column. Row groups are the units; pyarrow is optional."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_mone.data.errors import DataError

_MAGIC = b"PAR1"
_TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")
_ROWS = 256
"""Rows decoded at once."""
_COLUMNS_SHOWN = 8


def why_not_readable(path: Path, name: str, column: str) -> str | None:
    """What keeps `column` of a Parquet file from being read, None if nothing does.

    Raises DataError where pyarrow is not installed: no file is left out for want of a package.
    """
    with path.open("rb") as stream:
        head = stream.read(len(_MAGIC))
        size = stream.seek(0, 2)
        stream.seek(max(0, size - len(_MAGIC)))
        tail = stream.read()
    if (head, tail) != (_MAGIC, _MAGIC) or size < 3 * len(_MAGIC):
        return f"is no whole Parquet file ({size:,} bytes); copy it again"
    pyarrow = _pyarrow(name)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        return f"cannot be read as Parquet ({_first_line(error)}); copy it again"
    if (count := schema.names.count(column)) != 1:
        shown = ", ".join(repr(known) for known in schema.names[:_COLUMNS_SHOWN])
        many = f"{count} columns" if count else "no column"
        return f"has {many} {column!r}, of {shown}; name one with --json-key"
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if str(kind) not in _TEXT_TYPES:
        return f"column {column!r} is {kind}, not string; name another with --json-key"
    return None if rows else "holds no row"


def row_groups(path: Path, name: str) -> list[int]:
    """The number of rows of each row group."""
    with _errors(name) as pyarrow, pyarrow.parquet.ParquetFile(path) as file:
        return [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]


def read_column(path: Path, name: str, column: str, groups: range) -> Iterator[bytes | None]:
    """The bytes of each row of `column` in `groups`, in order; None is a null.

    Held at once: a page of the file and `_ROWS` rows.
    """
    with _errors(name) as pyarrow:
        with pyarrow.parquet.ParquetFile(
            path, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True
        ) as file:
            batches = file.iter_batches(_ROWS, list(groups), [column], use_threads=False)
            for batch in batches:
                # As bytes, so that one row that is no UTF-8 costs no other.
                yield from batch.column(0).cast(pyarrow.large_binary()).to_pylist()


@contextmanager
def _errors(name: str) -> Iterator[Any]:
    pyarrow = _pyarrow(name)
    try:
        yield pyarrow
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(
            f"--input {name}: damaged Parquet file ({_first_line(error)}); copy the file again"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _pyarrow(name: str) -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"--input {name}: reading Parquet needs the package pyarrow: pip install pyarrow, or "
            "megatron-mone[parquet]"
        ) from None
    return pyarrow
