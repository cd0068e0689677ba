"""Optimizers against precision, packages and experts: what Megatron 0.19 finds out when the model
is built, or never says. Touches nothing.
"""

from argparse import Namespace
from importlib.util import find_spec

from megatron_mone.config_checks import is_mone

PLAIN = ("adam", "sgd")
LION_BETAS = {"lion_beta1": 0.95, "lion_beta2": 0.98}  # Megatron's defaults
SCALED = ("fp16", "fp8")
"""States that Transformer Engine's FusedAdam keeps with one scale a tensor."""


def check_optimizer(args: Namespace) -> None:
    """The optimizer and what is asked of it.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: names the flag, its value and what works.
    """
    name = args.optimizer
    if is_mone(args):
        _check_stacks(args)
    if args.optimizer_cpu_offload:
        _check_offload(args)
    if name in PLAIN:
        return
    needs = [
        (not args.fp16, "fp16 = True", "Megatron has it for adam and sgd: give --bf16"),
        (name != "adaptive_muon", "emerging-optimizers >= 0.3", "Megatron 0.19's class is written "
         "for 0.2 and ends in an AttributeError: give --optimizer muon"),
        (not args.use_precision_aware_optimizer, "use_precision_aware_optimizer = True",
         "Megatron has it for adam: leave it out"),
        (not args.optimizer_cpu_offload, "optimizer_cpu_offload = True", "Megatron has it for adam "
         "and sgd: leave it out"),
        (args.bf16 or not (args.use_distributed_optimizer or name == "dist_muon"),
         "--use-distributed-optimizer" if name != "dist_muon" else "its layer-wise sharding",
         "Megatron wraps the parts of a layer-wise optimizer for bf16 alone: give --bf16, or leave "
         "out the sharding (--optimizer muon without --use-distributed-optimizer)"),
        (args.num_distributed_optimizer_instances == 1, "num_distributed_optimizer_instances = "
         f"{args.num_distributed_optimizer_instances}", "leave it out"),
    ]  # fmt: skip
    for met, what, fix in needs:
        if not met:
            raise ValueError(f"optimizer = {name!r} does not go with {what}: {fix}")
    _check_soap(args)
    _check_lion(args)
    _check_muon(args)


def check_optimizer_package(args: Namespace) -> None:
    """Where the run is to run: Muon, SOAP and Lion are a package of their own.

    Raises:
        ValueError: it is not installed, or knows no such coefficients.
    """
    if args.optimizer in PLAIN:
        return
    if find_spec("emerging_optimizers") is None:
        raise ValueError(
            f"optimizer = {args.optimizer!r} needs the package emerging-optimizers: pip install "
            "'megatron-mone[optimizers]', or pass --optimizer adam"
        )
    if "muon" in args.optimizer:
        from megatron.core.optimizer.emerging_optimizers import get_supported_coefficient_types

        known = [kind for kind in get_supported_coefficient_types() if kind != "custom"]
        if args.muon_coefficient_type not in known:
            raise ValueError(
                f"muon_coefficient_type = {args.muon_coefficient_type!r} is not one of "
                f"{', '.join(known)}"
            )


def _check_stacks(args: Namespace) -> None:
    """Stock experts have a parameter each, here all of a rank are one: what scales by parameter is
    refused."""
    for name in ("exp_avg_dtype", "exp_avg_sq_dtype"):
        if getattr(args, name) in SCALED:
            raise ValueError(
                f"{name} = {getattr(args, name)!r} is not allowed with MoNE: Transformer "
                "Engine scales it by tensor, and the experts of a rank are one: give fp32 or bf16"
            )


def _check_offload(args: Namespace) -> None:
    """What HybridDeviceOptimizer is not given (optimizer/__init__.py)."""
    unread = {
        "use_torch_optimizer_for_cpu_offload": (False, "the device's optimizer is Adam's all the "
                                                "same"),
        "exp_avg_dtype": ("fp32", "its moments are fp32"),
        "exp_avg_sq_dtype": ("fp32", "its moments are fp32"),
        "main_params_dtype": ("fp32", "its parameters are fp32"),
        "pin_cpu_params": (True, "they are pinned and then converted"),
    }  # fmt: skip
    for name, (default, why) in unread.items():
        if getattr(args, name) != default:
            raise ValueError(
                f"{name} = {getattr(args, name)!r} would have no effect with optimizer_cpu_offload "
                f"in Megatron 0.19: {why}; leave it out"
            )


def _check_soap(args: Namespace) -> None:
    """dist_checkpointing/optimizer.py asserts that state has a parameter's shape; its factors have
    not."""
    saves = args.save and not args.no_save_optim
    loads = args.load and not (args.no_load_optim or args.finetune)
    if args.optimizer == "soap" and args.ckpt_format != "torch" and (saves or loads):
        what, flag = ("saved", "--no-save-optim") if saves else ("loaded", "--no-load-optim")
        raise ValueError(
            f"optimizer = 'soap': its state cannot be {what} with ckpt_format = "
            f"{args.ckpt_format!r}, which takes tensors of a parameter's shape: pass {flag}"
        )


def _check_lion(args: Namespace) -> None:
    """Megatron reads lion_beta* where Lion is Muon's scalar optimizer, adam_beta* elsewhere."""
    given = [name for name, default in LION_BETAS.items() if getattr(args, name) != default]
    if args.optimizer == "lion" and given:
        name = given[0]
        adam = name.replace("lion", "adam")
        raise ValueError(
            f"{name} = {getattr(args, name)} is not read with --optimizer lion, which Megatron "
            f"gives {adam} = {getattr(args, adam)}: pass --{adam.replace('_', '-')}"
        )


def _check_muon(args: Namespace) -> None:
    if args.muon_num_ns_steps < 1:
        raise ValueError(f"muon_num_ns_steps = {args.muon_num_ns_steps} must be 1 or more")
