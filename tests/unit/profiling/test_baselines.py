"""Baselines by name, as edits of the arguments of the model under test."""

from argparse import Namespace

import pytest

from megatron_mone.profiling.baselines import run_specs


def arguments(**changes):
    given = {
        "mone_neuron_ratio": 0.25,
        "mone_neurons_per_token": None,
        "mone_record_masks": None,
        "mone_replay_masks": None,
        "moe_ffn_hidden_size": 512,
    }
    return Namespace(**{**given, **changes})


def test_runs_in_the_order_given():
    specs = run_specs(["moe", "plain:mone_backend=reference:mone_ng_loss_coeff=0"])
    assert [spec.name for spec in specs] == ["mone", "moe", "plain"]
    assert specs[2].fields == {"mone_backend": "reference", "mone_ng_loss_coeff": 0}
    assert run_specs(["grouped_mm"])[1].grouped_mm


def test_moe_keeps_the_size_and_drops_the_choice():
    args = arguments()
    run_specs(["moe"])[1].edit(args)
    assert args.mone_neuron_ratio is None
    assert args.moe_ffn_hidden_size == 512


@pytest.mark.parametrize(
    ("changes", "width"),
    [
        ({}, 256),  # (1 + 2/4) / 3 = 1/2
        ({"mone_neuron_ratio": None, "mone_neurons_per_token": 64}, 208),  # 512 * 1.25 / 3 = 213.3
        ({"moe_ffn_hidden_size": 16}, 16),  # never less than a vector
    ],
)
def test_moe_active_has_the_parameters_that_mone_activates(changes, width):
    args = arguments(**changes)
    run_specs(["moe-active"])[1].edit(args)
    assert args.moe_ffn_hidden_size == width
    assert args.mone_neurons_per_token is None


@pytest.mark.parametrize(
    ("against", "words"),
    [
        (["moo"], "'moo' is not a baseline.*did you mean 'moe'"),
        (["moe", "moe"], "names 'moe' twice"),
        (["mone:mone_backend=cpu"], "names 'mone' twice"),
        (["x:mone_backend"], "write NAME:field=value"),
        (["x:=3"], "write NAME:field=value"),
        (["x:tensor_model_parallel_size=2"], "changes tensor_model_parallel_size"),
        (["x:mone_backend=[1"], "cannot be read"),
    ],
)
def test_wrong_names_are_refused(against, words):
    with pytest.raises(ValueError, match=words):
        run_specs(against)


def test_moe_active_of_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="needs a MoNE model"):
        run_specs(["moe-active"])[1].edit(arguments(mone_neuron_ratio=None))
