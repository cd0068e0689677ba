"""The op's contract: a wrong shape, dtype, count or name is an error before anything runs."""

import pytest
import torch

from megatron_mone.kernels import mone_grouped_mlp, resolve_backend


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


def keep_all(gate_NF):
    return torch.ones_like(gate_NF, dtype=torch.bool)


WRONG = [
    (dict(x_NH=torch.randn(5, 4, 1)), "must be [N, H]"),
    (dict(w_gate_EFH=torch.randn(2, 6, 3)), "w_gate has shape (2, 6, 3)"),
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
]


@pytest.mark.parametrize(("changes", "part"), WRONG, ids=[part for _, part in WRONG])
def test_wrong_argument(changes, part):
    with pytest.raises(ValueError) as caught:
        mone_grouped_mlp(**arguments(**changes), select=keep_all)
    assert part in str(caught.value)


def test_works_without_megatron():
    output = mone_grouped_mlp(**arguments(), select=keep_all)
    assert output.y_NH.shape == (5, 4)
    assert output.mask_NF.all()


def test_auto_is_a_backend_that_exists():
    assert resolve_backend("auto") == "reference"
