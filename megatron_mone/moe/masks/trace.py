"""Masks of a run as data: by step, layer, token and expert, whatever the layout they came from.

A record names a routed pair by its place in the step's global batch (sample, sequence position,
expert), so that masks recorded under one layout replay under any other. May touch: torch, files.

Shapes: P routed pairs of one layer and step, B = ceil(F / 8) bytes of a packed mask over the F
neurons of a whole expert.
"""

import hashlib
import io
import pickle
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.common.files import atomic_write

SCHEMA = "megatron-mone/masks/1"


class MaskTraceError(ValueError):
    """Masks that are missing, damaged, or of another model; one line says which and the fix."""


@dataclass(frozen=True)
class TraceModel:
    """What a mask's meaning rests on; equal in the recording and the replaying run.

    Attributes:
        hidden_size: H.
        num_layers: decoder layers.
        num_experts: E.
        moe_ffn_hidden_size: F.
        seq_length: tokens of a sample.
    """

    hidden_size: int
    num_layers: int
    num_experts: int
    moe_ffn_hidden_size: int
    seq_length: int


_SIZES = tuple(one.name for one in fields(TraceModel))


@dataclass
class LayerMasks:
    """Masks of one layer in one step, in the order they came, or sorted by `merged`.

    Attributes:
        keys_P: per forward, [P] int64 (sample * seq_length + position) * E + expert.
        bits_PB: per forward, [P, B] uint8.
    """

    keys_P: list[Tensor] = field(default_factory=list)
    bits_PB: list[Tensor] = field(default_factory=list)

    def add(self, keys_P: Tensor, bits_PB: Tensor) -> None:
        """Append one forward's pairs; kept on the CPU."""
        self.keys_P.append(keys_P.cpu())
        self.bits_PB.append(bits_PB.cpu())

    def merged(self) -> tuple[Tensor, Tensor]:
        """(keys_P ascending, bits_PB in their order), sorted once."""
        if len(self.keys_P) > 1 or not _ascending(self.keys_P[0]):
            keys, bits = torch.cat(self.keys_P), torch.cat(self.bits_PB)
            order = keys.argsort()
            self.keys_P, self.bits_PB = [keys[order]], [bits[order]]
        return self.keys_P[0], self.bits_PB[0]

    def lookup(self, keys_P: Tensor) -> Tensor:
        """[P, B] packed masks of the pairs `keys_P`.

        Raises:
            MaskTraceError: a pair that was not recorded.
        """
        keys, bits = self.merged()
        wanted = keys_P.cpu()
        at = torch.searchsorted(keys, wanted).clamp(max=max(keys.numel() - 1, 0))
        found = keys[at] == wanted if keys.numel() else torch.zeros_like(wanted, dtype=torch.bool)
        if not bool(found.all()):
            raise MaskTraceError(
                f"{int((~found).sum())} of {wanted.numel()} routed pairs have no recorded mask: "
                "the router chose other experts than in the recorded run (same checkpoint, data "
                "and global batch?)"
            )
        return bits[at].to(keys_P.device)


@dataclass
class MaskTrace:
    """Recorded masks: trace.steps[step][layer], layers counted from 1, MTP layers after decoder's.

    Attributes:
        model: None until the first layer records.
    """

    model: TraceModel | None = None
    steps: dict[int, dict[int, LayerMasks]] = field(default_factory=dict)

    def layer(self, step: int, layer: int) -> LayerMasks:
        """The masks of a layer in a step, made empty where there are none."""
        return self.steps.setdefault(step, {}).setdefault(layer, LayerMasks())

    def recorded(self, step: int, layer: int) -> LayerMasks:
        """The masks of a layer in a step.

        Raises:
            MaskTraceError: there are none.
        """
        layers = self.steps.get(step)
        if layers is None:
            raise MaskTraceError(
                f"no masks were recorded for step {step}; steps: {_span(self.steps)}"
            )
        if layer not in layers:
            raise MaskTraceError(
                f"no masks were recorded for layer {layer} in step {step}; layers: {_span(layers)}"
            )
        return layers[layer]

    def save(self, folder: Path, step: int, group: ProcessGroup | None = None) -> None:
        """Write a step's layers, one file each, whole or not at all.

        Args:
            folder: gets step-SSSSSSS/layer-LLL.pt.
            step: of those recorded.
            group: ranks that hold the other tokens of the same layers (TP x CP x DP), all of which
                call; its first rank writes. None when this rank holds them all.
        """
        assert self.model is not None, "nothing was recorded"
        for number, layer in sorted(self.steps[step].items()):
            gathered = _gather(layer, group)
            if gathered is not None:
                path = mask_file(folder, step, number)
                path.parent.mkdir(parents=True, exist_ok=True)
                atomic_write(path, _to_bytes(gathered, self.model, step, number))

    def load(self, folder: Path, step: int, layer: int, model: TraceModel) -> LayerMasks:
        """Read one layer of one step, checked against `model`; cached in this trace.

        Raises:
            MaskTraceError: names the file, what is wrong with it and the fix.
        """
        if layer not in self.steps.get(step, {}):
            self.model = model
            self.steps.setdefault(step, {})[layer] = read_masks(
                mask_file(folder, step, layer), step, layer, model
            )
        return self.steps[step][layer]


def mask_file(folder: Path, step: int, layer: int) -> Path:
    """Where the masks of one layer in one step lie."""
    return folder / f"step-{step:07d}" / f"layer-{layer:03d}.pt"


