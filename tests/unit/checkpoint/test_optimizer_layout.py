"""Parameter groups saved by two optimizers load into one, and the other way round."""

from types import SimpleNamespace

import pytest

from megatron_mone.checkpoint.optimizer_layout import _with_a_reason, fit_state


def group(weight_decay, expert, **more):
    return {"wd_mult": weight_decay, "lr_mult": 1.0, "is_expert_parallel": expert, **more}


def optimizer(*groups):
    """Stands for a MegatronOptimizer around a torch optimizer with these groups."""
    state = {"state": {}, "param_groups": list(groups)}
    return SimpleNamespace(optimizer=SimpleNamespace(state_dict=lambda: state))


DENSE = optimizer(group(1.0, False, params=[0, 1]), group(0.0, False, params=[2]))
EXPERT = optimizer(group(1.0, True, params=[0]))
ALL = optimizer(group(1.0, False, params=[0, 1, 2]), group(0.0, False, params=[3]))


def saved(*groups, nested):
    inner = {"param_groups": [dict(g, lr=0.5, step=7) for g in groups]}
    return {"optimizer": inner, "kind": "reshardable"} if nested else inner


@pytest.mark.parametrize("nested", [True, False])
def test_two_saved_into_one(nested):
    state = {
        0: saved(group(1.0, False), group(0.0, False), nested=nested),
        1: saved(group(1.0, True), nested=nested),
        **({"param_state": "tensors"} if nested else {"state": {0: "tensors"}}),
    }
    fitted = fit_state(state, [ALL])
    inner = fitted["optimizer"] if nested else fitted
    assert [(g["wd_mult"], g["step"], g["params"]) for g in inner["param_groups"]] == [
        (1.0, 7, [0, 1, 2]),
        (0.0, 7, [3]),
    ]
    assert not any(g["is_expert_parallel"] for g in inner["param_groups"])
    assert fitted["param_state" if nested else "state"]
    assert 1 not in fitted
    assert not nested or fitted["kind"] == "reshardable"


@pytest.mark.parametrize("nested", [True, False])
def test_one_saved_into_two(nested):
    state = {
        **saved(group(1.0, False), group(0.0, False), nested=nested),
        0: {"param_state": "dense"} if nested else {"state": {0: "dense"}},
        1: {"param_state": "expert"} if nested else {"state": {0: "expert"}},
    }
    fitted = fit_state(state, [DENSE, EXPERT])
    assert sorted(fitted) == [0, 1]
    expert = fitted[1]["optimizer"] if nested else fitted[1]
    assert [(g["is_expert_parallel"], g["lr"]) for g in expert["param_groups"]] == [(True, 0.5)]
    key = "param_state" if nested else "state"
    assert "dense" in str(fitted[0][key])
    assert "expert" in str(fitted[1][key])


def test_common_step_of_plain_optimizers_is_kept():
    state = {
        0: {**saved(group(1.0, False), group(0.0, False), nested=False),
            "state": {"common_step": 9}},
        1: saved(group(1.0, True), nested=False),
        "state": {0: "tensors"},
    }  # fmt: skip
    assert fit_state(state, [ALL])["state"] == {0: "tensors", "common_step": 9}


def test_the_same_number_is_left_alone():
    state = {0: saved(group(1.0, False), nested=True), 1: saved(group(1.0, True), nested=True)}
    assert fit_state(state, [DENSE, EXPERT]) is state


def test_unknown_settings_are_an_error():
    state = {0: saved(group(0.3, False), nested=True), 1: saved(group(0.3, True), nested=True)}
    with pytest.raises(ValueError, match="no parameter group with the settings"):
        fit_state(state, [ALL])


def test_groups_that_megatron_cannot_join_are_one_line():
    def load(level):
        raise ValueError(f"Cannot merge two lists with different lengths (2 and 1, at {level})")

    with pytest.raises(ValueError, match=r"parted otherwise .* pass --no-load-optim") as error:
        _with_a_reason(load)(("optimizer", 1, "param_groups"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="different lengths"):
        _with_a_reason(load)(("model", 1))
