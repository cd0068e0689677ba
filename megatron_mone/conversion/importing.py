"""Hugging Face folder -> torch_dist checkpoint, by the table of pairs of its family.

One tensor of ours is in memory at a time (of experts, a layer's). Everything is accounted for
before the first byte is written: a tensor that is missing, left over or of another shape is one
line. Stopped, an import goes on where it was. May touch: the output folder.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_mone.common.files import atomic_write, write_json
from megatron_mone.conversion.dist_checkpoint import Writer
from megatron_mone.conversion.families import Family, family_of
from megatron_mone.conversion.families.mone import FAMILY as MONE
from megatron_mone.conversion.folders import (
    RELEASE,
    SOURCE,
    SUMS,
    Step,
    copy_beside,
    refuse_existing,
    unfinished,
)
from megatron_mone.conversion.hf_config import CONFIG, HFConfig
from megatron_mone.conversion.hf_folder import Stored, Weights
from megatron_mone.conversion.inspect import model_file
from megatron_mone.conversion.megatron_model import bare_model
from megatron_mone.conversion.pairs import Sizes
from megatron_mone.conversion.placing import MORE_TOKENS, Placed, placed, words_of


@dataclass(frozen=True)
class Origin:
    """What a checkpoint is made of.

    Attributes:
        weights: its tensors, by their names elsewhere.
        family: the table of those names.
        words: Megatron's flags of one rank.
        text: the model file.
        identity: tells one import from another, for one that is started again.
        beside: folder whose tokenizer, and config.json where `is_copy`, travel along.
        is_copy: it can be exported to a folder like `beside`.
    """

    weights: Weights
    family: Family
    words: list[str]
    text: str
    identity: str
    beside: Path
    is_copy: bool = True


def import_model(
    source: Path, out: Path, step: Step, *, mone: str | None = None, differs: bool = False
) -> list[str]:  # fmt: skip
    """Write a Hugging Face folder as a torch_dist checkpoint.

    Args:
        source: of the model.
        out: the checkpoint folder, for --load; must not be there.
        step: told of the progress.
        mone: of configs/mone: the fields that its model file then has. The weights are the same.
        differs: also a model of which Megatron computes something else, as inspect says.

    Returns:
        What is not in the checkpoint, a line each.

    Raises:
        ValueError: one line; `out` is not made.
    """
    refuse_existing(out)
    config = HFConfig.read(source)
    family = family_of(config)
    shape = family.shape(config)
    refuse_notes(config, differs)
    weights = Weights(config.path.parent)
    without = _heads_that_are_not_there(config, weights) if MORE_TOKENS in shape else ()
    origin = Origin(
        weights, family, words_of(source, mone, without), model_file(source, mone, without),
        f"import of {mone} {fingerprint(weights)}", config.path.parent,
    )  # fmt: skip
    said = write_checkpoint(origin, out, step)
    if without:
        said.append(f"{MORE_TOKENS} is left out: the folder has no layer of multi-token prediction")
    return said


def refuse_notes(config: HFConfig, differs: bool) -> None:
    """Raises ValueError where Megatron computes something else and `differs` is not given."""
    if config.notes and not differs:
        raise ValueError(
            f"{config.notes[0]} ({config.path}): the outputs would differ; --differs to import "
            "the weights all the same"
        )


def check_folder(
    weights: Weights, found: Sequence[Placed], family: Family, tied: bool
) -> list[str]:
    """Account for every tensor of a folder.

    Returns:
        Names that are left out, as the family says.

    Raises:
        ValueError: the first that is missing, mis-shaped or left over.
    """
    there: dict[str, Stored] = dict(weights.tensors)
    for one in found:
        dtypes = set()
        for name, _, shape in one.views:
            if name not in there:
                raise ValueError(f"{weights.folder}: tensor {name} {list(shape)} is missing")
            stored = there.pop(name)
            if stored.shape != shape:
                raise ValueError(
                    f"{stored.path}: {name} is {list(stored.shape)}, by its config.json it is "
                    f"{list(shape)}"
                )
            dtypes.add(stored.dtype)
        if len(dtypes) > 1:
            raise ValueError(
                f"{weights.folder}: {one.views[0][0]} and its like are of several dtypes: "
                f"{', '.join(sorted(map(str, dtypes)))}"
            )
    left_out = [name for name in there if family.drops(name) or (tied and name == "lm_head.weight")]
    extra = sorted(set(there) - set(left_out))
    if extra:
        raise ValueError(
            f"{weights.folder}: tensor {extra[0]} {list(there[extra[0]].shape)} is none of the "
            f"model that its config.json describes ({len(extra)} such)"
        )
    return left_out


def write_checkpoint(
    origin: Origin, out: Path, step: Step, beside: Mapping[str, bytes] | None = None
) -> list[str]:
    """Write a torch_dist checkpoint, a layer in memory at a time.

    Args:
        origin: of its tensors.
        out: the checkpoint folder; must not be there.
        step: told of the progress.
        beside: more files of the folder, by name.

    Returns:
        Tensors that are not in the checkpoint, a line each.

    Raises:
        ValueError: one line; `out` is not made.
    """
    from megatron_mone.checkpoint.model_file import write_model_file
    from megatron_mone.checkpoint.tracker import TRACKER_NAME

    weights = origin.weights
    # Weights of another family were trained to keep every neuron, whatever --mone says.
    with bare_model(origin.words, plain=origin.family is not MONE) as model:
        found = placed(model, origin.family)
        tied = not model.args.untie_embeddings_and_output_weights
        left_out = check_folder(weights, found, origin.family, tied)
        total = sum(weights.tensors[name].size for one in found for name, _, _ in one.views)
        with unfinished(out, total, origin.identity) as folder:
            writer = Writer(folder / RELEASE)
            writer.folder.mkdir(exist_ok=True)
            sums = _read_sums(folder)
            done, part = 0, -1
            for part, group in enumerate(_by_layer(found)):
                size = sum(weights.tensors[n].size for one in group for n, _, _ in one.views)
                if not writer.has(part):
                    writer.write(part, _pieces(group, weights, model.sizes, sums))
                    write_json(folder / SUMS, sums)
                done += size
                step(done, total, "import")
            writer.write(part + 1, [*model.objects, _common_state(model.args)])
            writer.finish()
            write_model_file(folder, model.args)
            for name, content in {"model.yaml": origin.text.encode(), **(beside or {})}.items():
                atomic_write(folder / name, content)
            atomic_write(folder / TRACKER_NAME, RELEASE.encode())
            copy_beside(origin.beside, folder / SOURCE)
            if not origin.is_copy:
                (folder / SOURCE / CONFIG).unlink(missing_ok=True)
    return [f"{name} is left out: a copy of the model's own" for name in left_out]


def fingerprint(weights: Weights) -> str:
    """Tells the tensors of a folder, and when its files were written, from any other."""
    facts = [
        (name, str(one.dtype), one.shape, one.start, one.path.stat().st_mtime_ns)
        for name, one in sorted(weights.tensors.items())
    ]
    return f"{weights.folder.resolve()} {hashlib.sha256(repr(facts).encode()).hexdigest()}"


def _heads_that_are_not_there(config: HFConfig, weights: Weights) -> tuple[str, ...]:
    """Layers of multi-token prediction follow the others; transformers does not save them."""
    first = f"model.layers.{config.size('num_hidden_layers')}."
    there = any(name.startswith(first) for name in weights.tensors)
    return () if there else (MORE_TOKENS,)


def _by_layer(found: Sequence[Placed]) -> list[list[Placed]]:
    """One after another in the model's order: a group a layer, and what stands between them."""
    groups: list[list[Placed]] = []
    for one in found:
        if not groups or groups[-1][0].slot.layer != one.slot.layer:
            groups.append([])
        groups[-1].append(one)
    return groups


def _pieces(
    group: Sequence[Placed], weights: Weights, sizes: Sizes, sums: dict[str, str]
) -> Iterator[Any]:
    for one in group:
        yield from one.slot.pieces(one.join(weights, sizes, sums))


def _read_sums(folder: Path) -> dict[str, str]:
    path = folder / SUMS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _common_state(args: Any) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {
        "args": args, "checkpoint_version": 3.0, "iteration": 0,
        "num_floating_point_operations_so_far": 0,
    }  # fmt: skip
    return ShardedObject("common_state", state, (1,), (0,))
