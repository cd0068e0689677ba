"""What --data-path and its kin name: datasets with or without weights, read as Megatron reads them.

Megatron takes an even number of words, a number at every other place, for weights and prefixes,
and all else for prefixes (get_blend_from_list in core/datasets/utils.py); it splits no word, save
in the files that list data (get_blend_and_blend_per_split in training/utils/common_utils.py). A
slip becomes a prefix that is nowhere, or an assertion without words: here it is a line that says
what is meant. May touch: those files, and whether an .idx is there.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mone.data.errors import DataError

SPLITS = ("train", "valid", "test")
WORDS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
"""Arguments that take a blend."""
FILES = ("data_args_path", "per_split_data_args_path")
"""Arguments that name a file of one: its words, or a JSON mapping of split to words."""
_REMOTE = ("s3://", "msc://")
_SHOWN = 100


@dataclass(frozen=True)
class Blend:
    """Datasets that are mixed; `weights` are relative, None: by the datasets' sizes."""

    source: str
    """The argument, or the argument, file and split, for errors."""
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None


@dataclass(frozen=True)
class RunData:
    """The data of a run; `unread` are the files of FILES that are not on this machine."""

    blends: tuple[Blend, ...]
    unread: tuple[tuple[str, str], ...]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Of all datasets, each once."""
        return tuple(dict.fromkeys(p for blend in self.blends for p in blend.prefixes))


def read_data(values: Mapping[str, Any]) -> RunData:
    """The data that some arguments name; nothing where they name none.

    Args:
        values: Megatron's arguments by name, parsed or of a run file; others are passed over.

    Raises:
        DataError: a blend or a file of one is wrong.
    """
    blends, unread = [], []
    for name in (*WORDS, *FILES):
        if values.get(name) is None:
            continue
        if name in WORDS:
            blends.append(read_blend(name, _words(values[name])))
        elif not Path(path := str(values[name])).is_file():
            unread.append((name, path))
        else:
            blends += _listed(name, Path(path))
    return RunData(tuple(blends), tuple(unread))


def read_blend(source: str, words: Sequence[str]) -> Blend:
    """A blend from its words.

    Args:
        source: what holds them, for errors.
        words: prefixes, or weights and prefixes in turn.

    Raises:
        DataError: a weight is missing, in the wrong place or not above 0, or a word is no prefix.
    """
    if not words:
        raise DataError(f"{source} names no dataset: give a dataset's path, or leave it out")
    weighted = len(words) % 2 == 0 and all(_is_number(word) for word in words[::2])
    prefixes = tuple(word.strip() for word in (words[1::2] if weighted else words))
    for prefix in prefixes:
        # A file may be called anything; who has it means it.
        if not Path(f"{prefix}.idx").is_file() and (slip := _slip(prefix)):
            raise DataError(f"{source} = {_shown(words)}: {slip}")
    if not weighted:
        return Blend(source, prefixes, None)
    weights = tuple(float(word) for word in words[::2])
    for word, weight, prefix in zip(words[::2], weights, prefixes, strict=True):
        if not (0 < weight < math.inf):
            raise DataError(
                f"{source}: the weight {word} of {prefix} must be a number above 0; leave the "
                "dataset out to read nothing of it"
            )
    return Blend(source, prefixes, weights)


def check_sources(values: Mapping[str, Any]) -> None:
    """One source of data may be named: of two Megatron asserts, or passes one over in silence.

    Args:
        values: as `read_data`, and `mock_data`.

    Raises:
        DataError: names both.
    """
    given = [name for name in ("mock_data", *FILES) if values.get(name)]
    given += [name for name in WORDS if values.get(name) is not None]
    per_split = [name for name in given if name in WORDS[1:]]
    sources = [name for name in given if name not in per_split] + per_split[:1]
    if len(sources) > 1:
        raise DataError(f"{sources[0]} and {sources[1]} are both given: leave one out")


def is_remote(prefix: str) -> bool:
    """Whether a dataset lies in object storage, which Megatron reads through a local cache."""
    return prefix.startswith(_REMOTE)


def _words(value: Any) -> list[str]:
    return [str(word) for word in (value if isinstance(value, list | tuple) else [value])]


def _listed(name: str, path: Path) -> Iterator[Blend]:
    """The blends in a file of FILES."""
    try:
        text = path.read_text(encoding="utf-8")
        lists = json.loads(text) if name == "per_split_data_args_path" else {"": text}
    except (OSError, ValueError) as error:
        raise DataError(f"{name} = {str(path)!r} cannot be read: {error}") from error
    if not isinstance(lists, dict) or (lists.keys() != {""} and not lists.keys() >= set(SPLITS)):
        raise DataError(
            f"{name} = {str(path)!r} must hold a JSON mapping with {', '.join(SPLITS)}, each words "
            "as --data-path has them, or null"
        )
    for split, value in lists.items():
        source = f"{name} = {str(path)!r}" + (f", {split}" if split else "")
        if split and split not in SPLITS:
            raise DataError(f"{source}: Megatron reads {', '.join(SPLITS)} alone; leave it out")
        if value is not None:
            words = value.split() if isinstance(value, str) else value
            if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
                raise DataError(f"{source}: {value!r} must be a text, or a list of texts")
            yield read_blend(source, words)


def _slip(prefix: str) -> str:
    """What is wrong with a prefix that names no dataset here; empty where nothing shows it."""
    if not prefix:
        return "one word is empty; leave it out"
    if _is_number(prefix):
        return (
            f"{prefix} is read as a dataset's path: give each dataset its weight before it, or "
            "none of them"
        )
    parts = prefix.split()
    if len(parts) > 1 and (
        any(_is_number(part) or Path(f"{part}.idx").is_file() for part in parts)
        or all(part.startswith(("/", "./", "../")) for part in parts)
    ):
        return (
            "this is one word, the path of one dataset: leave out the quotes on a command line, "
            f"and write a list in a run file, [{', '.join(parts)}]"
        )
    for suffix in (".bin", ".idx"):
        if prefix.endswith(suffix):
            return f"Megatron adds .bin and .idx itself: give {prefix.removesuffix(suffix)}"
    if Path(f"{(bare := prefix.rstrip('/'))}.idx").is_file():
        return f"Megatron adds .bin and .idx as they are: give {bare}, without the slash"
    if prefix.endswith("/") or (not is_remote(prefix) and Path(prefix).is_dir()):
        found = sorted(Path(prefix).glob("*.idx"))
        such = f", such as {found[0].with_suffix('')}" if found else ""
        return f"{prefix} is a folder: name a dataset in it, without .bin or .idx{such}"
    if prefix.startswith("~") or "$" in prefix:
        return f"{prefix} is read as it stands, without a shell: write the whole path"
    if set("*?[") & set(prefix):
        return f"{prefix} is read as it stands, not as a pattern: name each dataset"
    return ""


def _shown(words: Sequence[str]) -> str:
    text = " ".join(words)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}...")


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
