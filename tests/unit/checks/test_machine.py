"""An option that needs a package or a device is refused where that is not, in one line."""

from argparse import Namespace

import pytest

from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.checks import machine


@pytest.fixture(scope="module")
def defaults() -> dict:
    found: dict = {}
    for action in flag_parser()._actions:
        found.setdefault(action.dest, action.default)
    return found


CASES = {
    "enable_ft_package": (True, "pip install nvidia-resiliency-ext"),
    "fault_injector_ranks": ("0", "pip install nvidia-resiliency-ext"),
    "fault_injector_num_ranks": (1, "pip install nvidia-resiliency-ext"),
    "non_persistent_ckpt_type": ("local", "pip install nvidia-resiliency-ext"),
    "wandb_project": ("mine", "pip install wandb"),
    "mlflow_experiment": ("mine", "pip install mlflow"),
    "log_energy": (True, "pip install nvidia-ml-py"),
    "run_workload_inspector_server": (True, "pip install workload-inspector"),
    "logits_save_dir": ("logits", "pip install zstandard"),
    "log_straggler": (True, "these are CPU ranks"),
    "record_memory_history": (True, "these are CPU ranks"),
    "optimizer_cpu_offload": (True, "these are CPU ranks"),
    "optimizer_cuda_graph": (True, "these are CPU ranks"),
    "cuda_graph_impl": ("local", "these are CPU ranks"),
    "gpu_sniff_test_interval": (10, "these are CPU ranks"),
    "nccl_ub": (True, "these are CPU ranks"),
    "outer_dp_sharding_strategy": ("optim", "these are CPU ranks"),
    "use_sharp": (True, "these are CPU ranks"),
    "pipeline_model_parallel_comm_backend": ("ucc", "these are CPU ranks"),
    "profile": (True, "--use-pytorch-profiler"),
    "moe_router_fusion": (True, "transformer-engine"),
    "moe_mlp_glu_interleave_size": (32, "transformer-engine"),
    "fused_residual_rmsnorm": (True, "transformer-engine"),
    "use_te_activation_func": (True, "transformer-engine"),
    "use_transformer_engine_op_fuser": (True, "transformer-engine"),
    "use_precision_aware_optimizer": (True, "transformer-engine"),
    "layernorm_zero_centered_gamma": (True, "transformer-engine"),
    "cpu_offloading_num_layers": (1, "transformer-engine"),
    "save_activations_interval": (1, "transformer-engine"),
    "save_dgrads_interval": (1, "transformer-engine"),
    "te_precision_config_file": ("recipe.yaml", "transformer-engine"),
    "experimental_attention_variant": ("dsa", "transformer-engine"),
    "expert_tensor_parallel_num_weight_shards": (2, "transformer-engine"),
    "async_save": (True, "drop --async-save"),
}


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_here_is_refused(defaults, monkeypatch, name):
    absent = {
        *("wandb", "mlflow", "zstandard", "pynvml", "workload_inspector", "nvidia_resiliency_ext")
    }
    monkeypatch.setattr(machine, "find_spec", lambda package: None if package in absent else 1)
    machine.check_machine(Namespace(**defaults))
    value, says = CASES[name]
    with pytest.raises(ValueError, match=f"^{name} = ") as error:
        machine.check_machine(Namespace(**{**defaults, name: value}))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize(
    ("tokenizer", "package"),
    [("TikTokenizer", "tiktoken"), ("Llama2Tokenizer", "sentencepiece"),
     ("GPT2BPETokenizer", "wget")],
)  # fmt: skip
def test_a_tokenizer_names_its_package(defaults, monkeypatch, tokenizer, package):
    monkeypatch.setattr(machine, "find_spec", lambda asked: None if asked == package else 1)
    with pytest.raises(ValueError, match=f"^tokenizer_type = '{tokenizer}' .*install {package}"):
        machine.check_machine(Namespace(**{**defaults, "tokenizer_type": tokenizer}))


@pytest.mark.usefixtures("one_rank")
def test_what_is_here_is_let_through(defaults, monkeypatch):
    """Packages installed, a GPU at hand: nothing is said."""
    from megatron.core.extensions import transformer_engine

    monkeypatch.setattr(machine, "find_spec", lambda package: 1)
    monkeypatch.setattr(machine.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    given = {name: value for name, (value, _) in CASES.items()}
    machine.check_machine(Namespace(**{**defaults, **given}))


def test_the_tables_name_flags_alone(defaults):
    tables = [machine.CUDA, machine.TRANSFORMER_ENGINE, [need.name for need in machine.PACKAGES]]
    assert [name for table in tables for name in table if name not in defaults] == []
