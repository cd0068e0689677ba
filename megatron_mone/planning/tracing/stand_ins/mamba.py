"""Stand-ins for the kernels of mamba-ssm that Megatron's Mamba mixer calls, without values.

One op a kernel, "fused.mamba_...": the convolution of causal-conv1d and the chunked scan forward
(sums of the decay, states of chunks, their passing on, scores within chunks, the outputs); backward
all but the outputs again, then the gradients. Products count whole chunks: the kernels skip at most
half of the scores of one. Kept for backward: the mixer's projected input and the ungated output.
The norm behind it is mamba-ssm's RMSNorm, which keeps its input and a deviation a row and group.

Symbols: b batch, l sequence, h heads of p channels, g groups of n states, c chunks of q positions.
May touch: names in Megatron's mixer, while `installed`.

Sources: mamba_ssm.ops.triton.ssd_combined (MambaSplitConv1dScanCombinedFn,
_mamba_chunk_scan_combined_fwd and _bwd), layernorm_gated; megatron/core/ssm/mamba_mixer.py.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_mone.common.patch import Replaced
from megatron_mone.cpu_emulation.hybrid import GroupedRMSNorm
from megatron_mone.planning.tracing.stand_ins.op import note


@dataclass(frozen=True)
class _Scan:
    """Sizes of one call."""

    b: int
    l: int  # noqa: E741
    h: int
    p: int
    g: int
    n: int
    q: int

    @property
    def chunks(self) -> int:
        return -(-self.l // self.q)

    @property
    def of_states(self) -> int:
        """Operations of one product of inputs or outputs with the states."""
        return 2 * self.b * self.l * self.h * self.p * self.n

    @property
    def of_outputs(self) -> int:
        """Of one product of scores with inputs, or of outputs with inputs."""
        return 2 * self.b * self.l * min(self.q, self.l) * self.h * self.p

    @property
    def of_scores(self) -> int:
        """Of the scores, or of a gradient of them with B or C."""
        return 2 * self.b * self.l * min(self.q, self.l) * self.g * self.n


@dataclass(frozen=True)
class _Made:
    """What the forward kernels make on the way, and the backward ones again."""

    xbc: Tensor
    sums: Tensor
    dt: Tensor
    states: Tensor
    scores: Tensor


def _up_to_scores(zxbcdt: Tensor, weights: list[Tensor], dt_bias: Tensor, s: _Scan) -> _Made:
    """The kernels before the outputs."""

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return zxbcdt.new_empty(shape, dtype=dtype)

    width, states = s.h * s.p, s.g * s.n
    xbc = zxbcdt[..., width : 2 * width + 2 * states]
    convolved = new(*xbc.shape, dtype=xbc.dtype)
    note("fused.mamba_conv", [xbc, *weights], [convolved])
    x, b, c = convolved.split([width, states, states], dim=-1)
    sums, dt = (new(s.b, s.h, s.chunks, s.q) for _ in range(2))
    note("fused.mamba_sums", [zxbcdt[..., -s.h :], dt_bias], [sums, dt])
    of_chunks = new(s.b, s.chunks, s.h, s.p * s.n)
    note("fused.mamba_states", [x, b, dt, sums], [of_chunks], flops=s.of_states, dtype=x.dtype)
    passed = new(s.b, s.chunks, s.h, s.p * s.n, dtype=x.dtype)
    last = new(s.b, s.h, s.p * s.n)
    note("fused.mamba_pass_on", [of_chunks, sums[..., -1]], [passed, last])
    scores = new(s.b, s.chunks, s.g, s.q, s.q)
    note("fused.mamba_scores", [c, b], [scores], flops=s.of_scores, dtype=x.dtype)
    return _Made(convolved, sums, dt, passed, scores)


class _SplitConvScan(torch.autograd.Function):
    """[b, l, z + x + B + C + dt] -> [b, l, h p], gated."""

    @staticmethod
    def forward(ctx, zxbcdt, conv_weight, conv_bias, dt_bias, decay, skip, s: _Scan):
        made = _up_to_scores(zxbcdt, [conv_weight, conv_bias], dt_bias, s)
        width = s.h * s.p
        out, ungated = (zxbcdt.new_empty(s.b, s.l, width) for _ in range(2))
        x, c = made.xbc[..., :width], made.xbc[..., -s.g * s.n :]
        note(
            "fused.mamba_outputs",
            [made.scores, x, zxbcdt[..., :width], made.dt, made.sums, c, made.states, skip],
            [out, ungated],
            flops=s.of_outputs + s.of_states,
        )
        ctx.save_for_backward(zxbcdt, ungated, decay, dt_bias)
        ctx.weights, ctx.skip, ctx.sizes = (conv_weight, conv_bias), skip, s
        return out

    @staticmethod
    def backward(ctx, *gradients):
        (dout,), s = gradients, ctx.sizes
        zxbcdt, ungated, decay, dt_bias = ctx.saved_tensors
        width, states = s.h * s.p, s.g * s.n
        made = _up_to_scores(zxbcdt, list(ctx.weights), dt_bias, s)
        x, b, c = made.xbc.split([width, states, states], dim=-1)
        dzxbcdt, dxbc = torch.empty_like(zxbcdt), torch.empty_like(made.xbc)
        dx, db, dc = dxbc.split([width, states, states], dim=-1)
        dungated = torch.empty_like(dout)
        note("fused.mamba_gate_backward", [x, zxbcdt[..., :width], ungated, dout],
             [dzxbcdt[..., :width], dungated])  # fmt: skip
        dstates, again = torch.empty_like(made.states), torch.empty_like(made.states)
        note("fused.mamba_states_backward", [c, made.sums, dungated], [dstates],
             flops=s.of_states)  # fmt: skip
        note("fused.mamba_pass_on_backward", [made.states, made.sums[..., -1], dstates],
             [dstates, again])  # fmt: skip
        note("fused.mamba_inputs_backward",
             [x, made.dt, made.sums, b, made.scores, dungated, dstates, ctx.skip],
             [dx, torch.empty_like(made.dt)], flops=s.of_outputs + s.of_states)  # fmt: skip
        parts = [made.xbc.new_empty(s.b, s.l, states, dtype=torch.float32) for _ in range(2)]
        note("fused.mamba_b_backward", [x, made.dt, made.sums, dstates, b], parts[:1],
             flops=s.of_states, dtype=x.dtype)  # fmt: skip
        note("fused.mamba_c_backward", [again, made.sums, dungated, c], parts[1:],
             flops=s.of_states, dtype=x.dtype)  # fmt: skip
        dscores = torch.empty_like(made.scores)
        note("fused.mamba_scores_backward", [x, made.dt, made.sums, dungated], [dscores],
             flops=s.of_outputs, dtype=x.dtype)  # fmt: skip
        for factor, part, to in ((c, parts[0], db), (b, parts[1], dc)):
            note("fused.mamba_scores_backward", [factor, dscores, part], [to],
                 flops=s.of_scores)  # fmt: skip
        dsums = torch.empty_like(made.sums)
        note("fused.mamba_decay_backward", [x, made.dt, made.sums, dungated, made.scores], [dsums],
             flops=s.of_outputs, dtype=x.dtype)  # fmt: skip
        small = [torch.empty_like(t) for t in (dt_bias, decay)]
        note("fused.mamba_sums_backward", [dsums, made.dt, zxbcdt[..., -s.h :], decay],
             [dzxbcdt[..., -s.h :], *small])  # fmt: skip
        of_weights = [torch.empty_like(t) for t in ctx.weights]
        note("fused.mamba_conv_backward", [made.xbc, dxbc, *ctx.weights],
             [dzxbcdt[..., width:-s.h], *of_weights])  # fmt: skip
        return dzxbcdt, *of_weights, *small, torch.empty_like(ctx.skip), None


def split_conv_scan(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor, dt_bias: Tensor, A: Tensor,
    D: Tensor, *, chunk_size: int, headdim: int | None, ngroups: int, seq_idx: Any = None,
    **options: Any,
) -> Tensor:  # fmt: skip
    """mamba_ssm's `mamba_split_conv1d_scan_combined` without its norm: y [b, l, h p].

    Args:
        zxbcdt: [b, l, z + x + B + C + dt].
        conv1d_weight: [x + B + C, w], conv1d_bias: [x + B + C].
        dt_bias, A: [h].
        D: [h], or [h, p] where headdim is None.
        chunk_size: q.
        headdim: p.
        ngroups: g.
        seq_idx: of packed sequences.
        options: activation and dtypes that change no shape.

    Raises:
        ValueError: packed sequences.
    """
    del options
    if seq_idx is not None:
        raise ValueError("packed sequences cannot be traced: plan with sequences of one length")
    heads = D.shape[0]
    channels = D.shape[1] if headdim is None else headdim
    states = (conv1d_weight.shape[0] - heads * channels) // (2 * ngroups)
    batch, length, _ = zxbcdt.shape
    sizes = _Scan(batch, length, heads, channels, ngroups, states, chunk_size)
    return _SplitConvScan.apply(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, sizes)


class _Norm(torch.autograd.Function):
    """Rows of x by group, each by its size."""

    @staticmethod
    def forward(ctx, x, weight, groups):
        out = torch.empty_like(x)
        deviations = x.new_empty(x.numel() // x.shape[-1] * groups, dtype=torch.float32)
        note("fused.rms_norm", [x, weight], [out, deviations])
        ctx.save_for_backward(x, deviations)
        ctx.weight = weight
        return out

    @staticmethod
    def backward(ctx, *gradients):
        dx, dweight = torch.empty_like(gradients[0]), torch.empty_like(ctx.weight)
        read = [gradients[0], *ctx.saved_tensors, ctx.weight]
        note("fused.rms_norm_backward", read, [dx, dweight])
        return dx, dweight, None


class GroupedNorm(GroupedRMSNorm):
    """mamba_ssm's RMSNormGated where nothing is gated."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] of the same."""
        return _Norm.apply(x, self.weight, x.shape[-1] // self.group_size)


@contextmanager
def installed() -> Iterator[None]:
    """While it lasts Megatron's mixer calls these."""
    from megatron.core.ssm import mamba_mixer

    with (
        Replaced(mamba_mixer, "mamba_split_conv1d_scan_combined", split_conv_scan),
        Replaced(mamba_mixer, "ExtendedRMSNorm", GroupedNorm),
    ):
        yield
