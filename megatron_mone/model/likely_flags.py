"""The flags that an error of Megatron most likely means, by its words and by where it was raised.

Touches nothing.
"""

import re
import traceback
from argparse import Namespace
from collections.abc import Iterable

MOST = 4
_LAYOUT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size",
           "expert_model_parallel_size", "expert_tensor_parallel_size")  # fmt: skip
_STAGES = ("pipeline_model_parallel_size", "num_layers", "pipeline_model_parallel_layout",
           "num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank",
           "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers")  # fmt: skip
TOPICS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("parallel_state", _LAYOUT),
    ("pipeline_parallel", _STAGES),
    ("transformer_block", _STAGES),
    ("optimizer_param_scheduler", ("lr", "min_lr", "lr_decay_style", "lr_decay_iters",
                                   "lr_warmup_iters", "lr_wsd_decay_iters", "train_iters")),
    ("datasets/", ("data_path", "split", "train_data_path", "valid_data_path", "seq_length",
                   "data_cache_path")),
    ("dist_checkpointing", ("load", "ckpt_format", "pretrained_checkpoint")),
    ("checkpointing", ("load", "ckpt_format", "pretrained_checkpoint", "ckpt_step")),
    ("tokenizers", ("tokenizer_type", "tokenizer_model", "vocab_file", "vocab_size")),
    ("rotary", ("position_embedding_type", "rotary_percent", "kv_channels")),
    ("attention", ("num_attention_heads", "num_query_groups", "kv_channels",
                   "tensor_model_parallel_size", "context_parallel_size")),
    ("moe/", ("num_experts", "moe_router_topk", "moe_token_dispatcher_type",
              "expert_model_parallel_size", "expert_tensor_parallel_size")),
    ("tensor_parallel", ("tensor_model_parallel_size", "sequence_parallel", "ffn_hidden_size",
                         "hidden_size")),
    ("optimizer/", ("optimizer", "use_distributed_optimizer", "bf16", "fp16")),
    ("distributed/", ("use_distributed_optimizer", "overlap_grad_reduce", "ddp_bucket_size")),
    ("num_microbatches", ("global_batch_size", "micro_batch_size", "rampup_batch_size")),
)  # fmt: skip


def likely_flags(
    error: BaseException, said: str, args: Namespace | None, words: Iterable[str]
) -> tuple[str, ...]:
    """At most MOST flags: those named in the words, then those given of what the code is about.

    Args:
        error: with its traceback.
        said: its words.
        args: Megatron's, where they were read: what is none of them is no flag.
        words: of the command line.
    """
    known = vars(args) if args is not None else {}
    in_words = re.findall(r"--([a-z][a-z0-9-]+)|\b([a-z]\w*_\w+)\b", said)
    named = [a.replace("-", "_") or b for a, b in in_words]
    given = {word.partition("=")[0] for word in words if word.startswith("--")}
    about = _about(error)
    chosen = [name for name in about if _flag(name) in given] or list(about)
    found = [name for name in named if name in known] + chosen
    return tuple(dict.fromkeys(map(_flag, found)))[:MOST]


def _about(error: BaseException) -> tuple[str, ...]:
    """Arguments of what the code that raised the error is about, the innermost frame first.

    The pipeline's schedule calls all that happens in a step: it is meant where it raised the error
    itself. Of our own code nothing is guessed.
    """
    files = [frame.filename for frame in reversed(traceback.extract_tb(error.__traceback__))]
    files = [file for file in files if "/megatron/" in file or "/megatron_mone/" in file]
    for place, file in enumerate(files):
        if "/megatron_mone/" in file:
            return ()
        for part, names in TOPICS:
            if part in file and (place == 0 or names is not _STAGES):
                return names
    return ()


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
