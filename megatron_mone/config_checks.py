"""What the mone_* fields say of a model, and every check on their values.

Touches nothing: takes any config that has the mone_* fields and Megatron's. The symbols are those
of config.py.
"""

from typing import Any

FULL_ITERATION = "full_iteration"
"""A value of cuda_graph_impl."""

FP8_RECIPES = ("tensorwise", "delayed", "blockwise", "mxfp8")
"""Of --fp8-recipe, those that MoNE's experts multiply in (kernels/te)."""


def check(condition: bool, name: str, value: Any, allowed: str) -> None:
    """Raise the one-line ValueError of a field unless the condition is met."""
    if not condition:
        raise ValueError(f"{name} = {value!r} is not allowed: it must be {allowed}")


def is_mone(config: Any) -> bool:
    """Whether a model selects neurons: either field that says how many turns MoNE on.

    Args:
        config: anything with mone_* fields: a config, or Megatron's arguments.
    """
    return config.mone_neuron_ratio is not None or config.mone_neurons_per_token is not None


def neurons_per_token(config: Any) -> int:
    """S: neurons of an expert kept per routed token.

    Args:
        config: a config with mone_* fields and `moe_ffn_hidden_size` (F).

    Raises:
        ValueError: S is not an integer in [1, F].
    """
    width = config.moe_ffn_hidden_size
    if not is_mone(config):
        raise ValueError(
            "neither mone_neuron_ratio nor mone_neurons_per_token is set: give one of them, such "
            "as mone_neuron_ratio = 0.25"
        )
    if config.mone_neurons_per_token is not None:
        kept = config.mone_neurons_per_token
        check(
            1 <= kept <= width,
            "mone_neurons_per_token",
            kept,
            f"1 to moe_ffn_hidden_size = {width}",
        )
        return kept
    ratio = config.mone_neuron_ratio
    kept = round(ratio * width)
    check(
        kept >= 1 and abs(kept - ratio * width) < 1e-6 * width,
        "mone_neuron_ratio",
        ratio,
        f"a ratio that makes a whole number of the {width} neurons (this makes "
        f"{ratio * width:g}; mone_neurons_per_token = {max(kept, 1)} is nearest)",
    )
    return kept


def expert_hidden(config: Any) -> int:
    """H of routed experts: moe_latent_size where tokens are projected to it, else hidden_size."""
    return config.moe_latent_size or config.hidden_size


def selection_bounds(config: Any) -> tuple[int, int]:
    """(S_min, S_max) neurons kept per routed token; equal for topk selection."""
    kept = neurons_per_token(config)
    if config.mone_selection == "topk":
        return kept, kept
    low, high = config.mone_min_neurons_per_token, config.mone_max_neurons_per_token
    if low is None:
        low = config.mone_neuron_groups * config.mone_neuron_block
    return low, kept if high is None else high


def layer_pattern(config: Any) -> list[int]:
    """For each decoder layer: 2 where it is MoNE, 1 where it is a stock MoE layer, 0 where dense.

    Raises:
        ValueError: a list of the wrong length, or one that asks for MoNE at a dense layer.
    """
    layers = config.num_layers
    moe = _moe_layers(config)
    freq = config.mone_layer_freq
    if isinstance(freq, int):
        check(freq >= 1, "mone_layer_freq", freq, "an integer >= 1 or a list of 0 and 1")
        return [kind + int(kind == 1 and i % freq == 0) for i, kind in enumerate(moe)]
    check(
        len(freq) == layers and set(freq) <= {0, 1},
        "mone_layer_freq",
        freq,
        f"one 0 or 1 for each of the {layers} decoder layers",
    )
    for i, (is_mone, is_moe) in enumerate(zip(freq, moe, strict=True)):
        check(
            not is_mone or bool(is_moe),
            "mone_layer_freq",
            freq,
            f"1 only where moe_layer_freq has an MoE layer (layer {i + 1} is dense)",
        )
    return [is_moe + is_mone for is_mone, is_moe in zip(freq, moe, strict=True)]


