"""What a device found is told once a step, in the words and before the step it would have stopped
at once."""

import json
import math

import pytest
import torch

from megatron_mone.moe import faults
from megatron_mone.moe.padding import mark_padding
from tests.unit.moe.builders import build_layer

pytestmark = pytest.mark.usefixtures("one_rank")

TOKENS = torch.randn(40, 1, 16, generator=torch.Generator().manual_seed(5))


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch):
    monkeypatch.setattr(faults, "_kept", {})


@pytest.fixture
def deferring(monkeypatch):
    monkeypatch.setattr(faults, "DEFER", True)


def broken(value=math.nan, expert=3, number=1):
    layer = build_layer(mone_ng_loss_coeff=0.0)  # the tracker's table has one row
    layer.layer_number = number
    with torch.no_grad():
        layer.experts.linear_fc2[expert] = value
    return layer


def marked(number=1):
    """A layer whose peers have a padding mask, and it has none."""
    layer = build_layer()
    dispatch = layer.token_dispatcher.dispatch_preprocess

    def preprocess(hidden, routing_map, probs):
        padding_T = torch.arange(probs.shape[0]) % 3 == 0
        return dispatch(hidden, routing_map, mark_padding(probs, padding_T))

    layer.token_dispatcher.dispatch_preprocess = preprocess
    return layer


def words_at_once(layer):
    with pytest.raises((faults.NonFiniteExpertError, ValueError)) as error:
        layer(TOKENS)
    return str(error.value)


def words_later():
    with pytest.raises((faults.NonFiniteExpertError, ValueError)) as error:
        faults.look()
    assert str(error.value)
    faults.look()  # told once
    return str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        broken,
        lambda: broken(math.inf, expert=0),
        lambda: broken(-math.inf, number=None),
        marked,
        lambda: broken(expert=slice(1, 3)),
    ],
    ids=["nan", "infinity", "without a number", "padding", "two experts"],
)
def test_later_it_is_said_in_the_same_words(make, monkeypatch):
    wanted = words_at_once(make())
    monkeypatch.setattr(faults, "DEFER", True)
    make()(TOKENS)
    assert words_later() == wanted


def test_rows_are_counted_in_the_forward_pass_that_failed_first(deferring, monkeypatch):
    layer = broken()
    for tokens in (TOKENS[:8], TOKENS):
        layer(tokens)
    later = words_later()
    monkeypatch.setattr(faults, "DEFER", False)
    with pytest.raises(faults.NonFiniteExpertError) as error:
        layer(TOKENS[:8])
    assert later == str(error.value)


def test_an_earlier_forward_pass_counts_before_an_earlier_layer(deferring):
    first, second = build_layer(), broken(number=2)
    for layer in (first, second):
        layer(TOKENS)
    with torch.no_grad():
        first.experts.linear_fc2[:] = math.nan
    first(TOKENS)
    assert "layer 2, expert 3" in words_later()
    for layer in (second, first):
        layer(TOKENS)
    assert "layer 1, expert 0" in words_later()


def test_no_optimizer_steps_on_what_was_found(deferring):
    layer = broken()
    layer(TOKENS)[0].sum().backward()
    before = layer.experts.linear_fc1.clone()
    with pytest.raises(faults.NonFiniteExpertError, match="layer 1, expert 3"):
        torch.optim.SGD(layer.parameters(), lr=1.0).step()
    assert torch.equal(layer.experts.linear_fc1, before)


def test_a_skipped_step_is_looked_at_too(deferring):
    layer = broken()
    layer(TOKENS)
    with pytest.raises(faults.NonFiniteExpertError):
        layer.end_step()


def test_a_sound_step_goes_on(deferring):
    layer = build_layer()
    for _ in range(2):
        layer(TOKENS)[0].sum().backward()
        torch.optim.SGD(layer.parameters(), lr=1e-3).step()
        layer.end_step()
    assert faults.words() is None


def test_ranks_agree_on_what_came_first(deferring, monkeypatch):
    """Another rank saw it in an earlier layer; a third found nothing, and its loss is refused."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(faults, "PATIENCE_SECONDS", 0)
    layer = broken(number=5)
    layer(TOKENS)
    store.set("megatron-mone/fault/at/1", "2")
    store.set("megatron-mone/fault/2", json.dumps([1, 4, 2, "NonFiniteExpertError", "layer 4"]))
    store.add("megatron-mone/fault", 1)
    assert words_later() == "layer 4"
    assert faults.words() == "layer 4"


@pytest.mark.parametrize("by_kernel", [False, True])
def test_what_a_replayed_graph_writes_is_told(by_kernel):
    """It runs none of the host's code again: the place is the same, and is looked at every step."""

    def error(found, rows):
        return ValueError(f"found {found} of {rows}")

    watch = faults.FaultWatch(error, lasting=True)
    clean, rows = torch.zeros(2, dtype=torch.int64), torch.tensor([5, 7])
    if by_kernel:
        watch.keep_by(lambda first_EX, call: None, 2, clean)
    else:
        watch.keep(clean, rows)
    place = watch._first_EX if by_kernel else watch._first
    faults.look()
    for step in (1, 2):
        fault = torch.tensor([[0, 0, 0], [step, 3, 7]] if by_kernel else [step, 0, 3, 5, 7])
        place.copy_(fault)
        with pytest.raises(ValueError, match=r"found \[0, 3\] of \[(0|5), 7\]"):
            faults.look()
        assert not place.any()
        faults.look()
        place.copy_(fault)
        watch.forget()  # a warm-up
        faults.look()
    assert (watch._first_EX if by_kernel else watch._first) is place


def test_a_watch_of_no_graph_does_not_last():
    watch = faults.FaultWatch(lambda found, rows: ValueError("found"))
    watch.keep(torch.zeros(2, dtype=torch.int64), torch.tensor([5, 7]))
    faults.look()
    assert not faults._kept


def test_checks_last_where_a_graph_holds_the_experts():
    for changes, lasting in (({}, False), ({"cuda_graph_impl": "full_iteration"}, True)):
        assert build_layer(**changes).finite_check._watch.lasting == lasting
