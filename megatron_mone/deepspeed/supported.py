"""What DeepSpeed's engine trains here, and what it refuses before a model is built.

docs/DEEPSPEED.md's table is made of `REFUSALS` and of the runs of tests/parity/test_engines.py.
Touches nothing but the JSON that a run names.
"""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from megatron_mone.deepspeed.settings import (
    AUTO,
    OF_DEEPSPEED,
    given_json,
    is_deepspeed,
    settings_of,
    stage_of,
    tag_of,
)

_MEGATRON = "leave it out, or give --engine megatron"


@dataclass(frozen=True)
class Refusal:
    """Something that this engine does not train.

    Attributes:
        name: argument of Megatron's or ours.
        met: whether a run asks for it.
        reason: why not.
        fix: what to do.
        asked: what is refused, for the page; any value when empty.
    """

    name: str
    met: Callable[[Namespace], bool]
    reason: str
    fix: str = _MEGATRON
    asked: str = ""

    @property
    def words(self) -> str:
        """What is refused."""
        return f"`{self.name}` {self.asked}".strip()


def _given(name: str, reason: str, fix: str = _MEGATRON) -> Refusal:
    return Refusal(name, lambda args: bool(getattr(args, name, None)), reason, fix)


def _over_one(name: str, reason: str, fix: str = _MEGATRON) -> Refusal:
    return Refusal(name, lambda args: (getattr(args, name, None) or 1) > 1, reason, fix, "above 1")


_OWN_GRADIENTS = "DeepSpeed keeps and reduces gradients itself"
REFUSALS = (
    _over_one("pipeline_model_parallel_size",
              "DeepSpeed's pipeline engine needs a model of its own layers in a row"),
    Refusal("expert_model_parallel_size",
            lambda args: args.expert_model_parallel_size > 1 and stage_of(args) == 3,
            "ZeRO 3 cuts a parameter over all data-parallel ranks, and an expert is not on all of "
            "them", "give --zero-stage 2, or --expert-model-parallel-size 1",
            "above 1 with ZeRO 3"),
    Refusal("optimizer", lambda args: args.optimizer not in ("adam", "sgd"),
            "ZeRO cuts parameters into flat pieces, on which only optimizers that go by element "
            "step", "give --optimizer adam or sgd, or --engine megatron", "but adam and sgd"),
    Refusal("fp16", lambda args: args.fp16, "its loss scale is DeepSpeed's",
            "give --bf16, or --engine megatron"),
    Refusal("bf16", lambda args: args.bf16 and stage_of(args) == 0,
            "at ZeRO 0 DeepSpeed adds gradients up in bf16", "give --zero-stage 1", "with ZeRO 0"),
    _given("hybrid_layer_pattern", "hybrid models were not tried under ZeRO"),
    _given("fp8", "what Transformer Engine keeps beside its weights was not tried under ZeRO"),
    _given("fp4", "what Transformer Engine keeps beside its weights was not tried under ZeRO"),
    _given("use_megatron_fsdp", "ZeRO shards the parameters", "give --zero-stage 3"),
    _given("use_torch_fsdp2", "ZeRO shards the parameters", "give --zero-stage 3"),
    _given("optimizer_cpu_offload", "Megatron's works on its own optimizers",
           "give --zero-offload-optimizer"),
    _given("fine_grained_activation_offloading",
           "what Megatron hands to the host was not tried under ZeRO"),
    Refusal("zero_offload_optimizer",
            lambda args: args.zero_offload_optimizer and stage_of(args) == 0,
            "at ZeRO 0 DeepSpeed has nothing that it could move", "give --zero-stage 1",
            "with ZeRO 0"),
    _given("calculate_per_token_loss", "DeepSpeed divides gradients by ranks, not by tokens"),
    _given("delay_wgrad_compute", f"{_OWN_GRADIENTS} as soon as a backward pass is over"),
    _given("overlap_moe_expert_parallel_comm", "it runs two micro-batches in one schedule of its "
           "own, whose backward passes DeepSpeed does not see"),
    _given("overlap_dispatch_backward_with_experts_wgrad",
           f"{_OWN_GRADIENTS} as soon as a backward pass is over"),
    Refusal("cuda_graph_impl", lambda args: getattr(args, "cuda_graph_impl", "none") != "none",
            "DeepSpeed's hooks run in the backward pass"),
    _given("log_num_zeros_in_grad", "gradients are gone when a step is over"),
    _given("use_precision_aware_optimizer", "the optimizer's tensors are DeepSpeed's",
           "give bf16 options of the JSON, or --engine megatron"),
    _given("save_wgrads_interval", _OWN_GRADIENTS),
    _given("moe_use_upcycling", "a dense checkpoint was not tried under ZeRO",
           "upcycle first: megatron-mone convert upcycle"),
    _given("async_save", "state is gathered while the ranks wait", "leave it out"),
    *(Refusal(name, lambda args, name=name: bool(  # type: ignore[misc]
          getattr(args, name) and args.expert_model_parallel_size > 1),
          "DeepSpeed writes a file for each expert of its own MoE layers, and knows no others",
          "give --expert-model-parallel-size 1", "with experts over several ranks")
      for name in ("load_deepspeed", "save_deepspeed")),
    Refusal("ckpt_format", lambda args: args.ckpt_format != "torch_dist",
            "checkpoints of this engine are torch_dist", "give --ckpt-format torch_dist",
            "but torch_dist"),
)  # fmt: skip


