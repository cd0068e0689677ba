"""Local Hugging Face tokenizers: copied, given an end-of-document token, never executed."""

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from megatron_mone.common.files import atomic_write
from megatron_mone.data.errors import DataError

_EOD_GUESSES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>")
COPIED = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
           "merges.txt", "tokenizer.model", "chat_template.jinja")  # fmt: skip


def load_tokenizer(path: Path) -> Any:
    """A tokenizers.Tokenizer from a tokenizer.json; DataError if it is missing or malformed."""
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for every malformed file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"tokenizer {path}: cannot be read ({reason}); give a valid one") from None


def copy_hugging_face(path: Path, text: str, eod_token: str | None, folder: Path) -> None:
    """Copy the tokenizer at `path` (called `text` in messages) into `folder`, with an end token."""
    config: dict[str, Any] = {}
    if path.is_file():
        load_tokenizer(path)  # a broken one is named by its own path, not by its copy's
        shutil.copyfile(path, folder / "tokenizer.json")
    elif (path / "tokenizer.json").is_file():
        load_tokenizer(path / "tokenizer.json")
        # Copied to the byte, so the checksum also holds for the folder it came from.
        for name in COPIED:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
        config = _read_config(path / "tokenizer_config.json")
    else:
        config = _convert_slow(path, text, folder)
    vocab = load_tokenizer(folder / "tokenizer.json").get_vocab(with_added_tokens=True)
    named = eod_token or _configured_eod(folder, config)
    write_config(folder, config, _choose_eod(named, text, vocab))


def _convert_slow(path: Path, text: str, folder: Path) -> dict[str, Any]:
    """Let transformers turn vocab.json + merges.txt and the like into a tokenizer.json."""
    from transformers import AutoTokenizer

    try:
        # False, not absent: left out, transformers asks on the terminal whether to run the
        # folder's own code.
        loaded = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        loaded.save_pretrained(folder)
    except Exception as error:  # any of a dozen libraries may refuse the folder
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"--tokenizer {text}: no tokenizer.json, and transformers cannot load the folder "
            f"({reason}); give a folder with a tokenizer.json"
        ) from None
    if not (folder / "tokenizer.json").is_file():
        raise DataError(f"--tokenizer {text}: has no fast form; give a tokenizer.json")
    return _read_config(folder / "tokenizer_config.json")


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); repair or remove it") from None
    if not isinstance(config, dict):
        raise DataError(f"{path}: holds no JSON object; repair or remove it")
    return config


def _configured_eod(folder: Path, config: dict[str, Any]) -> str | None:
    special = _read_config(folder / "special_tokens_map.json")
    return token_text(config.get("eos_token") or special.get("eos_token"))


def _choose_eod(named: str | None, text: str, vocab: dict[str, int]) -> str:
    if named is not None and named not in vocab:
        raise DataError(f"--eod-token {named!r}: not a token of {text}; name one that is")
    chosen = named or next((guess for guess in _EOD_GUESSES if guess in vocab), None)
    if chosen is None:
        raise DataError(
            f"--tokenizer {text}: names no end-of-sequence token; give one with --eod-token"
        )
    return chosen


def token_text(token: Any) -> str | None:
    """`eos_token` is written either as a string or as an AddedToken's dictionary."""
    return token.get("content") if isinstance(token, dict) else token


def write_config(folder: Path, config: dict[str, Any], eod_token: str) -> None:
    """Write tokenizer_config.json: `config` with `eod_token` as its eos_token."""
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    # auto_map points at code in the folder; we neither copy nor want it.
    kept = {key: value for key, value in config.items() if key != "auto_map"}
    merged = defaults | kept | {"eos_token": eod_token}
    atomic_write(folder / "tokenizer_config.json", json.dumps(merged, indent=2).encode() + b"\n")
