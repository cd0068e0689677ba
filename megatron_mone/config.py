"""The mone_* fields of a model: their meaning, their units, and every check on them.

May touch: Megatron's TransformerConfig classes. Builds nothing, reads one YAML file at most.
Symbols: F neurons of one expert (`moe_ffn_hidden_size`), S neurons kept per routed token,
r = S / F, G neuron groups, g the gate activation of a neuron.
"""

import contextlib
import dataclasses
import os
from argparse import ArgumentParser
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_type_hints

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from megatron_mone.common.field_values import read_value
from megatron_mone.common.spelling import nearest_name
from megatron_mone.common.yaml_values import read_mapping
from megatron_mone.config_checks import (
    check,
    check_flex,
    check_model,
    check_ranges,
    check_router_loss,
    check_selection,
    expert_hidden,
    is_mone,
    layer_pattern,
    mask_steps,
    neurons_per_token,
    selection_bounds,
)

Activation = Literal["silu", "sigmoid", "softmax", "gelu", "relu", "squared_relu"]
Selection = Literal["topk", "threshold"]
LossType = Literal["raw", "selected", "normalized", "entropy", "bias"]
LossScope = Literal["micro_batch", "global_batch"]
RouterLossProbs = Literal["before_topk", "after_topk"]
Backend = Literal["auto", "reference", "cpu", "triton", "te", "sparse24"]

__all__ = ["expert_hidden", "layer_pattern", "mask_steps", "neurons_per_token", "selection_bounds"]

CONFIG_ENV = "MONE_CONFIG"
OUR_SPEC = ["megatron_mone.layer_spec", "mone_layer_spec"]
OUR_HYBRID_SPEC = ["megatron_mone.layer_spec", "mone_hybrid_spec"]


@dataclass
class MoNEFields:
    """Mixture of Neuron Experts (arXiv 2510.05781): what each routed expert computes per token."""

    mone_neuron_ratio: float | None = None
    """Fraction r of an expert's neurons kept per routed token, 0 < r <= 1. Exclusive with
    mone_neurons_per_token. Either one turns MoNE on."""

    mone_neurons_per_token: int | None = None
    """Neurons S of an expert kept per routed token, 1 <= S <= F."""

    mone_activation: Activation = "silu"
    """Gate activation sigma; neurons are chosen by |sigma(W_gate x)|. softmax is over the F
    neurons of the expert, and its gate gradient is dense; squared_relu is relu(a)^2."""

    mone_selection: Selection = "topk"
    """topk keeps exactly S neurons. threshold keeps neuron j while |g_j| >= mone_threshold times
    the row's (with groups: the group's) largest |g|, between the two bounds below."""

    mone_threshold: float = 0.1
    """Fraction of the largest |g|, 0 < t <= 1. Only used by mone_selection=threshold."""

    mone_min_neurons_per_token: int | None = None
    """Lower bound S_min of threshold selection, neurons per routed token. Default: one (or one
    block) a group."""

    mone_max_neurons_per_token: int | None = None
    """Upper bound S_max of threshold selection, neurons per routed token. Default: S."""

    mone_neuron_groups: int = 1
    """The F neurons form G equal contiguous groups and each keeps S / G. A property of the model:
    when the expert tensor parallel size divides G, selection needs no communication."""

    mone_neuron_block: int = 1
    """B adjacent neurons kept or left together, chosen by the sum of their |g|: any B that divides
    F / G, S / G and F / ETP; 1 is the paper's choice of single neurons. Multiples of 16 give matrix
    units whole tiles."""

    mone_ng_loss_type: LossType = "selected"
    """Neuron-granular load balancing: the P_j of f_j * P_j (raw, selected, normalized), or entropy
    of P, or bias: no loss but a per-neuron selection bias moved by the sign of the load error."""

    mone_ng_loss_coeff: float = 1e-3
    """Weight alpha of the neuron-granular balance loss; 0 turns it off. Not used by bias."""

    mone_ng_loss_scope: LossScope = "micro_batch"
    """Rows the statistics are taken over: each source micro-batch by itself, or all rows of the
    last step (not of the step so far as Megatron's global_aux_loss: its running sums make gradient
    accumulation and data parallelism different models)."""

    mone_ng_bias_update_rate: float = 1e-3
    """Step of the selection bias per optimizer step, in units of |g|. Only used by type bias."""

    mone_router_loss_probs: RouterLossProbs = "before_topk"
    """Probabilities that the router's aux losses average: before_topk, of all experts, as Megatron,
    Switch and DeepSeek do; after_topk, what the chosen experts weigh, 0 of others, as a reviewer
    says of the published MoNE. Of all MoE layers."""

    mone_backend: Backend = "auto"
    """Implementation of the masked expert. reference is plain torch, the definition, and computes
    every neuron; cpu is native code that computes the kept ones; auto: the faster usable of these.
    triton (our kernels on the tiles of dense products, or over few kept blocks alone), te
    (Transformer Engine's grouped GEMMs, alone with fp8) and sparse24 (triton, with 2:4 products
    where mone_neuron_groups is F / 4 and half of the neurons are kept) need CUDA; none has run on a
    GPU yet."""

    mone_record_masks: str | None = None
    """Folder that gets the neuron masks of training steps mone_record_mask_steps, one file a step
    and layer. The files know no layout: they replay under any."""

    mone_record_mask_steps: str = "1"
    """Training steps to record, "5" or "5-8", counted from 1. Only used by mone_record_masks."""

    mone_replay_masks: str | None = None
    """Folder that mone_record_masks wrote: the steps recorded in it keep those neurons instead of
    choosing; other steps choose."""

    mone_check_for_nan: bool = True
    """Stop with rank, layer and expert where an expert's output is NaN or infinite. Waits for the
    device once a layer."""

    mone_layer_freq: int | list[int] = 1
    """Which MoE layers are MoNE: an integer N makes every N-th decoder layer one where it is an
    MoE layer, a list holds a 1 (MoNE) or 0 (stock) per decoder layer, e.g. "([0]+[1]*3)*2"."""

    mone_qk_norm_all_heads: bool = False
    """The norms of q and k (--qk-layernorm) are over all heads at once, as in OLMoE, in all layers.
    Megatron's are head by head, those of the stock models that a profile or plan compares with
    too."""

    mone_residual_multiplier: float = 1.0
    """What attention and MLP of every layer are multiplied by before they are added to the residual
    stream, as in Granite, > 0. Its other multipliers are Megatron's of MuP. The stock models that a
    profile or plan compares with have none."""

    mone_plain_checkpoint: bool = False
    """Checkpoints have the keys of a stock MoE model: stock tools read them, as a model that keeps
    every neuron. Else they stop at keys that are missing."""

    mone_change_choice: bool = False
    """Load a checkpoint that was trained with another choice of neurons (how many, by which rule,
    groups, blocks, activation, layers) than this run's; otherwise the first that differs is an
    error."""

    @property
    def mone_enabled(self) -> bool:
        """Whether this model selects neurons at all."""
        return is_mone(self)


