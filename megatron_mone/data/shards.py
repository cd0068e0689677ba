"""One shard: the token file of a group of units, written by whichever worker gets it.

A shard is three files in the work folder. The .json is written last and marks the shard finished;
every file is written beside and renamed, and its bytes depend only on the input. So a killed run
leaves finished shards and rubbish, and two workers writing one shard write the same bytes.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np

from megatron_mone.common.files import atomic_write, sync_file
from megatron_mone.data.documents import BadLine, read_unit
from megatron_mone.data.errors import DataError
from megatron_mone.data.manifest import BAD_LINES_KEPT
from megatron_mone.data.sources import Unit
from megatron_mone.data.tokenizers import Encoder

_LONGEST = 2**31 - 1
"""Megatron's .idx keeps the length of a sequence in an int32 (indexed_dataset._IndexWriter)."""


@dataclass(frozen=True)
class ShardJob:
    """All a worker needs; `size` is the input bytes it covers (the unit of the progress bar)."""

    index: int
    size: int
    units: tuple[Unit, ...]
    folder: Path
    tokenizer: Path
    tokenizer_sha256: str
    dtype: str
    json_key: str
    txt_documents: str
    strict: bool

    def path(self, suffix: str) -> Path:
        """This shard's file in the work folder: ".bin", ".lengths.npy" or ".json"."""
        return self.folder / f"shard-{self.index:06d}{suffix}"


@dataclass(frozen=True)
class ShardFacts:
    """Counts of one shard; `tokens` includes the end-of-document tokens.

    `documents_of` has the documents of each source, by its name.
    """

    documents: int
    tokens: int
    empty_documents: int
    bad_total: int
    bad: tuple[BadLine, ...]
    documents_of: dict[str, int]


def group_units(
    units: Iterable[tuple[Unit, int]], shard_bytes: int
) -> list[tuple[list[Unit], int]]:
    """Join (unit, size in bytes) pairs, in order, into groups of at most about `shard_bytes`."""
    groups: list[tuple[list[Unit], int]] = []
    for unit, size in units:
        if groups and groups[-1][1] + size <= shard_bytes:
            groups[-1] = ([*groups[-1][0], unit], groups[-1][1] + size)
        else:
            groups.append(([unit], size))
    return groups


def finished(job: ShardJob) -> ShardFacts | None:
    """The facts of a shard a run before this one finished, else None."""
    try:
        stored = json.loads(job.path(".json").read_text(encoding="utf-8"))
        facts = ShardFacts(**(stored | {"bad": tuple(BadLine(**bad) for bad in stored["bad"])}))
        lengths = np.load(job.path(".lengths.npy"))
        size = job.path(".bin").stat().st_size
    except (OSError, ValueError, TypeError, KeyError, EOFError):
        return None
    whole = size == facts.tokens * np.dtype(job.dtype).itemsize
    return facts if whole and len(lengths) == facts.documents else None


def tokenize_shard(job: ShardJob) -> ShardFacts:
    """Tokenize the units of `job` into its three files, unless they are there already.

    With `strict` it stops at the first bad line and marks nothing finished.
    """
    if (done := finished(job)) is not None:
        return done
    encoder = _encoder(job.tokenizer, job.tokenizer_sha256)
    lengths: list[int] = []
    bad: list[BadLine] = []
    documents_of: dict[str, int] = {}
    bad_total = empty = 0
    beside = job.path(f".bin.{os.getpid()}.tmp")
    with beside.open("wb") as stream:
        for unit in job.units:
            before = len(lengths)
            for document in read_unit(unit, job.json_key, job.txt_documents):
                if isinstance(document, BadLine):
                    bad_total += 1
                    bad += [document] if len(bad) < BAD_LINES_KEPT else []
                    if job.strict:
                        return ShardFacts(0, 0, 0, bad_total, tuple(bad), {})
                elif not document:
                    empty += 1
                else:
                    ids = [*encoder.encode(document), encoder.eod_id]
                    if len(ids) > _LONGEST:
                        raise DataError(
                            f"{unit.source.name}: one document of {len(ids)} tokens; the format "
                            f"allows {_LONGEST}; split it (a .txt: --txt-documents auto)"
                        )
                    stream.write(np.array(ids, dtype=job.dtype).tobytes())
                    lengths.append(len(ids))
            name = unit.source.name
            documents_of[name] = documents_of.get(name, 0) + len(lengths) - before
    facts = ShardFacts(len(lengths), sum(lengths), empty, bad_total, tuple(bad), documents_of)
    _publish(job, beside, lengths, facts)
    return facts


def _publish(job: ShardJob, beside: Path, lengths: list[int], facts: ShardFacts) -> None:
    sync_file(beside)
    beside.replace(job.path(".bin"))
    lengths_beside = job.path(f".lengths.{os.getpid()}.tmp.npy")
    np.save(lengths_beside, np.array(lengths, dtype=np.int32))
    sync_file(lengths_beside)
    lengths_beside.replace(job.path(".lengths.npy"))
    atomic_write(job.path(".json"), json.dumps(asdict(facts)).encode())


@lru_cache(maxsize=1)
def _encoder(folder: Path, sha256: str) -> Encoder:
    """One load per process. `sha256` is part of the key: a path may come to hold another one."""
    return Encoder(folder)
