"""A MoNE model in transformers: the decoder that Megatron-Core trains, with neurons chosen inside.

This file is copied into exported folders, beside configuration_mone.py. It needs torch and
transformers; where megatron-mone is installed too, its native CPU kernels compute the chosen
neurons alone (no gradients, float32 or bfloat16), else plain torch does, with the same choice.

Weights, of layer N (all [out, in] but the experts'):
    model.embed_tokens.weight, model.norm.weight, lm_head.weight
    model.layers.N.input_layernorm.weight, .post_attention_layernorm.weight
    model.layers.N.self_attn.{q,k,v,o}_proj.weight, .bias where the config has them
    model.layers.N.self_attn.{q,k}_norm.weight              qk_norm: [head_dim], or of all heads
  latent attention, in the place of q, k, v:
    model.layers.N.self_attn.q_proj.weight, or q_a_proj, q_a_layernorm, q_b_proj
    model.layers.N.self_attn.kv_a_proj_with_mqa.weight, kv_a_layernorm, kv_b_proj
  dense:
    model.layers.N.mlp.{gate,up,down}_proj.weight
  experts:
    model.layers.N.mlp.gate.weight                          [E, H] the router
    model.layers.N.mlp.gate.e_score_correction_bias         [E] float32, router_expert_bias
    model.layers.N.mlp.experts.gate_up_proj                 [E, 2F, H] gate first
    model.layers.N.mlp.experts.down_proj                    [E, H, F]
    model.layers.N.mlp.experts.neuron_bias                  [E, F] float32, mone_selection_bias
    model.layers.N.mlp.shared_experts.{gate,up,down}_proj.weight
    model.layers.N.mlp.shared_expert_gate.weight            [1, H]

Symbols: T tokens, K experts of a token, N routed rows (one for each token and expert), E experts, F
neurons of one expert, S kept of them, H hidden size.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update
from transformers.modeling_utils import (
    ALL_ATTENTION_FUNCTIONS,
    PreTrainedModel,
    slice_logits_to_keep,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .configuration_mone import MoNEConfig

try:  # the one thing that is used of megatron-mone, if it is here
    from megatron_mone import kernels as native
    from megatron_mone.kernels.neuron_selection import NeuronSelector
except ImportError:
    native = None  # type: ignore[assignment]

_GATES: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "softmax": lambda a_NF: torch.softmax(a_NF, dim=-1),
    "gelu": F.gelu,
    "relu": F.relu,
    "squared_relu": lambda a_NF: F.relu(a_NF).square(),
}


class NeuronChoice:
    """Which neurons of an expert a routed row keeps, by |gate|.

    The same to the bit as Megatron's experts choose: exactly S, or as many as pass the threshold;
    ties go to the lower index, NaN is above every number.

    Args:
        config: of the model.
        every: keep all neurons: a layer that does not choose.
    """

    def __init__(self, config: MoNEConfig, every: bool) -> None:
        self.rule, self.threshold = config.mone_selection, config.mone_threshold
        self.groups, self.block = config.mone_neuron_groups, config.mone_neuron_block
        self.least, self.most = config.selection_bounds
        self.neurons = config.moe_intermediate_size
        self.every = every or (self.rule == "topk" and self.most == self.neurons)

    @torch.no_grad()
    def __call__(self, gate_NF: Tensor, bias_NF: Tensor | None = None) -> Tensor:
        """[N, F] bool of the gates, and of what is added to their sizes for choosing."""
        score_NF = gate_NF.abs()
        if bias_NF is not None:
            score_NF = score_NF + bias_NF
        score_NB = block_scores(score_NF, self.block)
        score_NB = torch.where(score_NB.isnan(), torch.inf, score_NB)
        score_RB = score_NB.reshape(score_NB.shape[0] * self.groups, -1)
        size = self.groups * self.block
        mask_RB = largest(score_RB, self.most // size)
        if self.rule == "threshold":
            mask_RB &= score_RB >= score_RB.amax(dim=1, keepdim=True) * self.threshold
            mask_RB |= largest(score_RB, self.least // size)
        return mask_RB.view_as(score_NB).repeat_interleave(self.block, dim=1)


def block_scores(score_NF: Tensor, block: int) -> Tensor:
    """[N, F / B] sums of B adjacent scores in float32, halves added to halves: an order that is
    part of the definition."""
    if block == 1:
        return score_NF
    if score_NF.dtype != torch.float64:
        score_NF = score_NF.float()
    parts_NBW = score_NF.unflatten(1, (-1, block))
    parts_NBW = F.pad(parts_NBW, (0, (1 << (block - 1).bit_length()) - block))
    while parts_NBW.shape[2] > 1:
        low_NBW, high_NBW = parts_NBW.chunk(2, dim=2)
        parts_NBW = low_NBW + high_NBW
    return parts_NBW.squeeze(2)


def largest(score_RB: Tensor, kept: int) -> Tensor:
    """[R, B] bool of the `kept` largest scores of each row; ties go to the lower index."""
    if kept == score_RB.shape[1] or score_RB.shape[0] == 0:
        return torch.ones_like(score_RB, dtype=torch.bool)
    kth_R1 = score_RB.topk(kept, dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above_RB, equal_RB = score_RB > kth_R1, score_RB == kth_R1
    room_R1 = kept - above_RB.sum(dim=1, keepdim=True)
    return above_RB | (equal_RB & (equal_RB.cumsum(dim=1) <= room_R1))


@use_experts_implementation
class MoNEExperts(nn.Module):
    """E experts, whose rows keep the neurons that `NeuronChoice` names.

    Args:
        config: of the model.
        layer_idx: number of the layer, from 0.
    """

    neuron_bias: Tensor | None

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__()
        self.num_experts, width = config.num_experts, config.moe_intermediate_size
        chooses = layer_idx in config.choosing_layers
        self.choice = NeuronChoice(config, every=not chooses)
        self.activation = config.mone_activation if chooses else "silu"
        self.act_fn = _GATES[self.activation]
        hidden = config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, hidden, width))
        biased = chooses and config.mone_selection_bias
        bias_EF = torch.zeros(self.num_experts, width) if biased else None
        self.register_buffer("neuron_bias", bias_EF)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Sum of what the experts of each token make of it.

        Args:
            hidden_states: [T, H].
            top_k_index: [T, K] numbers of experts.
            top_k_weights: [T, K] probabilities.
        """
        expert_N = top_k_index.flatten()
        order_N = expert_N.argsort(stable=True)
        counts_E = expert_N.bincount(minlength=self.num_experts)
        token_N = order_N // top_k_index.shape[1]
        x_NH, probs_N = hidden_states[token_N], top_k_weights.flatten()[order_N]
        y_NH = self._native(x_NH, probs_N, counts_E)
        if y_NH is None:
            y_NH = self._plain(x_NH, probs_N, counts_E.tolist())
        output_TH = torch.zeros_like(hidden_states, dtype=y_NH.dtype)
        return output_TH.index_add_(0, token_N, y_NH)

    def _apply_gate(self, gate_up_out: Tensor) -> Tensor:
        """[N, F] of [N, 2F], for transformers' own implementations, which know no expert here."""
        a_NF, u_NF = gate_up_out.chunk(2, dim=-1)
        return self._kept(self.act_fn(a_NF), u_NF)

    def _kept(self, gate_NF: Tensor, u_NF: Tensor, bias_F: Tensor | None = None) -> Tensor:
        h_NF = gate_NF * u_NF
        if self.choice.every:
            return h_NF
        return h_NF.masked_fill(~self.choice(gate_NF.detach(), bias_F), 0.0)

    def _plain(self, x_NH: Tensor, probs_N: Tensor, counts: list[int]) -> Tensor:
        """[N, H], an expert at a time."""
        rows = zip(x_NH.split(counts), probs_N.split(counts), strict=True)
        weights = zip(self.gate_up_proj.unbind(), self.down_proj.unbind(), strict=True)
        bias_EF = (
            [None] * self.num_experts if self.neuron_bias is None else self.neuron_bias.float()
        )
        y_NH = []
        for (x_MH, p_M), (gate_up, down), bias_F in zip(rows, weights, bias_EF, strict=True):
            if x_MH.shape[0]:
                a_MF, u_MF = F.linear(x_MH, gate_up).chunk(2, dim=-1)
                h_MF = self._kept(self.act_fn(a_MF), u_MF, bias_F) * p_M.unsqueeze(-1)
                y_NH.append(F.linear(h_MF.to(x_MH.dtype), down))
        return torch.cat(y_NH) if y_NH else x_NH

    def _native(self, x_NH: Tensor, probs_N: Tensor, counts_E: Tensor) -> Tensor | None:
        """[N, H] by megatron-mone's CPU kernels; None where they are not here or not the faster."""
        weights = (self.gate_up_proj, self.down_proj)
        needs_gradient = torch.is_grad_enabled() and any(
            one.requires_grad for one in (x_NH, probs_N, *weights)
        )
        if native is None or needs_gradient or x_NH.device.type != "cpu" or self.choice.every:
            return None
        if any(one.dtype != x_NH.dtype for one in weights):  # autocast
            return None
        width = self.choice.neurons
        gate_EFH, up_EFH = self.gate_up_proj[:, :width], self.gate_up_proj[:, width:]
        choose = self._native_choice(counts_E)
        call = native.Call("cpu", x_NH.dtype, self.activation)
        call = call.sized(x_NH.shape[0], gate_EFH, choose)
        if native.choose_backend("auto", call).backend.name != "cpu":
            return None
        if self.down_proj.stride(1) != 1:  # a neuron's H numbers side by side, as kernels read them
            with torch.inference_mode(False):  # whose tensors could not be trained afterwards
                self.down_proj.data = self.down_proj.data.mT.contiguous().mT
        return native.grouped_mlp_with_gates(
            x_NH, probs_N, counts_E, gate_EFH, up_EFH, self.down_proj.mT,
            choose=choose, activation=self.activation, backend="cpu",
        ).y_NH  # fmt: skip

    def _native_choice(self, counts_E: Tensor) -> Any:
        choice = self.choice
        if choice.rule == "topk" and self.neuron_bias is None:
            return native.Selection(choice.most, choice.groups, choice.block)
        rule = NeuronSelector(
            choice.rule, choice.least, choice.most, choice.threshold, choice.groups, choice.block
        )
        bias_EF = None if self.neuron_bias is None else self.neuron_bias.float()
        return native.BiasedRule(rule, bias_EF, counts_E)


