"""What a MoNE model of transformers cannot be made of is refused in a line."""

from argparse import Namespace

import pytest

from megatron_mone.conversion.mone_folder import config_of


@pytest.mark.parametrize(
    ("experts", "said"),
    [(None, "num_experts is not set: a MoNE model has experts; give --like"),
     (8, "no mone_ argument was given: .*, or train with --mone-neuron-ratio 1")],
)  # fmt: skip
def test_a_stock_model_is_none(experts, said):
    with pytest.raises(ValueError, match=said):
        config_of(Namespace(num_experts=experts), Namespace(), "float32")
