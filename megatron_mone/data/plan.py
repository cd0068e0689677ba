"""What to prepare, and the plan of it: inputs with checksums, shards, one fingerprint of all."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import InputFacts, sha256_of
from megatron_mone.data.shards import group_units
from megatron_mone.data.sources import Source, Unit, scan
from megatron_mone.data.text_pieces import SMALLEST, is_piece, piece_bytes
from megatron_mone.data.tokenizers import TokenizerSpec

TXT_DOCUMENTS = ("auto", "file", "paragraph")
_FEW_FILES = 20
Progress = Callable[[str, int, int], None]
"""Told (stage, input bytes done since the last call, input bytes in all)."""


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare. Fields are the options of tools/prepare_data.py."""

    inputs: tuple[Path, ...]
    """Files and directories, in the order their documents shall have."""
    output_prefix: Path
    """Writes PREFIX_text_document.bin/.idx, PREFIX.manifest.json and PREFIX.tokenizer/."""
    tokenizer: str = "byte"
    """`byte`, `bpe:N` (N pieces, trained on the input) or a local folder or tokenizer.json."""
    workers: int = 1
    """Processes that tokenize. The output does not depend on it."""
    json_key: str = "text"
    """The key of a .jsonl object that holds the document."""
    txt_documents: str = "auto"
    """A .txt holds one document ("file"), one per blank-line-separated block ("paragraph"), or is
    cut into pieces of so many bytes (a number). "auto" cuts where few .txt files are all there is:
    training takes its validation data from the documents, and few leave it none."""
    strict: bool = False
    """Stop at the first bad line."""
    overwrite: bool = False
    """Replace a dataset that was made from something else."""
    licence: str = ""
    """Free text for the manifest."""
    eod_token: str | None = None
    """End-of-document token of a local tokenizer that names none."""
    name_root: Path | None = None
    """Inputs are named in messages and manifest relative to this; default: as given."""
    shard_bytes: int = 8 << 20
    """Input bytes of one shard, the grain of parallel work and of resuming."""

    def __post_init__(self) -> None:
        """Refuse values no run could use."""
        if self.workers < 1:
            raise DataError(f"--workers {self.workers}: must be at least 1")
        if self.shard_bytes < 1:
            raise DataError(f"shard_bytes {self.shard_bytes}: must be at least 1")
        if not (self.txt_documents in TXT_DOCUMENTS or is_piece(self.txt_documents)):
            raise DataError(
                f"--txt-documents {self.txt_documents}: must be one of {', '.join(TXT_DOCUMENTS)}, "
                f"or the bytes of a piece, at least {SMALLEST}"
            )
        if not self.output_prefix.name:
            raise DataError(f"--output-prefix {self.output_prefix}: give a path such as out/data/x")


def cut_of(config: PrepareConfig, sources: list[Source]) -> str:
    """`config.txt_documents`, "auto" turned into what it means for these sources."""
    if config.txt_documents != "auto":
        return config.txt_documents
    sizes = [source.path.stat().st_size for source in sources]
    piece = piece_bytes(sum(sizes))
    only_text = all(source.kind == ".txt" for source in sources)
    stays_whole = max(sizes) <= 2 * piece and not any(source.compression for source in sources)
    return str(piece) if only_text and len(sizes) < _FEW_FILES and not stays_whole else "file"


@dataclass(frozen=True)
class Plan:
    """All that decides the output's bytes, and the shards it is cut into."""

    inputs: list[InputFacts]
    shards: list[tuple[list[Unit], int]]
    fingerprint: str

    @property
    def size(self) -> int:
        """Bytes of all inputs."""
        return sum(entry.bytes for entry in self.inputs)


def make_plan(
    config: PrepareConfig, spec: TokenizerSpec, sources: list[Source], progress: Progress
) -> Plan:
    """Hash and cut every source; `progress` is told of the stage "reading"."""
    total = sum(source.path.stat().st_size for source in sources)
    inputs: list[InputFacts] = []
    units: list[tuple[Unit, int]] = []
    for source in sources:
        found = scan(
            source,
            config.txt_documents,
            config.shard_bytes,
            lambda count: progress("reading", count, total),
        )
        inputs.append(InputFacts(source.name, found.size, found.sha256))
        units += [(unit, unit.size) for unit in found.units]
    decisive = {
        "inputs": [{"name": e.name, "bytes": e.bytes, "sha256": e.sha256} for e in inputs],
        "tokenizer": [spec.text, spec.eod_token, [sha256_of(p) for p in spec.source_files()]],
        "options": [config.json_key, config.txt_documents, config.shard_bytes, config.licence],
        "versions": [version("tokenizers"), version("megatron-core")],
    }
    fingerprint = hashlib.sha256(json.dumps(decisive).encode()).hexdigest()
    return Plan(inputs, group_units(units, config.shard_bytes), fingerprint)
