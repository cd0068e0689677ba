"""torch_dist checkpoint, of any layout -> Hugging Face folder, and whether a round trip is equal.

One tensor of ours is in memory at a time; every tensor of the checkpoint's model has its place.
Stopped, an export goes on where it was. May touch: the output folder.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_mone.conversion import mone_folder
from megatron_mone.conversion.dist_checkpoint import Reader
from megatron_mone.conversion.families import Family, family_of
from megatron_mone.conversion.families.mone import FAMILY as MONE
from megatron_mone.conversion.folders import (
    SOURCE,
    Step,
    copy_beside,
    find_iteration,
    refuse_existing,
    unfinished,
)
from megatron_mone.conversion.hf_config import CONFIG, HFConfig
from megatron_mone.conversion.hf_folder import SHARD_BYTES, Planned, Weights, write_weights
from megatron_mone.conversion.importing import import_model
from megatron_mone.conversion.megatron_model import TRAINING_STATE, BareModel, Slot, bare_model
from megatron_mone.conversion.placing import (
    MORE_TOKENS,
    Placed,
    digest,
    named,
    placed,
    words_of,
    words_of_saved,
)
from megatron_mone.model.saved_model import saved_arguments


def export_model(
    checkpoint: Path, out: Path, step: Step, *, like: Path | None = None, mone: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, str]:  # fmt: skip
    """Write a torch_dist checkpoint as a Hugging Face folder.

    Args:
        checkpoint: what --save or `import_model` wrote, or an iteration in it.
        out: folder, must not be there.
        step: told of the progress.
        like: folder or config.json of a model of the same shape; what the import kept when None.
        mone: write our own class, by the checkpoint's own arguments; so too without an import.
        shard_bytes: of one file.

    Returns:
        Name -> SHA-256 of a tensor's bytes.

    Raises:
        ValueError: one line; `out` is not made.
    """
    refuse_existing(out)
    iteration = find_iteration(checkpoint)
    reader = Reader(iteration)
    rows = getattr(reader.keys.get("embedding.word_embeddings.weight"), "size", (None,))[0]
    if like is None and not mone and (iteration.parent / SOURCE / CONFIG).is_file():
        like = iteration.parent / SOURCE
        mone = family_of(HFConfig.read(like)) is MONE
    if like is not None and not mone:
        source = like if like.is_dir() else like.parent
        family = family_of(HFConfig.read(like))
        if family is MONE:
            raise ValueError(
                f"--like {like}: a MoNE model is written by the checkpoint's own arguments: --mone"
            )
        heads = any(key.startswith("mtp.") for key in reader.keys)
        words = words_of(like, None, () if heads else (MORE_TOKENS,))
        with bare_model(words, rows, held=reader.keys) as model:
            _refuse_choice(iteration, model.args)
            _check_model_file(iteration.parent, model.args)
            return _export(
                reader, model, family, out, step, shard_bytes,
                lambda folder, dtype: copy_beside(source, folder),
            )  # fmt: skip
    saved = saved_arguments(iteration)
    length = saved.get("max_position_embeddings") or saved.get("seq_length")
    source = iteration.parent / SOURCE
    if not source.is_dir():
        source = Path(str(saved.get("tokenizer_model")))
    with bare_model(words_of_saved(saved, iteration, length), rows, held=reader.keys) as model:
        made = mone_folder.config_of(
            model.args, model.config, "float32"
        )  # refuses before it writes
        generation = mone_folder.generation_of(source, made["vocab_size"])
        return _export(
            reader, model, MONE, out, step, shard_bytes,
            lambda folder, dtype: _write_mone(folder, made | {"dtype": dtype}, generation, source),
        )  # fmt: skip


def _write_mone(
    folder: Path, config: dict[str, Any], generation: dict[str, Any], tokenizer: Path
) -> None:
    if tokenizer.is_dir():
        copy_beside(tokenizer, folder)
    mone_folder.write_beside(folder, config, generation)


def _export(
    reader: Reader, model: BareModel, family: Family, out: Path, step: Step, shard_bytes: int,
    write_beside: Callable[[Path, str], None],
) -> dict[str, str]:  # fmt: skip
    """Write the tensors of a model, then what stands beside them, told their dtype."""
    found = placed(model, family, TRAINING_STATE)
    planned = []
    for one in found:
        stored = reader.keys.get(one.slot.pieces(one.slot.fake)[0].key)
        if stored is None:
            raise ValueError(f"{reader.folder}: tensor {one.slot.name} is missing")
        planned += [Planned(n, stored.properties.dtype, shape) for n, _, shape in one.views]
    _refuse_left_over(reader, model, found)
    total = sum(one.size for one in planned)
    owner = {name: one for one in found for name, _, _ in one.views}
    done = 0

    def data(names: list[str]) -> Iterator[Tensor]:
        last: Placed | None = None
        parts: dict[str, Tensor] = {}
        for name in names:
            if owner[name] is not last:
                last = owner[name]
                ours = _whole(reader, last.slot)
                views = named(last.pair, ours, model.sizes, last.slot.layer)
                parts = {n: view.reshape(shape) for n, view, shape in views}
            yield parts[name]

    def told(size: int) -> None:
        nonlocal done
        done += size
        step(done, total, "export")

    with unfinished(out, total, f"export of {reader.folder}") as folder:
        sums = write_weights(folder, planned, data, told, shard_bytes)
        write_beside(folder, str(planned[0].dtype).removeprefix("torch."))
    return sums


def _check_model_file(folder: Path, args: Any) -> None:
    import warnings

    from megatron_mone.checkpoint.model_file import check_model_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mone_* fields: the weights are the same
        check_model_file(folder, args)


def _refuse_choice(iteration: Path, args: Any) -> None:
    """A model of another class keeps every neuron."""
    from megatron_mone.checkpoint.choice import saved_choice

    choice = saved_choice(iteration) or {}
    kept = choice.get("mone_neurons_per_token", args.moe_ffn_hidden_size)
    if kept != args.moe_ffn_hidden_size or choice.get("mone_selection") == "threshold":
        raise ValueError(
            f"checkpoint {iteration} keeps {kept} of {args.moe_ffn_hidden_size} neurons "
            f"(mone_selection = {choice['mone_selection']}): written as a model that keeps every "
            "one it would compute something else: add --mone"
        )


def _whole(reader: Reader, slot: Slot) -> Tensor:
    """A tensor of ours, read piece by piece."""
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(slot.leaf, ShardedTensorFactory):
        return reader.fill(slot.leaf)
    return slot.leaf.merge_fn(dict_list_map_inplace(reader.fill, slot.leaf.build()))


def _refuse_left_over(reader: Reader, model: BareModel, found: Sequence[Placed]) -> None:
    """Every tensor of the model's is exported; an optimizer's are known not to be."""
    slots = [one.slot for one in found]
    slots += [slot for slot in model.slots if slot.within in TRAINING_STATE]
    known = {piece.key for slot in slots for piece in slot.pieces(slot.fake)}
    for key, stored in reader.keys.items():
        if hasattr(stored, "size") and key not in known and not key.startswith("optimizer."):
            raise ValueError(
                f"{reader.folder}: {key} {list(stored.size)} has no place in the model"
            )


def round_trip(source: Path, scratch: Path, step: Step) -> int:
    """Import and export in `scratch`, and compare every tensor's bytes with the source's.

    Returns:
        How many tensors are equal: all.

    Raises:
        ValueError: one line, the first tensor that differs.
    """
    import_model(source, scratch / "checkpoint", step)
    export_model(scratch / "checkpoint", scratch / SOURCE, step)
    before, after = Weights(source), Weights(scratch / SOURCE)
    for name in after.tensors:
        one, other = before.tensors[name], after.tensors[name]
        if (one.dtype, digest(before.read(name))) != (other.dtype, digest(after.read(name))):
            raise ValueError(f"{source}: {name} came back otherwise than it was")
    return len(after.tensors)
