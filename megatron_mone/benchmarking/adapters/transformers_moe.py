"""Hugging Face transformers' MoE experts (OLMoE's class, shared by its MoE models), grouped_mm."""

import torch
from torch import Tensor

from megatron_mone.benchmarking.adapters.base import Adapter, Experts, why_no_package
from megatron_mone.benchmarking.cases import Cell, Inputs


class TransformersGroupedMM(Adapter):
    """Every routed row is given as a token of one expert, so that the same rows are computed."""

    name = "transformers-grouped-mm"
    timed = "its own sort, permutation and un-permutation of the rows too"

    def why_absent(self, cell: Cell, device: torch.device) -> str | None:
        """A reason where transformers is missing or too old."""
        missing = why_no_package("transformers", "transformers")
        if missing or why_no_package("transformers.integrations.moe", "transformers") is None:
            return missing
        return "transformers has no grouped experts before 5"

    def build(self, cell: Cell, inputs: Inputs) -> Experts:
        """Its module on views of the shared weights."""
        from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts

        config = OlmoeConfig(
            hidden_size=cell.hidden,
            intermediate_size=cell.neurons,
            num_experts=cell.experts,
            num_experts_per_tok=1,
            hidden_act="silu",
        )
        config._experts_implementation = "grouped_mm"
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        experts.gate_up_proj = torch.nn.Parameter(inputs.gate_up_E2FH)
        experts.down_proj = torch.nn.Parameter(inputs.down_EHF)
        expert_of_N1 = inputs.expert_of_N.unsqueeze(-1)

        def forward(x_NH: Tensor, probs_N: Tensor) -> Tensor:
            # routing weights come in the model's dtype, as from its router
            return experts(x_NH, expert_of_N1, probs_N.to(x_NH.dtype).unsqueeze(-1))

        return Experts(forward, [experts.gate_up_proj, experts.down_proj])
