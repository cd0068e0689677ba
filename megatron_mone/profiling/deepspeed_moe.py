"""DeepSpeed's own MoE layer in the place of Megatron's: a baseline for whole training steps.

Gate, dispatch, exchanges and combination are deepspeed.moe.layer.MoE; its experts are gated SiLU
ones of the same size. Initial weights are those that Megatron's layer would draw, so that both are
the same model. No token is dropped: in every micro-batch each expert gets as many rows as the
fullest expert of any rank of the group has from one rank, and computes the padding too
(`computed_rows`). For comparison only: it has no checkpoint of its own. May touch: Megatron's layer
specs, DeepSpeed's gate. Shapes: S tokens, E experts, E_l local, F neurons, H hidden, k chosen.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import BaseMoELayer, MoELayer
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, apply_random_logits
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional as F

from megatron_mone.common.patch import Replaced
from megatron_mone.deepspeed.package import init_distributed
from megatron_mone.deepspeed.settings import stage_of
from megatron_mone.model.layer_spec import is_moe, stock_block, with_experts
from megatron_mone.moe.experts import stock_weights

BACKEND = "DeepSpeed MoE"
_NEVER = -1e4
"""Logit of an expert that is not to be chosen; the softmax of the chosen stays as it is."""


class GatedExpert(torch.nn.Module):
    """W_down (silu(W_gate x) * W_up x), as a user of DeepSpeed writes an expert.

    Args:
        hidden, neurons: H and F.
        dtype: of the weights.
    """

    def __init__(self, hidden: int, neurons: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up = torch.nn.Linear(hidden, 2 * neurons, bias=False, dtype=dtype)
        self.down = torch.nn.Linear(neurons, hidden, bias=False, dtype=dtype)

    def forward(self, x_H: Tensor) -> Tensor:
        """[..., H] of [..., H]."""
        gate_F, up_F = self.gate_up(x_H).chunk(2, dim=-1)
        return self.down(F.silu(gate_F) * up_F)


class _Choice:
    """What stands where Megatron's layer has its router: nothing, or a tape of choices."""

    router_replay: Any = None

    def set_layer_number(self, layer_number: int) -> None:
        """Megatron tells its router."""


class DeepSpeedMoE(MoELayer):
    """deepspeed.moe.layer.MoE with the surface that a transformer layer and the profiler use.

    Args:
        config: of the model; `check_deepspeed_moe` has seen it.
        layer_number: 1-based.
        pg_collection: of the run.
        unused: what Megatron's layer takes besides: its parts.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int | None = None,
        pg_collection: ProcessGroupCollection | None = None, **unused: Any,
    ) -> None:  # fmt: skip
        init_distributed()
        from deepspeed.moe.layer import MoE

        assert pg_collection is not None
        BaseMoELayer.__init__(self, config, layer_number, pg_collection)
        assert config.num_moe_experts is not None
        assert config.moe_ffn_hidden_size is not None
        expert = (config.hidden_size, config.moe_ffn_hidden_size, config.params_dtype)
        with torch.random.fork_rng():  # its own initial values are not kept
            self.moe = MoE(
                config.hidden_size, GatedExpert(*expert), config.num_moe_experts,
                pg_collection.ep.size(), config.moe_router_topk, drop_tokens=False, use_rts=False,
                top2_2nd_expert_sampling=False,
            )  # fmt: skip
        self.router: Any = _Choice()
        inner = self.moe.deepspeed_moe
        draw: Any = config.init_method
        draw(inner.gate.wg.weight)
        fc1_E2FH, fc2_EFH = stock_weights(config, self.num_local_experts, pg_collection.expt_tp)
        for number, one in enumerate(inner.experts.deepspeed_experts):
            one.gate_up.weight.data.copy_(fc1_E2FH[number].flatten(0, 1))
            one.down.weight.data.copy_(fc2_EFH[number].t())

    def forward(self, hidden_states: Tensor, *unused: Any, **named: Any) -> tuple[Tensor, None]:
        """([s, b, H], no bias) of [s, b, H]."""
        with self._chosen():
            output, balance_loss, _ = self.moe(hidden_states)
        if self.training and torch.is_grad_enabled() and self.config.moe_aux_loss_coeff:
            balance_loss = balance_loss * self.config.moe_aux_loss_coeff
            output = MoEAuxLossAutoScaler.apply(output, balance_loss)
        return output, None

    @contextmanager
    def _chosen(self) -> Iterator[None]:
        """Where experts are to be replayed or drawn: the gate's logits changed so that it chooses
        those."""
        tape, balanced = self.router.router_replay, self.config.moe_router_force_load_balancing
        if tape is None and not balanced:
            yield
            return
        from deepspeed.moe import sharded_moe

        name = {1: "top1gating", 2: "top2gating"}.get(self.config.moe_router_topk, "topkgating")
        gating = getattr(sharded_moe, name)

        def choosing(logits_SE: Tensor, *given: Any, **named: Any) -> Any:
            if balanced:
                logits_SE = apply_random_logits(logits_SE)
            if tape is not None:
                k = self.config.moe_router_topk
                _, chosen_Sk = tape.get_replay_topk(
                    logits_SE, k, default_compute_topk=lambda s, k, **ignored: s.topk(k, dim=1)
                )
                others_SE = torch.ones_like(logits_SE).scatter(1, chosen_Sk, 0.0).bool()
                logits_SE = logits_SE.masked_fill(others_SE, _NEVER)
            return gating(logits_SE, *given, **named)

        with Replaced(sharded_moe, name, choosing):
            yield

    def watch_rows(
        self, routed: Callable[[Tensor], None], computed: Callable[[int], None]
    ) -> list[Callable[[], None]]:
        """Have two functions told in every forward.

        Args:
            routed: of this rank's rows for each expert, [E] int64.
            computed: of the rows that this rank's experts compute, padding included.

        Returns:
            What ends it.
        """
        inner = self.moe.deepspeed_moe
        return [
            self.moe.register_forward_hook(lambda module, given, out: routed(out[2])).remove,
            inner.experts.register_forward_pre_hook(
                lambda module, given: computed(given[0].shape[:-1].numel())
            ).remove,
        ]

    def local(self, rows_E: Tensor) -> Tensor:
        """[E_l] rows of this rank's experts, of what every rank routed; collective."""
        summed_E = rows_E.clone()
        torch.distributed.all_reduce(summed_E, group=self.ep_group)
        return summed_E[self.local_expert_indices]


