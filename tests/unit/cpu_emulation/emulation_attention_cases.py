"""Cases of the core attention in two context-parallel ranks: each alone (CP_1), and both (CP_2)."""

import math

import pytest
import torch
import torch.distributed as dist

SEQUENCE, BATCH, HEADS = 16, 2, 4


def _config(**overrides):
    from megatron.core.transformer import TransformerConfig

    settings = dict(
        num_layers=1,
        hidden_size=32,
        num_attention_heads=HEADS,
        attention_dropout=0.0,
        hidden_dropout=0.0,
    )
    return TransformerConfig(**{**settings, **overrides})


def _attention(cls=None, mask_type="causal", softmax_scale=None, layer_number=1, **overrides):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType

    from megatron_mone.cpu_emulation.attention import EmulatedDotProductAttention

    channels = {k: overrides.pop(k) for k in ("k_channels", "v_channels") if k in overrides}
    return (cls or EmulatedDotProductAttention)(
        _config(**overrides),
        layer_number,
        AttnMaskType[mask_type],
        "self",
        softmax_scale=softmax_scale,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(["tp", "cp"]),
        **channels,
    )


def _inputs(groups=HEADS, dk=8, dv=8, dtype=torch.float32):
    shapes = ((HEADS, dk), (groups, dk), (groups, dv))
    return [torch.randn(SEQUENCE, BATCH, n, d, dtype=dtype, requires_grad=True) for n, d in shapes]


def _naive(query, key, value, scale, causal=True):
    """Attention by its definition in float64: one query row and one head at a time."""
    query, key, value = (x.double() for x in (query, key, value))
    repeat = query.size(2) // key.size(2)
    rows = []
    for i in range(query.size(0)):
        heads = []
        for n in range(query.size(2)):
            last = i + 1 if causal else key.size(0)
            k, v = key[:last, :, n // repeat], value[:last, :, n // repeat]
            p = torch.softmax((k * query[i, :, n]).sum(-1) * scale, dim=0)
            heads.append((p[..., None] * v).sum(0))
        rows.append(torch.cat(heads, dim=-1))
    return torch.stack(rows)


def _gradients(output, inputs, weight):
    return torch.autograd.grad((output.double() * weight).sum(), inputs)


def _check_against_naive(attention, inputs, scale, causal=True):
    output = attention(*inputs, None)
    expected = _naive(*inputs, scale, causal)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(expected)
    for got, want in zip(
        _gradients(output, inputs, weight), _gradients(expected, inputs, weight), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def case_causal():
    _check_against_naive(_attention(), _inputs(), 1 / math.sqrt(8))


def case_no_mask():
    _check_against_naive(_attention(mask_type="no_mask"), _inputs(), 1 / math.sqrt(8), causal=False)


def case_grouped_queries():
    _check_against_naive(_attention(num_query_groups=2), _inputs(groups=2), 1 / math.sqrt(8))


def case_mla_head_sizes():
    attention = _attention(k_channels=12, v_channels=6, softmax_scale=0.2)
    _check_against_naive(attention, _inputs(dk=12, dv=6), 0.2)


def case_query_key_layer_scaling():
    attention = _attention(
        layer_number=3, apply_query_key_layer_scaling=True, attention_softmax_in_fp32=True
    )
    _check_against_naive(attention, _inputs(), 1 / math.sqrt(8))


def case_stock_bit_for_bit():
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    for dtype in (torch.float32, torch.bfloat16):
        bf16 = dtype == torch.bfloat16
        inputs = _inputs(groups=2, dtype=dtype)
        outputs = []
        for cls in (DotProductAttention, None):
            attention = _attention(cls, num_query_groups=2, attention_dropout=0.3, bf16=bf16)
            model_parallel_cuda_manual_seed(3, force_reset_rng=True)
            output = attention(*inputs, None)
            outputs.append((output, *_gradients(output, inputs, 1.0)))
        for stock, ours in zip(*outputs, strict=True):
            assert torch.equal(stock, ours)


def case_local_spec_hands_it_out():
    from megatron.core.models.backends import LocalSpecProvider

    from megatron_mone.cpu_emulation.attention import EmulatedDotProductAttention

    assert LocalSpecProvider().core_attention() is EmulatedDotProductAttention


CP_1 = (
    case_causal,
    case_no_mask,
    case_grouped_queries,
    case_mla_head_sizes,
    case_query_key_layer_scaling,
    case_stock_bit_for_bit,
    case_local_spec_hands_it_out,
)


def _zigzag(tensor, rank):
    """Megatron's own cut of a sequence, [b, s] in its terms."""
    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    group = parallel_state.get_context_parallel_group()
    batch = {"x": tensor.transpose(0, 1).contiguous(), "cu_seqlens": None}
    return get_batch_on_this_cp_rank(batch, False, group)["x"].transpose(0, 1).contiguous()


def _check_cp_equals_one_rank(inputs, whole, cut):
    """The theorem: the parts of CP ranks are the parts of the whole, and so are their gradients."""
    rank = dist.get_rank()
    expected = whole(*inputs, None)
    weight = torch.randn_like(expected)
    expected_gradients = _gradients(expected, inputs, weight.double())
    parts = [_zigzag(x.detach(), rank).requires_grad_() for x in inputs]
    output = cut(*parts, None)
    torch.testing.assert_close(output, _zigzag(expected, rank), rtol=1e-5, atol=1e-6)
    gradients = _gradients(output, parts, _zigzag(weight, rank).double())
    for got, want in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(got, _zigzag(want, rank), rtol=1e-5, atol=1e-6)


def case_cp_causal_grouped_queries():
    _check_cp_equals_one_rank(
        _inputs(groups=2),
        _attention(num_query_groups=2),
        _attention(num_query_groups=2, context_parallel_size=2),
    )


def case_cp_mla():
    channels = dict(k_channels=12, v_channels=6, softmax_scale=0.2)
    _check_cp_equals_one_rank(
        _inputs(dk=12, dv=6),
        _attention(**channels),
        _attention(**channels, context_parallel_size=2),
    )


def case_cp_no_mask():
    _check_cp_equals_one_rank(
        _inputs(),
        _attention(mask_type="no_mask"),
        _attention(mask_type="no_mask", context_parallel_size=2),
    )


def case_cp_refusals():
    with pytest.raises(ValueError, match="window_size"):
        _attention(context_parallel_size=2, window_size=(4, 0))
    with pytest.raises(ValueError, match="softmax_type"):
        _attention(context_parallel_size=2, softmax_type="off-by-one")
    attention = _attention(mask_type="arbitrary", context_parallel_size=2)
    with pytest.raises(ValueError, match="attn_mask_type"):
        attention(*_inputs(), None)


CP_2 = (
    case_cp_causal_grouped_queries,
    case_cp_mla,
    case_cp_no_mask,
    case_cp_refusals,
)
