"""The op's contract: a wrong shape, dtype, count or name is an error before anything runs."""

from typing import get_args

import pytest
import torch

from megatron_mone.kernels import (
    BACKENDS,
    Call,
    choose_backend,
    grouped_mlp_with_gates,
    mone_grouped_mlp,
    resolve_backend,
)
from megatron_mone.kernels.cpu import backend as cpu
from megatron_mone.kernels.neuron_mask import NeuronMask


def arguments(**changes):
    good = dict(
        x_NH=torch.randn(5, 4),
        probs_N=torch.rand(5),
        tokens_per_expert=[2, 3],
        w_gate_EFH=torch.randn(2, 6, 4),
        w_up_EFH=torch.randn(2, 6, 4),
        w_down_EFH=torch.randn(2, 6, 4),
    )
    return {**good, **changes}


WRONG = [
    (dict(x_NH=torch.randn(5, 4, 1)), "must be [N, H]"),
    (dict(x_NH=torch.ones(5, 4, dtype=torch.long)), "x is torch.int64"),
    (dict(w_gate_EFH=torch.randn(6, 4)), "w_gate has shape (6, 4)"),
    (dict(w_up_EFH=torch.randn(2, 6, 4, device="meta")), "w_up is on meta"),
    (dict(probs_N=torch.rand(5, device="meta")), "probs is on meta"),
    (dict(w_gate_EFH=torch.randn(2, 6, 3)), "w_gate has shape (2, 6, 3)"),
    (dict(w_gate_EFH=torch.randn(0, 6, 4)), "E, F and H must be 1 or more"),
    (dict(w_up_EFH=torch.randn(2, 5, 4)), "w_up has shape (2, 5, 4)"),
    (dict(w_down_EFH=torch.randn(1, 6, 4)), "w_down has shape (1, 6, 4)"),
    (dict(w_down_EFH=torch.randn(2, 6, 4).double()), "w_down is torch.float64"),
    (dict(probs_N=torch.rand(4)), "probs has shape (4,)"),
    (dict(probs_N=torch.ones(5, dtype=torch.long)), "dtype torch.int64"),
    (dict(tokens_per_expert=[2, 2]), "tokens_per_expert = [2, 2]"),
    (dict(tokens_per_expert=[5]), "must be 2 counts"),
    (dict(tokens_per_expert=[6, -1]), "tokens_per_expert = [6, -1]"),
    (dict(activation="swish"), "activation = 'swish'"),
    (dict(backend="cuda"), "backend = 'cuda'"),
    (dict(neurons_per_token=7), "neurons_per_token = 7"),
    (dict(neurons_per_token=0), "neurons_per_token = 0"),
    (dict(neuron_groups=4), "neurons_per_token = 2 with neuron_groups = 4"),
    (dict(neuron_block=0), "neuron_block = 0: it must divide the 6 neurons"),
    (dict(neuron_block=4), "neuron_block = 4: it must divide the 6 neurons"),
    (dict(neuron_block=3), "neurons_per_token = 2 with neuron_groups = 1 and neuron_block = 3"),
    (dict(neurons_per_token=3, neuron_block=2), "neurons_per_token = 3 with neuron_groups = 1"),
    (dict(neurons_per_token=None), "give either neurons_per_token or neuron_mask"),
    (
        dict(neurons_per_token=None, neuron_mask=NeuronMask.from_bool(torch.ones(4, 6) > 0)),
        "neuron_mask has 4 rows over 6 neurons",
    ),
]


@pytest.mark.parametrize(("changes", "part"), WRONG, ids=[part for _, part in WRONG])
def test_wrong_argument(changes, part):
    with pytest.raises(ValueError) as caught:
        mone_grouped_mlp(**{"neurons_per_token": 2, **arguments(**changes)})
    assert part in str(caught.value)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    ("choose", "part"),
    [(3, "choose = 3"), (lambda gate: gate, "choose returned torch.float32")],
    ids=["number", "rule"],
)
def test_wrong_choice(choose, part, backend):
    if backend == "cpu" and not cpu.available()[0]:
        pytest.skip("the CPU kernels cannot be built here")
    with pytest.raises(ValueError, match=part):
        grouped_mlp_with_gates(**arguments(), choose=choose, backend=backend)


def test_works_without_megatron():
    y, mask = mone_grouped_mlp(**arguments(), neurons_per_token=6, backend="reference")
    assert y.shape == (5, 4)
    assert mask.density == 1.0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_given_mask_is_computed(backend):
    given = arguments()
    y, mask = mone_grouped_mlp(**given, neurons_per_token=2, backend=backend)
    again, same = mone_grouped_mlp(**given, neuron_mask=mask, backend=backend)
    assert same == mask
    torch.testing.assert_close(again, y)
    all_y, _ = mone_grouped_mlp(**given, neurons_per_token=6, backend=backend)
    assert not torch.allclose(all_y, y)


def test_auto_is_a_backend_that_exists():
    """Native code where it can be built, and the reference for what that does not know."""
    usable, _ = cpu.available()
    assert resolve_backend("auto") == ("cpu" if usable else "reference")
    assert resolve_backend("auto", activation="softmax") == "reference"
    assert resolve_backend("auto", dtype=torch.float64) == "reference"
    assert resolve_backend("auto", all_gates=True) == "reference"
    assert resolve_backend("auto", device="cuda") == "reference"


def test_gpu_backends_without_a_gpu():
    """One needs a device to be checked on, the other is taken by name only; the reason says so."""
    chosen = choose_backend("auto", Call("cuda", torch.bfloat16))
    assert chosen.backend.name == "reference"
    assert "not triton: triton needs a CUDA device" in chosen.reason
    assert "not te: not run on a GPU yet, so only by name" in chosen.reason


def test_the_config_knows_every_backend():
    from megatron_mone.config import Backend

    assert set(get_args(Backend)) == {"auto", *BACKENDS}


def test_a_backend_that_cannot_run_says_why():
    with pytest.raises(ValueError, match="'cpu' cannot run here: activation = 'softmax' is not"):
        resolve_backend("cpu", activation="softmax")
