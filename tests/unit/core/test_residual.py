"""Each part of a layer is multiplied before it is added to the residual stream, its bias too."""

import pytest
import torch

from megatron_mone.model.layer_spec import mone_layer_spec
from tests.conftest import mone_config


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_what_a_part_adds_is_multiplied(training, biased):
    config = mone_config(num_layers=2, moe_layer_freq=[0, 1], mone_residual_multiplier=0.22)
    x, residual, bias = torch.randn(3, 4, 8), torch.randn(3, 4, 8), torch.randn(8)
    wanted = residual + 0.22 * (x + bias if biased else x)
    before = x.clone()
    for layer in mone_layer_spec(config).layer_specs:
        for add in (layer.submodules.self_attn_bda, layer.submodules.mlp_bda):
            found = add(training, False)((x, bias if biased else None), residual.clone(), 0.0)
            torch.testing.assert_close(found, wanted)
    assert torch.equal(x, before)


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_multiplier_is_above_0(value):
    with pytest.raises(ValueError, match=r"mone_residual_multiplier = .* it must be > 0"):
        mone_config(mone_residual_multiplier=value)
