"""Finding the files to read behind --input, and saying of every other one why it is left out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_mone.data.errors import DataError
from megatron_mone.data.merge import OutputPaths
from megatron_mone.data.recognise import LeftOut, recognise, shown_name
from megatron_mone.data.sources import Source

_KINDS = ".txt, .jsonl, .json or .parquet"
_EXPECTED = f"a {_KINDS} file (.gz, .bz2, .xz, .zst too) or a directory of them"


@dataclass(frozen=True)
class Found:
    """What is behind the inputs, in order."""

    sources: list[Source]
    left_out: list[LeftOut]


def discover(
    inputs: Sequence[Path],
    name_root: Path | None = None,
    json_key: str = "text",
    outputs: OutputPaths | None = None,
) -> Found:
    """The files behind files and directories, in the order given, directories sorted by path.

    Inputs are called by the path given, or relative to `name_root` if that is set. `outputs`,
    which may lie among the inputs, are passed over. Raises DataError for an input that is missing
    or, given by its own name, repeated or unreadable, and where nothing can be read.
    """
    sources: dict[tuple[int, int], Source] = {}
    left_out: list[LeftOut] = []
    for given in inputs:
        if given.is_dir():
            found = [*_directory(given, name_root, json_key, outputs)]
            reasons = [entry for entry in found if isinstance(entry, LeftOut)]
            if problem := _nothing_in_it(found, reasons):
                raise DataError(f"--input {given}: {problem}; give {_EXPECTED}")
            left_out += reasons
        elif not given.exists():
            raise DataError(f"--input {given}: no such file or directory; give {_EXPECTED}")
        else:
            found = [recognise(given, name_root, json_key)]
            if isinstance(found[0], LeftOut):
                raise DataError(f"--input {found[0]}; give {_EXPECTED}")
            if given.stat().st_size == 0:
                raise DataError(f"--input {given}: the file is empty; give one with text in it")
        for source in (entry for entry in found if isinstance(entry, Source)):
            first = sources.setdefault(_identity(source.path), source)
            if first is source:
                continue
            if not given.is_dir():
                raise DataError(f"--input {source.name}: is given twice; name each file once")
            left_out.append(LeftOut(source.name, f"the same file as {first.name}, which is read"))
    if not sources:
        raise DataError(f"--input: nothing given; give {_EXPECTED}")
    return Found([*sources.values()], left_out)


def _nothing_in_it(found: list[Source | LeftOut], reasons: list[LeftOut]) -> str | None:
    sources = [entry for entry in found if isinstance(entry, Source)]
    if not sources:
        why = f" ({reasons[0]}{', ...' if len(reasons) > 1 else ''})" if reasons else ""
        return f"holds no {_KINDS} file that can be read{why}"
    if all(source.path.stat().st_size == 0 for source in sources):
        return f"all its {len(sources)} files are empty"
    return None


def _directory(
    folder: Path, name_root: Path | None, json_key: str, outputs: OutputPaths | None
) -> Iterator[Source | LeftOut]:
    for entry in _walk(folder, name_root, outputs, {_identity(folder)}):
        yield recognise(entry, name_root, json_key) if isinstance(entry, Path) else entry


def _walk(
    folder: Path, name_root: Path | None, outputs: OutputPaths | None, above: set[tuple[int, int]]
) -> Iterator[Path | LeftOut]:
    """The files under `folder`; links are followed, but never round."""
    for path in sorted(folder.iterdir()):
        if outputs is not None and path in outputs.all:
            continue
        if path.name.startswith("."):
            yield LeftOut(shown_name(path, name_root), "hidden")
        elif _is_prepared(path):
            yield LeftOut(shown_name(path, name_root), "part of a prepared dataset")
        elif not path.is_dir():
            yield path
        elif (identity := _identity(path)) in above:
            yield LeftOut(shown_name(path, name_root), "a link to a folder that it is in")
        else:
            yield from _walk(path, name_root, outputs, above | {identity})


def _is_prepared(path: Path) -> bool:
    """Is this what an earlier run wrote into a folder of texts? None of it is a text."""
    if path.name.endswith(("_text_document.bin", "_text_document.idx", ".manifest.json")):
        return True
    holds = {".tokenizer": "tokenizer.json", ".work": "lock"}.get(path.suffix)
    return holds is not None and (path / holds).is_file()


def _identity(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_dev, found.st_ino