def recorded_layers(folder: Path, step: int) -> list[int]:
    """Numbers of the layers with masks of a step, ascending."""
    names = [
        path.stem.removeprefix("layer-") for path in mask_file(folder, step, 0).parent.iterdir()
    ]
    return sorted(int(name) for name in names if name.isdigit())


def recorded_steps(folder: Path, asked: str = "mone_replay_masks") -> tuple[int, int]:
    """First and last step with masks in `folder`.

    Args:
        folder: of the masks.
        asked: what named it.

    Raises:
        MaskTraceError: there is none, or one between them is missing.
    """
    names = [p.name.removeprefix("step-") for p in folder.glob("step-*") if p.is_dir()]
    steps = sorted(int(name) for name in names if name.isdigit())
    if not steps:
        raise MaskTraceError(
            f"{asked} = {str(folder)!r} holds no recorded steps: name the folder that "
            "mone_record_masks named in the recorded run"
        )
    missing = sorted(set(range(steps[0], steps[-1] + 1)) - set(steps))
    if missing:
        raise MaskTraceError(
            f"{asked} = {str(folder)!r} lacks step {missing[0]} between {steps[0]} and "
            f"{steps[-1]}: record it again"
        )
    return steps[0], steps[-1]


def trace_model(folder: Path, step: int, layer: int) -> TraceModel:
    """The model that recorded the masks of a layer in a step.

    Raises:
        MaskTraceError: names the file, what is wrong with it and the fix.
    """
    path = mask_file(folder, step, layer)
    saved, _, _ = _read(path, step, layer)
    sizes = {name: saved[name] for name in _SIZES}
    if not all(type(size) is int and size > 0 for size in sizes.values()):
        raise MaskTraceError(f"{path} is damaged (sizes {sizes}): record it again")
    return TraceModel(**sizes)


def read_masks(path: Path, step: int, layer: int, model: TraceModel) -> LayerMasks:
    """Read and check one mask file; runs no code from it.

    Raises:
        MaskTraceError: names the file, what is wrong with it and the fix.
    """
    saved, keys, bits = _read(path, step, layer)
    for name, value in {**asdict(model), "schema": SCHEMA, "step": step, "layer": layer}.items():
        if saved[name] != value:
            raise MaskTraceError(
                f"{path} was recorded with {name} = {saved[name]}, this run has {value}: replay "
                "it in the same model"
            )
    width = (model.moe_ffn_hidden_size + 7) // 8
    whole = (
        keys.dtype == torch.int64
        and bits.dtype == torch.uint8
        and tuple(bits.shape) == (keys.numel(), width)
        and _ascending(keys)
    )
    if not whole or _digest(keys, bits) != saved["digest"]:
        raise MaskTraceError(f"{path} is damaged (its masks do not match their digest): record it "
                         "again")  # fmt: skip
    used = model.moe_ffn_hidden_size % 8
    if used and bool((bits[:, -1] >> used).any()):  # nobody looks again on a GPU
        raise MaskTraceError(
            f"{path} has a mask with a bit set beyond its {model.moe_ffn_hidden_size} neurons: "
            "record it again"
        )
    return LayerMasks([keys], [bits])


def _read(path: Path, step: int, layer: int) -> tuple[dict[str, Any], Tensor, Tensor]:
    """(manifest, keys_P, bits_PB) of a file, unchecked but for what the manifest names."""
    try:
        content = torch.load(io.BytesIO(path.read_bytes()), weights_only=True, map_location="cpu")
        manifest, keys, bits = content["manifest"], content["keys_P"], content["bits_PB"]
        named = (*_SIZES, "schema", "step", "layer", "digest")
        return {name: manifest[name] for name in named}, keys, bits
    except FileNotFoundError as error:
        raise MaskTraceError(
            f"{path} is missing: no masks were recorded there for step {step}, layer {layer}"
        ) from error
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, pickle.UnpicklingError) as error:
        raise MaskTraceError(
            f"{path} is not a mask file, or is damaged ({_first_line(error)}): record it again"
        ) from error


def _to_bytes(masks: LayerMasks, model: TraceModel, step: int, layer: int) -> bytes:
    keys, bits = masks.merged()
    manifest: dict[str, Any] = {
        "schema": SCHEMA,
        "step": step,
        "layer": layer,
        **asdict(model),
        "pairs": keys.numel(),
        "digest": _digest(keys, bits),
    }
    buffer = io.BytesIO()
    torch.save({"manifest": manifest, "keys_P": keys, "bits_PB": bits}, buffer)
    return buffer.getvalue()


def _gather(masks: LayerMasks, group: ProcessGroup | None) -> LayerMasks | None:
    """All ranks' pairs on the group's first rank, None on the others."""
    if group is None or group.size() == 1:
        return masks
    first = torch.distributed.get_global_rank(group, 0)
    parts: list | None = [None] * group.size() if group.rank() == 0 else None
    torch.distributed.gather_object(masks.merged(), parts, dst=first, group=group)
    if parts is None:
        return None
    return LayerMasks([keys for keys, _ in parts], [bits for _, bits in parts])


def _digest(keys_P: Tensor, bits_PB: Tensor) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(keys_P.contiguous().numpy())
    digest.update(bits_PB.contiguous().numpy())
    return digest.hexdigest()


def _ascending(keys_P: Tensor) -> bool:
    return bool((keys_P[1:] > keys_P[:-1]).all())


def _span(numbers: Any) -> str:
    return ", ".join(str(n) for n in sorted(numbers)) or "none"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:120]