MONE_FIELD_NAMES = tuple(f.name for f in dataclasses.fields(MoNEFields))
_TYPES = get_type_hints(MoNEFields)


@dataclass
class MoNEConfig(MoNEFields, TransformerConfig):
    """Megatron's TransformerConfig with the mone_* fields, checked on construction.

    Raises:
        ValueError: names the field, its value and what is allowed.
    """

    if TYPE_CHECKING:  # a model that selects neurons has both
        num_moe_experts: int = 0  # type: ignore[assignment]
        moe_ffn_hidden_size: int = 0  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        validate(self)


@dataclass
class MoNEMLAConfig(MoNEFields, MLATransformerConfig):
    """MoNEConfig for multi-latent attention."""

    def __post_init__(self) -> None:
        # core_transformer_config_from_args passes the flag only when it picks the class itself.
        self.multi_latent_attention = True
        super().__post_init__()
        validate(self)


def add_mone_args(parser: ArgumentParser) -> ArgumentParser:
    """Add one Megatron flag per mone_* field (`--mone-neuron-ratio` ...)."""
    from megatron.training.argument_utils import ArgumentGroupFactory
    from megatron.training.arguments import moe_freq_type

    # The factory cannot infer a type for int | list; Megatron adds --moe-layer-freq by hand too.
    factory = ArgumentGroupFactory(MoNEFields, exclude=["mone_layer_freq"])
    group = factory.build_group(parser, title="mixture of neuron experts")
    group.add_argument(
        "--mone-layer-freq",
        type=moe_freq_type,
        default=1,
        help=factory.field_docstrings["mone_layer_freq"],
    )
    return parser


def check_doors(args: Any) -> None:
    """mone_* fields come from flags or, with --spec alone, from MONE_CONFIG; all are read.

    Args:
        args: Megatron's, with mone_* fields.

    Raises:
        ValueError: a spec that would build another model, a MONE_CONFIG that nobody reads, or a
            mone_* field where no field turns MoNE on.
    """
    path, spec = os.environ.get(CONFIG_ENV), getattr(args, "spec", None)
    enabled = is_mone(args)
    ours = list(spec or ()) == our_spec(args)
    if enabled and spec and not ours:
        raise ValueError(
            f"spec = {' '.join(spec)!r} builds another model than the mone_* fields ask for: drop "
            "--spec, or the mone_* fields"
        )
    if path and (enabled or not ours):
        raise ValueError(
            f"{CONFIG_ENV} = {path!r} is not read here, where mone_* fields are flags or stand in "
            f"the run file: unset it (only --spec {' '.join(our_spec(args))} reads it)"
        )
    if enabled or ours:
        return
    for field in dataclasses.fields(MoNEFields):
        value = getattr(args, field.name)
        if value != field.default:
            raise ValueError(
                f"{field.name} = {value!r} has no effect: neither mone_neuron_ratio nor "
                "mone_neurons_per_token is set; give one of them, or leave it out"
            )


