"""Hybrid models: the pattern of their layers, the packages that kinds of layers need, and the
commands that know GPT models alone. Touches nothing."""

from argparse import Namespace
from collections.abc import Iterator
from importlib.util import find_spec

import torch

_KERNELS = {"M": ("mamba_ssm", "mamba-ssm"), "G": ("fla", "flash-linear-attention")}
"""Symbol -> module and package whose kernels the layer calls on a GPU."""


def check_pattern(args: Namespace) -> None:
    """Experts and the pattern's layers of them.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: names the argument, its value and what to do.
    """
    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    experts = "E" in pattern
    if experts and args.num_experts is None:
        raise ValueError(
            f"hybrid_layer_pattern = {pattern!r} has layers of experts (E): give --num-experts"
        )
    if args.num_experts is not None and not experts:
        raise ValueError(
            f"num_experts = {args.num_experts} would have no effect: hybrid_layer_pattern = "
            f"{pattern!r} has no layer of experts (E)"
        )
    if args.overlap_moe_expert_parallel_comm:
        raise ValueError(
            "overlap_moe_expert_parallel_comm = True does not go with hybrid_layer_pattern = "
            f"{pattern!r}: it knows GPT models alone; leave it out"
        )


def check_gpt(args: Namespace, done: str) -> None:
    """For a command that takes a GPT model's layers one by one.

    Args:
        args: Megatron's.
        done: what it does, such as "converted".

    Raises:
        ValueError: the model is a hybrid one.
    """
    if args.hybrid_layer_pattern is not None:
        raise ValueError(
            f"hybrid_layer_pattern = {args.hybrid_layer_pattern!r}: hybrid models are trained, not "
            f"{done}: no family of Hugging Face models has these layers here; give a GPT model by "
            "--num-layers"
        )


def hybrid_faults(args: Namespace) -> Iterator[str]:
    """A line for each thing that the pattern asks for and this machine has not."""
    from megatron.core.extensions.transformer_engine import HAVE_TE

    pattern = args.hybrid_layer_pattern
    if pattern is None:
        return
    if not torch.cuda.is_available():
        for symbol, what in (("G", "gated delta nets"), ("D", "DeepSeek sparse attention")):
            if symbol in pattern:
                yield (
                    f"hybrid_layer_pattern = {pattern!r}: {symbol}, {what}, needs a GPU, and these "
                    "are CPU ranks: leave it out"
                )
        for name, usual in (
            ("use_mamba_mem_eff_path", True),
            ("mamba_training_ssm_states_dtype", None),
        ):
            if getattr(args, name) != usual:
                yield (
                    f"{name} = {getattr(args, name)!r} is of mamba-ssm's kernels, which need a "
                    "GPU, and these are CPU ranks: leave it out"
                )
        return
    if not HAVE_TE or args.transformer_impl == "local":
        yield (
            f"hybrid_layer_pattern = {pattern!r}: on GPUs Megatron builds its layers of "
            "Transformer Engine alone: pip install 'megatron-mone[te]', and give "
            "--transformer-impl transformer_engine"
        )
    for symbol, (module, package) in _KERNELS.items():
        if symbol in pattern and find_spec(module) is None:
            yield (
                f"hybrid_layer_pattern = {pattern!r}: {symbol} needs the package {package}: pip "
                f"install {package}"
            )