def _moe_layers(config: Any) -> list[int]:
    """For each decoder layer, 1 where it is an MoE layer."""
    if pattern := getattr(config, "hybrid_layer_pattern", None):
        return hybrid_moe_layers(pattern)
    freq, layers = config.moe_layer_freq, config.num_layers
    allowed = f"an integer >= 1, or one 0 or 1 for each of the {layers} decoder layers"
    if isinstance(freq, int):
        check(freq >= 1, "moe_layer_freq", freq, allowed)
        return [int(i % freq == 0) for i in range(layers)]
    fits = isinstance(freq, list | tuple) and len(freq) == layers and set(freq) <= {0, 1}
    check(fits, "moe_layer_freq", freq, allowed)
    return list(freq)


def hybrid_moe_layers(hybrid_layer_pattern: str) -> list[int]:
    """For each decoder layer of a pattern, 1 where it is a layer of experts: a moe_layer_freq."""
    return [int(kind == "E") for kind in hybrid_layer_pattern.partition("/")[0].replace("|", "")]


def mask_steps(text: str, name: str = "mone_record_mask_steps") -> tuple[int, int]:
    """(first, last) of steps to record masks of, "5" or "5-8".

    Args:
        text: of a field or an option.
        name: of it.

    Raises:
        ValueError: anything else.
    """
    first, _, last = str(text).partition("-")
    last = last or first
    valid = first.isdigit() and last.isdigit() and 1 <= int(first) <= int(last)
    check(valid, name, text, "a step or a range of steps, e.g. 5 or 5-8")
    return int(first), int(last)


def check_ranges(config: Any) -> None:
    """What can be told without the model, of fields that another one makes unused as well."""
    ratio = config.mone_neuron_ratio
    check(ratio is None or 0.0 < ratio <= 1.0, "mone_neuron_ratio", ratio, "0 < ratio <= 1")
    coeff, rate = config.mone_ng_loss_coeff, config.mone_ng_bias_update_rate
    check(coeff >= 0, "mone_ng_loss_coeff", coeff, ">= 0")
    check(rate > 0, "mone_ng_bias_update_rate", rate, "> 0")
    scale = config.mone_residual_multiplier
    check(scale > 0, "mone_residual_multiplier", scale, "> 0")
    threshold = config.mone_threshold
    check(0.0 < threshold <= 1.0, "mone_threshold", threshold, "0 < threshold <= 1")
    for name in ("mone_neurons_per_token", "mone_min_neurons_per_token",
                 "mone_max_neurons_per_token"):  # fmt: skip
        value = getattr(config, name)
        check(value is None or value >= 1, name, value, "at least 1")
    mask_steps(config.mone_record_mask_steps)


def check_model(config: Any) -> None:
    """MoNE is defined on gated experts without bias; say so before a layer is built."""
    needs = [
        (config.num_moe_experts is not None, "num_moe_experts", "set (--num-experts): MoNE "
         "selects neurons inside routed experts"),
        (config.gated_linear_unit, "gated_linear_unit", "True (--swiglu): a neuron is a gate, an "
         "up and a down vector"),
        (not config.add_bias_linear, "add_bias_linear", "False (--disable-bias-linear)"),
        (not config.moe_apply_probs_on_input, "moe_apply_probs_on_input", "False with MoNE: the "
         "router's probability is applied before fc2"),
        (not config.fp4, "fp4", "unset with MoNE (no --fp4-format): its experts have 16 or 8 bits"),
        (config.glu_linear_offset == 0.0, "glu_linear_offset", "0 with MoNE"),
        (config.activation_func_clamp_value is None, "activation_func_clamp_value", "unset"),
    ]  # fmt: skip
    if config.fp8:
        needs += _fp8_needs(config)
    if config.mone_qk_norm_all_heads:
        beside = "with mone_qk_norm_all_heads"
        needs += [
            (config.qk_layernorm, "qk_layernorm", f"True {beside}"),
            (not config.qk_l2_norm, "qk_l2_norm", f"False {beside}"),
            (not config.multi_latent_attention, "multi_latent_attention", f"False {beside}"),
            (config.normalization == "RMSNorm", "normalization", f"RMSNorm {beside}"),
            (not config.layernorm_zero_centered_gamma, "layernorm_zero_centered_gamma",
             f"False {beside}"),
        ]  # fmt: skip
    for met, name, allowed in needs:
        check(met, name, getattr(config, name), allowed)


