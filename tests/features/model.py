"""Rows of the rest of a layer: attention, norms, embeddings, further heads."""

from tests.features.row import SEED, Example, refused, trained, unrun

MLA = (
    "--multi-latent-attention --q-lora-rank 16 --kv-lora-rank 16 --qk-head-dim 8 "
    "--qk-pos-emb-head-dim 8 --v-head-dim 8"
)
MTP = "--mtp-num-layers 2 --mtp-loss-scaling-factor 0.2"

ROWS = (
    trained(
        "num_layers hidden_size num_attention_heads ffn_hidden_size kv_channels num_query_groups",
        "the sizes of a model",
        Example(flags="--group-query-attention --num-query-groups 2 --kv-channels 16 "
                "--num-layers 4 --ffn-hidden-size 96 --moe-layer-freq ([0]+[1]*3)"),
    ),
    trained(
        "mtp_num_layers mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads",
        "layers of multi-token prediction are MoNE as the last layer is",
        Example(flags=MTP),
        Example(flags=f"{MTP} --mtp-use-repeated-layer"),
        Example(flags=f"{MTP} --mtp-detach-heads"),
    ),
    trained(
        "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim "
        "v_head_dim rotary_scaling_factor mscale mscale_all_dim mla_down_proj_fusion",
        "attention of latents, as DeepSeek-V3 has it",
        # under TP 2 stock Megatron's own gradient of linear_kv_down_proj is off by 1e-3
        Example(flags=MLA, layouts=("EP2", "EP2 PP2")),
    ),
    trained(
        "normalization layernorm_epsilon qk_layernorm qk_l2_norm",
        "norms",
        Example(flags="--normalization LayerNorm --norm-epsilon 1e-6"),
        Example(flags=f"--qk-layernorm {SEED}"),
        Example(flags="--qk-l2-norm"),
    ),
    trained(
        "softmax_type attention_output_gate add_qkv_bias rotary_interleaved",
        "sinks, gates and biases of attention",
        Example(flags="--softmax-type learnable --attention-output-gate"),
        Example(flags="--add-qkv-bias --rotary-interleaved"),
    ),
    trained(
        "apply_query_key_layer_scaling",
        "of attention",
        Example(flags="--apply-query-key-layer-scaling", same=1e-6),
    ),
    trained(
        "hidden_dropout attention_dropout",
        "another layout draws other numbers",
        Example(flags="--hidden-dropout 0.1 --attention-dropout 0.1", layouts=()),
    ),
    trained(
        "init_method_std embedding_init_method_std perform_initialization use_cpu_initialization",
        "experts start as Megatron starts them, from the same random numbers",
        Example(flags="--init-method-std 0.05 --embedding-init-method-std 0.1 "
                "--use-cpu-initialization"),
    ),
    trained(
        "use_mup mup_*",
        "learning rates and scales by width; experts are hidden matrices as in stock",
        Example(flags="--use-mup --mup-base-hidden-size 16"),
    ),
    trained(
        "cross_entropy_loss_fusion cross_entropy_fusion_impl",
        "`native` rounds the gradient of logits to bf16; `te` needs Transformer Engine",
        Example(flags="--cross-entropy-loss-fusion"),
    ),
    unrun(
        "layernorm_zero_centered_gamma qk_clip qk_clip_*",
        "of Transformer Engine's norms and attention",
        "--apply-layernorm-1p",
        "--qk-clip --multi-latent-attention",
    ),
    unrun(
        "experimental_attention_variant linear_* dsa_*",
        "gated delta net and sparse attention in place of attention",
        "--experimental-attention-variant gated_delta_net --linear-attention-freq 2",
    ),
    refused(
        "heterogeneous_layers_config_*",
        "Megatron builds another config class of them",
        ("--heterogeneous-layers-config-path x", "another config class"),
    ),
    trained(
        "add_bias_linear",
        "off: a neuron of MoNE has no bias; on is refused",
        shown="tests/unit/checks/test_combinations.py",
    ),
    trained(
        "hybrid_layer_pattern mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads",
        "Megatron's HybridModel: its layers of experts are MoNE; Mamba's scan is plain torch on "
        "CPU ranks; multi-token prediction behind /, with one layer of experts a depth; planned "
        "without it, mamba-ssm's kernels counted; evaluated, not converted",
        shown="tests/parity/test_hybrid_models.py::test_a_hybrid_model_is_the_same_in_every_layout "
        "tests/parity/test_hybrid_models.py::test_attention_and_experts_alone_are_the_gpt_model",
    ),
    unrun("use_mamba_mem_eff_path mamba_training_ssm_states_dtype",
          "of mamba-ssm's kernels, which need a GPU"),
    trained(
        "dataloader_inter_document_masking",
        "packed documents (THD), with masks by token; not with context parallelism, and a sample "
        "at a time at TP or PP above 1",
        shown="tests/parity/test_sequences.py::test_same_numbers_as_one_rank "
        "tests/parity/test_sequences.py::test_masks_are_recorded_by_token",
    ),
    refused(
        "sft hybrid_context_parallel max_seqlen_per_dp_cp_rank",
        "of Megatron-LM's own pretrain_gpt.py, which takes --spec",
        ("--sft", "pretrain_gpt.py"), ("--hybrid-context-parallel", "pretrain_gpt.py"),
    ),
    trained("deterministic_mode", "MoNE's kernels are deterministic without it",
            Example(flags="--deterministic-mode", same=0)),
)  # fmt: skip
