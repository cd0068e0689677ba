"""Three kinds of tokenizer, one form on disk: a folder that `--tokenizer-type
HuggingFaceTokenizer --tokenizer-model FOLDER` loads (tokenizer.json + tokenizer_config.json).

`byte` is a byte-level BPE without merges whose ids are the byte values; `bpe:N` is trained on the
input; anything else is a local folder or tokenizer.json. Nothing is ever fetched or executed.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from megatron_mone.common.files import atomic_write
from megatron_mone.data.errors import DataError
from megatron_mone.data.hugging_face import (
    COPIED,
    copy_hugging_face,
    load_tokenizer,
    token_text,
    write_config,
)

EOD_TOKEN = "<|endoftext|>"
SMALLEST_BPE = 258
"""256 bytes, the end-of-document token and at least one merge."""


@dataclass(frozen=True)
class TokenizerSpec:
    """A parsed --tokenizer: kind "byte", "bpe" (`vocab_size` pieces) or "hf" (`path`)."""

    text: str
    kind: str
    vocab_size: int = 0
    path: Path = Path()
    eod_token: str | None = None

    def source_files(self) -> list[Path]:
        """The files of an "hf" tokenizer that decide the ids; empty for the other kinds."""
        if self.kind != "hf":
            return []
        if self.path.is_file():
            return [self.path]
        names = {*COPIED, "tokenizer_config.json"}
        files = (p for p in self.path.iterdir() if p.name in names or p.suffix == ".model")
        return sorted(p for p in files if p.is_file())


def parse_spec(text: str, eod_token: str | None = None) -> TokenizerSpec:
    """Read `byte`, `bpe:N` or a local path; DataError names the value and the fix."""
    if text == "byte":
        return TokenizerSpec(text, "byte")
    if text.startswith("bpe:"):
        size = text.removeprefix("bpe:")
        if not size.isascii() or not size.isdigit() or int(size) < SMALLEST_BPE:
            raise DataError(
                f"--tokenizer {text}: the size must be a number of at least {SMALLEST_BPE} "
                "(256 bytes, one end-of-document token, one merge); try bpe:4096"
            )
        return TokenizerSpec(text, "bpe", vocab_size=int(size))
    path = Path(text)
    if not path.exists():
        raise DataError(
            f"--tokenizer {text}: no such file or folder; give byte, bpe:N, a local Hugging Face "
            "tokenizer folder or a tokenizer.json (nothing is downloaded)"
        )
    return TokenizerSpec(text, "hf", path=path, eod_token=eod_token)


class Encoder:
    """A loaded tokenizer folder: text to ids, without any special token the text did not earn."""

    def __init__(self, folder: Path) -> None:
        """Load `folder`; its tokenizer_config.json names the end-of-document token."""
        self.tokenizer = load_tokenizer(folder / "tokenizer.json")
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        # "<|endoftext|>" written in a document is text; only we end documents.
        self.tokenizer.encode_special_tokens = True
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        self.eod_token = str(token_text(config["eos_token"]))
        self.eod_id = int(self.tokenizer.token_to_id(self.eod_token))
        self.vocab_size = _vocab_size(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone; an empty text has none."""
        batch = self.tokenizer.encode_batch_fast([text], add_special_tokens=False)
        return list(batch[0].ids)

    def decode(self, ids: list[int]) -> str:
        """The text of ids; for the byte-level kinds exactly the one that was encoded."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=False))


def vocab_size_of(path: Path) -> int:
    """Largest id plus one of a tokenizer folder or tokenizer.json; DataError if unreadable."""
    return _vocab_size(load_tokenizer(tokenizer_json(path)))


def tokenizer_json(path: Path) -> Path:
    """The tokenizer.json of a folder, or the file itself."""
    return path / "tokenizer.json" if path.is_dir() else path


def write_tokenizer(spec: TokenizerSpec, folder: Path, texts: Iterator[str]) -> None:
    """Write the tokenizer folder of `spec`; `texts` is read only to train a "bpe"."""
    folder.mkdir(parents=True)
    if spec.kind == "hf":
        copy_hugging_face(spec.path, spec.text, spec.eod_token, folder)
        return
    built = _byte_tokenizer() if spec.kind == "byte" else _train_bpe(spec.vocab_size, texts)
    atomic_write(folder / "tokenizer.json", built.to_str(pretty=True).encode())
    write_config(folder, {}, EOD_TOKEN)


def _vocab_size(tokenizer: Any) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def _byte_alphabet() -> dict[str, int]:
    """ByteLevel's character of each byte value (GPT-2's `bytes_to_unicode`)."""
    kept = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = (byte for byte in range(256) if byte not in kept)
    return {chr(byte): byte for byte in kept} | {
        chr(256 + index): byte for index, byte in enumerate(moved)
    }


def _byte_tokenizer() -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=_byte_alphabet(), merges=[]))
    # Without merges, splitting into words changes nothing but the speed.
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([EOD_TOKEN])
    return tokenizer


def _train_bpe(vocab_size: int, texts: Iterator[str]) -> Any:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOD_TOKEN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