def _fp8_needs(config: Any) -> list[tuple[bool, str, str]]:
    """(whether it is met, field, what is allowed) of a model whose layers multiply in fp8."""
    ranks = config.expert_tensor_parallel_size or 1
    recipe = getattr(config.fp8_recipe, "value", config.fp8_recipe)
    multiple = 32 if recipe == "mxfp8" else 16
    width, hidden = config.moe_ffn_hidden_size, expert_hidden(config)
    fits = f"a multiple of {multiple} with fp8_recipe = {recipe}"
    return [
        (config.mone_backend == "te", "mone_backend", "te with fp8: the products of other backends "
         "are in the parameters' type, whatever --fp8-format"),
        (recipe in FP8_RECIPES, "fp8_recipe", f"one of {', '.join(FP8_RECIPES)} with MoNE"),
        (config.fp8_wgrad, "fp8_wgrad", "True with MoNE (no --no-fp8-wgrad)"),
        (not config.fp8_param, "fp8_param", "False with MoNE (no --fp8-param-gather): its experts "
         "keep their weights in 16 bits"),
        (width % (multiple * ranks) == 0, "moe_ffn_hidden_size",
         f"{fits} on each of {ranks} expert tensor ranks"),
        (hidden % multiple == 0, "moe_latent_size" if config.moe_latent_size else "hidden_size",
         fits),
    ]  # fmt: skip


def check_router_loss(config: Any) -> None:
    """Probabilities after top-k are those of an aux loss that there is, and that Megatron computes
    in parts."""
    if config.mone_router_loss_probs == "before_topk":
        return
    kinds, coefficients = config.moe_router_load_balancing_type, config.moe_aux_loss_coeff
    if isinstance(kinds, str):
        kinds, coefficients = [kinds], [coefficients]
    losses = {"aux_loss", "seq_aux_loss", "global_aux_loss"}
    check(
        any(kind in losses and coeff for kind, coeff in zip(kinds, coefficients, strict=True)),
        "mone_router_loss_probs",
        config.mone_router_loss_probs,
        "before_topk where no moe_router_load_balancing_type of aux_loss, seq_aux_loss, "
        "global_aux_loss has a moe_aux_loss_coeff > 0",
    )
    check(
        not config.moe_router_fusion,
        "moe_router_fusion",
        config.moe_router_fusion,
        f"False with mone_router_loss_probs = {config.mone_router_loss_probs}",
    )


def captured(args: Any) -> tuple[str, frozenset[str]]:
    """What Megatron's arguments capture, its older flags among them.

    Args:
        args: Megatron's, parsed or validated, or a config.

    Returns:
        "none", "local", "transformer_engine" or "full_iteration", and names of modules, none for
        whole layers.
    """
    kind = args.cuda_graph_impl
    if getattr(args, "enable_cuda_graph", False):
        kind = "local"
    elif getattr(args, "external_cuda_graph", False):
        kind = "transformer_engine"
    given: Any = getattr(args, "cuda_graph_scope_deprecated", None) or args.cuda_graph_modules or ()
    if isinstance(given, str):
        given = given.split(",")
    names = {getattr(module, "name", str(module)) for module in given} - {"full"}
    if FULL_ITERATION in names and kind != "none":
        kind = FULL_ITERATION
    return kind, frozenset(names)


def captures_experts(args: Any) -> bool:
    """Whether the experts of an MoE layer are inside a graph."""
    kind, modules = captured(args)
    return kind != "none" and (kind == FULL_ITERATION or not modules or "moe" in modules)


