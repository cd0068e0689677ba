"""A stock Megatron MoE whose experts are torch's grouped_mm: a baseline for whole training steps.

Everything but the experts is Megatron's; they compute what SequentialMLP does, in two grouped
products and a fused SwiGLU. For comparison only: it has no checkpoint keys of its own. May touch:
Megatron's layer specs. Shapes: N rows grouped by expert, E_l local experts, F_l neurons, H hidden.
"""

from typing import Any

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_mone.model.layer_spec import is_moe, stock_block, with_experts
from megatron_mone.moe.experts import stock_weights
from megatron_mone.profiling.weighted_swiglu import WeightedSwiGLU


class GroupedMMExperts(MegatronModule):
    """Dense experts in torch.nn.functional.grouped_mm, initialised as Megatron's.

    Args:
        num_local_experts: E_l.
        config: with gated SiLU experts without bias.
        pg_collection: `expt_tp` is used.
        name: of the module, as Megatron passes it down; unused.
    """

    def __init__(
        self,
        num_local_experts: int,
        config: TransformerConfig,
        *,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        del name
        super().__init__(config=config)
        self.linear_fc1, self.linear_fc2 = stock_weights(
            config, num_local_experts, pg_collection.expt_tp
        )

    def forward(self, x_NH: Tensor, tokens_per_expert: Tensor, probs_N: Tensor) -> tuple:
        """([N, H] outputs, no bias); see SequentialMLP.forward."""
        offsets_E = tokens_per_expert.to(x_NH.device).cumsum(0).int()
        fc1_E2FH = self.linear_fc1.flatten(1, 2)
        gate_up_N2F = F.grouped_mm(x_NH, fc1_E2FH.transpose(1, 2), offs=offsets_E)
        h_NF = WeightedSwiGLU.apply(gate_up_N2F, probs_N)
        return F.grouped_mm(h_NF, self.linear_fc2, offs=offsets_E), None


def grouped_mm_layer_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Stock decoder layers with GroupedMMExperts in their MoE layers.

    Args:
        config: a GPTModelConfig, or its TransformerConfig.
        vp_stage: virtual pipeline stage, None without interleaving.

    Raises:
        ValueError: torch has no grouped_mm, or the experts are not gated SiLU without bias.
    """
    transformer = getattr(config, "transformer", config)
    check_grouped_mm(transformer)
    block = stock_block(transformer, vp_stage)
    block.layer_specs = [
        with_experts(spec, MoELayer, GroupedMMExperts) if is_moe(spec) else spec
        for spec in block.layer_specs or ()
    ]
    return block


def check_grouped_mm(config: TransformerConfig) -> None:
    """Raise ValueError, in one line, where grouped_mm cannot stand in for the experts."""
    if not hasattr(F, "grouped_mm"):
        raise ValueError("baseline grouped_mm needs torch >= 2.10: update torch or leave it out")
    if not config.gated_linear_unit or config.add_bias_linear or config.activation_func != F.silu:
        raise ValueError(
            "baseline grouped_mm has gated SiLU experts without bias: set swiglu = true and "
            "add_bias_linear = false, or leave it out"
        )
    for flag in ("delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"):
        if getattr(config, flag):
            raise ValueError(
                f"baseline grouped_mm makes weight gradients at once, which {flag} puts off: leave "
                "one of them out"
            )
    if config.mtp_num_layers:
        raise ValueError(
            f"baseline grouped_mm has no multi-token prediction (mtp_num_layers = "
            f"{config.mtp_num_layers}): leave it out"
        )
