"""Executed and active operations of a step follow docs/MODEL.md's cost table."""

from argparse import Namespace

import pytest

from megatron_mone.kernels.cpu import backend as cpu
from megatron_mone.model import step_flops as flops
from tests.conftest import mone_config

TOKENS = 3 * 32  # batch of 3 samples of 32 tokens


@pytest.fixture(autouse=True)
def _dense_count(monkeypatch):
    monkeypatch.setattr(
        "megatron.training.training.num_floating_point_operations", lambda args, batch: 1e9
    )


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_active_experts_cost_one_plus_eight_r_ninths(ratio):
    config = mone_config(num_layers=2, mone_neuron_ratio=ratio, mone_backend="reference")
    executed, active = flops.step_flops(Namespace(seq_length=32), config, 3)
    dense_experts = 2 * 9 * (TOKENS * 2) * 16 * 24 * 2  # 2 flops, 9NHF, K_E = 2, two layers
    assert executed == 1e9
    assert executed - active == pytest.approx(dense_experts * (1 - (1 + 8 * ratio) / 9))


@pytest.mark.skipif(not cpu.available()[0], reason="the CPU kernels cannot be built here")
def test_native_kernels_execute_what_is_active():
    """Where few neurons are kept; with most of them kept they run dense products."""
    for ratio, skips in ((0.25, True), (1.0, False)):
        config = mone_config(mone_neuron_ratio=ratio, mone_backend="cpu")
        executed, active = flops.step_flops(Namespace(seq_length=32), config, 3)
        assert executed == (active if skips else 1e9)


def test_only_mone_layers_save():
    one = mone_config(num_layers=2, mone_layer_freq=[0, 1])
    two = mone_config(num_layers=2)
    saved = [1e9 - flops.step_flops(Namespace(seq_length=32), c, 3)[1] for c in (one, two)]
    assert saved[1] == 2 * saved[0] > 0


def test_stock_model_is_all_active():
    stock = mone_config(mone_neuron_ratio=None)
    assert flops.step_flops(Namespace(seq_length=32), stock, 3) == (1e9, 1e9)
