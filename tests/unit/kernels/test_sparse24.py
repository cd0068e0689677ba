"""The 2:4 pattern in torch's format, products by it, and what the sparse24 backend refuses.

Nothing here ran on a GPU; the layer is among the interpreter's cases (triton_two_four_cases.py).
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from megatron_mone.kernels import Call, Selection, choose_backend, sparse24
from megatron_mone.kernels.__main__ import backends
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.operands import apply_rule
from megatron_mone.kernels.triton import self_check, two_four
from megatron_mone.planning.tracing import traced_backend
from tests.unit.kernels.two_four_stand_ins import stand_ins

ROWS, NEURONS = 96, 128


def chosen() -> torch.Tensor:
    """[ROWS, NEURONS] bool of the reference's choice; ties among few distinct values."""
    gate_NF = torch.randint(0, 4, (ROWS, NEURONS)).float()
    return apply_rule(Selection(NEURONS // 2, groups=NEURONS // 4), gate_NF)


def test_words_become_torchs_metadata():
    """Kept values in order and metadata are what torch compresses dense rows to, and decode."""
    mask_NF = chosen()
    words_NW = NeuronMask.from_bool(mask_NF).words()
    assert two_four.keeps_two_of_four(words_NW)
    v_NF = torch.rand(ROWS, NEURONS).add(1).bfloat16().masked_fill(~mask_NF, 0)
    values, meta = sparse_semi_structured_from_dense_cutlass(v_NF)
    ours = two_four.cutlass_order(two_four.metadata(words_NW))
    assert torch.equal(v_NF[mask_NF].view(ROWS, -1), values)
    assert torch.equal(ours, meta)
    v_NF[:, ::3] = 0  # a kept zero is none for torch, and decodes to the same
    values = v_NF[mask_NF].view(ROWS, -1)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, ours), v_NF)


def test_bits_that_are_no_pattern_are_seen_and_have_valid_codes():
    """Rows of nobody hold any bits: their metadata must not be what hardware does not take."""
    mask_NF = torch.rand(ROWS, NEURONS) < 0.5
    words_NW = NeuronMask.from_bool(mask_NF).words()
    assert not two_four.keeps_two_of_four(words_NW)
    one = chosen()
    one[7, 40:44] = torch.tensor([True, False, False, False])
    assert not two_four.keeps_two_of_four(NeuronMask.from_bool(one).words())
    _, meta = sparse_semi_structured_from_dense_cutlass(mask_NF.bfloat16())
    assert torch.equal(two_four.cutlass_order(two_four.metadata(words_NW)), meta)


@pytest.mark.parametrize("terms", [1, 2])
def test_rows_are_filled_up_to_what_a_product_takes(terms):
    """By the rows behind an expert's, and past the last row by its own: no result is of them."""
    counts, hidden = [3, 0, 18, 1], 8
    mask_NF = chosen()[: sum(counts)]
    words_NW = NeuronMask.from_bool(mask_NF).words()
    pairs = []
    for _ in range(terms):
        v_NF = torch.randn(mask_NF.shape).masked_fill(~mask_NF, 0).bfloat16()
        w_EFH = torch.randn(len(counts), NEURONS, hidden).bfloat16()
        pairs.append((two_four.TwoFour(v_NF, words_NW), w_EFH))
    with stand_ins(two_four.CUSPARSELT) as seen:
        y_NH = two_four.hidden_product(two_four.CUSPARSELT, counts, None, *pairs)
    assert [shape[0] for shape in seen] == [16] * terms + [32] * terms + [16] * terms
    starts = [0, 3, 3, 21]
    for expert, (start, count) in enumerate(zip(starts, counts, strict=True)):
        rows = slice(start, start + count)
        want = sum(v.wide_NF[rows].float() @ w[expert].float() for v, w in pairs)
        torch.testing.assert_close(y_NH[rows].float(), want, rtol=2e-2, atol=5e-2)


def test_each_device_has_its_product(monkeypatch):
    """CUTLASS on 8.x alone, cuSPARSELt later; what is missing is named."""
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    found = {}
    for capability in ((7, 5), (8, 0), (8, 9), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda at=capability: at)
        found[capability] = two_four.gemm_here()
    assert found[8, 0] is found[8, 9] is two_four.CUTLASS
    assert found[7, 5] == "compute capability 7.5 has no sparse tensor cores: use 8.0 or later"
    assert found[9, 0].startswith("compute capability 9.0 needs cuSPARSELt")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    assert two_four.gemm_here() is two_four.CUSPARSELT


