"""A model's config.json, as Hugging Face's libraries write it: untrusted, and told apart by what
was asked of it. Each fault is one line with the file and the field."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.checked_json import load

CONFIG = "config.json"
_FIX = "give the folder of a Hugging Face model, or its config.json"
_LARGEST = 2**40  # of a size
_LONGEST = 80  # characters of a value in a message

HARMLESS = frozenset({
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype",
    "torch_dtype", "transformers_version", "use_cache", "output_router_logits", "pretraining_tp",
    "model_type", "name_or_path", "_name_or_path", "id2label", "label2id", "problem_type",
    "output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward",
    "is_encoder_decoder", "use_return_dict", "quantization_config", "ep_size", "moe_layer_freq",
    "max_window_layers", "seq_aux", "_attn_implementation", "tokenizer_class", "unsloth_fixed",
    "rope_interleave", "router_jitter_noise",
})  # fmt: skip
"""Fields that change no number of a shape."""


class HFConfig:
    """The fields of a config.json, or of an object in it.

    Args:
        path: of the file, named in messages.
        values: its fields.
        place: what stands before their names in messages.

    Attributes:
        notes: what the Megatron shape does not say of the model, a line each.
    """

    def __init__(self, path: Path, values: dict[str, Any], place: str = "") -> None:
        self.path, self._values, self._place = path, values, place
        self._asked: set[str] = set()
        self.notes: list[str] = []

    @classmethod
    def read(cls, path: Path) -> HFConfig:
        """Of a folder that holds one, or of a file.

        Raises:
            ValueError: no such file, or no JSON object.
        """
        path = path / CONFIG if path.is_dir() else path
        found = load(path, _FIX)
        if not isinstance(found, dict):
            raise ValueError(f"{path}: holds no JSON object; {_FIX}")
        return cls(path, found)

    def ignore(self, *names: str) -> None:
        """Fields that say nothing here, whatever they hold."""
        self._asked.update(names)

    def has(self, name: str) -> bool:
        """Whether a field is there and is not null."""
        self._asked.add(name)
        return self._values.get(name) is not None

    def size(self, name: str, default: int | None = None) -> int:
        """A whole number of 1 or more; without a default the field must be there."""
        value = self._value(name, default)
        if type(value) is not int or not 1 <= value <= _LARGEST:
            self._refuse(name, value, "a whole number of 1 or more")
        return value

    def count(self, name: str, default: int = 0) -> int:
        """A whole number of 0 or more."""
        return 0 if self._value(name, default) == 0 else self.size(name, default)

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(name, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            self._refuse(name, value, "a number")
        return value

    def truth(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self._value(name, default)
        if not isinstance(value, bool):
            self._refuse(name, value, "true or false")
        return value

    def word(self, name: str, default: str | None = None) -> str:
        """A text."""
        value = self._value(name, default)
        if not isinstance(value, str):
            self._refuse(name, value, "a text")
        return value

    def null(self, name: str) -> bool:
        """Whether a field is there and says nothing, where one that is not there has a default."""
        self._asked.add(name)
        return name in self._values and self._values[name] is None

    def words(self, name: str, default: list[str]) -> list[str]:
        """A list of texts."""
        value = self._value(name, default)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            self._refuse(name, value, "a list of texts")
        return value

    def layers(self, name: str, most: int) -> list[int]:
        """Numbers of layers, below `most`; none where the field is not there."""
        value = self._value(name, [])
        if not isinstance(value, list) or any(
            type(one) is not int or not 0 <= one < most for one in value
        ):
            self._refuse(name, value, f"a list of layers from 0 to {most - 1}")
        return value

    def part(self, name: str) -> HFConfig:
        """An object; one without fields where there is none."""
        value = self._value(name, {})
        if not isinstance(value, dict):
            self._refuse(name, value, "an object")
        return HFConfig(self.path, value, f"{self._place}{name}.")

    def unless(self, name: str, plain: Any, meaning: str) -> None:
        """Tell of a field that the shape does not say, if it is there and is not the plain one."""
        if self.has(name) and self._values[name] != plain:
            self.notes.append(f"{name} = {self._printed(self._values[name])}: {meaning}")

    def left(self) -> list[str]:
        """Fields that nobody asked for, as notes."""
        return [
            f"{name} = {self._printed(value)}: not translated"
            for name, value in self._values.items()
            if name not in self._asked | HARMLESS and value is not None
        ]

    def _value(self, name: str, default: Any) -> Any:
        self._asked.add(name)
        value = self._values.get(name)
        if value is None and default is None:
            raise ValueError(f"{self.path}: {self._place}{name} is missing; {_FIX}")
        return default if value is None else value

    def _refuse(self, name: str, value: Any, wanted: str) -> NoReturn:
        raise ValueError(
            f"{self.path}: {self._place}{name} = {self._printed(value)} must be {wanted}"
        )

    @staticmethod
    def _printed(value: Any) -> str:
        text = repr(value)
        return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
