"""A Hugging Face folder -> its model and tokenizer, without running code that came with it.

A folder is untrusted: weights are safetensors; code in it is run only where that is asked for, and
where it is this package's own, the package's is; what libraries raise of files becomes one line.
May touch: the folder, transformers. Asks no network.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from megatron_mone.common.checked_json import load
from megatron_mone.conversion.hf_config import CONFIG, HFConfig
from megatron_mone.conversion.hf_folder import Weights
from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.hf_model.folder import AUTO_MAP, CODE, has_own_code
from megatron_mone.conversion.hf_model.modeling_mone import MoNEForCausalLM

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_IMPLEMENTATIONS = ("attn_implementation", "_attn_implementation", "experts_implementation")
_LONGEST = 300  # characters of a library's message
_FIX = "copy the folder again"


@dataclass(frozen=True)
class Loaded:
    """A model that can run.

    Attributes:
        model: in evaluation mode.
        notes: what of the folder was left out, a line each.
    """

    model: Any
    notes: list[str]


def load_model(folder: Path, *, dtype: str = "auto", trust_code: bool = False) -> Loaded:
    """The causal language model of a folder.

    Args:
        folder: with a config.json and safetensors.
        dtype: of the weights as torch names it; "auto" is what they are stored in.
        trust_code: run the folder's own Python files where its config names any.

    Raises:
        ValueError: one line: a file that is missing, cut short or damaged, a tensor that is missing
            or has another shape, a field that the model cannot compute, code that is not run.
    """
    config = HFConfig.read(_folder(folder))
    kind, has_code = config.word("model_type", ""), config.has("auto_map")
    for name in _IMPLEMENTATIONS:
        if config.has(name) and "/" in config.word(name):
            raise ValueError(
                f"{folder / CONFIG}: {name} = {config.word(name)[:80]!r} names code elsewhere, "
                "which is not fetched; take the field out"
            )
    _ = Weights(folder).tensors  # every file is there and whole
    notes: list[str] = []
    ours = kind == MoNEConfig.model_type and (not has_code or _is_ours(folder))
    auto: Any = MoNEForCausalLM if ours else AutoModelForCausalLM
    if has_code and not ours and not trust_code:
        words = f"the code that {folder / CONFIG} names (auto_map) is not run"
        if kind not in CONFIG_MAPPING:
            raise ValueError(
                f"{words}: it is not this package's {' and '.join(CODE)}; give --trust-remote-code "
                "if you trust where the folder came from"
            )
        notes.append(f"{words}: transformers has {kind} itself")
    elif not has_code and not ours and kind not in CONFIG_MAPPING:
        raise ValueError(
            f"{folder / CONFIG}: model_type = {kind[:80]!r} is none that transformers has, and no "
            "code comes with it"
        )
    with _told(folder):
        model, info = auto.from_pretrained(
            folder, dtype=dtype, local_files_only=True, use_safetensors=True,
            ignore_mismatched_sizes=True, output_loading_info=True,
            **({} if ours else {"trust_remote_code": trust_code and has_code}),
        )  # fmt: skip
    for name in sorted(info["missing_keys"]):
        raise ValueError(f"{folder}: the tensor {name} is missing; {_FIX}")
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ValueError(
            f"{folder}: the tensor {name} has shape {tuple(found)}, by the config it has "
            f"{tuple(wanted)}; {_FIX}"
        )
    notes += [
        f"{folder}: the tensor {name} is not used" for name in sorted(info["unexpected_keys"])
    ]
    return Loaded(model.eval(), notes)


def load_tokenizer(folder: Path, model: Any, *, trust_code: bool = False) -> Any:
    """The tokenizer of a folder.

    Args:
        folder: with its files.
        model: of the folder.
        trust_code: as `load_model`.

    Raises:
        ValueError: one line: there is none, or it cannot be read.
    """
    if not any((_folder(folder) / name).is_file() for name in TOKENIZERS):
        raise ValueError(
            f"{folder} has no tokenizer ({', '.join(TOKENIZERS[:3])}): copy the files of the one "
            "that the model was trained with there"
        )
    with _told(folder):
        return AutoTokenizer.from_pretrained(
            folder, config=model.config, local_files_only=True, trust_remote_code=trust_code
        )


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give that of a Hugging Face model, with {CONFIG}")
    return folder


def _is_ours(folder: Path) -> bool:
    return load(folder / CONFIG, _FIX)["auto_map"] == AUTO_MAP and has_own_code(folder)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """Whatever a library raises of a folder's files, as a line."""
    try:
        yield
    except Exception as error:
        words = " ".join(str(error).split())[:_LONGEST]
        raise ValueError(f"{folder}: cannot be loaded: {words or type(error).__name__}") from error