class MoNERouter(nn.Module):
    """The experts of each token and their probabilities, as Megatron's TopKRouter finds them."""

    e_score_correction_bias: Tensor | None

    def __init__(self, config: MoNEConfig) -> None:
        super().__init__()
        self.top_k, self.num_experts = config.num_experts_per_tok, config.num_experts
        self.score, self.before = config.router_score_function, config.router_pre_softmax
        self.groups, self.used_groups = config.n_group, config.topk_group
        self.scaling = config.routed_scaling_factor
        self.dtype = config.router_dtype and getattr(torch, config.router_dtype)
        self.weight = nn.Parameter(torch.zeros(config.num_experts, config.hidden_size))
        bias_E = torch.zeros(config.num_experts) if config.router_expert_bias else None
        self.register_buffer("e_score_correction_bias", bias_E)

    def forward(self, hidden_TH: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [T, E], probabilities [T, K] and numbers [T, K] of the chosen experts."""
        dtype = self.dtype or hidden_TH.dtype
        with torch.autocast(hidden_TH.device.type, enabled=False):
            logits_TE = F.linear(hidden_TH.to(dtype), self.weight.to(dtype))
        if self.score == "softmax" and not self.before:
            chosen_TK, index_TK = self._top(logits_TE)
            probs_TK = torch.softmax(chosen_TK, dim=-1, dtype=torch.float32)
        elif self.score == "softmax":
            probs_TK, index_TK = self._top(torch.softmax(logits_TE, dim=-1, dtype=torch.float32))
        else:
            scores_TE = torch.sigmoid(logits_TE.float())
            bias_E = self.e_score_correction_bias
            _, index_TK = self._top(scores_TE if bias_E is None else scores_TE + bias_E.float())
            probs_TK = scores_TE.gather(1, index_TK)
            if self.top_k > 1:
                probs_TK = probs_TK / (probs_TK.sum(dim=-1, keepdim=True) + 1e-20)
        return logits_TE, (probs_TK * self.scaling).to(logits_TE.dtype), index_TK

    def _top(self, scores_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The K largest scores; with groups of experts, within those whose best sum to the most."""
        if self.groups is None or self.used_groups is None:
            return torch.topk(scores_TE, self.top_k, dim=1)
        grouped_TGE = scores_TE.unflatten(1, (self.groups, -1))
        best_TG = grouped_TGE.topk(self.top_k // self.used_groups, dim=-1).values.sum(dim=-1)
        used_TG = torch.zeros_like(best_TG, dtype=torch.bool)
        used_TG.scatter_(1, best_TG.topk(self.used_groups, dim=-1, sorted=False).indices, True)
        masked_TE = grouped_TGE.masked_fill(~used_TG.unsqueeze(-1), -torch.inf).flatten(1)
        return torch.topk(masked_TE, self.top_k, dim=1)


class MoNEMLP(nn.Module):
    """A dense SwiGLU layer, or a shared expert."""

    def __init__(self, config: MoNEConfig, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] of [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoNESparseBlock(nn.Module):
    """Routed experts, and those that all tokens pass."""

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__()
        self.gate = MoNERouter(config)
        self.experts = MoNEExperts(config, layer_idx)
        shared = config.shared_expert_intermediate_size
        self.shared_experts = None if shared is None else MoNEMLP(config, shared)
        weighed = config.shared_expert_gate
        self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False) if weighed else None

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., H] of [..., H]."""
        hidden_TH = hidden_states.flatten(0, -2)
        _, probs_TK, index_TK = self.gate(hidden_TH)
        output = self.experts(hidden_TH, index_TK, probs_TK).view_as(hidden_states)
        if self.shared_experts is None:
            return output
        shared = self.shared_experts(hidden_states)
        if self.shared_expert_gate is not None:
            shared = shared * torch.sigmoid(self.shared_expert_gate(hidden_states))
        return output + shared


class MoNERMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        """As `x`."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class MoNERotaryEmbedding(nn.Module):
    """Cosines and sines [batch, sequence, rotated elements] of positions."""

    inv_freq: Tensor

    def __init__(self, config: MoNEConfig) -> None:
        super().__init__()
        assert config.rope_parameters is not None
        self.max_seq_len_cached = self.original_max_seq_len = config.max_position_embeddings
        self.config, self.rope_type = config, config.rope_parameters["rope_type"]
        make: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            make = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = make(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    @staticmethod
    def compute_default_rope_parameters(config: MoNEConfig, **_: Any) -> tuple[Tensor, float]:
        """Frequencies of the rotated part of a head, and the factor of cosines and sines."""
        assert config.rope_parameters is not None
        rope = config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))  # type: ignore[operator]
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size)), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """In x's dtype, of positions [batch, sequence]."""
        angles = position_ids[..., None].float() * self.inv_freq.float().to(x.device)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first elements of heads [batch, heads, sequence, head_dim], halves against halves;
    cos and sin are [batch, sequence, rotated]."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, passed = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    low, high = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-high, low), dim=-1) * sin
    return torch.cat((turned, passed), dim=-1) if passed.shape[-1] else turned


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention written out; arguments and results as transformers' interface has them."""
    share = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(share, dim=1) for one in (key, value))
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class _Attention(nn.Module):
    """What both kinds of attention share: the cache, and the interface to implementations."""

    o_proj: nn.Linear

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, True
        self.num_heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.num_key_value_groups = self.num_heads // config.num_key_value_heads  # type: ignore[operator]
        self.scaling = 1.0

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, sequence, H] and, where the implementation makes them, attention weights."""
        query, key, value = self.heads(hidden_states, *position_embeddings)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        output, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
        )
        return self.o_proj(output.flatten(2)), weights

    def heads(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [batch, heads, sequence, elements]."""
        raise NotImplementedError


