"""Is this dataset whole, and does it fit this model? Asked before training starts, in milliseconds.

Only the .idx, the size of the .bin and the manifest are read; a .bin without a manifest is sampled.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import Manifest, load_manifest, manifest_path, sha256_of
from megatron_mone.data.tokenizers import tokenizer_json, vocab_size_of

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER_BYTES = 34  # magic 9, version 8, dtype code 1, sequence count 8, document count 8
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Integer codes of megatron.core.datasets.indexed_dataset.DType."""
_SAMPLE = 1_000_000
_AGAIN = "prepare the data again with tools/prepare_data.py"


@dataclass(frozen=True)
class DatasetFacts:
    """Counts of a checked dataset; `unigram_loss` (nats per token) and `vocab_size` come from the
    manifest and are None without one."""

    documents: int
    tokens: int
    dtype: str
    unigram_loss: float | None
    vocab_size: int | None


def check_dataset(
    prefix: Path, vocab_size: int | None = None, tokenizer_path: Path | None = None
) -> DatasetFacts:
    """Check the dataset at `prefix` (Megatron's --data-path, without .bin and .idx).

    `vocab_size`: rows of the model's embedding, padding included; every id must be below it.
    `tokenizer_path`: the folder or tokenizer.json training uses; it must be the manifest's.
    Raises ValueError, one line with file, value and fix, for a missing or truncated file, a wrong
    header, a manifest that describes other data, and a vocabulary or tokenizer that does not fit.
    """
    bin_path, idx_path = (prefix.with_name(prefix.name + suffix) for suffix in (".bin", ".idx"))
    for path in (idx_path, bin_path):
        if not path.is_file():
            raise DataError(_missing(prefix, path))
    dtype, documents, lengths = read_index(idx_path)
    tokens = int(lengths.sum(dtype=np.int64))
    size, expected = bin_path.stat().st_size, tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(
            f"{bin_path}: has {size} bytes, but its .idx describes {expected}; "
            f"copy the file again or {_AGAIN}"
        )
    manifest = load_manifest(manifest_path(prefix))
    if manifest is not None:
        _check_manifest(manifest, idx_path, documents, tokens, vocab_size)
    elif vocab_size is not None:
        _check_ids(bin_path, dtype, vocab_size)
    if tokenizer_path is not None:
        _check_tokenizer(tokenizer_path, manifest, idx_path, vocab_size)
    return DatasetFacts(
        documents,
        tokens,
        dtype,
        None if manifest is None else manifest.unigram_loss,
        None if manifest is None else manifest.tokenizer.vocab_size,
    )


def _missing(prefix: Path, path: Path) -> str:
    longer = prefix.with_name(prefix.name + "_text_document")
    if longer.with_name(longer.name + ".idx").is_file():
        return f"{path}: no such file; did you mean the data path {longer}?"
    return f"{path}: no such file; give the path of a dataset without .bin or .idx, or {_AGAIN}"


def read_index(path: Path) -> tuple[str, int, np.ndarray]:
    """(dtype, documents, length in tokens of each sequence) of an .idx file.

    Raises:
        DataError: one line, for what is no whole index.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(_HEADER_BYTES)
    if not header.startswith(_MAGIC):
        raise DataError(
            f"{path}: starts with {header[:9]!r}, not {_MAGIC!r}: no Megatron index; {_AGAIN}"
        )
    if len(header) < _HEADER_BYTES:
        raise DataError(
            f"{path}: has {size} bytes, less than its header's {_HEADER_BYTES}; {_AGAIN}"
        )
    format_version, code, sequences, documents = struct.unpack("<QBQQ", header[len(_MAGIC) :])
    if format_version != 1 or code not in _DTYPES:
        raise DataError(
            f"{path}: format version {format_version} with dtype code {code}; "
            f"version 1 with an integer type is read; {_AGAIN}"
        )
    expected = _HEADER_BYTES + sequences * (4 + 8) + documents * 8
    # A multimodal index goes on with one more byte per sequence.
    if size not in (expected, expected + sequences):
        raise DataError(
            f"{path}: has {size} bytes, but its header describes {expected}; "
            f"copy the file again or {_AGAIN}"
        )
    if sequences == 0:
        raise DataError(f"{path}: holds no document; {_AGAIN}")
    lengths = np.memmap(path, np.int32, mode="r", offset=_HEADER_BYTES, shape=(sequences,))
    return _DTYPES[code], documents - 1, lengths


def _check_manifest(
    manifest: Manifest, idx_path: Path, documents: int, tokens: int, vocab_size: int | None
) -> None:
    if (manifest.documents, manifest.tokens) != (documents, tokens):
        raise DataError(
            f"{idx_path}: {documents} documents and {tokens} tokens, but its manifest says "
            f"{manifest.documents} and {manifest.tokens}; {_AGAIN}"
        )
    if vocab_size is not None and vocab_size < manifest.tokenizer.vocab_size:
        raise DataError(
            f"{idx_path}: was made with a vocabulary of {manifest.tokenizer.vocab_size}, the model "
            f"has {vocab_size}; train with the tokenizer folder {manifest.tokenizer.folder}"
        )


def _check_ids(bin_path: Path, dtype: str, vocab_size: int) -> None:
    """Look at up to a million ids, evenly spread: nobody recorded what the data was made with."""
    tokens = np.memmap(bin_path, np.dtype(dtype), mode="r")
    sample = tokens[:: -(-len(tokens) // _SAMPLE)]
    lowest, highest = int(sample.min()), int(sample.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"{bin_path}: holds token id {wrong}, the vocabulary is {vocab_size}; train with the "
            f"tokenizer that made it or {_AGAIN}"
        )


def _check_tokenizer(
    tokenizer_path: Path, manifest: Manifest | None, idx_path: Path, vocab_size: int | None
) -> None:
    path = tokenizer_json(tokenizer_path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; give the folder that holds tokenizer.json")
    found = vocab_size_of(path)
    if vocab_size is not None and found > vocab_size:
        raise DataError(
            f"{path}: has a vocabulary of {found}, the model has {vocab_size}; set the model's to "
            f"{found} or more"
        )
    if manifest is None:
        return
    made_with = manifest.tokenizer
    fix = f"train with --tokenizer-model {idx_path.with_name(made_with.folder)}"
    if found != made_with.vocab_size:
        raise DataError(
            f"{path}: has a vocabulary of {found}, {idx_path.name} was made with "
            f"{made_with.vocab_size}; {fix}"
        )
    if (digest := sha256_of(path)) != made_with.sha256:
        raise DataError(
            f"{path}: sha256 {digest[:12]}..., but {idx_path.name} was made with "
            f"{made_with.sha256[:12]}...; {fix}"
        )
