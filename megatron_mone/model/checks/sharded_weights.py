"""Weights cut over replicas, by Megatron FSDP or torch's FSDP2: what Megatron 0.19 cannot do with
them, and finds out when the model is built, at the first save, or when that is loaded. Touches
nothing.
"""

from argparse import Namespace

from megatron_mone.config_checks import is_mone

_FOLDERS = ("load", "pretrained_checkpoint", "save")


def check_sharded_weights(args: Namespace) -> None:
    """Stages and checkpoints.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: names the flag, its value and what works.
    """
    stages = args.pipeline_model_parallel_size
    if args.use_megatron_fsdp and stages > 1:
        raise ValueError(
            f"pipeline_model_parallel_size = {stages} does not go with use_megatron_fsdp = True, "
            "whose meshes Megatron 0.19 makes of all ranks: leave one of them out"
        )
    folder = next((name for name in _FOLDERS if getattr(args, name)), None)
    if folder is None:
        return
    given = f"{folder} = {getattr(args, folder)!r} does not go with"
    if args.use_torch_fsdp2:
        raise ValueError(
            f"{given} use_torch_fsdp2 = True: Megatron 0.19 saves it in torch_dist up to a "
            "KeyError in the optimizer, and loads torch_dcp up to a TypeError there: give "
            "--use-megatron-fsdp or --use-distributed-optimizer in its place"
        )
    if args.use_megatron_fsdp and args.data_parallel_sharding_strategy == "no_shard":
        raise ValueError(
            f"{given} data_parallel_sharding_strategy = 'no_shard': Megatron 0.19 cuts gate from "
            "up by their place in a shard, which a whole weight has not: give optim"
        )
    weights_alone = args.finetune or args.no_load_optim or args.pretrained_checkpoint
    if args.use_megatron_fsdp and (args.bf16 or args.fp16) and folder != "save" and weights_alone:
        raise ValueError(
            f"{given} use_megatron_fsdp = True and weights without their optimizer in 16 bits, "
            "which Megatron 0.19 has not written (NotImplementedError): leave out --finetune and "
            "--no-load-optim, and give --load in place of --pretrained-checkpoint"
        )
    if args.use_megatron_fsdp and is_mone(args) and args.mone_plain_checkpoint:
        raise ValueError(
            "mone_plain_checkpoint = True does not go with ckpt_format = 'fsdp_dtensor', where "
            "experts cannot lie as stock ones do: leave it out"
        )
