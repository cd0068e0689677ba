"""Files and folders that a run names: data, tokenizer, checkpoint, output folders.

Each failure is a ValueError of one line that names the flag or file, the value and the fix. May
touch: the file system, read-mostly.
"""

import json
import tempfile
from argparse import Namespace
from pathlib import Path

from megatron_mone.checkpoint.choice import check_stored_choice
from megatron_mone.checkpoint.model_file import check_engine_of, check_model_file
from megatron_mone.checkpoint.tracker import TRACKER_NAME
from megatron_mone.checkpoint.verify import folder_to_load
from megatron_mone.data.blend import check_sources, is_remote, read_data
from megatron_mone.data.checks import check_dataset
from megatron_mone.model.checks.data_split import check_split


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
        ValueError: from `data.blend.read_data` or `data.checks.check_dataset`, or no data is named.
    """
    check_sources(vars(args))
    if args.mock_data:
        return
    data = read_data(vars(args))
    for name, path in data.unread:
        raise ValueError(f"{name} = {path!r}: no such file; give one that lists datasets")
    if not data.prefixes:
        raise ValueError("data_path is not set: name a dataset prefix, or pass --mock-data")
    sequences = read_sequences(args)
    for prefix in data.prefixes:
        if sequences is not None and prefix not in sequences:
            raise ValueError(
                f"per_dataset_sequences_path = {args.per_dataset_sequences_path!r} lacks "
                f"{prefix!r}: Megatron asks it for every dataset, by the prefix as it is given"
            )
    tokenizer = Path(args.tokenizer_model) if args.tokenizer_model else None
    for prefix in data.prefixes:
        if is_remote(prefix):
            _check_remote(prefix, args)
        else:
            check_dataset(Path(prefix), vocab_size=args.vocab_size, tokenizer_path=tokenizer)
    check_split(vars(args), data)


def read_sequences(args: Namespace) -> dict[str, list[int]] | None:
    """The file of per_dataset_sequences_path: dataset prefix -> [sequences, documents].

    Raises:
        ValueError: it cannot be read, or holds something else.
    """
    path = args.per_dataset_sequences_path
    if path is None:
        return None
    try:
        counts = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"per_dataset_sequences_path = {path!r} cannot be read: {error}"
        ) from error
    pairs = counts.values() if isinstance(counts, dict) else [None]
    if not all(isinstance(pair, list) and list(map(type, pair)) == [int, int] for pair in pairs):
        raise ValueError(
            f"per_dataset_sequences_path = {path!r} must hold an object of dataset prefixes, each "
            "with [sequences, documents]"
        )
    return counts


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
        ValueError: from those called, of checkpoint/.
    """
    if args.load and (Path(args.load) / TRACKER_NAME).is_file():
        check_model_file(Path(args.load), args)
        check_engine_of(Path(args.load), args)
    folder = folder_to_load(args)
    if folder is not None:
        check_stored_choice(folder, args)


def _check_remote(prefix: str, args: Namespace) -> None:
    """What Megatron asserts, without words, of data in object storage (core/datasets)."""
    if not args.object_storage_cache_path:
        raise ValueError(f"{prefix}: give --object-storage-cache-path, a folder for its .idx")
    if args.mmap_bin_files:
        raise ValueError(f"{prefix}: a .bin in object storage is not mapped: --no-mmap-bin-files")
