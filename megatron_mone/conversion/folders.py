"""Folders as a whole: where an iteration is, what travels along, an output whole or not there.

May touch: the output folder.
"""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron_mone.common.files import atomic_write

RELEASE = "release"
"""The folder of a checkpoint that no training wrote: it starts at step 0 without an optimizer."""


SOURCE = "hugging_face"
"""Beside it: config.json, tokenizer and generation config of the folder it came from."""


SUMS = "conversion.json"


_TRAVELS = (
    "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template*", "*.model", "LICENSE*",
)  # fmt: skip


Step = Callable[[int, int, str], None]
"""Told: bytes done, of all, and of what."""


def refuse_existing(out: Path) -> None:
    """Raises ValueError where `out` is there."""
    if out.exists():
        raise ValueError(f"--out {out} is there: choose another folder, or delete it")


@contextmanager
def unfinished(out: Path, size: int, of: str) -> Iterator[Path]:
    """`OUT.partial`, renamed to `out` at a good end; kept at any other, to go on from.

    Args:
        out: the folder.
        size: bytes that will be written.
        of: what; a partial folder of another is started anew.

    Raises:
        ValueError: one line: not enough space, or no folder can be made there.
    """
    folder, mark = out.with_name(out.name + ".partial"), "source"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not _says(folder / mark, of):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        atomic_write(folder / mark, of.encode())
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        if size - there > free:
            raise ValueError(
                f"--out {out}: {size - there:,} bytes are to be written, {free:,} are free there"
            )
        yield folder
        (folder / mark).unlink()
        folder.rename(out)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error} ({error.filename})") from None


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def copy_beside(source: Path, folder: Path) -> None:
    """Copy config.json, tokenizer, generation config and licence, those that are there."""
    folder.mkdir(exist_ok=True)
    for pattern in _TRAVELS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def find_iteration(checkpoint: Path) -> Path:
    """The iteration that a checkpoint folder's tracker names, or the folder itself.

    Raises:
        ValueError: one line.
    """
    from megatron_mone.checkpoint.tracker import ITERATION_FORMAT, TRACKER_NAME, read_tracker

    if (checkpoint / "metadata.json").is_file():
        return checkpoint
    text = read_tracker(checkpoint) if checkpoint.is_dir() else None
    if text is None:
        raise ValueError(f"{checkpoint} holds no checkpoint: {TRACKER_NAME} is missing")
    name = text if text == RELEASE else ITERATION_FORMAT.format(int(text)) if text.isdigit() else ""
    if not name or not (checkpoint / name).is_dir():
        raise ValueError(f"{checkpoint / TRACKER_NAME} names {text!r}, which is not there")
    return checkpoint / name
