"""Rows of number formats, and of the optimizers that step in them."""

from tests.features.row import Example, refused, trained, unrun

MATRICES = (
    "tests/parity/test_training_layouts.py::test_keep_all_is_stock_megatron_in_the_same_layout"
)
BF16 = "--bf16"
FP8 = f"{BF16} --fp8-format hybrid"
FP8_TE = f"{FP8} --mone-backend te --moe-ffn-hidden-size 64"
OFFLOADED = "--optimizer-cpu-offload --use-precision-aware-optimizer --use-distributed-optimizer"
IN_BF16 = f"{BF16} --grad-reduce-in-bf16"

ROWS = (
    trained(
        "bf16 attention_softmax_in_fp32 accumulate_allreduce_grads_in_fp32 "
        "disable_bf16_reduced_precision_matmul",
        "weights and products in bf16, gradients added up in fp32; choices are made of bf16 gates",
        Example(flags=f"{BF16} --attention-softmax-in-fp32 "
                "--disable-bf16-reduced-precision-matmul", layouts=()),
    ),
    trained(
        "grad_reduce_in_bf16 ddp_param_name_patterns_for_fp32_local_accumulation",
        "gradients sent, and added up, in bf16",
        Example(flags=IN_BF16, layouts=()),
        Example(flags=f"{IN_BF16} --ddp-param-name-patterns-for-fp32-local-accumulation *router*",
                layouts=()),
    ),
    trained("fp32_residual_connection", "of bf16 models",
            Example(flags=f"{BF16} --fp32-residual-connection", layouts=())),
    trained(
        "optimizer muon_*",
        "Adam, SGD, Lion, SOAP, Muon and its sharded form; optimizers of matrices see an expert's "
        "own, not the stack of a rank",
        shown=MATRICES,
    ),
    unrun(
        "gradient_accumulation_fusion",
        "MoNE's kernels add weight gradients to main_grad themselves; dense linears need a GPU",
        shown="tests/unit/moe/test_weight_views.py::test_fused_accumulation_adds_to_main_grad",
    ),
    unrun(
        "use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype "
        "exp_avg_sq_dtype",
        "bf16 moments, of Transformer Engine's optimizer; fp8 and fp16 moments, which it scales by "
        "tensor, are refused",
        "--use-precision-aware-optimizer --exp-avg-dtype bf16 --use-distributed-optimizer",
        shown="tests/integration/test_gpu_job_traces.py::test_moments_of_16_bits",
    ),
    unrun(
        "fp16 loss_scale initial_loss_scale min_loss_scale loss_scale_window hysteresis "
        "fp16_lm_cross_entropy",
        "loss scales are Megatron's",
        "--fp16",
    ),
    unrun(
        "optimizer_cpu_offload optimizer_offload_fraction overlap_cpu_optimizer_d2h_h2d "
        "pin_cpu_grads",
        "fp32 weights, moments and a copy of the gradients in host memory, and Adam there; planned "
        "from published bandwidths, fitted to nothing",
        OFFLOADED,
        f"{OFFLOADED} --optimizer-offload-fraction 0.5 --overlap-cpu-optimizer-d2h-h2d",
        shown="tests/integration/test_gpu_job_traces.py::test_an_optimizer_on_the_host",
    ),
    refused(
        "use_torch_optimizer_for_cpu_offload pin_cpu_params",
        "without effect in Megatron 0.19, with or without MoNE; so are other formats of moments "
        "beside optimizer_cpu_offload",
        (f"{OFFLOADED} --use-torch-optimizer-for-cpu-offload", "no effect"),
        (f"{OFFLOADED} --no-pin-cpu-params", "no effect"),
        (f"{OFFLOADED} --exp-avg-dtype bf16", "exp_avg_dtype"),
    ),
    unrun(
        "fp8 fp8_recipe fp8_margin fp8_interval fp8_amax_history_len fp8_amax_compute_algo "
        "fp8_output_proj first_last_layers_bf16 num_layers_at_start_in_bf16 "
        "num_layers_at_end_in_bf16 moe_router_padding_for_quantization moe_router_padding_for_fp8",
        "with `--mone-backend te`: tensorwise, delayed, blockwise and mxfp8 products of experts, "
        "held to float64 bounds on stand-ins that quantize; activation and choice of neurons are "
        "in bf16; over alltoall and allgather, not flex",
        *(f"{FP8_TE} --fp8-recipe {recipe}" for recipe in ("delayed", "blockwise", "mxfp8")),
        f"{FP8_TE} --fp8-recipe tensorwise --first-last-layers-bf16",
        shown="tests/unit/kernels/test_te_fp8.py "
        "tests/unit/moe/test_fp8_experts.py::test_four_recipes_are_let_through",
    ),
    refused(
        "fp8_param_gather fp8_wgrad fp8_quantizer_factory reuse_grad_buf_for_mxfp8_param_ag "
        "te_precision_config_file",
        "experts keep their weights in 16 bits, and multiply all alike",
        (f"{FP8_TE} --fp8-param-gather --use-distributed-optimizer", "fp8_param"),
        (f"{FP8_TE} --no-fp8-wgrad", "fp8_wgrad"),
        (FP8, "te with fp8"),
        ("--te-precision-config-file x", "te_precision_config_file"),
    ),
    refused("fp4 fp4_*", "experts have 16 or 8 bits", ("--fp4-format e2m1 --bf16", "fp4")),
)  # fmt: skip
