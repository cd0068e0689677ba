"""The Mamba mixer's two kernels in plain torch, against the recurrence that they stand for."""

import pytest
import torch
from torch.nn.functional import silu, softplus

from megatron_mone.cpu_emulation.hybrid import GroupedRMSNorm, split_conv1d_scan

BATCH, LENGTH, HEADS, CHANNELS, GROUPS, STATES, TAPS = 2, 7, 4, 3, 2, 5, 4
WIDTH = HEADS * CHANNELS


def stepwise(inputs, weight, bias, dt_bias, a, d):
    """One position after another: h = exp(dt A) h + dt B x; y = (C h + D x) silu(z)."""
    rows, states = [], GROUPS * STATES
    for row in inputs:
        z, xbc, dt = row.split([WIDTH, WIDTH + 2 * states, HEADS], dim=-1)
        held = torch.zeros(HEADS, CHANNELS, STATES, dtype=row.dtype)
        out = []
        for t in range(len(row)):
            window = [
                xbc[t - TAPS + 1 + k] * weight[:, k] for k in range(TAPS) if t - TAPS + 1 + k >= 0
            ]
            x, b, c = silu(sum(window) + bias).split([WIDTH, states, states])
            x = x.view(HEADS, CHANNELS)
            b, c = (
                v.view(GROUPS, STATES).repeat_interleave(HEADS // GROUPS, dim=0) for v in (b, c)
            )
            step = softplus(dt[t] + dt_bias)
            held = (
                torch.exp(step * a)[:, None, None] * held
                + step[:, None, None] * x[..., None] * b[:, None]
            )
            y = (held * c[:, None]).sum(-1) + x * (d if d.dim() == 2 else d[:, None])
            out.append(y.flatten() * silu(z[t]))
        rows.append(torch.stack(out))
    return torch.stack(rows)


@pytest.fixture
def parts():
    torch.manual_seed(5)
    channels = WIDTH + 2 * GROUPS * STATES
    shapes = [(BATCH, LENGTH, WIDTH + channels + HEADS), (channels, TAPS), (channels,), (HEADS,)]
    made = [torch.randn(shape, requires_grad=True) for shape in shapes]
    return [*made, (-torch.rand(HEADS) - 0.1).requires_grad_()]


@pytest.mark.parametrize("d_shape", [(HEADS,), (HEADS, CHANNELS)])
def test_scan_is_the_recurrence(parts, d_shape):
    d = torch.randn(d_shape, requires_grad=True)
    headdim = CHANNELS if len(d_shape) == 1 else None
    got = split_conv1d_scan(*parts, D=d, headdim=headdim, ngroups=GROUPS, chunk_size=128)
    wanted = stepwise(*(part.double() for part in parts), d.double())
    assert torch.allclose(got.double(), wanted, atol=1e-5)
    weight = torch.randn_like(got)
    here = torch.autograd.grad((got * weight).sum(), [*parts, d])
    there = torch.autograd.grad((wanted * weight).sum(), [*parts, d])
    for one, other in zip(here, there, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-4)


def test_packed_sequences_know_nothing_of_each_other(parts):
    inputs, *rest = parts
    d = torch.ones(HEADS)
    seq_idx = torch.tensor([[0] * 3 + [1] * 4] * BATCH)
    packed = split_conv1d_scan(
        inputs, *rest, D=d, headdim=CHANNELS, ngroups=GROUPS, seq_idx=seq_idx
    )
    alone = [
        split_conv1d_scan(part, *rest, D=d, headdim=CHANNELS, ngroups=GROUPS)
        for part in (inputs[:, :3], inputs[:, 3:])
    ]
    assert torch.allclose(packed, torch.cat(alone, dim=1), atol=1e-5)


def test_norm_takes_each_group_by_itself():
    norm = GroupedRMSNorm(6, eps=0.0, group_size=3, norm_before_gate=False)
    x = torch.tensor([[3.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    assert torch.allclose(norm(x), torch.tensor([[3**0.5, 0, 0, 1, 1, 1]]))
