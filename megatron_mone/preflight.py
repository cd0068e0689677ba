"""Checks made before anything expensive starts: data, tokenizer, checkpoint, folders.

`check_run` works on Megatron's parsed arguments, `check_checkpoint` on its validated ones. Each
failure is a ValueError of one line that names the flag or file, the value and the fix. May touch:
the file system, read-mostly.
"""

from __future__ import annotations

import os
import tempfile
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

import torch

from megatron_mone.checkpoint.manifest import check_manifest
from megatron_mone.checkpoint.tracker import TRACKER_NAME
from megatron_mone.checkpoint.verify import folder_to_load
from megatron_mone.data.checks import check_dataset
from megatron_mone.kernels.measured import check_table
from megatron_mone.moe.mask_trace import recorded_steps


def check_run(args: Namespace) -> None:
    """Files and folders, before Megatron opens any. Cheap: index headers, one tokenizer file."""
    check_async_save(args)
    check_table()
    check_values(args)
    check_data(args)
    if args.mone_replay_masks:
        recorded_steps(Path(args.mone_replay_masks))
    for flag in ("save", "tensorboard_dir", "mone_record_masks", "mone_profile_dir"):
        if getattr(args, flag) and int(os.environ.get("LOCAL_RANK", "0")) == 0:
            check_writable(flag, Path(getattr(args, flag)))


def check_values(args: Namespace) -> None:
    """What can be judged away from the run's machine: no dataset or folder is looked for."""
    check_tokenizer(args)
    check_schedule(args)


def check_schedule(args: Namespace) -> None:
    """Megatron asserts this without words, after it has built the model.

    Raises:
        ValueError: the learning rate would still rise when its decay, or training, ends.
    """
    for unit in ("iters", "samples"):
        name = f"lr_decay_{unit}"
        end = getattr(args, name)
        if end is None:
            name = f"train_{unit}"
            end = getattr(args, name)
        warm_up = getattr(args, f"lr_warmup_{unit}")
        if end and args.lr_warmup_fraction is None and warm_up >= end:
            raise ValueError(
                f"lr_warmup_{unit} = {warm_up} must be fewer than {name} = {end}: lower it "
                f"(--lr-warmup-{unit} 0), or train longer"
            )


def check_async_save(args: Namespace) -> None:
    """Megatron starts its writer process only later, and hangs where that cannot run.

    Raises:
        ValueError: CPU ranks, or the package of the chosen strategy is absent.
    """
    if not args.async_save:
        return
    if not torch.cuda.is_available():
        raise ValueError(
            "async_save = True is not available on CPU ranks, where Megatron's writer process "
            "never answers: drop --async-save"
        )
    if args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        raise ValueError(
            "async_strategy = 'nvrx' needs nvidia-resiliency-ext: pip install "
            "nvidia-resiliency-ext, or pass --async-strategy mcore"
        )


def check_tokenizer(args: Namespace) -> None:
    """A local Hugging Face tokenizer must be a folder with tokenizer files."""
    if args.tokenizer_type != "HuggingFaceTokenizer" or not args.tokenizer_model:
        return
    path = Path(args.tokenizer_model)
    looks_local = path.is_absolute() or args.tokenizer_model.count("/") > 1 or path.exists()
    if looks_local and not (path / "tokenizer.json").is_file() and not path.is_file():
        raise ValueError(
            f"tokenizer_model = {args.tokenizer_model!r} holds no tokenizer.json: name the folder "
            "that tools/prepare_data.py wrote beside the data"
        )


def check_data(args: Namespace) -> None:
    """Every indexed dataset named must be whole and fit the tokenizer.

    Raises:
        ValueError: from `data.checks.check_dataset`, or no data is named at all.
    """
    if args.mock_data:
        return
    sources = [args.data_path, args.train_data_path, args.valid_data_path, args.test_data_path]
    prefixes = [word for source in sources if source for word in source if not _is_number(word)]
    if not prefixes:
        if args.per_split_data_args_path or args.data_args_path:
            return
        raise ValueError("data_path is not set: name a dataset prefix, or pass --mock-data")
    tokenizer = Path(args.tokenizer_model) if args.tokenizer_model else None
    for prefix in prefixes:
        check_dataset(Path(prefix), vocab_size=args.vocab_size, tokenizer_path=tokenizer)


def check_writable(flag: str, folder: Path) -> None:
    """Make the folder and write an empty file in it.

    Raises:
        ValueError: it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".write-check-"):
            pass
    except OSError as error:
        raise ValueError(
            f"{flag} = {str(folder)!r} is not writable ({error.strerror}): give another folder"
        ) from error


def check_checkpoint(args: Namespace) -> None:
    """The checkpoint to load must be of this model; a named iteration must exist.

    Whether its files are whole is looked at later, by all ranks together (`checkpoint.verify`).

    Raises:
        ValueError: from `checkpoint.manifest.check_manifest` or `checkpoint.verify.folder_to_load`.
    """
    if args.load and (Path(args.load) / TRACKER_NAME).is_file():
        check_manifest(Path(args.load), args)
    folder_to_load(args)


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
