"""Every flag of Megatron's parser has a reader that a run comes to, or a line that says why not."""

import re
from argparse import Namespace

import pytest

from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.checks import flags
from tests.unit.checks.flag_readers import readers

# arguments.py turns these into other arguments, or refuses them itself.
TRANSLATED = (
    "batch_size warmup model_parallel_size checkpoint_activations "
    "decoder_num_layers encoder_num_layers encoder_seq_length recompute_activations "
    "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
    "grad_reduce_in_bf16 use_rotary_position_embeddings add_position_embedding "
    "use_checkpoint_args no_weight_decay_cond_type cuda_graph_scope_deprecated "
    "disable_msc_deprecated dist_ckpt_format_deprecated use_dist_ckpt_deprecated "
    "ckpt_fully_parallel_save_deprecated"
)
# Read by a name put together: OptimizerConfig's muon_*, in emerging_optimizers.py, and
# TransformerConfig's moe_*_num_sms, which its __post_init__ turns into moe_flex_dispatcher_num_sms.
BY_COMPOSED_NAME = re.compile(r"muon_|moe_(deepep|hybridep)_num_sms")
# What pretrain_gpt.py of Megatron-LM 0.19 reads itself, so that no file of the package need to.
SCRIPT = (
    "allow_ambiguous_pad_tokens check_for_nan_in_loss_and_grad check_for_spiky_loss "
    "context_parallel_size create_attention_mask_in_dataloader data_cache_path "
    "dataloader_defer_npy_index_mmap dataloader_fast_cache_load dataloader_inter_document_masking "
    "eod_mask_loss fim_data fim_eod_token fim_fragment_rate fim_middle_token fim_no_prefix "
    "fim_pad_token fim_prefix_token fim_rate fim_split_sample fim_spm_rate fim_suffix_token "
    "full_validation hybrid_context_parallel logits_load_decode_threads logits_load_dir "
    "logits_load_ignore_errors logits_load_kd_loss_alpha logits_load_msc_prefetch_depth "
    "logits_load_prefetch_factor micro_batch_size mid_level_dataset_surplus mmap_bin_files "
    "mock_data multiple_validation_sets num_dataset_builder_threads object_storage_cache_path "
    "per_dataset_sequences_path pipeline_model_parallel_size reset_attention_mask "
    "reset_position_ids seed seq_length sft split"
)


@pytest.fixture(scope="module")
def defaults() -> dict:
    found: dict = {}
    for action in flag_parser()._actions:
        found.setdefault(action.dest, action.default)
    return found


@pytest.fixture(scope="module")
def read(defaults) -> dict[str, set[str]]:
    return readers({*defaults, "a_new_flag"})


def unexplained(names, read) -> set[str]:
    known = {*read, *TRANSLATED.split(), *flags.MOOT, "help"}
    rest = {name for name in names if name not in known and not BY_COMPOSED_NAME.match(name)}
    return {name for name in rest if not flags.refusal(name)}


def test_every_flag_is_read_or_refused(defaults, read):
    assert unexplained(defaults, read) == set()
    assert unexplained({*defaults, "a_new_flag"}, read) == {"a_new_flag"}


def test_what_only_the_stock_script_reads_is_read_here_too_or_refused(defaults, read):
    assert set(defaults) >= set(SCRIPT.split())
    ours = {name for name, files in read.items() if any("megatron_mone/" in f for f in files)}
    assert {name for name in set(SCRIPT.split()) - ours if not flags.refusal(name)} == set()


