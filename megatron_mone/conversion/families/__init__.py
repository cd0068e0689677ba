"""A file for each line of models that are stored alike. To add one: a module here with a FAMILY,
named in MODULES; nothing else knows of it."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

from megatron_mone.common.spelling import nearest_name
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.pairs import Pair
from megatron_mone.conversion.shape import Shape

MODULES = ("llama", "qwen_dense", "mixtral", "olmoe", "qwen_moe", "granite_moe", "deepseek",
           "glm_moe", "gpt_oss", "mone")  # fmt: skip


@dataclass(frozen=True)
class Family:
    """Models that are stored alike.

    Attributes:
        name: as people call it.
        model_types: what `model_type` of their config.json may be.
        shape: of a config.json, Megatron's arguments in the order of a model file; raises
            ValueError where MoNE or Megatron has no such model, with the reason.
        pairs: its tensors, ours and theirs.
        left_out: pattern of the names of tensors that are left out.
    """

    name: str
    model_types: tuple[str, ...]
    shape: Callable[[HFConfig], Shape]
    pairs: tuple[Pair, ...] = ()
    left_out: str = r"(?!)"

    def drops(self, name: str) -> bool:
        """Whether a tensor of a folder is left out, and said to be."""
        return re.fullmatch(self.left_out, name) is not None


def families() -> dict[str, Family]:
    """`model_type` -> its family."""
    found = [import_module(f"{__name__}.{name}").FAMILY for name in MODULES]
    return {kind: family for family in found for kind in family.model_types}


def family_of(config: HFConfig) -> Family:
    """The family of a config.json.

    Raises:
        ValueError: one that is not known; names those that are.
    """
    known, kind = families(), config.word("model_type")
    if kind not in known:
        kind = kind[:80]
        raise ValueError(
            f"{config.path}: model_type = {kind!r} is no family that is translated"
            f"{nearest_name(kind, list(known))}: {', '.join(sorted(known))}"
        )
    return known[kind]
