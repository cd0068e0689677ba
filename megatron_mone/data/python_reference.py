"""Text of a domain that is on every machine: the language reference that Python has for its help.

`pydoc_data.topics` of the standard library repeats whole sections under several names; here each
paragraph stands once. The text is that of the Python that runs: the same for the same version.
"""

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path

from megatron_mone.common.files import atomic_write
from megatron_mone.data.errors import DataError

LICENCE = (
    "Python Software Foundation License 2: the language reference of the Python standard library "
    "as installed, its module pydoc_data.topics."
)
_SECTION = 2000  # characters, about a page


def write_reference(cache_dir: Path) -> list[Path]:
    """The text as a .jsonl file, a section a line, written to `cache_dir` where it is not there.

    Raises:
        DataError: this Python came without it, or the folder cannot be written.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DataError(
            f"corpus python-reference: Python {platform.python_version()} here has no "
            "pydoc_data.topics: install all of its standard library, or use --input with text of "
            "your own"
        ) from None
    lines = [json.dumps({"text": text}) for text in sections(topics)]
    content = "".join(f"{line}\n" for line in lines).encode()
    file = cache_dir / f"python-{platform.python_version()}" / "reference.jsonl"
    try:
        if not file.is_file() or file.read_bytes() != content:
            file.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file, content)
    except OSError as error:
        raise DataError(
            f"--cache-dir {cache_dir}: {error.strerror}: {error.filename}; choose a folder you may "
            "write to"
        ) from None
    return [file]


def sections(topics: Mapping[str, str]) -> list[str]:
    """Pieces of about 2,000 characters, no paragraph twice, in the order of their sha256: so every
    part of a split is of all topics.

    Args:
        topics: name -> text.
    """
    texts = [topics[name].strip() for name in sorted(topics)]
    found, piece, length = [], list[str](), 0
    for paragraph in dict.fromkeys(part for text in texts for part in text.split("\n\n")):
        piece.append(paragraph.strip("\n"))
        length += len(paragraph)
        if length >= _SECTION:
            found.append("\n\n".join(piece))
            piece, length = [], 0
    found += ["\n\n".join(piece)] if piece else []
    return sorted(found, key=lambda text: hashlib.sha256(text.encode()).hexdigest())
