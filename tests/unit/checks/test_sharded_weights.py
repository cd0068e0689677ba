"""Megatron 0.19 and weights cut over replicas: what it cannot do is one line before it builds."""

import pytest

from megatron_mone.model.checks.sharded_weights import check_sharded_weights

FSDP = "--use-megatron-fsdp --ckpt-format fsdp_dtensor"
NO_SHARD = f"{FSDP} --data-parallel-sharding-strategy no_shard"


@pytest.mark.parametrize(
    "flags",
    [
        f"{FSDP} --bf16 --save x --load x --mone-neuron-ratio 0.25",
        f"{FSDP} --load x --finetune",
        f"{FSDP} --bf16 --save x --finetune",
        f"{FSDP} --save x --mone-plain-checkpoint",
        NO_SHARD,
        "--use-torch-fsdp2",
        "--pipeline-model-parallel-size 2",
    ],
)
def test_what_trains_passes(parser, flags):
    check_sharded_weights(parser.parse_args(flags.split()))


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (f"{FSDP} --pipeline-model-parallel-size 2",
         "pipeline_model_parallel_size = 2 does not go with use_megatron_fsdp = True, whose"),
        ("--use-torch-fsdp2 --load x", "load = 'x' does not go with use_torch_fsdp2 = True: Meg"),
        ("--use-torch-fsdp2 --save x", "save = 'x' does not go with use_torch_fsdp2 = True: Meg"),
        (f"{NO_SHARD} --save x", "save = 'x' does not go with data_parallel_sharding_strategy = "),
        (f"{FSDP} --load x --finetune --bf16", "load = 'x' does not go with .* their optimizer"),
        (f"{FSDP} --load x --no-load-optim --fp16", "load = 'x' does not go with .* in 16 bits"),
        (f"{FSDP} --pretrained-checkpoint x --bf16", "pretrained_checkpoint = 'x' does not go"),
        (f"{FSDP} --save x --mone-neuron-ratio 0.25 --mone-plain-checkpoint",
         "mone_plain_checkpoint = True does not go with ckpt_format = 'fsdp_dtensor'"),
    ],
)  # fmt: skip
def test_what_does_not_is_one_line(parser, flags, line):
    with pytest.raises(ValueError, match=line) as error:
        check_sharded_weights(parser.parse_args(flags.split()))
    assert "\n" not in str(error.value)