def test_the_tables_name_flags_alone(defaults):
    patterns = [p for names in flags.REFUSED.values() for p in names.split()]
    unmatched = [p for p in patterns if not any(flags.fnmatchcase(n, p) for n in defaults)]
    unmatched += [
        pattern for names in flags.ONLY_WITH.values() for pattern in names.split()
        if not any(flags.fnmatchcase(name, pattern) for name in defaults)
    ]  # fmt: skip
    assert unmatched == []
    assert set(flags.ONLY_WITH) <= set(defaults)
    assert {*flags.MOOT, *flags.MOOT_WITH_MONE, *TRANSLATED.split()} <= set(defaults)


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("sft", True, "pretrain_gpt.py"),
        ("fim_rate", 0.1, "pretrain_gpt.py"),
        ("hybrid_context_parallel", True, "pretrain_gpt.py"),
        ("logits_load_dir", "/nonexistent", "pretrain_gpt.py"),
        ("inprocess_restart", True, "python -m launch"),
        ("perform_rl_step", True, "train_rl.py"),
        ("grpo_group_size", 3, "train_rl.py"),
        ("inference_max_requests", 9, "this entry trains"),
        ("hybrid_override_pattern", "M*", "hybrid_layer_pattern alone"),
        ("mamba_state_dim", 64, "M in hybrid_layer_pattern"),
        ("vision_pretraining", True, "vision"),
        ("bert_binary_head", False, "BERT"),
        ("rampup_batch_size", [8, 8, 64], "--step-batch-size-schedule"),
        ("openai_gelu", True, "builds the same model"),
        ("exit_signal_handler_for_dataloader", True, "reads it nowhere"),
    ],
)
def test_a_flag_without_effect_is_one_line(defaults, name, value, says):
    flags.check_flags(Namespace(**defaults), defaults)
    with pytest.raises(ValueError, match=f"^{name} = .* would have no effect: ") as error:
        flags.check_flags(Namespace(**{**defaults, name: value}), defaults)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "switch"),
    [
        ("moe_paged_stash_page_size", 128, "moe_paged_stash"),
        ("moe_paged_stash_buffer_size_factor_cpu", 1.0, "moe_paged_stash"),
        ("offload_modules", ["core_attn"], "fine_grained_activation_offloading"),
        ("min_offloaded_tensor_size", 1, "fine_grained_activation_offloading"),
        ("moe_shared_expert_glu_interleave_size", 32, "use_grouped_gemm_for_shared_expert"),
    ],
)
def test_a_flag_without_its_switch_is_one_line(defaults, name, value, switch):
    flags.check_flags(Namespace(**{**defaults, name: value, switch: True}), defaults)
    with pytest.raises(ValueError, match=f"^{name} = .* no effect without {switch}: ") as error:
        flags.check_flags(Namespace(**{**defaults, name: value}), defaults)
    assert "\n" not in str(error.value)


def test_modules_that_are_not_recomputed_are_named(defaults):
    given = {**defaults, "recompute_modules": ["mlp"]}
    [line] = flags.notices(Namespace(**given))
    assert line.startswith("recompute_modules = ['mlp'] has no effect with")
    assert flags.notices(Namespace(**{**given, "recompute_granularity": "selective"})) == []


def test_a_hybrid_model_reads_its_own_flags(defaults):
    hybrid = {**defaults, "hybrid_layer_pattern": "M*E", "mamba_state_dim": 64}
    flags.check_flags(Namespace(**hybrid), defaults)
    for name, value in (("moe_layer_freq", 2), ("qk_layernorm", True), ("use_rope_scaling", True)):
        with pytest.raises(ValueError, match=f"^{name} = {value} would .* in a hybrid model: "):
            flags.check_flags(Namespace(**{**hybrid, name: value}), defaults)


def test_what_changes_nothing_is_said_and_trains(defaults):
    given = {**defaults, "use_flash_attn": True, "moe_grouped_gemm": True}
    assert flags.notices(Namespace(**defaults)) == []
    flags.check_flags(Namespace(**given), defaults)
    stock = flags.notices(Namespace(**given))
    assert [line.split(":")[0] for line in stock] == ["use_flash_attn = True has no effect"]
    of_experts = {name: True for name in flags.MOOT_WITH_MONE}
    recompute = {"recompute_granularity": "selective", "recompute_modules": ["moe_act"]}
    mone = Namespace(**{**given, **of_experts, **recompute, "mone_neuron_ratio": 0.25})
    assert [line.split(" = ")[0] for line in flags.notices(mone)] == [
        "use_flash_attn", *flags.MOOT_WITH_MONE, "recompute_modules",
    ]  # fmt: skip