def deepspeed_moe_layer_spec(
    config: Any, vp_stage: int | None = None
) -> TransformerBlockSubmodules:
    """Stock decoder layers with DeepSpeedMoE where they have experts.

    Args:
        config: a GPTModelConfig, or its TransformerConfig.
        vp_stage: virtual pipeline stage, None without interleaving.
    """
    block = stock_block(getattr(config, "transformer", config), vp_stage)
    block.layer_specs = [
        with_experts(spec, DeepSpeedMoE, experts=None) if is_moe(spec) else spec
        for spec in block.layer_specs or ()
    ]
    return block


_NEEDED: dict[str, tuple[tuple[Any, ...], str]] = {
    "tensor_model_parallel_size": ((1,), "it takes the tokens of tensor-parallel ranks for copies, "
                                   "and Megatron splits them"),
    "expert_tensor_parallel_size": ((1, None), "its experts are whole"),
    "moe_shared_expert_intermediate_size": ((None,), "it has no shared experts"),
    "moe_latent_size": ((None,), "its experts have the model's width"),
    "hybrid_layer_pattern": ((None,), "it stands in GPT models alone"),
    "mtp_num_layers": ((None, 0), "it has no multi-token prediction"),
    "swiglu": ((True,), "its experts here are gated SiLU"),
    "add_bias_linear": ((False,), "its experts here have no bias"),
    "moe_router_score_function": (("softmax",), "its gate is a softmax"),
    "moe_router_pre_softmax": ((False,), "its gate makes the chosen experts' shares add up to 1"),
    "moe_router_load_balancing_type": (("aux_loss", "none"), "its balance loss is of the batch"),
    "moe_router_num_groups": ((None,), "its gate knows no groups of experts"),
    "moe_router_topk_scaling_factor": ((None,), "its gate scales nothing"),
    "moe_router_enable_expert_bias": ((False,), "its gate has no bias"),
    "moe_z_loss_coeff": ((None,), "its gate has no z-loss"),
    "moe_input_jitter_eps": ((None,), "nothing is random in it here"),
    "moe_expert_capacity_factor": ((None,), "no token is dropped in it here"),
}  # fmt: skip


def check_deepspeed_moe(args: Namespace) -> None:
    """Whether DeepSpeed's layer can stand in for Megatron's.

    Args:
        args: Megatron's, validated.

    Raises:
        ValueError: one line that names the argument, its value and the fix.
    """
    if not args.num_experts:
        raise ValueError("--against deepspeed-moe needs a model with experts: set num_experts")
    if stage_of(args) == 3:
        raise ValueError(
            "--against deepspeed-moe: zero_stage = 3 is not trained: DeepSpeed refuses its own MoE "
            "layer there: write deepspeed-moe:zero_stage=2"
        )
    for name, (allowed, why) in _NEEDED.items():
        if (value := getattr(args, name, allowed[0])) not in allowed:
            raise ValueError(
                f"--against deepspeed-moe: {name} = {value!r} is not in DeepSpeed's layer: {why}: "
                f"set {name} = {allowed[0]!r}, or leave the baseline out"
            )