def our_spec(args: Any) -> list[str]:
    """The two words of --spec that build MoNE layers, in a GPT or a hybrid model."""
    return OUR_HYBRID_SPEC if getattr(args, "hybrid_layer_pattern", None) else OUR_SPEC


def needs_all_gates(config: Any) -> bool:
    """Whether the balance loss is computed from the gates of unchosen neurons too."""
    return config.mone_ng_loss_type == "normalized" and config.mone_ng_loss_coeff > 0


def chosen_by_rule(config: Any) -> bool:
    """Whether neurons are chosen by a function of all gates, not by top-S within a rank's own."""
    ranks = config.expert_tensor_parallel_size or 1
    return (
        config.mone_selection != "topk"
        or config.mone_ng_loss_type == "bias"
        or (ranks > 1 and config.mone_neuron_groups % ranks > 0)
    )


def validate(config: Any) -> None:
    """Check every mone_* field by its type, and against the model where MoNE is on.

    A value that its field holds in another form (a whole float, a path) is put into that form.

    Raises:
        ValueError: one line that names the field, its value and what is allowed.
    """
    for name in MONE_FIELD_NAMES:
        setattr(config, name, _read_field(name, getattr(config, name)))
    check_ranges(config)
    if config.mone_neuron_ratio is not None and config.mone_neurons_per_token is not None:
        raise ValueError(
            f"mone_neuron_ratio = {config.mone_neuron_ratio} and mone_neurons_per_token = "
            f"{config.mone_neurons_per_token} are both set: give one of them"
        )
    if not is_mone(config):
        return
    check_model(config)
    check_selection(config)
    check_flex(config)
    check_router_loss(config)
    if config.mone_record_masks is not None:
        kind = config.moe_token_dispatcher_type
        check(
            kind != "flex",
            "moe_token_dispatcher_type",
            kind,
            "alltoall or allgather with "
            "mone_record_masks: DeepEP brings no masks back (a recorded file replays under all)",
        )
    layer_pattern(config)


def _read_field(name: str, value: Any) -> Any:
    if name == "mone_layer_freq" and isinstance(value, str):
        from megatron.training.arguments import moe_freq_type

        # What is no such pattern is refused below, as the text it is.
        with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError):
            value = moe_freq_type("".join(value.split()))
    return read_value(name, value, _TYPES[name])


def attach_fields_from_env(config: Any) -> None:
    """Give a plain TransformerConfig its mone_* fields from the YAML named by MONE_CONFIG.

    This is what lets `--spec megatron_mone.layer_spec mone_layer_spec` work in a stock script,
    which builds the config before it asks for the spec.

    Raises:
        ValueError: MONE_CONFIG is unset, unreadable, or holds an unknown or wrong field.
    """
    path = os.environ.get(CONFIG_ENV)
    if not path:
        raise ValueError(
            f"the model config has no mone_* fields and {CONFIG_ENV} is not set: name a YAML "
            f"file with them, e.g. 'mone_neuron_ratio: 0.25'{_other_variables()}"
        )
    values = _read_fields(Path(path))
    try:
        attach_fields(config, values)
        neurons_per_token(config)
    except ValueError as error:
        raise ValueError(f"{CONFIG_ENV} = {path!r}: {error}") from error


def _other_variables() -> str:
    """The variables that stand where MONE_CONFIG should: a field's, or one misspelt."""
    names = [name for name in os.environ if name.upper().startswith("MONE_")]
    fields = [name for name in names if name.lower() in MONE_FIELD_NAMES]
    close = [name for name in names if nearest_name(name.upper(), [CONFIG_ENV])]
    wrong = ", ".join(sorted({*fields, *close}))
    return f"; {wrong} in the environment is read by nobody" if wrong else ""


def attach_fields(config: Any, values: Mapping[str, Any]) -> None:
    """Set all mone_* fields on `config` (defaults where `values` has none) and validate it."""
    for f in dataclasses.fields(MoNEFields):
        setattr(config, f.name, values.get(f.name, f.default))
    config.mone_enabled = is_mone(config)
    validate(config)


def _read_fields(path: Path) -> dict[str, Any]:
    try:
        values = read_mapping(path)
    except ValueError as error:
        raise ValueError(f"{CONFIG_ENV} = {str(path)!r}: {error}") from error
    for name in values:
        if name not in MONE_FIELD_NAMES:
            hint = nearest_name(name, list(MONE_FIELD_NAMES))
            raise ValueError(f"{CONFIG_ENV} = {str(path)!r}: unknown field {name!r}{hint}")
    return values
