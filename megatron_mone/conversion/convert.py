"""Hugging Face folder -> torch_dist checkpoint, and back, by the table of pairs of its family.

One tensor of ours is in memory at a time (of experts, a layer's). Everything is accounted for
before the first byte is written: a tensor that is missing, left over or of another shape is one
line. What is written stands in `OUT.partial` until it is whole, and goes on from there when started
again. May touch: the output folder.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.files import atomic_write, write_json
from megatron_mone.conversion import mone_folder
from megatron_mone.conversion.dist_checkpoint import Reader, Writer
from megatron_mone.conversion.families import Family, family_of
from megatron_mone.conversion.families.mone import FAMILY as MONE
from megatron_mone.conversion.hf_config import CONFIG, HFConfig
from megatron_mone.conversion.hf_folder import SHARD_BYTES, Planned, Stored, Weights, write_weights
from megatron_mone.conversion.inspect import chooses_neurons, model_file
from megatron_mone.conversion.megatron_model import TRAINING_STATE, BareModel, Slot, bare_model
from megatron_mone.conversion.pairs import Pair, Sizes, View
from megatron_mone.conversion.shape import Shape
from megatron_mone.model.saved_model import model_values, saved_arguments

RELEASE = "release"
"""The folder of a checkpoint that no training wrote: it starts at step 0 without an optimizer."""
SOURCE = "hugging_face"
"""Beside it: config.json, tokenizer and generation config of the folder it came from."""
SUMS = "conversion.json"
_TRAVELS = (
    "config.json", "generation_config.json", "tokenizer*", "vocab.*", "merges.txt",
    "added_tokens.json", "special_tokens_map.json", "chat_template*", "*.model", "LICENSE*",
)  # fmt: skip
_FLAGS = (
    "--transformer-impl", "local", "--distributed-backend", "gloo", "--micro-batch-size", "1",
    "--global-batch-size", "1", "--train-iters", "1", "--lr", "1e-5", "--mock-data",
    "--tokenizer-type", "NullTokenizer", "--no-gradient-accumulation-fusion",
    "--no-bias-swiglu-fusion", "--no-masked-softmax-fusion", "--no-rope-fusion",
    "--no-persist-layer-norm", "--no-bias-dropout-fusion",
)  # fmt: skip

Step = Callable[[int, int, str], None]
"""Told: bytes done, of all, and of what."""


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


MORE_TOKENS = "mtp_num_layers"


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
    with bare_model(origin.words) as model:
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
            _copy_beside(origin.beside, folder / SOURCE)
            if not origin.is_copy:
                (folder / SOURCE / CONFIG).unlink(missing_ok=True)
    return [f"{name} is left out: a copy of the model's own" for name in left_out]


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
        with bare_model(words, rows) as model:
            _check_model_file(iteration.parent, model.args)
            return _export(
                reader, model, family, out, step, shard_bytes,
                lambda folder, dtype: _copy_beside(source, folder),
            )  # fmt: skip
    saved = saved_arguments(iteration)
    length = saved.get("max_position_embeddings") or saved.get("seq_length")
    source = iteration.parent / SOURCE
    if not source.is_dir():
        source = Path(str(saved.get("tokenizer_model")))
    with bare_model(words_of_saved(saved, iteration, length), rows) as model:
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
        _copy_beside(tokenizer, folder)
    mone_folder.write_beside(folder, config, generation)


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


def _heads_that_are_not_there(config: HFConfig, weights: Weights) -> tuple[str, ...]:
    """Layers of multi-token prediction follow the others; transformers does not save them."""
    first = f"model.layers.{config.size('num_hidden_layers')}."
    there = any(name.startswith(first) for name in weights.tensors)
    return () if there else (MORE_TOKENS,)


def refuse_existing(out: Path) -> None:
    """Raises ValueError where `out` is there."""
    if out.exists():
        raise ValueError(f"--out {out} is there: choose another folder, or delete it")


@contextmanager
def unfinished(out: Path, size: int, of: str) -> Iterator[Path]:
    """`OUT.partial`, renamed to `out` at a good end; kept at any other, to go on from.

    Args:
        out: the folder.
        size: bytes that will be written.
        of: what; a partial folder of another is started anew.

    Raises:
        ValueError: one line: not enough space, or no folder can be made there.
    """
    folder, mark = out.with_name(out.name + ".partial"), "source"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if folder.exists() and not _says(folder / mark, of):
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        atomic_write(folder / mark, of.encode())
        there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(folder).free
        if size - there > free:
            raise ValueError(
                f"--out {out}: {size - there:,} bytes are to be written, {free:,} are free there"
            )
        yield folder
        (folder / mark).unlink()
        folder.rename(out)
    except OSError as error:
        raise ValueError(f"--out {out}: {error.strerror or error} ({error.filename})") from None


def _says(path: Path, text: str) -> bool:
    return path.is_file() and path.read_text(encoding="utf-8") == text


def fingerprint(weights: Weights) -> str:
    """Tells the tensors of a folder, and when its files were written, from any other."""
    facts = [
        (name, str(one.dtype), one.shape, one.start, one.path.stat().st_mtime_ns)
        for name, one in sorted(weights.tensors.items())
    ]
    return f"{weights.folder.resolve()} {hashlib.sha256(repr(facts).encode()).hexdigest()}"


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


def _copy_beside(source: Path, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for pattern in _TRAVELS:
        for path in sorted(source.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def find_iteration(checkpoint: Path) -> Path:
    """The iteration that a checkpoint folder's tracker names, or the folder itself.

    Raises:
        ValueError: one line.
    """
    from megatron_mone.checkpoint.tracker import ITERATION_FORMAT, TRACKER_NAME, read_tracker

    if (checkpoint / "metadata.json").is_file():
        return checkpoint
    text = read_tracker(checkpoint) if checkpoint.is_dir() else None
    if text is None:
        raise ValueError(f"{checkpoint} holds no checkpoint: {TRACKER_NAME} is missing")
    name = text if text == RELEASE else ITERATION_FORMAT.format(int(text)) if text.isdigit() else ""
    if not name or not (checkpoint / name).is_dir():
        raise ValueError(f"{checkpoint / TRACKER_NAME} names {text!r}, which is not there")
    return checkpoint / name


def _check_model_file(folder: Path, args: Any) -> None:
    import warnings

    from megatron_mone.checkpoint.model_file import check_model_file

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mone_* fields: the weights are the same
        check_model_file(folder, args)


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
