"""Values that Megatron takes and cannot run, or ignores, are refused in one line."""

from argparse import Namespace

import pytest

from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.checks.combinations import check_combinations

MONE = {"mone_neuron_ratio": 0.25}
CACHE = {"data_cache_path": "cache"}


@pytest.fixture(scope="module")
def defaults() -> dict:
    found: dict = {}
    for action in flag_parser()._actions:
        found.setdefault(action.dest, action.default)
    return {**found, "num_experts": 4, "world_size": 4}


HANDED_OVER = {"offload_modules": ["attn_norm", "mlp_norm", "moe_act"], "num_layers": 8,
               "pipeline_model_parallel_size": 2,
               "num_virtual_stages_per_pipeline_rank": 2}  # fmt: skip
CASES = [  # the refused, what the line says, and a way out
    ({"adlr_autoresume": True}, "adlr_autoresume = True .*python -m launch", {}),
    ({"optimizer": "sgd", "use_distributed_optimizer": True},
     "optimizer = 'sgd' .*leave out --use-distributed-optimizer", {"optimizer": "sgd"}),
    ({"config_logger_dir": "x"}, "config_logger_dir = 'x' ", {}),
    ({"moe_use_upcycling": True}, "moe_use_upcycling = True .*mone_neuron_ratio = 1.0", {}),
    ({"perform_initialization": False}, "load = None .*--no-initialization",
     {"perform_initialization": False, "load": "x"}),
    ({"init_model_with_meta_device": True}, "load = None .*--init-model-with-meta-device",
     {"init_model_with_meta_device": True, "use_megatron_fsdp": True}),
    ({**HANDED_OVER, "num_layers": 4}, "offload_modules = .*Chunk mismatch", HANDED_OVER),
    ({**HANDED_OVER, "num_layers_per_virtual_pipeline_stage": 1},
     "offload_modules = .*give chunks of two layers",
     {**HANDED_OVER, "num_layers": 4, "offload_modules": ["expert_fc1", "moe_act"]}),
    ({"dataloader_type": "external"}, "dataloader_type = 'external' .*cyclic",
     {"dataloader_type": "cyclic"}),
    ({"multiple_validation_sets": True}, "multiple_validation_sets = True needs --full-valid",
     {"multiple_validation_sets": True, "full_validation": True}),
    ({"dataloader_fast_cache_load": True}, "dataloader_fast_cache_load = True needs --data-cache",
     {"dataloader_fast_cache_load": True, **CACHE}),
    ({"dataloader_fast_cache_load": True, "data_path": ["x"], **CACHE},
     "dataloader_fast_cache_load = True .*--train-data-path",
     {"dataloader_fast_cache_load": True, "train_data_path": ["x"], **CACHE}),
    ({"dataloader_defer_npy_index_mmap": True}, "dataloader_defer_npy_index_mmap = True needs",
     {"dataloader_defer_npy_index_mmap": True, **CACHE}),
    ({"tokenizer_type": "NullTokenizer", "vocab_size": None}, "vocab_size = None .*number of",
     {"tokenizer_type": "NullTokenizer", "vocab_size": 8}),
    ({"tokenizer_type": "NullMultimodalTokenizer"}, "tokenizer_type = .*give NullTokenizer",
     {"tokenizer_type": "NullTokenizer", "vocab_size": 8}),
    ({"tensor_model_parallel_size": 2}, "sequence_parallel = False .*pass --sequence-parallel",
     {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    ({"tensor_model_parallel_size": 2}, "sequence_parallel = False .*pass --sequence-parallel",
     {"tensor_model_parallel_size": 2, "num_experts": None}),
    ({"position_embedding_type": "mrope"}, "position_embedding_type = 'mrope' .*give rope",
     {"position_embedding_type": "yarn"}),
    ({"moe_latent_size": 8, "moe_shared_expert_overlap": True},
     "moe_shared_expert_overlap = True does not go with moe_latent_size", {"moe_latent_size": 8}),
    ({"use_grouped_gemm_for_dense_mlp": True},
     "use_grouped_gemm_for_dense_mlp = True would have no effect with num_experts = 4",
     {"use_grouped_gemm_for_dense_mlp": True, "num_experts": None}),
    ({"init_method_xavier_uniform": True, "use_mup": True}, "init_method_xavier_uniform = True",
     {"init_method_xavier_uniform": True}),
    ({"spec": ["none.such", "spec"]}, "spec = 'none.such spec' cannot be imported: No module",
     {"spec": ["megatron_mone.layer_spec", "mone_layer_spec"]}),
    ({"spec": ["megatron.core", "none"]}, "spec = 'megatron.core none': the module has no 'none'",
     {"spec": ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]}),
    ({"spec": ["megatron.core"]}, "spec = 'megatron.core' must be two words", {}),
]  # fmt: skip
STOCK_SPEC = ["megatron.core.models.gpt.gpt_layer_specs", "get_gpt_layer_local_spec"]
WITH_MONE = [
    {"spec": STOCK_SPEC},
    {"quick_geglu": True},
    {"moe_mlp_glu_interleave_size": 32},
    {"te_precision_config_file": "x"},
    {"moe_paged_stash": True},
    {"moe_single_grouped_weight": True},
    {"moe_single_grouped_bias": True},
    {"cpu_offloading_num_layers": 1},
    {"recompute_modules": ["core_attn", "moe_act"], "mone_backend": "reference"},
    {"offload_modules": ["fused_group_mlp"]},
    {"heterogeneous_layers_config_path": "x"},
]
BESIDE_MONE = [
    {"spec": ["megatron_mone.layer_spec", "mone_layer_spec"]},
    {"offload_modules": ["attn_norm", "expert_fc1", "moe_act"]},
    {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["attn", "moe_router"]},
    {"moe_grouped_gemm": True},
    {"recompute_modules": ["moe_act"]},
    {"recompute_modules": ["moe"], "mone_backend": "reference"},
]
UPCYCLING = [
    {"moe_upcycling_granularity": 0},
    {"num_experts": 6},
    {"moe_router_topk": 1},
    {"moe_router_topk": 3},
    {"moe_router_topk_scaling_factor": None},
    {"moe_router_pre_softmax": True},
    {"moe_router_load_balancing_type": ["sinkhorn"]},
    {"moe_layer_freq": 2},
    {"mone_layer_freq": [1, 0]},
    {"moe_shared_expert_intermediate_size": 8},
    {"moe_latent_size": 8},
    {"mtp_num_layers": 1},
    {"hybrid_layer_pattern": "*E"},
    {"ckpt_format": "torch"},
    {"use_torch_fsdp2": True},
]


@pytest.mark.parametrize(("wrong", "says", "right"), CASES, ids=lambda case: str(case)[:50])
def test_what_cannot_run_is_refused(defaults, wrong, says, right):
    check_combinations(Namespace(**{**defaults, **right}))
    with pytest.raises(ValueError, match=f"^{says}") as error:
        check_combinations(Namespace(**{**defaults, **wrong}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("given", WITH_MONE, ids=str)
def test_what_only_stock_experts_read_is_refused_with_mone(defaults, given):
    check_combinations(Namespace(**{**defaults, **given}))
    with pytest.raises(ValueError, match=f"^{next(iter(given))} = .* not allowed with MoNE: "):
        check_combinations(Namespace(**{**defaults, **given, **MONE}))


@pytest.mark.parametrize("given", BESIDE_MONE, ids=str)
def test_what_goes_with_mone_is_let_through(defaults, given):
    check_combinations(Namespace(**{**defaults, **given, **MONE}))


@pytest.mark.parametrize("given", UPCYCLING, ids=str)
def test_what_slices_of_a_dense_ffn_cannot_be(defaults, given):
    fits = {"moe_use_upcycling": True, "moe_upcycling_granularity": 4, "moe_router_topk": 4,
            "moe_router_topk_scaling_factor": 4.0, "num_experts": 8, "num_layers": 2}  # fmt: skip
    check_combinations(Namespace(**{**defaults, **fits, **MONE}))
    with pytest.raises(ValueError, match=f"^{next(iter(given))} = .* moe_use_upcycling: ") as error:
        check_combinations(Namespace(**{**defaults, **fits, **MONE, **given}))
    assert "\n" not in str(error.value)