def check_engine(args: Namespace) -> None:
    """Everything that can be judged of an engine's run before a model is built.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: one line that names the argument, its value and the fix.
    """
    if not is_deepspeed(args):
        for name in OF_DEEPSPEED:
            if getattr(args, name, None) not in (None, False):
                raise ValueError(
                    f"{name} = {getattr(args, name)!r} would have no effect: the engine is "
                    "Megatron's: give --engine deepspeed, or leave it out"
                )
        return
    stage_of(args)
    for one in REFUSALS:
        if one.met(args):
            raise ValueError(
                f"{one.name} = {getattr(args, one.name)!r} does not go with engine = deepspeed: "
                f"{one.reason}: {one.fix}"
            )


def check_settings(args: Namespace) -> None:
    """The user's JSON against the flags.

    Args:
        args: Megatron's, validated.

    Raises:
        ValueError: one line.
    """
    if is_deepspeed(args):
        settings_of(args)


def check_package(args: Namespace) -> None:
    """Where the run is to run.

    Raises:
        ValueError: deepspeed is not installed.
    """
    if is_deepspeed(args) and find_spec("deepspeed") is None:
        raise ValueError(
            "engine = 'deepspeed' needs the package deepspeed: pip install "
            "'megatron-mone[deepspeed]', or give --engine megatron"
        )


def check_files(args: Namespace) -> None:
    """Where the run is to run, with the package: what its files hold.

    Raises:
        ValueError: one line.
    """
    if not is_deepspeed(args):
        return
    if args.load_deepspeed:
        tag_of(Path(args.load_deepspeed))
    check_zero(args)


def check_zero(args: Namespace) -> None:
    """What the JSON says of ZeRO, by DeepSpeed's own model of it; the package is there.

    Args:
        args: Megatron's, of which `deepspeed_config` is read.

    Raises:
        ValueError: one line.
    """
    given = given_json(args).get("zero_optimization")
    if not given:
        return
    from pydantic import ValidationError

    from megatron_mone.deepspeed.package import package

    package()
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    try:
        DeepSpeedZeroConfig(**{key: value for key, value in given.items() if value != AUTO})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, ("zero_optimization", *first["loc"])))
        where = f"{args.deepspeed_config}: {place}"
        raise ValueError(f"{where} = {first['input']!r}: {first['msg']}") from None
