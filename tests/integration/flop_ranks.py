"""Ranks of test_flop_count: each case trains one step under the counter and writes both counts.

The counted step takes no number from module_flops: rows and kept neurons are read by hooks here.
"""

import functools
import json
from pathlib import Path

import torch
from megatron.core.num_microbatches_calculator import get_num_microbatches
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.training import get_args, training

from megatron_mone.model.module_flops import expert_bytes, module_flops, rank_share
from megatron_mone.profiling.document_lengths import DocumentLengths
from megatron_mone.profiling.flop_counter import FlopCounter
from tests import training_cases

MODULES = ("self_attention", "experts", "shared_experts", "router", "output_layer", "eh_proj")


def watch(model):
    """({layer: rows}, {layer: kept}) that the hooks on the experts of `model` fill."""
    rows, kept = {}, {}

    def hook(number, _experts, inputs, output):
        if not torch.is_grad_enabled():  # the first of two passes of a recomputed layer
            return
        rows[number] = rows.get(number, 0) + int(inputs[1].sum())
        if hasattr(output, "mask"):
            kept[number] = kept.get(number, 0) + output.mask.num_entries

    for layer in (m for chunk in model for m in chunk.modules() if isinstance(m, MoELayer)):
        number = layer.layer_number + (layer.config.num_layers if layer.is_mtp_layer else 0)
        layer.experts.register_forward_hook(functools.partial(hook, number))
    return rows, kept


def of_modules(counter: FlopCounter, suffix: str) -> int:
    """Operations inside modules whose path ends in `suffix`, e.g. "self_attention".

    torch tells modules apart by hooks: exact where a module's input feeds nothing else.
    """
    counts = counter.get_flop_counts()
    return sum(sum(c.values()) for path, c in counts.items() if path.endswith(f".{suffix}"))


def counted(train_step):
    """`train_step` under the counter; what it found goes to FOLDER/CASE.RANK.json."""

    @functools.wraps(train_step)
    def step(*arguments, **keywords):
        model, config = arguments[2], arguments[5]
        rows, kept = watch(model)
        documents = DocumentLengths()
        documents.begin()
        with FlopCounter() as counter:
            result = train_step(*arguments, **keywords)
        documents.end()
        args = get_args()
        share = rank_share(
            args, config, model, micro_batches=get_num_microbatches(), rows=rows, kept=kept,
            document_tokens=documents.mean(),
        )  # fmt: skip
        found = {
            "counted": counter.total(),
            "operations": counter.by_operation(),
            "inside": {name: of_modules(counter, name) for name in MODULES},
            "formula": module_flops(config, share),
            "bytes": expert_bytes(config, share),
            "rows": rows,
            "kept": kept,
            "documents": documents.mean(),
            "megatron": training.num_floating_point_operations(args, args.global_batch_size),
        }
        path = Path(f"{args.tensorboard_dir}.{args.rank}.json")
        path.write_text(json.dumps(found))
        return result

    return step


def main(todo: str, folder: str) -> None:
    """As training_cases: the cases of a file, one after another."""
    training.train_step = counted(training.train_step)
    training_cases._main(todo, folder)
