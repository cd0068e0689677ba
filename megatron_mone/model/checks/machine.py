"""Options that ask for a package or a device which the machine of the ranks has not.

Megatron imports most packages where they are used, so that it fails only there, or leaves out in
silence what they would do. Looked at where the run is to run, and for jobs of CPU ranks wherever
they are described; not where a GPU job is described on another machine. Touches nothing.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch

from megatron_mone.model.checks.hybrid import hybrid_faults


@dataclass(frozen=True)
class Need:
    """What one argument asks for.

    Attributes:
        name: of the argument.
        package: by the name it is imported by.
        install: what to give pip.
        given: whether a value of the argument asks for it.
    """

    name: str
    package: str
    install: str
    given: Callable[[Any], bool] = bool


RESILIENCY = ("nvidia_resiliency_ext", "nvidia-resiliency-ext")
PACKAGES = (
    Need("enable_ft_package", *RESILIENCY),
    Need("fault_injector_ranks", *RESILIENCY),
    Need("fault_injector_num_ranks", *RESILIENCY),
    Need("non_persistent_ckpt_type", *RESILIENCY, lambda kind: kind == "local"),
    Need("wandb_project", "wandb", "wandb"),
    Need("mlflow_experiment", "mlflow", "mlflow"),
    Need("log_device_memory_used", "pynvml", "nvidia-ml-py"),
    Need("log_energy", "pynvml", "nvidia-ml-py"),
    Need("run_workload_inspector_server", "workload_inspector", "workload-inspector"),
    Need("logits_save_dir", "zstandard", "zstandard"),
    Need("tokenizer_type", "tiktoken", "tiktoken", lambda kind: kind == "TikTokenizer"),
    Need("tokenizer_type", "sentencepiece", "sentencepiece",
         lambda kind: kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer",
                               "Llama2Tokenizer")),
    Need("tokenizer_type", "wget", "wget",
         lambda kind: kind in ("GPT2BPETokenizer", "BertWordPieceLowerCase", "BertWordPieceCase")),
)  # fmt: skip

TRANSFORMER_ENGINE: dict[str, Callable[[Any], bool]] = {
    "moe_router_fusion": bool,
    "moe_latent_size": bool,
    "moe_mlp_glu_interleave_size": bool,
    "layernorm_zero_centered_gamma": bool,
    "fused_residual_rmsnorm": bool,
    "use_te_activation_func": bool,
    "use_transformer_engine_op_fuser": bool,
    "use_grouped_gemm_for_shared_expert": bool,
    "use_precision_aware_optimizer": bool,
    "te_precision_config_file": bool,
    "cpu_offloading_num_layers": bool,
    "save_activations_interval": bool,
    "save_dgrads_interval": bool,
    "tp_comm_overlap": bool,
    "tensor_parallel_num_weight_shards": lambda shards: (shards or 1) > 1,
    "expert_tensor_parallel_num_weight_shards": lambda shards: (shards or 1) > 1,
    "experimental_attention_variant": bool,
    "recompute_modules": lambda modules: "layernorm" in (modules or ()),
}
"""Arguments whose work is Transformer Engine's alone -> whether a value asks for it."""

EMULATED = frozenset({"moe_latent_size", "recompute_modules"})
"""Of these, what the CPU emulation gives CPU ranks."""

CUDA: dict[str, Callable[[Any], bool]] = {
    "log_straggler": bool,
    "record_memory_history": bool,
    "optimizer_cpu_offload": bool,
    "optimizer_cuda_graph": bool,
    "cuda_graph_impl": lambda kind: kind != "none",
    "enable_cuda_graph": bool,
    "external_cuda_graph": bool,
    "gpu_sniff_test_interval": bool,
    "use_sharp": bool,
    "nccl_ub": bool,
    "outer_dp_sharding_strategy": lambda kind: kind != "no_shard",
    "nccl_communicator_config_path": bool,
    "pipeline_model_parallel_comm_backend": lambda kind: kind not in (None, "gloo"),
}
"""Arguments whose work is done on a GPU alone -> whether a value asks for it."""


def check_machine(args: Namespace) -> None:
    """Packages and devices that arguments ask for.

    Args:
        args: Megatron's, parsed.

    Raises:
        ValueError: the first of `machine_faults`.
    """
    for fault in machine_faults(args):
        raise ValueError(fault)


def machine_faults(args: Namespace) -> Iterator[str]:
    """A line for each argument that asks for what is not here: its value, what and how to get it.

    Args:
        args: Megatron's, parsed.
    """
    from megatron.core.extensions.transformer_engine import HAVE_TE

    yield from _async_save(args)
    yield from hybrid_faults(args)
    for need in PACKAGES:
        if need.given(getattr(args, need.name)) and find_spec(need.package) is None:
            yield (
                f"{need.name} = {getattr(args, need.name)!r} needs the package {need.install}: pip "
                f"install {need.install}, or leave it out"
            )
    if not torch.cuda.is_available():
        yield from _given(args, CUDA, "a GPU, and these are CPU ranks")
        yield from _experts_without_replicas(args)
        if args.profile and not args.use_pytorch_profiler:
            yield (
                "profile = True needs a GPU, for it is nsys': add --use-pytorch-profiler, or give "
                "--mone-profile-steps"
            )
    if not HAVE_TE:
        what = "the package transformer-engine, which is not installed"
        on_gpus = torch.cuda.is_available()
        asked = {k: v for k, v in TRANSFORMER_ENGINE.items() if on_gpus or k not in EMULATED}
        yield from _given(args, asked, what)


def _given(args: Namespace, table: dict[str, Callable[[Any], bool]], what: str) -> Iterator[str]:
    for name, given in table.items():
        if given(value := getattr(args, name)):
            yield f"{name} = {value!r} needs {what}: leave it out"


def _experts_without_replicas(args: Namespace) -> Iterator[str]:
    """Over gloo Megatron FSDP gives such experts other gradients than DDP, stock ones too: losses
    of EP 2 on 2 ranks are 5e-5 apart after two steps, of EP 2 on 4 equal."""
    tp, ep = args.tensor_model_parallel_size, args.expert_model_parallel_size
    ranks = (args.expert_tensor_parallel_size or tp) * ep * args.pipeline_model_parallel_size
    if args.use_megatron_fsdp and ep > 1 and ranks == args.world_size:
        yield (
            f"expert_model_parallel_size = {ep} leaves every expert on one rank alone, and these "
            "are CPU ranks, where use_megatron_fsdp then trains otherwise than without: lower it, "
            "or give more ranks"
        )


def _async_save(args: Namespace) -> Iterator[str]:
    """Megatron starts its writer process only later, and hangs where that cannot run."""
    if not args.async_save:
        return
    if not torch.cuda.is_available():
        yield (
            "async_save = True is not available on CPU ranks, where Megatron's writer process "
            "never answers: drop --async-save"
        )
    elif args.async_strategy == "nvrx" and find_spec("nvidia_resiliency_ext") is None:
        yield (
            "async_strategy = 'nvrx' needs nvidia-resiliency-ext: pip install "
            "nvidia-resiliency-ext, or pass --async-strategy mcore"
        )
