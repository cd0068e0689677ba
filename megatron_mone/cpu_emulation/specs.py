"""What the layer specs hand out where Transformer Engine is absent."""

from typing import Any, NoReturn

from megatron_mone.common.patch import Patch, in_source, megatron_source


def _apply_attention() -> None:
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.training.models import gpt

    from megatron_mone.cpu_emulation.attention import EmulatedDotProductAttention

    LocalSpecProvider.core_attention = lambda self: EmulatedDotProductAttention
    # `--attention-backend local` puts this class over the spec's.
    gpt.MCoreDotProductAttention = EmulatedDotProductAttention


def _stock_attention_is_narrow() -> bool:
    source = megatron_source("core/transformer/dot_product_attention.py")
    refuses_cp = "only supported by TEDotProductAttention" in source
    return bool(source) and (refuses_cp or "k_channels" not in source)


def _no_transformer_engine(*args: Any, **kwargs: Any) -> NoReturn:
    """Stand in for the spec provider that is None without Transformer Engine."""
    raise RuntimeError(
        "transformer_impl='transformer_engine' (the default of --transformer-impl) needs "
        "Transformer Engine and a GPU; on CPU ranks pass --transformer-impl local"
    )


def _apply_error() -> None:
    from megatron.core.models.gpt import gpt_layer_specs

    if gpt_layer_specs.TESpecProvider is None:
        gpt_layer_specs.TESpecProvider = _no_transformer_engine


PATCHES = (
    Patch(
        name="core-attention",
        needed_by="megatron/core/transformer/dot_product_attention.py: __init__",
        why="the only core attention without Transformer Engine asserts CP 1 and does not take "
        "MLA's k_channels and v_channels",
        apply=_apply_attention,
        still_needed=_stock_attention_is_narrow,
    ),
    Patch(
        name="transformer-engine-error",
        needed_by="megatron/core/models/gpt/gpt_layer_specs.py: TESpecProvider = None",
        why="the default transformer_impl ends in \"'NoneType' object is not callable\"; an error "
        "names the flag instead",
        apply=_apply_error,
        still_needed=in_source("core/models/gpt/gpt_layer_specs.py", "TESpecProvider = None"),
    ),
)
