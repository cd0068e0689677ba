"""Windows of the text that a run held out for validation, the same for every run of a study.

May touch: the run's data, read only. Shapes: R windows of a sequence's tokens and one more.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


def held_out(checkpoint: Path, windows: int, part: int = 0, parts: int = 1) -> Tensor:
    """Windows spread evenly over the validation documents of the run that wrote a checkpoint.

    Args:
        checkpoint: folder of an iteration.
        windows: R.
        part: which of `parts` sets of windows; sets of one call share none.
        parts: sets that there are.

    Returns:
        [R, sequence + 1] int64 ids; the last of a window is only predicted.

    Raises:
        ValueError: the run named no data, or its validation part is too short.
    """
    from megatron_mone.model.saved_model import saved_arguments

    saved = saved_arguments(checkpoint)
    every_RS = _ids(saved).unfold(0, saved["seq_length"] + 1, saved["seq_length"])
    if len(every_RS) < windows * parts:
        raise ValueError(
            f"windows = {windows}: the validation part has {len(every_RS)} of "
            f"{saved['seq_length']} tokens for {parts} sets: ask for fewer"
        )
    at = torch.linspace(0, len(every_RS) - 1, windows * parts).long()
    return every_RS[at[part::parts]]


def _ids(saved: Mapping[str, Any]) -> Tensor:
    """The documents that Megatron's `split` holds out for validation, one after another, cut as
    blended_megatron_dataset_builder cuts them."""
    from megatron.core.datasets.blended_megatron_dataset_config import parse_and_normalize_split
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    paths = saved.get("data_path") or []
    if len(paths) != 1:
        raise ValueError(f"data_path = {paths}: text is held out of a run of one data set")
    data = IndexedDataset(paths[0])
    train, valid, _ = parse_and_normalize_split(saved["split"])
    first, last = round(train * len(data)), round((train + valid) * len(data))
    if first == last:
        raise ValueError(f"split = {saved['split']!r} holds out none of {len(data)} documents")
    parts = [data[n] for n in range(first, last)]  # views of a file that `data` closes at its end
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))
