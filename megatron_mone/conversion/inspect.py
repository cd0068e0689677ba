"""A Hugging Face model's shape as a model file of configs/model."""

from collections.abc import Container
from pathlib import Path

import yaml

from megatron_mone.common.files import atomic_write
from megatron_mone.conversion.families import family_of
from megatron_mone.conversion.hf_config import HFConfig
from megatron_mone.conversion.shape import Shape


def model_file(path: Path, mone: str | None = None, without: Container[str] = ()) -> str:
    """The YAML text of a model file; what it does not say of the model stands above as comments.

    Args:
        path: a folder with a config.json, or that file.
        mone: of configs/mone, what makes it a MoNE model.
        without: arguments that are left at their default.

    Raises:
        ValueError: one line: a file that is no such config, a field with a wrong value, a family
            that is not known or that MoNE has not, or `mone` of a model without experts.
    """
    config = HFConfig.read(path)
    family = family_of(config)
    shape = family.shape(config)
    if mone is not None:
        if "num_experts" not in shape:
            raise ValueError(f"--mone {mone}: {config.path} is a dense model, which has no experts")
        if chooses_neurons(shape):
            raise ValueError(f"--mone {mone}: {config.path} says itself which neurons are kept")
        shape["mone"] = mone
    shape = {name: value for name, value in shape.items() if name not in without}
    notes = [*config.notes, *config.left()]
    return shape_file(shape, f"The shape of a {family.name} model, from its config.json.", *notes)


def shape_file(shape: Shape, *header: str) -> str:
    """The YAML text of a model file, under a comment for each line of `header`."""
    lines = [f"# {' '.join(line.split())}" for line in header]
    return "\n".join([*lines, yaml.safe_dump(shape, sort_keys=False, width=1000)])


def chooses_neurons(shape: Container[str]) -> bool:
    """Whether a shape is a MoNE model's."""
    return "mone_neuron_ratio" in shape or "mone_neurons_per_token" in shape


def write_model_file(path: Path, out: Path, mone: str | None = None) -> None:
    """`model_file`, to a file that is not there yet.

    Raises:
        ValueError: also where `out` is there, with another content, or is no .yaml.
    """
    text = model_file(path, mone)
    if out.suffix != ".yaml":
        raise ValueError(f"--out {out} must end in .yaml: run files name a model by it")
    if out.exists() and out.read_text(encoding="utf-8") != text:
        raise ValueError(f"--out {out} is there: choose another name, or delete it")
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, text.encode())