RUNS = Call(
    "cuda", torch.bfloat16, groups=352, neurons=1408, kept_share=0.5, hidden=2048, rows=9, experts=2
)


@pytest.fixture
def device(monkeypatch):
    """A device of compute capability 8.0 whose check finds nothing."""
    monkeypatch.setattr(sparse24.triton, "available", lambda: (True, ""))
    monkeypatch.setattr(two_four, "gemm_here", lambda: two_four.CUTLASS)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(self_check, "two_four_fault", lambda device: None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"by_rule": True}, "a rule over all gates chooses: use mone_selection = topk"),
        ({"block": 2}, "mone_neuron_block = 2: 2:4 keeps single neurons, set it to 1"),
        ({"groups": 1}, "mone_neuron_groups = 1 of 1408 neurons: .* set it to F / 4 = 352"),
        ({"kept_share": 0.25}, "mone_neuron_ratio = 0.25: 2:4 keeps half, set it to 0.5"),
        ({"device": "cpu"}, "the tensors are on cpu: move them to a CUDA device"),
        ({"dtype": torch.float32}, "the tensors are torch.float32: use bfloat16"),
        ({"activation": "softmax"}, "activation = 'softmax': the kernels have silu"),
        ({"all_gates": True}, "set mone_ng_loss_type to another than normalized"),
        ({"neurons": 352, "groups": 88}, "moe_ffn_hidden_size = 352 neurons on this rank: CUTLASS"),
        ({"hidden": 2044}, "hidden_size = 2044: CUTLASS takes multiples of 8"),
    ],
)
@pytest.mark.usefixtures("device")
def test_refusals(changes, words):
    with pytest.raises(ValueError, match=f"backend = 'sparse24' cannot run here: .*{words}"):
        choose_backend("sparse24", replace(RUNS, **changes))


@pytest.mark.usefixtures("device")
def test_it_runs_by_name_alone(monkeypatch):
    """Before the first batch, of a mask that says no groups, and of the call itself; not by auto,
    and not where the device has no product or its check found a fault."""
    for call in (Call("cuda", torch.bfloat16), replace(RUNS, groups=None, kept_share=None), RUNS):
        assert choose_backend("sparse24", call).backend.name == "sparse24"
    auto = choose_backend("auto", RUNS)
    assert auto.backend.name == "reference"
    assert "not sparse24: not run on a GPU yet, so only by name" in auto.reason
    for module, name, words in (
        (self_check, "two_four_fault", "kernel 2:4 of CUTLASS is wrong"),
        (two_four, "gemm_here", "compute capability 7.5 has no sparse tensor cores"),
    ):
        monkeypatch.setattr(module, name, lambda *device, words=words: words)
        with pytest.raises(ValueError, match=f"'sparse24' cannot run here: {words}"):
            choose_backend("sparse24", RUNS)


def test_sizes_of_a_batch_say_groups_and_hidden():
    w_EFH = torch.empty(2, 64, 16)
    of_selection = Call().sized(3, w_EFH, Selection(32, groups=16))
    assert (of_selection.groups, of_selection.hidden, of_selection.kept_share) == (16, 16, 0.5)
    mask = NeuronMask.from_bool(torch.ones(3, 64, dtype=torch.bool), kept=64)
    assert Call().sized(3, w_EFH, mask).groups is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_it_is_listed_with_its_reason(capsys):
    for options, reason in (
        ({}, "mone_neuron_groups = 1 of 64 neurons"),
        ({"neuron_groups": 16, "ratio": 0.5}, "triton needs a CUDA device"),
    ):
        backends(neurons=64, dtype="bf16", device="cuda", **options)
        line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("sparse24"))
        assert line.startswith(f"sparse24   not usable: {reason}")
        assert line.endswith("go an expert at a time and wait for the row counts)")


def test_no_plan_prices_it():
    config = SimpleNamespace(
        mone_enabled=True, transformer_impl="transformer_engine", mone_backend="sparse24"
    )
    with pytest.raises(ValueError, match=r"mone_backend = 'sparse24' is not priced: .* 'triton'"):
        traced_backend.install(config)
