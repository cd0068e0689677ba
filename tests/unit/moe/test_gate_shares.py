"""Native sums over gates against plain torch, and what the balance loss keeps for backward."""

import pytest
import torch

from megatron_mone.kernels.cpu import products, shares
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.gate_shares import GateShares, TorchGateSums

pytestmark = pytest.mark.skipif(
    not shares.usable(torch.zeros(1)), reason="the CPU kernels cannot be built here"
)


def entries(rows, neurons, dtype, seed=0):
    """A ragged mask, its gates (one row all zero, one entry negative zero), weights and blocks."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(rows, neurons, generator=generator) < 0.3
    mask = NeuronMask.from_bool(chosen)
    gate_K = torch.randn(mask.indices_K.numel(), generator=generator).to(dtype)
    if rows > 2:
        gate_K[mask.rows_K == 1] = 0.0
    block_N = torch.randint(0, 3, (rows,), generator=generator)
    return mask, gate_K, block_N, torch.randn(3, neurons, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "neurons"), [(0, 5), (1, 1), (40, 33), (300, 40_000)])
def test_native_sums_are_torchs(rows, neurons, dtype, monkeypatch):
    """Also over more neurons than int16 indices hold; memory nobody wrote is NaN."""
    monkeypatch.setattr(products, "POISON", True)
    mask, gate_K, block_N, weight_BF = entries(rows, neurons, dtype)
    plain, native = (kind(mask, gate_K, block_N) for kind in (TorchGateSums, shares.GateSums))
    exact = TorchGateSums(mask, gate_K.double(), block_N)  # sums of rows have orders of their own
    total_N = exact.row_sums().float()
    torch.testing.assert_close(native.row_sums(), total_N)
    weighted_N = exact.row_sums(weight_BF.double()).float()
    torch.testing.assert_close(native.row_sums(weight_BF), weighted_N, rtol=1e-4, atol=1e-4)
    for total in (None, total_N):
        for ours, theirs in zip(
            native.share_sums(3, total), plain.share_sums(3, total), strict=True
        ):
            torch.testing.assert_close(ours, theirs)
    loss_N = torch.linspace(-1, 1, rows)
    for pair in ((None, None), (total_N, loss_N)):
        torch.testing.assert_close(native.slopes(weight_BF, *pair), plain.slopes(weight_BF, *pair))


def test_threads_do_not_change_a_bit():
    mask, gate_K, block_N, weight_BF = entries(200, 77, torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        native = shares.GateSums(mask, gate_K, block_N)
        total_N = native.row_sums()
        results.append([
            total_N, *native.share_sums(3, total_N), native.slopes(weight_BF, total_N, total_N),
        ])  # fmt: skip
    torch.set_num_threads(2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale_free", [True, False])
def test_gradient_by_autograd(scale_free):
    """Of the written-out gradient in float64, and of the gates made again from pre-activations."""
    mask, gate_K, block_N, weight_BF = entries(40, 33, torch.float64)
    a_K = torch.randn_like(gate_K).requires_grad_()
    weight_BF = weight_BF.double()

    def loss(kept_a):
        gate = torch.nn.functional.silu(a_K)
        terms = GateShares(mask, gate, block_N, 3, scale_free, kept_a, "silu")
        share_BF, _, total_N = terms.sums()
        return terms.loss(weight_BF, share_BF, total_N)

    size_K = torch.nn.functional.silu(a_K).abs()
    share_K = size_K
    if scale_free:
        share_K = size_K / torch.zeros(40).double().index_add(0, mask.rows_K, size_K)[mask.rows_K]
    wanted = (share_K * weight_BF[block_N[mask.rows_K], mask.indices_K.long()]).sum()
    (slope,) = torch.autograd.grad(wanted, a_K)
    for kept_a in (None, a_K.detach()):
        torch.testing.assert_close(loss(kept_a), wanted)
        torch.testing.assert_close(torch.autograd.grad(3 * loss(kept_a), a_K)[0], 3 * slope)


def test_nothing_per_entry_is_kept():
    """Beside what was there: the row totals and the weights."""
    mask, gate_K, block_N, weight_BF = entries(200, 400, torch.float32)
    a_K = gate_K.clone()
    terms = GateShares(mask, gate_K.requires_grad_(), block_N, 3, True, a_K, "silu")
    share_BF, _, total_N = terms.sums()
    known = {t.untyped_storage().data_ptr() for t in (a_K, mask.indices_K, mask.offsets_N1)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        terms.loss(weight_BF, share_BF, total_N)
    assert sum(saved.values()) == 4 * weight_BF.numel() + 200 * (4 + 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_no_block_are_as_if_they_were_not_there(dtype):
    """To the bit, native and in torch; their gates have no gradient."""
    mask, gate_K, block_N, weight_BF = entries(40, 33, dtype)
    real_N = torch.rand(40, generator=torch.Generator().manual_seed(1)) < 0.6
    real_K, results = real_N[mask.rows_K], []
    for kept, gate, block, outside in (
        (mask, gate_K, block_N.masked_fill(~real_N, 3), True),
        (mask.rows(real_N.nonzero().flatten()), gate_K[real_K], block_N[real_N], False),
    ):
        gate = gate.clone().requires_grad_()
        terms = GateShares(kept, gate, block, 3, has_outside=outside)
        share_BF, counts_BF, total_N = terms.sums()
        loss = terms.loss(weight_BF.to(dtype), share_BF, total_N)
        results.append((share_BF, counts_BF, loss, torch.autograd.grad(loss, gate)[0]))
    (*sums, slope_K), (*wanted, wanted_K) = results
    assert all(torch.equal(a, b) for a, b in zip(sums, wanted, strict=True))
    assert torch.equal(slope_K[real_K], wanted_K)
    assert not slope_K[~real_K].any()
