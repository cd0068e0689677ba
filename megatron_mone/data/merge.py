"""Finished shards -> Megatron's .bin and .idx, verified, then moved to their names.

Megatron is imported inside the functions: it takes seconds, and the workers never need it.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.common.files import sync_file
from megatron_mone.data.shards import ShardFacts, ShardJob


@dataclass(frozen=True)
class OutputPaths:
    """The final names of one `--output-prefix`."""

    prefix: Path

    def _named(self, suffix: str) -> Path:
        return self.prefix.with_name(self.prefix.name + suffix)

    @property
    def data(self) -> Path:
        """What Megatron's --data-path takes (the .bin and .idx without their suffix)."""
        return self._named("_text_document")

    @property
    def bin(self) -> Path:
        """The tokens."""
        return self._named("_text_document.bin")

    @property
    def idx(self) -> Path:
        """The lengths and offsets."""
        return self._named("_text_document.idx")

    @property
    def manifest(self) -> Path:
        """The manifest; it is written last, so where it stands the dataset is whole."""
        return self._named(".manifest.json")

    @property
    def tokenizer(self) -> Path:
        """The tokenizer folder, Megatron's --tokenizer-model."""
        return self._named(".tokenizer")

    @property
    def work(self) -> Path:
        """The shards of an unfinished run."""
        return self._named(".work")

    @property
    def all(self) -> tuple[Path, ...]:
        """Everything that is ever written."""
        return (self.bin, self.idx, self.manifest, self.tokenizer, self.work)


def merge_shards(
    jobs: Sequence[ShardJob], target: Path, vocab_size: int, merged: Callable[[int], None]
) -> np.ndarray:
    """Write `target`.bin and .idx with Megatron's own builder; returns the count of each id (V).

    `merged` is told the input bytes of each shard when it is in.
    """
    datasets = _indexed_dataset_module()
    dtype = np.dtype(jobs[0].dtype)
    assert dtype == datasets.DType.optimal_dtype(vocab_size), "dtype rule differs from Megatron's"
    counts = np.zeros(vocab_size, dtype=np.int64)
    builder = datasets.IndexedDatasetBuilder(f"{target}.bin", dtype=dtype.type)
    for job in jobs:
        lengths = np.load(job.path(".lengths.npy"))
        tokens = np.fromfile(job.path(".bin"), dtype=dtype)
        counts += np.bincount(tokens, minlength=vocab_size)
        for document in np.split(tokens, np.cumsum(lengths, dtype=np.int64)[:-1]):
            if len(document):
                builder.add_document(document, [len(document)])
        merged(job.size)
    builder.finalize(f"{target}.idx")
    return counts


def verify_merged(target: Path, facts: Sequence[ShardFacts], counts: np.ndarray) -> None:
    """Re-open the dataset as training does and compare its counts with the shards'.

    Raises RuntimeError on a difference: that is our bug or a failing disk, no user's mistake.
    """
    datasets = _indexed_dataset_module()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its logger warns that there are no ranks here
        dataset = datasets.IndexedDataset(str(target))
    found = (len(dataset.document_indices) - 1, int(dataset.sequence_lengths.sum(dtype=np.int64)))
    expected = (sum(fact.documents for fact in facts), sum(fact.tokens for fact in facts))
    if found != expected or int(counts.sum()) != expected[1]:
        raise RuntimeError(f"{target}: (documents, tokens) {found} were written, not {expected}")


def unigram_entropy(counts: np.ndarray) -> float:
    """Entropy in nats per token of id counts (V): -sum p ln p."""
    seen = counts[counts > 0].astype(np.float64)
    shares = seen / seen.sum()
    return math.fsum(-shares * np.log(shares))


def publish(work: Path, outputs: OutputPaths) -> None:
    """Move merged.bin, merged.idx, the tokenizer and the manifest in `work` to their final names.

    The old manifest and .idx go first and the new manifest comes last, so a kill in between leaves
    no set of files that opens as a dataset but is a mixture of two.
    """
    outputs.manifest.unlink(missing_ok=True)
    outputs.idx.unlink(missing_ok=True)
    for name, final in (("merged.bin", outputs.bin), ("merged.idx", outputs.idx)):
        sync_file(work / name)
        (work / name).replace(final)
    copy = work / "tokenizer.copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(work / "tokenizer", copy)
    shutil.rmtree(outputs.tokenizer, ignore_errors=True)
    copy.replace(outputs.tokenizer)
    (work / "manifest.json").replace(outputs.manifest)


def megatron_version() -> str:
    """The version of Megatron-Core that wrote the dataset."""
    return version("megatron-core")


def _indexed_dataset_module() -> Any:
    with warnings.catch_warnings():
        # Megatron warns of missing Transformer Engine and Apex, which data has no use for.
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset
