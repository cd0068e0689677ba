"""Hybrid models on CPU ranks: local modules in the one stack spec, and Mamba's two kernels.
Where Transformer Engine is (in the planner's stand-in), the spec is what it was.

Megatron's hybrid stack is of Transformer Engine's modules alone, and its Mamba mixer calls kernels
of mamba-ssm. The mixer itself, its context parallelism too, stays Megatron's.

Shapes: b batch, l sequence, h heads of p channels, g groups of n states, w taps of the convolution.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, silu, softplus

from megatron_mone.common.patch import Patch, in_source, rebind, wrapping


def split_conv1d_scan(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    headdim: int | None,
    ngroups: int,
    seq_idx: Tensor | None = None,
    **of_kernels: Any,
) -> Tensor:
    """mamba_ssm's `mamba_split_conv1d_scan_combined` without its norm: y [b, l, h * p], gated.

    As a product over all pairs of positions, which is exact, and quadratic in l.

    Args:
        zxbcdt: [b, l, z + x + B + C + dt], what the input projection makes.
        conv1d_weight: [x + B + C, w], conv1d_bias: [x + B + C].
        dt_bias: [h].
        A: [h], negative.
        D: [h], or [h, p] where headdim is None.
        headdim: p.
        ngroups: g.
        seq_idx: [b, l], the number of the packed sequence a position is of; None: all are of one.
        of_kernels: chunks, activation (SiLU) and dtypes; nothing here depends on them.
    """
    del of_kernels
    heads = D.shape[0]
    width = heads * (D.shape[1] if headdim is None else headdim)
    states = (zxbcdt.shape[-1] - 2 * width - heads) // 2
    z, xbc, dt = zxbcdt.split([width, width + 2 * states, heads], dim=-1)
    xbc = silu(_convolve(xbc, conv1d_weight, conv1d_bias, seq_idx))
    x, b, c = xbc.float().split([width, states, states], dim=-1)
    x_blhp = x.unflatten(-1, (heads, -1))
    b_blhn, c_blhn = (
        part.unflatten(-1, (ngroups, -1)).repeat_interleave(heads // ngroups, dim=2)
        for part in (b, c)
    )
    dt_blh = softplus(dt.float() + dt_bias)
    decay = (dt_blh * A).cumsum(dim=1).transpose(1, 2)  # [b, h, l], in logarithms
    later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
    hidden = (
        later if seq_idx is None else later | (seq_idx[:, :, None] != seq_idx[:, None])[:, None]
    )
    kept = (decay[..., :, None] - decay[..., None, :]).masked_fill(hidden, -torch.inf).exp()
    scores = torch.einsum("blhn,bmhn->bhlm", c_blhn, b_blhn) * kept
    y = torch.einsum("bhlm,bmhp->blhp", scores, x_blhp * dt_blh[..., None])
    y = y + x_blhp * (D[:, None] if headdim is not None else D)
    return (y.flatten(2) * silu(z.float())).to(zxbcdt.dtype)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """Each channel of x [b, l, d] over the last w positions of its own sequence."""
    taps = weight.shape[1]
    y = bias.expand_as(x)
    for back in range(taps):
        moved = pad(x, (0, 0, back, 0))[:, : x.shape[1]]
        if seq_idx is not None and back:
            before = pad(seq_idx, (back, 0), value=-1)[:, : x.shape[1]]
            moved = moved * (before == seq_idx)[..., None]
        y = y + moved * weight[:, taps - 1 - back]
    return y


class GroupedRMSNorm(torch.nn.Module):
    """mamba_ssm's RMSNormGated where nothing is gated: each group of channels by its own size."""

    def __init__(
        self, width: int, eps: float, group_size: int, norm_before_gate: bool, **factory: Any
    ) -> None:
        del norm_before_gate
        super().__init__()
        self.eps, self.group_size = eps, group_size
        self.weight = torch.nn.Parameter(torch.ones(width, **factory))

        self.tp_group: Any = None  # set by the mixer

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of the same."""
        groups = x.float().unflatten(-1, (-1, self.group_size))
        scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.eps)
        return ((groups * scale).flatten(-2) * self.weight.float()).to(x.dtype)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None
    ) -> Any:
        """As the mixer's ExtendedRMSNorm, whose base class is missing."""
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, {"weight": 0}, sharded_offsets,
            tp_group=self.tp_group, dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip


def _local(stock: Any) -> Any:
    """The stack's spec with the modules of Megatron's local GPT layers, and their keys."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec

    def layer(spec: Any, **parts: Any) -> Any:
        return replace(spec, submodules=replace(spec.submodules, **parts))

    layers = stock.submodules
    dense = partial(get_gpt_layer_local_submodules, normalization="RMSNorm")
    plain, latent = dense(), dense(multi_latent_attention=True)
    norm, keys = plain.input_layernorm, plain.sharded_state_dict_keys_map
    mixer = layers.mamba_layer.submodules.mixer
    mixer = layer(mixer, in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    one_mtp = layers.mtp_block_spec.submodules.layer_specs[0]
    one_mtp = layer(one_mtp, enorm=norm, hnorm=norm, eh_proj=ColumnParallelLinear, layer_norm=norm)
    return ModuleSpec(
        module=stock.module,
        submodules=replace(
            layers,
            mamba_layer=layer(
                layers.mamba_layer,
                norm=norm,
                mixer=mixer,
                sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
            ),
            attention_layer=layer(
                layers.attention_layer,
                input_layernorm=norm,
                self_attention=plain.self_attention,
                sharded_state_dict_keys_map=keys,
            ),
            mla_layer=layer(
                layers.mla_layer, input_layernorm=norm, self_attention=latent.self_attention
            ),
            mlp_layer=layer(
                layers.mlp_layer,
                pre_mlp_layernorm=norm,
                mlp=plain.mlp,
                sharded_state_dict_keys_map=keys,
            ),
            moe_layer=layer(
                layers.moe_layer,
                pre_mlp_layernorm=norm,
                mlp=get_moe_module_spec(use_te=False, num_experts=8),  # any number of them
                sharded_state_dict_keys_map=keys,
            ),
            mtp_block_spec=layer(layers.mtp_block_spec, layer_specs=[one_mtp]),
        ),
    )


def _apply_spec() -> None:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.models.hybrid import hybrid_layer_specs
    from megatron.training.models import hybrid  # noqa: F401  its copy of the name is rebound

    stock = hybrid_layer_specs.hybrid_stack_spec
    if not HAVE_TE:
        rebind(stock, _local(stock))


def _local_norm(stock: Any) -> Any:
    from megatron.core.extensions.transformer_engine import HAVE_TE
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return stock if HAVE_TE else WrappedTorchNorm


def _apply_kernels() -> None:
    from megatron.core.ssm import mamba_mixer

    mamba_mixer.HAVE_MAMBA_SSM = True
    mamba_mixer.mamba_split_conv1d_scan_combined = split_conv1d_scan
    mamba_mixer.ExtendedRMSNorm = GroupedRMSNorm
    mamba_mixer._check_mamba_sequence_packing_support = lambda **_of: (True, None)


PATCHES = (
    Patch(
        name="hybrid-stack",
        needed_by="megatron/core/models/hybrid/hybrid_layer_specs.py: hybrid_stack_spec",
        why="its layers are Transformer Engine's, whatever transformer_impl says",
        apply=_apply_spec,
        still_needed=in_source(
            "core/models/hybrid/hybrid_layer_specs.py", "linear_qkv=TELayerNormColumnParallelLinear"
        ),
    ),
    wrapping(
        "hybrid-final-norm",
        "megatron.core.models.hybrid.hybrid_block: TENorm",
        _local_norm,
        why="the stack's last norm is not in its spec",
        needed_while="self.final_norm = TENorm(",
    ),
    Patch(
        name="mamba-kernels",
        needed_by="megatron/core/ssm/mamba_mixer.py: mamba_split_conv1d_scan_combined, "
        "RMSNormGated",
        why="the mixer's scan and norm are Triton kernels of mamba-ssm, which need a GPU",
        apply=_apply_kernels,
        still_needed=in_source(
            "core/ssm/mamba_mixer.py",
            "from mamba_ssm.ops.triton.ssd_combined import",
            "y = mamba_split_conv1d_scan_combined(",
        ),
    ),
)
