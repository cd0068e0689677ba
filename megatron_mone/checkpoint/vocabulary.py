"""The padded vocabulary belongs to the model: a checkpoint's size is kept in every layout.

Megatron pads the vocabulary to a multiple of make_vocab_size_divisible_by x TP, anew for each run
(core/tokenizers/utils/build_tokenizer.py), and the padding takes part in the softmax: loaded under
another TP a model would gain or lose rows without a word, and its loss would change. May touch: a
checkpoint folder, read-only.
"""

import warnings
from argparse import Namespace
from pathlib import Path

from megatron_mone.checkpoint.safe_metadata import read_metadata
from megatron_mone.checkpoint.verify import folder_to_load

EMBEDDING = "embedding.word_embeddings.weight"


def keep_padded_vocabulary(args: Namespace, given: int | None) -> None:
    """Have the model of a checkpoint keep its rows where no other number was asked for.

    Args:
        args: Megatron's, validated: `padded_vocab_size` is its tokenizer's, padded for this layout.
        given: `padded_vocab_size` as parsed, before Megatron set it.

    Raises:
        ValueError: the rows cannot be split over the tensor parallel ranks, or are fewer than the
            vocabulary; names what would work.
    """
    try:
        folder = folder_to_load(args)
    except ValueError:
        folder = None  # where the files are, `check_checkpoint` has said so
    saved = saved_size(folder) if folder else None
    rows = given or saved
    if rows is None:
        return
    whose = f"padded_vocab_size = {rows}"
    if given is None:
        whose = f"checkpoint {folder} has an embedding of {rows} rows, padding included, which"
    args.padded_vocab_size, ranks = rows, args.tensor_model_parallel_size
    if rows % ranks:
        fitting = ", ".join(str(t) for t in range(1, ranks) if rows % t == 0)
        raise ValueError(
            f"{whose} cannot be split over tensor_model_parallel_size = {ranks}, and other rows "
            f"would make another model: give a tensor_model_parallel_size of {fitting}"
        )
    if args.vocab_size is not None and rows < args.vocab_size:
        raise ValueError(
            f"{whose} is less than vocab_size = {args.vocab_size}: give the vocabulary of the "
            "model, or a --padded-vocab-size of at least that for rows of zeros beside its own"
        )
    if saved not in (None, rows):
        warnings.warn(
            f"checkpoint {folder} has an embedding of {saved} rows, padded_vocab_size = {rows} "
            f"{'adds rows of zeros' if saved < rows else 'cuts the last'}: that is another model",
            stacklevel=2,
        )


def saved_size(folder: Path) -> int | None:
    """Rows of the word embedding in a torch_dist checkpoint, padding included; None: not told."""
    try:
        metadata = read_metadata(folder)
        return int(metadata.state_dict_metadata[EMBEDDING].size[0])
    except (ValueError, AttributeError, KeyError):
        return None  # of another format, or damaged: `verify_load` says so, and what is whole
