"""Wrong mone_* values are one-line ValueErrors naming field, value and what is allowed."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mone.config import layer_pattern, neurons_per_token, selection_bounds
from megatron_mone.kernels import BACKENDS
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.registry import Backend
from megatron_mone.model.layer_spec import check_packages
from megatron_mone.moe.experts import backend_of
from tests.conftest import mone_config

WRONG = [
    (dict(mone_neuron_ratio=0.25, mone_neurons_per_token=6), "give one of them"),
    (dict(mone_neuron_ratio=1.5), "mone_neuron_ratio = 1.5"),
    (dict(mone_neuron_ratio=0.0), "mone_neuron_ratio = 0.0"),
    (dict(mone_neuron_ratio=0.3), "mone_neurons_per_token = 7 is nearest"),
    (dict(mone_neuron_ratio=None, mone_neurons_per_token=25), "1 to moe_ffn_hidden_size = 24"),
    (dict(mone_neuron_ratio=None, mone_neurons_per_token=0), "mone_neurons_per_token = 0"),
    (dict(mone_neuron_groups=5), "mone_neuron_groups = 5"),
    (dict(mone_neuron_groups=4), "a divisor of the 6 neurons kept"),
    (dict(mone_neuron_groups=0), "mone_neuron_groups = 0"),
    (dict(mone_neuron_block=0), "mone_neuron_block = 0 is not allowed: it must be at least 1"),
    (dict(mone_neuron_block=-3), "mone_neuron_block = -3 is not allowed: it must be at least 1"),
    (
        dict(mone_neuron_block=6, expert_tensor_parallel_size=8),
        "mone_neuron_block = 6 is not allowed: it must be a divisor of the 3 neurons of an expert "
        "on each rank (expert_tensor_parallel_size = 8 cuts no block)",
    ),
    (dict(mone_neuron_block=16), "a divisor of the 24 neurons of a group"),
    (dict(mone_neuron_block=4), "a divisor of the 6 neurons kept of a group"),
    (dict(mone_neuron_block=2, mone_neuron_groups=2), "a divisor of the 3 neurons kept of a group"),
    (dict(mone_activation="swish"), "one of silu, sigmoid, softmax, gelu, relu, squared_relu"),
    (dict(mone_selection="top"), "one of topk, threshold"),
    (dict(mone_ng_loss_type="kept"), "mone_ng_loss_type = 'kept'"),
    (dict(mone_ng_loss_scope="batch"), "one of micro_batch, global_batch"),
    (dict(mone_ng_loss_coeff=-1.0), "mone_ng_loss_coeff = -1.0"),
    (dict(mone_ng_bias_update_rate=0.0), "mone_ng_bias_update_rate = 0.0"),
    (dict(mone_backend="cuda"), "mone_backend = 'cuda'"),
    (dict(mone_selection="threshold", mone_threshold=0.0), "mone_threshold = 0.0"),
    (dict(mone_selection="threshold", mone_min_neurons_per_token=7), "at most 6"),
    (dict(mone_selection="threshold", mone_max_neurons_per_token=99), "from 1 to 24"),
    (dict(mone_layer_freq=[1, 1]), "each of the 1 decoder layers"),
    (dict(mone_layer_freq=0), "mone_layer_freq = 0"),
    (dict(mone_layer_freq=[1], moe_layer_freq=[0]), "layer 1 is dense"),
    (dict(gated_linear_unit=False), "gated_linear_unit = False"),
    (dict(add_bias_linear=True), "add_bias_linear = True"),
    (dict(num_moe_experts=None, moe_ffn_hidden_size=None), "num_moe_experts = None"),
]


@pytest.mark.parametrize(("changes", "part"), WRONG, ids=[part for _, part in WRONG])
def test_wrong_value_names_field_and_fix(changes, part):
    with pytest.raises(ValueError) as caught:
        mone_config(**changes)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_ratio_and_count_agree():
    by_ratio = mone_config(mone_neuron_ratio=0.25)
    by_count = mone_config(mone_neuron_ratio=None, mone_neurons_per_token=6)
    assert neurons_per_token(by_ratio) == neurons_per_token(by_count) == 6
    assert by_ratio.mone_enabled
    assert not mone_config(mone_neuron_ratio=None).mone_enabled


def test_threshold_bounds_default_to_groups_and_kept():
    config = mone_config(mone_selection="threshold", mone_neuron_groups=2)
    assert selection_bounds(config) == (2, 6)
    blocks = mone_config(
        mone_selection="threshold", mone_neuron_block=4, mone_neuron_ratio=None,
        mone_neurons_per_token=8,
    )  # fmt: skip
    assert selection_bounds(blocks) == (4, 8)


@pytest.mark.parametrize(
    ("neurons", "kept", "groups", "block", "etp"),
    [(24, 6, 1, 3, 4), (24, 6, 1, 6, 4), (24, 12, 2, 6, 4), (88, 22, 1, 11, 8), (88, 22, 1, 22, 4),
     (1408, 352, 1, 352, 4), (1408, 352, 4, 88, 16), (1536, 384, 1, 192, 8)],
)  # fmt: skip
def test_a_block_may_have_any_size_that_divides(neurons, kept, groups, block, etp):
    """The group's neurons, those kept of it, and a rank's: no power of two is asked for."""
    mone_config(
        moe_ffn_hidden_size=neurons, mone_neuron_ratio=None, mone_neurons_per_token=kept,
        mone_neuron_groups=groups, mone_neuron_block=block, expert_tensor_parallel_size=etp,
    )  # fmt: skip
    Selection(kept, groups, block).check(neurons)


@pytest.mark.parametrize(
    ("moe", "mone", "pattern"),
    [
        (1, 1, [2, 2, 2, 2]),
        (1, 2, [2, 1, 2, 1]),
        ([0, 1, 1, 1], 1, [0, 2, 2, 2]),
        ([0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 2, 2]),
        (2, 1, [2, 0, 2, 0]),
    ],
)
def test_layer_pattern(moe, mone, pattern):
    config = mone_config(num_layers=4, moe_layer_freq=moe, mone_layer_freq=mone)
    assert layer_pattern(config) == pattern


@pytest.mark.parametrize(
    ("changes", "by_rule"),
    [
        ({}, False),
        ({"mone_selection": "threshold"}, True),
        ({"mone_ng_loss_type": "bias"}, True),
        ({"expert_tensor_parallel_size": 2}, True),
        ({"expert_tensor_parallel_size": 2, "mone_neuron_groups": 2}, False),
        ({"expert_tensor_parallel_size": 2, "mone_neuron_groups": 3}, True),
    ],
)
def test_a_backend_is_told_the_model(monkeypatch, changes, by_rule):
    """Activation, type, loss, rule, block and groups decide what can run, before any batch."""
    asked = []
    probe = Backend("triton", why_not=asked.append, run=lambda: None)
    monkeypatch.setitem(BACKENDS, "triton", probe)
    config = mone_config(mone_backend="triton", **changes)
    assert backend_of(config) == "triton"
    assert asked[0].by_rule is by_rule
    blocks = mone_config(mone_backend="triton", mone_neuron_block=2, mone_activation="gelu")
    backend_of(blocks)
    assert (asked[1].block, asked[1].activation, asked[1].dtype) == (2, "gelu", torch.float32)
    assert (asked[1].neurons, asked[1].hidden) == (24, 16)
    assert (asked[1].groups, asked[1].kept_share) == (1, 0.25)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
@pytest.mark.parametrize("name", ["triton", "te", "sparse24"])
def test_a_backend_that_cannot_run_stops_before_anything_starts(name):
    with pytest.raises(ValueError, match=f"backend = '{name}' cannot run here: "):
        check_packages(mone_config(mone_backend=name))
    check_packages(mone_config(mone_backend="reference"))


def test_fields_come_from_the_environment_file(tmp_path, monkeypatch):
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_mone.config import attach_fields_from_env

    stock = TransformerConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4,
        moe_ffn_hidden_size=24, gated_linear_unit=True, add_bias_linear=False,
    )  # fmt: skip
    path = tmp_path / "mone.yaml"
    for text, part in [
        (None, "MONE_CONFIG is not set"),
        ("mone_neuron_ration: 0.25", "did you mean 'mone_neuron_ratio'"),
        ("- 1", "must hold a mapping"),
        ("a: [", "cannot be read"),
        ("mone_neuron_ratio: 2.0", "mone_neuron_ratio = 2.0"),
    ]:
        if text is not None:
            path.write_text(text)
            monkeypatch.setenv("MONE_CONFIG", str(path))
        with pytest.raises(ValueError, match=part.replace("(", r"\(")):
            attach_fields_from_env(stock)
    path.write_text("mone_neurons_per_token: 6\nmone_ng_loss_type: entropy\n")
    attach_fields_from_env(stock)
    assert neurons_per_token(stock) == 6
    assert stock.mone_ng_loss_type == "entropy"
    assert stock.mone_activation == "silu"


def test_a_backend_of_arguments_that_are_no_models_yet():
    """Of a dense baseline of a run file, which names its backend too, and of sizes left out."""
    for changes in ({"mone_neuron_ratio": None}, {"moe_ffn_hidden_size": None}):
        fields = {**vars(mone_config(mone_backend="reference")), **changes}
        arguments = SimpleNamespace(**fields)
        assert backend_of(arguments) == "reference"