class MoNEAttention(_Attention):
    """Heads that share keys and values."""

    q_norm: nn.Module
    k_norm: nn.Module

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        size, hidden, bias = config.head_dim, config.hidden_size, config.attention_bias
        assert size is not None
        assert config.num_key_value_heads is not None
        shared = config.num_key_value_heads * size
        self.scaling = config.attention_multiplier or size**-0.5
        self.q_proj = nn.Linear(hidden, self.num_heads * size, bias=bias)
        self.k_proj = nn.Linear(hidden, shared, bias=bias)
        self.v_proj = nn.Linear(hidden, shared, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * size, hidden, bias=config.attention_output_bias)
        for name, heads in (("q_norm", self.num_heads), ("k_norm", config.num_key_value_heads)):
            if config.qk_norm:
                width = heads * size if config.qk_norm_all_heads else size
                setattr(self, name, MoNERMSNorm(width, config.rms_norm_eps))

    def heads(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [batch, heads, sequence, head_dim]."""
        query, key, value = (
            projection(hidden_states) for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.qk_norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        shape = (*hidden_states.shape[:2], -1, self.head_dim)
        query, key, value = (one.view(shape) for one in (query, key, value))
        if self.config.qk_norm and not self.config.qk_norm_all_heads:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (one.transpose(1, 2) for one in (query, key, value))
        return rotate(query, cos, sin), rotate(key, cos, sin), value


class MoNELatentAttention(_Attention):
    """DeepSeek's: keys and values from a latent, one rotated part of the key for all heads."""

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__(config, layer_idx)
        hidden, rank, eps = config.hidden_size, config.kv_lora_rank, config.rms_norm_eps
        plain, turned, values = (
            config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim,
        )  # fmt: skip
        assert rank is not None
        assert plain is not None
        assert turned is not None
        assert values is not None
        self.sizes, self.scaling = (plain, turned, values), _latent_scaling(config, plain + turned)
        queries, compressed = self.num_heads * (plain + turned), config.q_lora_rank
        if compressed is None:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, compressed, bias=False)
            self.q_a_layernorm = _norm(config, compressed, eps)
            self.q_b_proj = nn.Linear(compressed, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, rank + turned, bias=False)
        self.kv_a_layernorm = _norm(config, rank, eps)
        self.kv_b_proj = nn.Linear(rank, self.num_heads * (plain + values), bias=False)
        self.o_proj = nn.Linear(self.num_heads * values, hidden, bias=False)

    def heads(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value, [batch, heads, sequence, elements]."""
        plain, turned, values = self.sizes
        shape = (*hidden_states.shape[:2], self.num_heads, -1)
        if self.config.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q_plain, q_turned = query.view(shape).transpose(1, 2).split([plain, turned], dim=-1)
        latent, k_turned = self.kv_a_proj_with_mqa(hidden_states).split(
            [self.kv_b_proj.in_features, turned], dim=-1
        )
        both = self.kv_b_proj(self.kv_a_layernorm(latent)).view(shape).transpose(1, 2)
        k_plain, value = both.split([plain, values], dim=-1)
        q_turned = rotate(_pairs_to_halves(q_turned), cos, sin)
        k_turned = rotate(_pairs_to_halves(k_turned.unsqueeze(1)), cos, sin)
        key = torch.cat((k_plain, k_turned.expand(-1, self.num_heads, -1, -1)), dim=-1)
        return torch.cat((q_plain, q_turned), dim=-1), key, value


def _norm(config: MoNEConfig, size: int, eps: float) -> nn.Module:
    return MoNERMSNorm(size, eps) if config.qk_norm else nn.Identity()


def _pairs_to_halves(x: Tensor) -> Tensor:
    """What is rotated lies in pairs there, and as two halves here."""
    return torch.cat((x[..., 0::2], x[..., 1::2]), dim=-1)


def _latent_scaling(config: MoNEConfig, size: int) -> float:
    assert config.rope_parameters is not None
    factor, scale = config.rope_parameters.get("factor"), 1.0
    if factor is not None and factor > 1:
        scale = 0.1 * (config.rope_parameters.get("mscale_all_dim") or 0.0) * math.log(factor) + 1.0
    return scale * scale / math.sqrt(size)


class MoNEDecoderLayer(GradientCheckpointingLayer):
    """Attention, then experts or a dense layer, each after a norm and beside its residual."""

    def __init__(self, config: MoNEConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.mlp_layer_types is not None
        latent = config.kv_lora_rank is not None
        self.self_attn = (MoNELatentAttention if latent else MoNEAttention)(config, layer_idx)
        self.mlp: nn.Module
        if config.mlp_layer_types[layer_idx] == "sparse":
            self.mlp = MoNESparseBlock(config, layer_idx)
        else:
            self.mlp = MoNEMLP(config, config.intermediate_size)
        self.input_layernorm = MoNERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = MoNERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.residual_multiplier = config.residual_multiplier

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """[batch, sequence, H] of the same."""
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended * self.residual_multiplier
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + output * self.residual_multiplier


class MoNEPreTrainedModel(PreTrainedModel):
    """What transformers asks of the model's classes."""

    config: MoNEConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ("MoNEDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values",)
    _keep_in_fp32_modules_strict = ("e_score_correction_bias", "neuron_bias")
    _supports_sdpa = True
    _can_record_outputs = {  # noqa: RUF012
        "router_logits": OutputRecorder(MoNERouter, index=0),
        "hidden_states": MoNEDecoderLayer,
        "attentions": OutputRecorder(_Attention, index=1),
    }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, MoNEExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
            bias = module.neuron_bias
        elif isinstance(module, MoNERouter):
            init.normal_(module.weight, mean=0.0, std=std)
            bias = module.e_score_correction_bias
        else:
            return
        if bias is not None:
            init.zeros_(bias)

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """This file's own ("eager"), unless another is asked for.

        Raises:
            ValueError: another one, of a model whose choice depends on the expert.
        """
        if requested_experts in (None, "eager"):
            return "eager"
        if self.config.mone_selection_bias:
            raise ValueError(
                f"experts_implementation = {requested_experts!r} is not allowed with "
                "mone_selection_bias, which adds to each expert's gates: leave it out, or 'eager'"
            )
        return super().get_correct_experts_implementation(requested_experts)


class MoNEModel(MoNEPreTrainedModel):
    """Embeddings, decoder layers and the last norm."""

    def __init__(self, config: MoNEConfig) -> None:
        super().__init__(config)
        self.padding_idx, self.vocab_size = config.pad_token_id, config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(MoNEDecoderLayer(config, layer) for layer in layers)
        self.norm = MoNERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = MoNERotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states [batch, sequence, H] of tokens [batch, sequence].

        Raises:
            ValueError: both or neither of input_ids and inputs_embeds.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            seen = past_key_values.get_seq_length() if past_key_values is not None else 0
            positions = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + seen
            position_ids = positions.unsqueeze(0)
        mask = create_causal_mask(
            config=self.config, inputs_embeds=inputs_embeds, attention_mask=attention_mask,
            past_key_values=past_key_values, position_ids=position_ids,
        )  # fmt: skip
        hidden_states = inputs_embeds * self.config.embedding_multiplier
        rotary = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers:
            hidden_states = layer(
                hidden_states, position_embeddings=rotary, attention_mask=mask,
                past_key_values=past_key_values, position_ids=position_ids, use_cache=use_cache,
                **kwargs,
            )  # fmt: skip
        return MoeModelOutputWithPast(
            last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values
        )


class MoNEForCausalLM(MoNEPreTrainedModel, GenerationMixin):
    """The model with its output layer."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: MoNEConfig) -> None:
        super().__init__(config)
        self.model, self.vocab_size = MoNEModel(config), config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast:
        """Logits [batch, sequence, vocabulary]; with labels [batch, sequence], their mean loss.

        Balance losses are those of training in Megatron and are not added here.
        """
        outputs = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
            **kwargs,
        )  # fmt: skip
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        logits = logits / self.config.logits_scaling
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        return MoeCausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states, attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )  # fmt: skip


__all__ = ["MoNEForCausalLM", "MoNEModel", "MoNEPreTrainedModel"]
