"""Ranks of test_traced_collectives: real training steps whose routing is the one that is traced.

`run` is a job of `tests.training_cases` whose routers send tokens as the tracer assumes; each rank
writes what it held, kept and multiplied to CASE/held-RANK.json, every number from real tensors:
weights and gradients from the ledger, kept tensors by address, operations from module_flops.
`trace` is one trace in a process that has Megatron imported.
"""

import functools
import json
from pathlib import Path

import torch

from tests import training_cases
from tests.integration.flop_ranks import watch


def measured(train_step):
    """`train_step` with what it found in CASE/held-RANK.json."""
    from megatron.core.num_microbatches_calculator import get_num_microbatches
    from megatron.training import get_args

    from megatron_mone.model.module_flops import module_flops, rank_share
    from megatron_mone.profiling.ledger import persistent_tensors

    @functools.wraps(train_step)
    def step(*arguments, **keywords):
        model, optimizer, config = arguments[2], arguments[3], arguments[5]
        rows, kept = watch(model)
        held: dict[int, torch.UntypedStorage] = {}

        def pack(tensor):
            if torch._C._current_graph_task_id() == -1:  # not a recompute
                storage = tensor.untyped_storage()
                held[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = train_step(*arguments, **keywords)
        persistent = persistent_tensors(model, optimizer)
        by_kind = {kind: _storages(tensors) for kind, tensors in persistent.items()}
        found, seen = {}, set()
        for kind, storages in {**by_kind, "activations": held}.items():
            found[kind] = sum(s.nbytes() for at, s in storages.items() if at not in seen)
            seen |= set(storages)
        args = get_args()
        share = rank_share(
            args, config, model, micro_batches=get_num_microbatches(), rows=rows, kept=kept
        )
        found["rows"] = rows
        modules = module_flops(config, share)
        found["flops"] = {phase: work["executed"] for phase, work in modules.items()}
        Path(args.tensorboard_dir, f"held-{args.rank}.json").write_text(json.dumps(found))
        return result

    return step


def _storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors}


def run(todo: str, folder: str) -> None:
    """The cases of `todo`, as training_cases._main."""
    from megatron.training import training

    from megatron_mone.planning.tracing.stand_ins.values import known_routing

    training.train_step = measured(training.train_step)
    with known_routing():
        training_cases._main(todo, folder)


def trace(job: dict, result: str) -> None:
    """What planning.build does in a process of its own."""
    from megatron_mone.planning.tracing.build import trace_step

    training_cases.spare_repeated_work()
    trace_step(job).write(Path(result))
