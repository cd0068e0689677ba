"""Every tensor of a Megatron model, and what lies in it by the table of pairs of its family.

May touch: nothing; a model's flags are read from the files that its config names.
"""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.conversion.families import Family, family_of
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.hf_folder import Weights
from megatron_mone.conversion.inspect import chooses_neurons
from megatron_mone.conversion.megatron_model import BareModel, Slot
from megatron_mone.conversion.pairs import Pair, Sizes, View
from megatron_mone.conversion.shape import Shape
from megatron_mone.model.saved_model import model_values

_FLAGS = (
    "--transformer-impl", "local", "--distributed-backend", "gloo", "--micro-batch-size", "1",
    "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-5", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--no-gradient-accumulation-fusion",
    "--no-bias-swiglu-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion",
    "--no-persist-layer-norm", "--no-bias-dropout-fusion",
)  # fmt: skip


MORE_TOKENS = "mtp_num_layers"


@dataclass(frozen=True)
class Placed:
    """A tensor of ours and the tensors elsewhere that lie in it."""

    slot: Slot
    pair: Pair
    views: list[View]

    def join(self, weights: Weights, sizes: Sizes, sums: dict[str, str]) -> Tensor:
        """Ours, of the values of theirs, whose sums are noted; rows of padding are 0."""
        dtype = weights.tensors[self.views[0][0]].dtype
        out = torch.zeros(tuple(self.slot.fake.shape), dtype=dtype)
        for name, view, shape in named(self.pair, out, sizes, self.slot.layer):
            value = weights.read(name)
            sums[name] = digest(value)
            view.copy_(value.view(shape).view(view.shape))
        return out


def digest(tensor: Tensor) -> str:
    """SHA-256 of its bytes."""
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def named(pair: Pair, ours: Tensor, sizes: Sizes, layer: int | None) -> list[View]:
    """The pair's views, their names with the layer's number."""
    number = str(layer)
    return [(name.replace("{l}", number), v, s) for name, v, s in pair.views(ours, sizes)]


def placed(
    model: BareModel, family: Family, without: Container[str] = ()
) -> list[Placed]:  # fmt: skip
    """Every tensor of the model and where it is elsewhere, but those `without` a place there.

    Raises:
        ValueError: a tensor without a pair.
    """
    pairs = {pair.ours: pair for pair in family.pairs}
    found = []
    for slot in model.slots:
        if slot.within in without:
            continue
        pair = pairs.get(slot.within)
        if pair is None:
            raise ValueError(
                f"{slot.name} {list(slot.fake.shape)} has no name in {family.name}'s table "
                f"(megatron_mone/conversion/families): a {family.name} model holds no such tensor"
            )
        like = torch.empty(tuple(slot.fake.shape), dtype=slot.fake.dtype, device="meta")
        found.append(Placed(slot, pair, named(pair, like, model.sizes, slot.layer)))
    return found


def words_of(
    path: Path, mone: str | None = None, without: Sequence[str] = ()
) -> list[str]:  # fmt: skip
    """Megatron's flags of one rank for the model of a Hugging Face folder, or of a config.json.

    Args:
        path: of it.
        mone: of configs/mone.
        without: arguments that are left at their default.

    Raises:
        ValueError: one line, as inspect.model_file.
    """
    config = HFConfig.read(path)
    shape = family_of(config).shape(config)
    shape |= {} if mone is None else {"mone": mone}
    return words_of_shape(
        {name: value for name, value in shape.items() if name not in without}, config.path
    )


def words_of_shape(shape: Shape, source: Path) -> list[str]:
    """Megatron's flags of one rank for what a model file says; `source` is named in messages."""
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import read_part, to_flags

    if "num_experts" in shape and "mone" not in shape and not chooses_neurons(shape):
        shape = shape | {"mone_neuron_ratio": 1.0}  # our experts, which keep every neuron
    values = read_part(source, "model", shape)
    length = ["--seq-length", str(shape["max_position_embeddings"])]
    return [*_FLAGS, *length, *to_flags(values, flag_parser(), source)]


def words_of_saved(saved: dict[str, Any], source: Path, length: Any) -> list[str]:
    """Megatron's flags of one rank for the model of a checkpoint's own arguments."""
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import to_flags

    left_out = ("tokenizer_*", "seq_length", "transformer_impl", "bf16", "fp16", "*_fusion",
                "distributed_backend", "ckpt_format", "recompute_*", "delay_wgrad_compute",
                "overlap_*")  # fmt: skip
    values = {
        name: value
        for name, value in model_values(saved).items()
        if not any(fnmatchcase(name, pattern) for pattern in left_out)
    }
    if saved.get("padded_vocab_size"):
        values["vocab_size"] = saved["padded_vocab_size"]  # rows of padding are exported
    return [*_FLAGS, "--seq-length", str(length), *to_flags(values, flag_parser(), source)]
