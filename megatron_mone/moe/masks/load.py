"""How often each neuron was kept, counted from recorded masks: whole experts, whatever the layout.

May touch: the folder of masks, read only, and the file to write. Shapes: E experts of F neurons, P
routed pairs of a layer in a step.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from megatron_mone.common.files import atomic_write
from megatron_mone.kernels.neuron_bits import unpack_bits
from megatron_mone.moe.masks.trace import (
    LayerMasks,
    MaskTraceError,
    TraceModel,
    mask_file,
    read_masks,
    recorded_layers,
    recorded_steps,
    trace_model,
)

SCHEMA = "megatron-mone/load/1"
_ROWS = 1 << 14  # unpacked at a time


@dataclass
class LayerLoad:
    """Counts of one layer over the steps.

    Attributes:
        kept_EF: [E, F] int64, routed tokens that kept the neuron.
        rows_E: [E] int64, routed tokens.
        tokens: that at least one expert took.
    """

    kept_EF: Tensor
    rows_E: Tensor
    tokens: int = 0

    def add(self, masks: LayerMasks) -> None:
        """Count one step."""
        experts, neurons = self.kept_EF.shape
        keys_P, bits_PB = masks.merged()
        expert_P = keys_P % experts
        self.rows_E += expert_P.bincount(minlength=experts)
        self.tokens += keys_P.div(experts, rounding_mode="floor").unique_consecutive().numel()
        for expert, kept_F in enumerate(self.kept_EF):
            for bits_RB in bits_PB[expert_P == expert].split(_ROWS):
                kept_F += unpack_bits(bits_RB, neurons).sum(dim=0)


@dataclass(frozen=True)
class Load:
    """What `count` found.

    Attributes:
        model: that recorded the masks.
        steps: first and last, both counted.
        layers: 1-based number, layers of multi-token prediction after the decoder's.
    """

    model: TraceModel
    steps: tuple[int, int]
    layers: dict[int, LayerLoad]

    def write(self, path: Path) -> None:
        """A safetensors file, whole or not at all: `layer.N.kept` and `layer.N.rows`, and as
        metadata the model's sizes, the steps, and the tokens that each layer took."""
        tensors, tokens = {}, {}
        for number, layer in self.layers.items():
            tensors[f"layer.{number}.kept"] = layer.kept_EF
            tensors[f"layer.{number}.rows"] = layer.rows_E
            tokens[f"layer.{number}.tokens"] = layer.tokens
        first, last = self.steps
        facts = {
            "schema": SCHEMA, "first_step": first, "last_step": last,
            "layers": ",".join(map(str, self.layers)), **asdict(self.model), **tokens,
        }  # fmt: skip
        atomic_write(path, save(tensors, {name: str(value) for name, value in facts.items()}))


def count(folder: Path, steps: tuple[int, int] | None = None) -> Load:
    """Count the masks that a run recorded (mone_record_masks).

    Args:
        folder: of the run's masks.
        steps: first and last; all that are there when None.

    Raises:
        MaskTraceError: one line: no masks, steps or layers that are not there, a damaged file.
    """
    there = recorded_steps(folder, "MASKS")
    first, last = steps or there
    if not there[0] <= first <= last <= there[1]:
        raise MaskTraceError(
            f"steps {first}-{last} are not all in {folder}, which holds {there[0]}-{there[1]}"
        )
    numbers = recorded_layers(folder, first)
    if not numbers:
        raise MaskTraceError(f"{folder}: step {first} holds no layer: record it again")
    model = trace_model(folder, first, numbers[0])
    experts, neurons = model.num_experts, model.moe_ffn_hidden_size
    layers = {
        number: LayerLoad(
            torch.zeros(experts, neurons, dtype=torch.int64), torch.zeros(experts).long()
        )
        for number in numbers
    }
    for step in range(first, last + 1):
        if recorded_layers(folder, step) != numbers:
            raise MaskTraceError(
                f"{folder}: step {step} holds other layers than step {first}: record it again, or "
                "give --steps that hold the same"
            )
        for number, layer in layers.items():
            layer.add(read_masks(mask_file(folder, step, number), step, number, model))
    return Load(model, (first, last), layers)
