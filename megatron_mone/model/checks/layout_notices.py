"""Where Megatron makes a value of the layout, so that the same flags train otherwise in another.

It is Megatron's meaning of its flags, which a stock model has as well, so it stays and is said.
What belongs to the model is kept instead (checkpoint/vocabulary.py). Touches nothing.
"""

from argparse import Namespace
from collections.abc import Iterable

OTHERWISE = "in another layout the same flags train otherwise"


def layout_notices(args: Namespace, command: Iterable[str]) -> list[str]:
    """A line for each value of this run that another layout would not have.

    Args:
        args: Megatron's, validated.
        command: the command line, a run file's flags among it.
    """
    given = {word.partition("=")[0] for word in command}
    tp, cp, dp = (getattr(args, f"{k}_parallel_size") for k in ("tensor_model", "context", "data"))
    widest = max(tp, args.expert_tensor_parallel_size)
    shards = f"tensor x context parallel = {tp * cp}"
    return [f"{line}: {OTHERWISE}; {fix}" for happens, line, fix in (
        (given.isdisjoint(("--global-batch-size", "--step-batch-size-schedule")),
         f"global_batch_size is not given and is micro_batch_size x data parallel = "
         f"{args.global_batch_size} here", f"pass --global-batch-size {args.global_batch_size}"),
        (args.dataloader_type == "cyclic" and dp > 1,
         f"dataloader_type = 'cyclic' shuffles within each of the data parallel = {dp} shares",
         "--dataloader-type single gives one order to all"),
        (args.moe_expert_capacity_factor is not None and tp * cp > 1,
         f"moe_expert_capacity_factor = {args.moe_expert_capacity_factor} drops by the tokens of a "
         f"rank, a part of a micro-batch at {shards}", "leave it out to drop none"),
        ("sinkhorn" in _listed(args.moe_router_load_balancing_type) and tp * cp > 1,
         f"moe_router_load_balancing_type = 'sinkhorn' balances the tokens of a rank, a part of a "
         f"micro-batch at {shards}", "aux_loss counts all of them"),
        (args.eod_mask_loss and cp > 1 and not args.calculate_per_token_loss,
         f"eod_mask_loss averages over the unmasked tokens of each of the context parallel = {cp} "
         "ranks", "pass --calculate-per-token-loss"),
        (args.optimizer.endswith("muon") and args.muon_tp_mode == "blockwise" and widest > 1,
         f"muon_tp_mode = 'blockwise' orthogonalises the part of a matrix on each of the tensor "
         f"parallel = {widest} ranks", "--muon-tp-mode duplicated takes the whole matrix"),
        (args.optimizer == "soap" and widest > 1,
         f"optimizer = 'soap' conditions the part of a matrix on each of the tensor parallel = "
         f"{widest} ranks", "lay it out without"),
    ) if happens]  # fmt: skip


def _listed(value: str | list[str]) -> list[str]:
    return value if isinstance(value, list) else [value]
