"""The manifest beside a dataset, its checksums, and writing files so that none is half there."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_mone.data.errors import DataError

SCHEMA = 1
BAD_LINES_KEPT = 1000
"""How many bad lines, and files left out, a manifest names; the totals are always exact."""


@dataclass(frozen=True)
class InputFacts:
    """One input file: its name, size in bytes and sha256, as stored (compressed or not).

    `documents` that it gave; None in the manifest of an earlier version.
    """

    name: str
    bytes: int
    sha256: str
    documents: int | None = None


@dataclass(frozen=True)
class TokenizerFacts:
    """The tokenizer: spec as given, folder name beside the output, sha256 of tokenizer.json."""

    kind: str
    spec: str
    folder: str
    sha256: str
    vocab_size: int
    eod_id: int
    eod_token: str


@dataclass(frozen=True)
class FileFacts:
    """One output file: its name, size in bytes and sha256."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset was made of and holds.

    `tokens` counts one end-of-document token per document; `unigram_loss` is the entropy of the
    token frequencies in nats per token, the loss of the best model that ignores its context.
    `txt_documents` is what a .txt was cut into: "file", "paragraph", or pieces of so many bytes.
    `left_out` files were found among the inputs and not read; their names have the reason.
    """

    inputs: list[InputFacts]
    tokenizer: TokenizerFacts
    json_key: str
    txt_documents: str
    documents: int
    tokens: int
    empty_documents: int
    bad_lines: int
    bad_lines_named: list[str]
    dtype: str
    unigram_loss: float
    bin: FileFacts
    idx: FileFacts
    licence: str
    plan_sha256: str
    megatron_core: str
    tokenizers: str
    schema: int = field(default=SCHEMA)
    left_out: int = 0
    left_out_named: list[str] = field(default_factory=list)

    def to_json(self) -> bytes:
        """The bytes of the file; equal manifests are equal bytes (no times, no host names)."""
        return (
            json.dumps(asdict(self), indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"
        )


def manifest_path(prefix: Path) -> Path:
    """`PREFIX.manifest.json` for an output prefix or for its `PREFIX_text_document`."""
    return prefix.with_name(prefix.name.removesuffix("_text_document") + ".manifest.json")


def load_manifest(path: Path) -> Manifest | None:
    """The manifest at `path`, None if there is none; DataError if it cannot be read."""
    if not path.exists():
        return None
    try:
        fields: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if fields["schema"] != SCHEMA:
            raise DataError(
                f"{path}: schema {fields['schema']!r} is not {SCHEMA}; prepare the data again"
            )
        return Manifest(
            **(
                fields
                | {
                    "inputs": [InputFacts(**entry) for entry in fields["inputs"]],
                    "tokenizer": TokenizerFacts(**fields["tokenizer"]),
                    "bin": FileFacts(**fields["bin"]),
                    "idx": FileFacts(**fields["idx"]),
                }
            )
        )
    except DataError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not a manifest ({error!r}); prepare the data again") from None


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_facts(path: Path, name: str | None = None) -> FileFacts:
    """Size and sha256 of a file, under `name` if it is to be moved."""
    return FileFacts(name or path.name, path.stat().st_size, sha256_of(path))
