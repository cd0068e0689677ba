"""Selection over expert-tensor ranks equals selection on one rank, bit for bit, ties included."""

import itertools

import pytest
import torch

from megatron_mone.kernels.neuron_selection import NeuronSelector, top_neurons
from megatron_mone.kernels.selection_exchange import (
    EXCHANGES,
    ExchangeTraffic,
    _ordered_keys,
    _scores_of_keys,
    choose_exchange,
    predicted_bytes,
    top_neurons_over_ranks,
)
from tests.unit.cpu_emulation.emulation_ranks import run_cases

WORLD = 4
ROWS, WIDTH = 37, 24  # width over all ranks


def scores(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(ROWS, WIDTH, generator=generator)
    if kind == "ties":
        return (x * 2).round() / 2
    if kind == "equal":
        return torch.zeros_like(x)
    if kind == "infinite":
        return torch.where(x > 1, torch.inf, x.abs())
    return {"random": x.abs(), "negative": x, "bf16": x.abs().bfloat16()}[kind]


def my_slice(x, group):
    return x.chunk(group.size(), dim=1)[group.rank()].contiguous()


def exchanges_equal_one_rank():
    group = torch.distributed.group.WORLD
    kinds = ("random", "ties", "equal", "infinite", "negative", "bf16")
    for seed, (kind, kept, exchange) in enumerate(
        itertools.product(kinds, (1, 5, 6, 7, 23, 24), EXCHANGES)
    ):
        whole = scores(kind, seed)
        traffic = ExchangeTraffic()
        got = top_neurons_over_ranks(
            my_slice(whole, group), kept, group, widest=WIDTH // WORLD, exchange=exchange,
            traffic=traffic,
        )  # fmt: skip
        assert torch.equal(got, my_slice(top_neurons(whole, kept), group)), (kind, kept, exchange)
        wanted = predicted_bytes(ROWS, kept, WIDTH // WORLD, WORLD)
        assert getattr(traffic, exchange) == traffic.total == wanted[exchange]


def rules_and_groups_equal_one_rank():
    group = torch.distributed.group.WORLD
    for rule, (groups, block), kind in itertools.product(
        ("topk", "threshold"),
        (*((groups, 1) for groups in (1, 2, 3, 4, 6, 8, 12)),
         *((groups, block) for groups in (1, 2, 4) for block in (2, 3)), (1, 6)),
        ("random", "ties", "equal"),
    ):  # fmt: skip
        gate = scores(kind, groups)
        gate[3, 5] = torch.nan
        size = groups * block
        low, high = (size, size * 2) if rule == "threshold" else (size * 2, size * 2)
        settings = dict(
            min_neurons=low, max_neurons=high, threshold=0.6, groups=groups, block=block
        )
        one = NeuronSelector(rule, **settings)
        split = NeuronSelector(rule, **settings, etp_group=group)
        got = split(my_slice(gate, group))
        assert torch.equal(got, my_slice(one(gate), group)), (rule, groups, block, kind)
        assert (split.traffic.total == 0) == (groups % WORLD == 0)


@pytest.fixture(scope="module")
def failures():
    return run_cases(WORLD, [({}, [exchanges_equal_one_rank, rules_and_groups_equal_one_rank])])


@pytest.mark.parametrize("case", [exchanges_equal_one_rank, rules_and_groups_equal_one_rank])
def test_equal_to_one_rank(failures, case):
    assert failures[case.__name__] == ""


def test_keys_keep_the_order_of_floats():
    x = torch.tensor([-torch.inf, -3.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 3e38, torch.inf])
    keys = _ordered_keys(x)
    assert (keys.diff() > 0).sum() == 7  # only -0 and +0 share a key
    assert torch.equal(_scores_of_keys(keys), x)
    assert keys.min() >= 0
    assert keys.max() < 1 << 32


def test_the_cheaper_exchange_is_chosen():
    """Wide experts bisect, narrow ones gather; by the bytes, whichever they are."""
    assert choose_exchange(1000, 352, 704, 2) == "bisect"
    assert choose_exchange(1000, 8, 704, 2) == "gather"
    for kept, width, parts in itertools.product((1, 30, 40, 352), (704,), (2, 4, 8)):
        cost = predicted_bytes(1000, kept, width, parts)
        assert cost[choose_exchange(1000, kept, width, parts)] == min(cost.values())
