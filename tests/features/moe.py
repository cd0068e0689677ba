"""Rows of routers, experts and their balance."""

from tests.features.row import SEED, Example, refused, trained, unrun

BIASED = "--moe-router-enable-expert-bias --moe-router-bias-update-rate 0.05"
SHARED = "--moe-shared-expert-intermediate-size 32"
NO_ROUTER_LOSS = "--moe-router-load-balancing-type none --moe-aux-loss-coeff 0"

ROWS = (
    trained(
        "num_experts moe_router_topk moe_ffn_hidden_size moe_layer_freq",
        "experts, how many a token visits, their width, which layers have them",
        Example(flags="--moe-router-topk 3 --num-experts 8 --moe-layer-freq ([0]+[1]*1)"),
    ),
    trained(
        "moe_router_load_balancing_type moe_aux_loss_coeff",
        "Megatron's losses of the router, alone and in lists, beside the balance loss of neurons",
        Example(flags="--moe-router-load-balancing-type seq_aux_loss"),
        # its running sums see what is before them in the same step: other sums in other layouts
        Example(flags="--moe-router-load-balancing-type global_aux_loss", layouts=()),
        Example(flags="--moe-router-load-balancing-type aux_loss seq_aux_loss "
                "--moe-aux-loss-coeff 0.01 0.02"),
        Example(flags=NO_ROUTER_LOSS),
        Example(flags="--moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0",
                layouts=("EP2", "PP2")),
    ),
    trained(
        "moe_router_quantile_balancing_ema",
        "with moe_router_load_balancing_type quantile_balancing: a bias from quantiles of logits",
        Example(flags="--moe-router-load-balancing-type quantile_balancing --moe-aux-loss-coeff 0 "
                "--moe-router-quantile-balancing-ema 0.5"),
    ),
    trained("moe_z_loss_coeff", "Megatron's, of the router's logits",
            Example(flags="--moe-z-loss-coeff 0.01")),
    trained(
        "moe_router_score_function moe_router_enable_expert_bias moe_router_bias_update_rate",
        "scores by sigmoid or sqrtsoftplus, and the bias of experts that balances without a loss",
        Example(flags=f"--moe-router-score-function sigmoid {BIASED} {NO_ROUTER_LOSS}"),
        Example(flags=f"--moe-router-score-function sqrtsoftplus {BIASED} {SEED}"),
    ),
    trained(
        "moe_router_num_groups moe_router_group_topk",
        "group-limited routing, as DeepSeek-V3 has it",
        Example(flags="--num-experts 8 --moe-router-num-groups 4 --moe-router-group-topk 2"),
    ),
    trained(
        "moe_router_pre_softmax moe_router_topk_scaling_factor",
        "softmax before the choice of experts, and a factor of what it weighs",
        Example(flags="--moe-router-pre-softmax --moe-router-topk-scaling-factor 2.5"),
    ),
    trained("moe_router_dtype", "of the router's product and of the weighing of outputs",
            Example(flags="--moe-router-dtype fp64", same=1e-6)),
    trained(
        "moe_router_force_load_balancing moe_router_force_biased moe_input_jitter_eps",
        "random routing for benchmarks, random inputs; another layout draws other numbers",
        Example(flags="--moe-router-force-load-balancing", layouts=()),
        Example(flags="--moe-router-force-biased 1.0", layouts=()),
        Example(flags="--moe-input-jitter-eps 0.1", layouts=()),
    ),
    trained(
        "moe_expert_capacity_factor moe_token_drop_policy moe_pad_expert_input_to_capacity",
        "tokens dropped beyond a capacity, by probability or position; padding counts in no "
        "statistic of neurons",
        # a capacity is that of a rank's tokens, which sequence parallelism cuts
        Example(flags="--moe-expert-capacity-factor 1.0 --moe-token-drop-policy position",
                layouts=("EP2", "EP2 PP2")),
        Example(flags="--moe-expert-capacity-factor 1.0 --moe-pad-expert-input-to-capacity",
                layouts=("EP2", "EP2 PP2")),
    ),
    trained(
        "moe_shared_expert_intermediate_size moe_shared_expert_gate moe_shared_expert_overlap",
        "the shared expert is Megatron's dense MLP: no neuron of it is chosen",
        Example(flags=f"{SHARED} --moe-shared-expert-gate"),
        Example(flags="--moe-shared-expert-overlap", beside=SHARED, same=1e-6),
    ),
    trained(
        "moe_token_dispatcher_type",
        "alltoall and allgather; flex needs a package of its backend (below)",
        Example(flags="--moe-token-dispatcher-type allgather", same=1e-6),
    ),
    trained("moe_per_layer_logging", "Megatron's losses by layer in TensorBoard",
            Example(flags="--moe-per-layer-logging", same=0)),
    unrun(
        "moe_router_fusion moe_permute_fusion", "kernels of Transformer Engine",
        "--moe-router-fusion --moe-permute-fusion",
    ),
    trained(
        "moe_grouped_gemm use_transformer_engine_op_fuser bias_swiglu_fusion",
        "MoNE's experts are grouped by nature and have kernels of their own: a line says so",
        shown="tests/unit/checks/test_flags.py",
    ),
    trained("moe_latent_size", "experts of the latent width",
            Example(flags="--moe-latent-size 16")),
    refused(
        "moe_apply_probs_on_input glu_linear_offset activation_func_clamp_value",
        "another gated unit than p * g * (up x)",
        ("--glu-linear-offset 1", "glu_linear_offset"),
        ("--activation-func-clamp-value 7", "activation_func_clamp_value"),
        ("--moe-apply-probs-on-input --moe-router-topk 1 --moe-router-pre-softmax",
         "moe_apply_probs_on_input"),
    ),
    refused("moe_mlp_glu_interleave_size", "gates and ups lie apart",
            ("--moe-mlp-glu-interleave-size 32", "lie apart")),
    refused("moe_single_grouped_*", "of Transformer Engine's experts",
            ("--moe-grouped-gemm --moe-single-grouped-weight", "moe_single_grouped_weight")),
    unrun(
        "moe_shared_expert_glu_interleave_size use_grouped_gemm_for_shared_expert "
        "use_te_activation_func use_fused_weighted_squared_relu",
        "of stock's shared expert and dense layers",
        "--moe-shared-expert-intermediate-size 32 --use-te-activation-func",
    ),
    refused("use_grouped_gemm_for_dense_mlp", "Megatron has it of models without experts alone",
            ("--use-grouped-gemm-for-dense-mlp", "no effect")),
    trained(
        "moe_use_upcycling moe_upcycling_granularity",
        "the experts are slices of the dense checkpoint in --load, as `megatron-mone convert "
        "upcycle` makes them; stock experts, with which Megatron 0.19 ends in a TypeError, not",
        shown="tests/parity/test_upcycling.py::test_it_is_convert_upcycle_and_a_run_from_it "
        "tests/parity/test_upcycling.py::test_it_is_the_same_in_every_layout",
    ),
    unrun(
        "moe_enable_deepep moe_flex_dispatcher_backend moe_flex_dispatcher_num_sms "
        "moe_deepep_num_sms moe_hybridep_* moe_permute_fusion_into_hybridep moe_ncclep_* "
        "moe_expert_rank_capacity_factor",
        "the flex dispatcher over DeepEP, HybridEP and NCCL EP, with masks, row sources and a "
        "rank's capacity, on stand-ins of their calls; what leaves rows that experts cannot tell "
        "apart is a line (docs/TRAINING.md)",
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type flex --moe-flex-dispatcher-backend hybridep "
        "--moe-expert-rank-capacity-factor 2 --use-transformer-engine-op-fuser",
        shown="tests/unit/moe/test_mask_dispatch_flex.py::test_masks_travel_with_their_rows",
    ),
    refused(
        "moe_enable_routing_replay",
        "it waits for routes from a program",
        ("--moe-enable-routing-replay", "--mone-replay-routing"),
    ),
    trained(
        "moe_routing_trace_*",
        "Megatron's files of the experts that tokens chose; `--mone-replay-routing DIR` routes as "
        "they say",
        shown="tests/parity/test_features.py::test_routes_are_written "
        "tests/parity/test_features.py::test_written_routes_are_replayed",
    ),
)  # fmt: skip