def check_flex(config: Any) -> None:
    """Of the flex dispatcher's libraries, what leaves rows that the experts cannot tell apart."""
    backend = config.moe_flex_dispatcher_backend
    if config.moe_token_dispatcher_type != "flex":
        return
    factor = config.moe_expert_rank_capacity_factor
    of_te = f"False with MoNE and moe_flex_dispatcher_backend = {backend}"
    needs = [
        (not config.moe_pad_expert_input_to_capacity, "moe_pad_expert_input_to_capacity",
         "False with MoNE and moe_token_dispatcher_type = flex: the library does not say which "
         "rows it padded (alltoall does)"),
        *((not getattr(config, name), name, "unset with MoNE and moe_token_dispatcher_type = flex: "
           "its library pads rows for quantised products, and does not say which (alltoall does)")
          for name in ("fp8", "moe_router_padding_for_quantization")),
        (backend == "hybridep" or not config.use_transformer_engine_op_fuser,
         "use_transformer_engine_op_fuser", f"False with MoNE and moe_flex_dispatcher_backend = "
         f"{backend}: rows padded for it are not told from others"),
        (backend != "ncclep" or factor is not None, "moe_expert_rank_capacity_factor",
         "set with moe_flex_dispatcher_backend = ncclep: it sizes the buffer of what a rank gets"),
        (backend != "ncclep" or not config.moe_ncclep_static_shape, "moe_ncclep_static_shape",
         f"{of_te}: rows beyond the routed ones hold what was there before"),
        (backend != "ncclep" or not config.moe_ncclep_zero_copy, "moe_ncclep_zero_copy",
         f"{of_te}: its buffers are for Transformer Engine's own experts"),
    ]  # fmt: skip
    for met, name, allowed in needs:
        check(met, name, getattr(config, name), allowed)


def check_selection(config: Any) -> None:
    """Kept neurons, groups, blocks and bounds fit each other and the experts' width."""
    width, groups = config.moe_ffn_hidden_size, config.mone_neuron_groups
    kept = neurons_per_token(config)
    check(
        groups >= 1 and width % groups == 0,
        "mone_neuron_groups",
        groups,
        f"a divisor of moe_ffn_hidden_size = {width}",
    )
    check(
        kept % groups == 0,
        "mone_neuron_groups",
        groups,
        f"a divisor of the {kept} neurons kept per token",
    )
    _check_block(config, kept)
    if config.mone_selection == "threshold":
        low, high = selection_bounds(config)
        for name, value in (
            ("mone_min_neurons_per_token", low),
            ("mone_max_neurons_per_token", high),
        ):
            check(
                1 <= value <= width and value % (groups * config.mone_neuron_block) == 0,
                name,
                value,
                f"a multiple of mone_neuron_groups * mone_neuron_block = "
                f"{groups * config.mone_neuron_block} from 1 to {width}",
            )
        check(low <= high, "mone_min_neurons_per_token", low, f"at most {high}, the upper bound")


def _check_block(config: Any, kept: int) -> None:
    """Blocks are whole in a group, in the kept neurons and on every expert tensor rank."""
    block, width = config.mone_neuron_block, config.moe_ffn_hidden_size
    check(block >= 1, "mone_neuron_block", block, "at least 1")
    ranks = config.expert_tensor_parallel_size or 1
    check(width % ranks == 0, "moe_ffn_hidden_size", width,
           f"a multiple of expert_tensor_parallel_size = {ranks}")  # fmt: skip
    groups = config.mone_neuron_groups
    for size, what in (
        (width // groups, f"the {width // groups} neurons of a group"),
        (kept // groups, f"the {kept // groups} neurons kept of a group"),
        (
            width // ranks,
            f"the {width // ranks} neurons of an expert on each rank "
            f"(expert_tensor_parallel_size = {ranks} cuts no block)",
        ),
    ):
        check(size % block == 0, "mone_neuron_block", block, f"a divisor of {what}")
