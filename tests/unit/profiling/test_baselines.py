"""Baselines by name, as edits of the arguments of the model under test."""

from argparse import Namespace

import pytest
import torch

from megatron_mone.profiling.baselines import run_specs
from tests.conftest import mone_config


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


def deepspeed_arguments(**changes):
    return arguments(engine="megatron", zero_stage=None, deepspeed_config=None, **changes)


def test_a_known_name_with_fields_is_that_baseline():
    (spec,) = run_specs(["deepspeed-moe:zero_stage=2"])[1:]
    assert (spec.name, spec.fields, spec.deepspeed_moe) == (
        "deepspeed-moe",
        {"zero_stage": 2},
        True,
    )


def test_deepspeed_is_the_same_model_on_the_other_engine():
    args = deepspeed_arguments(use_distributed_optimizer=True)
    run_specs(["deepspeed"])[1].edit(args)
    assert (args.engine, args.mone_neuron_ratio) == ("deepspeed", 0.25)
    assert not args.use_distributed_optimizer
    with pytest.raises(ValueError, match="already: write megatron"):
        run_specs(["deepspeed"])[1].edit(args)
    args.zero_stage = 2
    run_specs(["megatron"])[1].edit(args)
    assert (args.engine, args.zero_stage) == ("megatron", None)
    with pytest.raises(ValueError, match="already: write deepspeed"):
        run_specs(["megatron"])[1].edit(args)


def test_deepspeeds_layer_has_stock_experts():
    args = deepspeed_arguments()
    run_specs(["deepspeed-moe"])[1].edit(args)
    assert (args.engine, args.mone_neuron_ratio) == ("deepspeed", None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"zero_stage": 3}, "zero_stage = 3 is not trained.*write deepspeed-moe:zero_stage=2"),
        ({"tensor_model_parallel_size": 2}, "tensor_model_parallel_size = 2 is not in DeepSpeed's"),
        ({"moe_shared_expert_intermediate_size": 64}, "set moe_shared_expert_.* = None"),
        ({"moe_router_score_function": "sigmoid"}, "score_function = 'sigmoid'.*a softmax"),
        ({"num_experts": None}, "needs a model with experts"),
    ],
)
def test_what_deepspeeds_layer_has_not_is_refused(changes, words):
    from megatron_mone.profiling.deepspeed_moe import check_deepspeed_moe

    given = {"num_experts": 4, **changes}
    with pytest.raises(ValueError, match=words) as refused:
        check_deepspeed_moe(Namespace(**vars(deepspeed_arguments()) | given))
    assert "\n" not in str(refused.value)


def test_moe_active_of_a_stock_model_is_refused():
    with pytest.raises(ValueError, match="needs a MoNE model"):
        run_specs(["moe-active"])[1].edit(arguments(mone_neuron_ratio=None))


@pytest.mark.parametrize(
    "flag", ["delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"]
)
def test_a_baseline_that_makes_weight_gradients_at_once_is_refused_beside_a_model_that_does_not(
    flag, one_rank
):
    from megatron_mone.profiling.grouped_mm_model import check_grouped_mm

    config = mone_config(activation_func=torch.nn.functional.silu)
    check_grouped_mm(config)
    setattr(config, flag, True)
    with pytest.raises(ValueError, match=f"at once, which {flag} puts off"):
        check_grouped_mm(config)
