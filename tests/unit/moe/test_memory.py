"""What the experts and a whole layer keep for backward, against stock Megatron's, in bytes."""

import pytest
import torch

from megatron_mone.benchmarking.memory import saved_bytes
from megatron_mone.kernels.cpu import backend as cpu
from tests.unit.moe.builders import build_layer

pytestmark = [
    pytest.mark.usefixtures("one_rank"),
    pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here"),
]

ROWS, NEURONS, HIDDEN = 256, 512, 64
COUNTS = torch.tensor([100, 0, 60, 96])


def layer(kind, dtype, **changes):
    return build_layer(
        kind, hidden_size=HIDDEN, moe_ffn_hidden_size=NEURONS, params_dtype=dtype,
        bf16=dtype == torch.bfloat16, moe_router_dtype="fp32", bias_activation_fusion=True,
        gated_linear_unit=True, **changes,
    )  # fmt: skip


def kept(module, call, *inputs):
    """Bytes beside the module's parameters and its inputs."""
    given = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *inputs)}
    return saved_bytes(call, given)


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 0.34), (torch.bfloat16, 0.40)])
def test_experts_keep_a_third_of_stock_megatrons(dtype, limit):
    """At r = 1/4, and even against a dense expert that keeps its 2 F pre-activations alone."""
    x = torch.randn(ROWS, HIDDEN, dtype=dtype, requires_grad=True)
    probs = torch.rand(ROWS, requires_grad=True)
    ours, stock = (layer(kind, dtype).experts for kind in ("mone", "stock"))
    mone = kept(ours, lambda: ours(x, COUNTS, probs).y_NH, x, probs)
    dense = kept(stock, lambda: stock(x, COUNTS, probs)[0], x, probs)
    assert ROWS * NEURONS // 4 * (2 * dtype.itemsize + 2) <= mone
    assert mone <= limit * dense
    assert mone <= limit * 2 * ROWS * NEURONS * dtype.itemsize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", ["selected", "entropy", "raw"])
def test_the_balance_loss_keeps_nothing_per_entry(dtype, loss):
    """Of the whole layer: its row totals, row blocks and weights are all that the loss adds."""
    x = torch.randn(ROWS // 2, 1, HIDDEN, dtype=dtype, requires_grad=True)
    sizes = []
    for coefficient in (0.0, 0.1):
        module = layer(
            "mone", dtype, mone_ng_loss_coeff=coefficient, mone_ng_loss_type=loss
        ).train()
        sizes.append(kept(module, lambda m=module: m(x)[0], x))
    weights, per_row = 4 * 4 * NEURONS, 4 + 8
    assert 0 < sizes[1] - sizes[0] <= weights + ROWS * per_row + 64


def test_recompute_keeps_no_kept_entries():
    """With the MoE layer recomputed, what is kept does not grow with S at all."""
    sizes = {}
    for ratio in (0.25, 1.0):
        module = layer("mone", torch.float32, mone_neuron_ratio=ratio).train()
        x = torch.randn(ROWS // 2, 1, HIDDEN, requires_grad=True)
        from megatron.core import tensor_parallel

        sizes[ratio] = kept(
            module, lambda m=module, v=x: tensor_parallel.checkpoint(m, False, v)[0], x
        )
    assert sizes[0.25] == sizes[1.0] < ROWS * HIDDEN * 4 + 4096
