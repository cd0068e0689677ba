"""Whether every dataset of a run has documents for each of its parts: training, validation, test.

Megatron takes documents for an epoch until it has the samples that are wanted, and of no document
for ever; where validation has no data at all it fails at the first evaluation. May touch: the
headers and lengths of .idx files.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_mone.data.blend import Blend, RunData, is_remote
from megatron_mone.data.checks import read_index

READ = ("split", "eval_iters", "full_validation", "skip_train", "seq_length")
"""Arguments that are looked at."""
_PARTS = ("train", "valid", "test")
_WORDS = {"train": "training", "valid": "validation", "test": "test"}
_TRIED = ("90,10,0", "80,20,0", "50,50,0")
_DEFAULT = "969, 30, 1"  # validate_args, where data_path is given and split is not


@dataclass(frozen=True)
class _Lengths:
    """The lengths in tokens of a dataset's documents, as Megatron splits them: by sequence."""

    prefix: str
    tokens: np.ndarray

    def of(self, share: tuple[float, float]) -> np.ndarray:
        """Those of a share, rounded as `_build_megatron_dataset_splits` does."""
        first, last = (round(bound * float(len(self.tokens))) for bound in share)
        return self.tokens[first:last]


def check_split(values: Mapping[str, Any], data: RunData) -> None:
    """Judge the datasets that are on this machine.

    Args:
        values: Megatron's arguments by name, those of READ.
        data: of the run.

    Raises:
        ValueError: a part of the run has no document of a dataset, or no dataset.
    """
    evaluates = bool(values["full_validation"]) or (values["eval_iters"] or 0) > 0
    split = values["split"] or _DEFAULT
    wanted = [part for part in _PARTS if (part == "train" or evaluates)]
    if values["skip_train"]:
        wanted.remove("train")
    for blend in data.blends:
        of = next((p for p in _PARTS if _is_of(blend, p)), None)
        parts = {of: (0.0, 1.0)} if of else shares(split)
        for lengths in _here(blend):
            for part in wanted:
                if part in parts:
                    _check_part(blend, lengths, part, parts[part], split if of is None else None)
    if "valid" in wanted and data.blends and not data.unread:
        whole = any(not any(_is_of(b, p) for p in _PARTS) for b in data.blends)
        if whole and "valid" not in shares(split):
            raise ValueError(
                f"split = {split!r} gives validation no share, and eval_iters = "
                f"{values['eval_iters']}: give --split {_TRIED[0]}, or --eval-iters 0"
            )
        if not whole and not any(_is_of(blend, "valid") for blend in data.blends):
            raise ValueError(
                f"valid_data_path is not set, and eval_iters = {values['eval_iters']}: name "
                "datasets for validation, or give --eval-iters 0"
            )


def shares(split: str) -> dict[str, tuple[float, float]]:
    """Part -> (first, last) share of the documents, of those that have one.

    Raises:
        ValueError: the split has no number above 0, or more than three.
    """
    numbers = [float(word) for word in re.findall(r"\d+\.?\d*|\.\d+", split)]
    if not 0 < len(numbers) <= len(_PARTS) or sum(numbers) <= 0:
        raise ValueError(
            f"split = {split!r} must be one to three numbers, for training, validation and test, "
            f"such as {_TRIED[0]}"
        )
    found, first = {}, 0.0
    for part, number in zip(_PARTS, numbers, strict=False):
        if number:
            found[part] = first, first + number / sum(numbers)
        first += number / sum(numbers)
    return found


def _is_of(blend: Blend, part: str) -> bool:
    """Whether a blend is of one part alone."""
    return blend.source.startswith(f"{part}_data_path") or blend.source.endswith(f", {part}")


def _here(blend: Blend) -> Iterator[_Lengths]:
    """The lengths of a blend's datasets that are whole and on this machine."""
    for prefix in blend.prefixes:
        path = Path(f"{prefix}.idx")
        if is_remote(prefix) or not path.is_file():
            continue
        _, _, tokens = read_index(path)
        yield _Lengths(prefix, tokens)


def _check_part(
    blend: Blend, lengths: _Lengths, part: str, share: tuple[float, float], split: str | None
) -> None:
    documents = lengths.of(share)
    if int(documents.sum(dtype=np.int64)):
        return
    total = len(lengths.tokens)
    said = f"{blend.source}: {lengths.prefix} has {total} document{'s' if total != 1 else ''}"
    if split is None or len(documents):
        raise ValueError(f"{said}, in which {_WORDS[part]} finds no token: prepare it again")
    works = [text for text in _TRIED if all(_fits(lengths, text))]
    others = "" if part == "train" else "--eval-iters 0, for there is no validation without two"
    if works and part != "train":
        others = f"--split {works[0]}, or --eval-iters 0"
    elif works:
        others = f"--split {works[0]}"
    raise ValueError(
        f"{said}, of which split = {split!r} leaves none for {_WORDS[part]}: give "
        f"{others or '--split 100,0,0 and --eval-iters 0'}"
    )


def _fits(lengths: _Lengths, split: str) -> Iterator[bool]:
    return (bool(lengths.of(share).sum(dtype=np.int64)) for share in shares(split).values())
