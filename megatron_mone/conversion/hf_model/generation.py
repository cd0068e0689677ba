"""Text that a folder's model goes on with, printed while it is made. May touch: torch's seed."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, TextStreamer

from megatron_mone.conversion.hf_model.loading import load_model, load_tokenizer


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: at most so many.
        temperature: of the softmax they are drawn from; 0 takes the likeliest.
        top_p: draw among the likeliest tokens that together have this probability; 1 is all.
        seed: of the draws.

    Raises:
        ValueError: names the option that is out of range, or would have no effect.
    """

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for met, name, allowed in (
            (self.max_new_tokens >= 1, "max-new-tokens", "1 or more"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature",
             "0 or more"),
            (0 < self.top_p <= 1, "top-p", "above 0, at most 1"),
            (self.temperature > 0 or self.top_p == 1, "top-p", "left out with --temperature 0, "
             "which takes the likeliest token"),
            (self.temperature > 0 or self.seed is None, "seed", "left out with --temperature 0, "
             "which draws nothing"),
            (self.seed is None or 0 <= self.seed < 2**63, "seed", "0 or more, below 2**63"),
        ):  # fmt: skip
            if not met:
                value = getattr(self, name.replace("-", "_"))
                raise ValueError(f"--{name} {value} is not allowed: it must be {allowed}")

    def config(self, ends: list[int], never: list[int] | None = None) -> GenerationConfig:
        """transformers' form of it.

        Args:
            ends: tokens that end a text.
            never: tokens that are not chosen.
        """
        options: dict[str, Any] = {"suppress_tokens": never} if never else {}
        if self.temperature > 0:
            options |= dict(temperature=self.temperature, top_p=self.top_p, top_k=0)
        return GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=self.temperature > 0,
            eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0, **options,
        )  # fmt: skip


def stream_text(
    folder: Path, prompt: str, sampling: Sampling, *, dtype: str, trust_code: bool
) -> None:
    """Print the prompt and what the model makes of it; what was left out goes to stderr.

    Args:
        folder: of a Hugging Face model, with its tokenizer.
        prompt: a text of a token or more.
        sampling: how to go on.
        dtype, trust_code: as `load_model` takes them.

    Raises:
        ValueError: one line: as `load_model`; a prompt without tokens, with tokens that the model
            has not, or too long; logits that are not finite.
    """
    loaded = load_model(folder, dtype=dtype, trust_code=trust_code)
    for note in loaded.notes:
        print(note, file=sys.stderr)
    model = loaded.model
    tokenizer = load_tokenizer(folder, model, trust_code=trust_code)
    ids = torch.tensor([tokenizer(prompt)["input_ids"]], dtype=torch.long)
    _check_prompt(folder, prompt, ids, model.config, sampling.max_new_tokens)
    ends = _ends(folder, model)
    settings = sampling.config(ends, model.generation_config.suppress_tokens)
    model.generation_config = GenerationConfig()  # no other settings of the folder's
    if sampling.temperature > 0:
        torch.manual_seed(sampling.seed or 0)
    model.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=settings,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        logits_processor=LogitsProcessorList([_Finite(folder)]),
    )  # fmt: skip


class _Finite(LogitsProcessor):
    """Stops at logits that say nothing; -inf is a token that was ruled out."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if not bool((scores < torch.inf).all()):
            raise ValueError(
                f"{self._folder}: the model's logits are NaN or infinite after "
                f"{input_ids.shape[1]} tokens: look at its weights, or try --dtype float32"
            )
        return scores


def _check_prompt(
    folder: Path, prompt: str, ids: torch.Tensor, config: Any, new_tokens: int
) -> None:
    if ids.numel() == 0:
        raise ValueError(f"--prompt {prompt!r} makes no token: give a text")
    if int(ids.max()) >= config.vocab_size or int(ids.min()) < 0:
        raise ValueError(
            f"{folder}: the tokenizer makes token {int(ids.max())} of the prompt, the model has "
            f"{config.vocab_size} tokens: it is the tokenizer of another model"
        )
    most = getattr(config, "max_position_embeddings", None)
    if most is not None and ids.shape[1] + new_tokens > most:
        raise ValueError(
            f"--max-new-tokens {new_tokens} after the {ids.shape[1]} tokens of the prompt is over "
            f"the {most} positions of the model (max_position_embeddings)"
        )


def _ends(folder: Path, model: Any) -> list[int]:
    """Tokens that end a text, by generation_config.json or config.json."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = model.config.eos_token_id
    ends = [] if found is None else found if isinstance(found, list) else [found]
    for token in ends:
        if type(token) is not int or not 0 <= token < model.config.vocab_size:
            raise ValueError(
                f"{folder}: eos_token_id = {str(found)[:80]} must be tokens from 0 to "
                f"{model.config.vocab_size - 1}"
            )
    return ends
