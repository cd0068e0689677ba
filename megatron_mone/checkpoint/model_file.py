"""A small JSON beside the checkpoints of a run that says which model they hold.

Megatron finds a wrong shape only after every rank has built its model, and then deep inside the
loader. The file is compared before anything starts. May touch: the checkpoint folder.
"""

import json
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_mone.common.files import write_json
from megatron_mone.config import MONE_FIELD_NAMES

MODEL_FILE_NAME = "mone_model.json"
SCHEMA = "megatron-mone/model/1"
_MEGATRON = "megatron"  # the engine where none is named
SHAPE_FIELDS = (
    "hybrid_layer_pattern", "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads",
    "num_query_groups", "kv_channels", "num_experts", "moe_ffn_hidden_size", "moe_layer_freq",
    "moe_shared_expert_intermediate_size", "mtp_num_layers", "multi_latent_attention",
    "untie_embeddings_and_output_weights", "position_embedding_type", "normalization", "swiglu",
    "mone_qk_norm_all_heads",
)  # fmt: skip


def write_model_file(folder: Path, args: Namespace) -> None:
    """Record the model of `args` in `folder`, atomically; rank 0 calls it."""
    model = {
        "schema": SCHEMA,
        "shape": {name: _shape(args, name) for name in SHAPE_FIELDS},
        "mone": {name: getattr(args, name, None) for name in MONE_FIELD_NAMES},
        "engine": getattr(args, "engine", _MEGATRON),
    }
    write_json(folder / MODEL_FILE_NAME, model)


def check_model_file(folder: Path, args: Namespace) -> None:
    """Compare the model of `args` with the checkpoints in `folder`; no file, no opinion.

    A different shape cannot be loaded and is an error. Different mone_* fields can (a stock
    checkpoint becomes a MoNE one that way) and are a warning.

    Raises:
        ValueError: one line naming the folder, the field, both values and the fix.
    """
    saved = _read(folder)
    if saved is None:
        return
    shape, mone = saved["shape"], saved["mone"]
    becomes_hybrid = _shape(args, "hybrid_layer_pattern") and not shape.get("hybrid_layer_pattern")
    for name in SHAPE_FIELDS:
        now = _shape(args, name)
        if becomes_hybrid and name in ("hybrid_layer_pattern", "num_layers"):
            continue  # a GPT layer's attention and MLP are layers there; Megatron pairs and checks
        if name in shape and shape[name] != now:
            raise ValueError(
                f"checkpoint {folder} holds a model with {name} = {shape[name]}, this run has "
                f"{name} = {now}: give another --load and --save, or the same model"
            )
    beside = {"mone_plain_checkpoint", "mone_change_choice"}
    names = [name for name in MONE_FIELD_NAMES if name in mone and name not in beside]
    changed = [n for n in names if mone[n] != getattr(args, n, None)]
    for name in changed:
        warnings.warn(
            f"checkpoint {folder} was trained with {name} = {mone[name]}, this run has "
            f"{getattr(args, name, None)}",
            stacklevel=2,
        )


def _shape(args: Namespace, name: str) -> Any:
    """A value of SHAPE_FIELDS; of a hybrid pattern what is the model's, not the layout's."""
    value = getattr(args, name, None)
    return value.replace("|", "") if name == "hybrid_layer_pattern" and value else value


def check_engine_of(folder: Path, args: Namespace) -> None:
    """Whose optimizer state is in `folder`; another engine's is loaded where --convert says so.

    Raises:
        ValueError: one line naming the folder, both engines and the fix.
    """
    saved = _read(folder)
    if saved is None or args.no_load_optim or args.finetune or args.convert:
        return
    engine = saved.get("engine", _MEGATRON)
    if engine != args.engine:
        raise ValueError(
            f"checkpoint {folder} was saved by engine = {engine}, this run has engine = "
            f"{args.engine}: add --convert to go on from its weights and optimizer state, or "
            "--finetune to start from its weights"
        )


def _read(folder: Path) -> dict[str, Any] | None:
    """What the file holds; None without one."""
    path = folder / MODEL_FILE_NAME
    if not path.is_file():
        return None
    try:
        saved: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        saved["shape"], saved["mone"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to go by Megatron's checks "
                         "alone") from error  # fmt: skip
    return saved
