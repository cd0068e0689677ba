"""What a checkpoint says of its choice of neurons, and the keys by which stock models stop."""

import warnings
from argparse import Namespace

import pytest
import torch

from tests.conftest import mone_config
from tests.unit.moe.builders import build_experts, build_layer

WEIGHT = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
OURS = "decoder.layers.mlp.experts.experts.mone_linear_fc1.weight"
CHOICE_KEY = "decoder.layers.mlp.experts.experts.mone_choice"


@pytest.mark.parametrize(
    ("stock", "ours"),
    [
        (WEIGHT, OURS),
        (f"optimizer.state.exp_avg.{WEIGHT}", f"optimizer.state.exp_avg.{OURS}"),
        ("mlp.experts.experts.3.linear_fc2.weight", "mlp.experts.experts.3.mone_linear_fc2.weight"),
    ],
)
def test_keys_go_both_ways(stock, ours):
    from megatron_mone.moe.stored_choice import our_key, stock_key

    assert our_key(stock) == our_key(ours) == ours
    assert stock_key(ours) == stock_key(stock) == stock


@pytest.mark.parametrize("key", ["mlp.shared_experts.linear_fc1.weight", "mlp.linear_fc1.weight"])
def test_other_keys_stay(key):
    from megatron_mone.moe.stored_choice import our_key

    assert our_key(key) == key


CHANGES = {
    "mone_neurons_per_token": dict(mone_neuron_ratio=0.5),
    "mone_activation": dict(mone_activation="gelu"),
    "mone_selection": dict(mone_selection="threshold"),
    "mone_neuron_groups": dict(mone_neuron_groups=2),
    "mone_neuron_block": dict(mone_neuron_block=2),
    "mone_ng_loss_type": dict(mone_ng_loss_type="bias"),
    "mone_layer_freq": dict(mone_layer_freq=[0]),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_differs_is_one_line(name):
    from megatron_mone.moe.stored_choice import check_choice, choice_of

    saved = choice_of(mone_config())
    check_choice(saved, mone_config(), "checkpoint x")
    now = choice_of(mone_config(**CHANGES[name]))[name]
    line = (
        f"checkpoint x was trained with {name} = {saved[name]}, this run has {name} = {now}: "
        "give what it was trained with, or --mone-change-choice to go on with another choice"
    )
    with pytest.raises(ValueError) as error:
        check_choice(saved, mone_config(**CHANGES[name]), "checkpoint x")
    assert str(error.value) == line
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        other = mone_config(**CHANGES[name], mone_change_choice=True)
        check_choice(saved, other, "checkpoint x")
    assert any(f"{name} = {now}" in str(one.message) for one in said)


@pytest.mark.parametrize("name", ["mone_threshold", "mone_min_neurons_per_token",
                                  "mone_max_neurons_per_token"])  # fmt: skip
def test_bounds_differ(name):
    from megatron_mone.moe.stored_choice import check_choice, choice_of

    rule = dict(mone_selection="threshold")
    value = 0.5 if name == "mone_threshold" else 4
    with pytest.raises(ValueError, match=f"{name} = .*, this run has {name} = {value}: "):
        check_choice(choice_of(mone_config(**rule)), mone_config(**rule, **{name: value}), "x")


def test_a_choice_is_one_whatever_fields_say_it():
    from megatron_mone.moe.stored_choice import choice_of

    of_number = mone_config(mone_neuron_ratio=None, mone_neurons_per_token=6, mone_layer_freq=[1])
    assert choice_of(of_number) == choice_of(mone_config())
    assert choice_of(mone_config(mone_threshold=0.9)) == choice_of(mone_config())  # not read


def test_a_run_without_fields_stops():
    from megatron_mone.moe.stored_choice import check_choice, choice_of

    stock = Namespace(mone_neuron_ratio=None, mone_neurons_per_token=None)
    with pytest.raises(ValueError, match="= 6\\), this run has no mone_\\* field and would keep"):
        check_choice(choice_of(mone_config()), stock, "x")


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("plain", [False, True])
def test_keys_of_experts(plain):
    """Stock Megatron's keys are all missing from a checkpoint of ours, or, plain, none."""
    from megatron_mone.moe.stored_choice import choice_of

    stock = build_layer("stock").experts.sharded_state_dict("e.")
    experts = build_layer("mone", mone_plain_checkpoint=plain).experts
    ours = experts.sharded_state_dict("e.")
    keys, stock_keys = ({leaf.key for leaf in state.values()} for state in (ours, stock))
    assert len(stock_keys) == 4
    if plain:
        assert keys == stock_keys
        return
    assert not keys & stock_keys
    (choice,) = (leaf.data for leaf in ours.values() if leaf.key.endswith("mone_choice"))
    assert choice == choice_of(experts.config)


@pytest.mark.usefixtures("one_rank")
def test_a_strict_load_of_modules_stops():
    """A plain `load_state_dict(strict=True)`, either way."""
    mone, stock = build_layer("mone"), build_layer("stock")
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.local_experts.0.linear_fc1.weig"):
        stock.load_state_dict(mone.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match=r"Missing key.*experts.linear_fc1"):
        mone.load_state_dict(stock.state_dict(), strict=True)


@pytest.mark.usefixtures("one_rank")
def test_experts_check_what_is_loaded():
    """Behind a stock script, where no argument of ours is read before."""
    from megatron_mone.moe.stored_choice import choice_of

    experts = build_experts(2)
    other = {"mone_choice": choice_of(mone_config(mone_neuron_ratio=0.5))}
    with pytest.raises(ValueError, match=r"mone_neurons_per_token = 12, this run has .* = 6"):
        experts.load_state_dict({**experts.state_dict(), **other})
    experts.load_state_dict({**experts.state_dict(), "mone_choice": choice_of(experts.config)})


@pytest.mark.parametrize(
    ("held", "key", "wanted"),
    [
        ([WEIGHT], OURS, WEIGHT),
        ([OURS], WEIGHT, OURS),
        ([OURS, WEIGHT], OURS, OURS),
        ([f"{CHOICE_KEY}/shard_0_1"], OURS, OURS),
    ],
)
def test_asks_for_what_is_held(held, key, wanted):
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    from megatron_mone.moe.stored_choice import name_as_held

    tensor = ShardedTensor.from_rank_offsets(key, torch.zeros(2))
    name_as_held({"model": {"deep": [tensor]}}, held)
    assert tensor.key == wanted


def test_a_choice_that_is_not_held_is_our_own():
    from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject

    from megatron_mone.moe.stored_choice import name_as_held

    for held, kind in (
        (f"{CHOICE_KEY}/shard_0_1", ShardedObject),
        (WEIGHT, LocalNonpersistentObject),
    ):
        state = {"model": {"choice": ShardedObject(CHOICE_KEY, {"a": 1}, (1,), (0,))}}
        name_as_held(state, [held])
        assert isinstance(state["model"]["choice"], kind)
