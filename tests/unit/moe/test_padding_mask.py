"""Tokens under Megatron's padding mask have no part in the neurons' balance: not in the loss, its
gradient, the load counts or the selection bias, whatever the loss and the dispatcher."""

import pytest
import torch

from megatron_mone.moe.metrics import install_tracker
from megatron_mone.moe.padding import mark_padding, unmark_padding
from tests.unit.moe.builders import build_layer
from tests.unit.moe.test_layer import LOSSES, assert_near, assert_same

pytestmark = pytest.mark.usefixtures("one_rank")

SEQUENCE, BATCH, HIDDEN = 11, 3, 16


@pytest.fixture
def tokens():
    """([s, b, H] tokens, [b, s] padding: the end of every sequence but the first)."""
    generator = torch.Generator().manual_seed(3)
    padding = torch.zeros(BATCH, SEQUENCE, dtype=torch.bool)
    padding[1, 7:] = padding[2, 3:] = True
    return torch.randn(SEQUENCE, BATCH, HIDDEN, generator=generator), padding


def moved(x, padding):
    """The tokens, with other ones where there is padding."""
    return torch.where(padding.t().unsqueeze(2), torch.randn_like(x) * 3, x).contiguous()


def balance_of(x, padding, *, loss_alone=True, steps=1, **changes):
    """What one or more steps leave: the logged loss, gradients, load counts and the bias."""
    layer = build_layer(mone_ng_loss_coeff=0.5, **changes)
    for _ in range(steps):
        install_tracker().clear()
        layer.zero_grad()
        y, _ = layer(x.clone().requires_grad_(), padding_mask=padding)
        (y * 0 if loss_alone else y.square()).sum().backward()
        counts = layer.neuron_balancer.load.step_counts_EF.clone()
        metrics = {n: e.values.clone() for n, e in install_tracker().metrics.items()}
        layer.end_step()
    return {
        **metrics,
        "counts": counts,
        "rows": layer.neuron_balancer.load.window_rows_E,
        "fc1": layer.experts.linear_fc1.grad,
        "y": y.detach(),
        "bias": layer.experts.neuron_bias,
        "weights": layer.experts.ng_weights,
    }


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("loss_type", [*LOSSES, "bias"])
def test_moving_padded_tokens_moves_no_part_of_the_balance(tokens, loss_type, scope):
    x, padding = tokens
    steps = 2 if scope == "global_batch" else 1
    kept, other, whole = (
        balance_of(v, m, mone_ng_loss_type=loss_type, mone_ng_loss_scope=scope, steps=steps)
        for v, m in ((x, padding), (moved(x, padding), padding), (x, None))
    )
    compared = ["counts", "rows", "fc1"]
    compared += ["bias"] if loss_type == "bias" else ["ng_loss"]
    compared += ["weights"] if scope == "global_batch" and loss_type != "bias" else []
    for name in compared:
        assert torch.equal(kept[name], other[name]), name
        if name != "rows" and not (loss_type == "bias" and name == "fc1"):
            assert not torch.equal(kept[name], whole[name]), name
    assert kept["rows"].sum() == (~padding).sum() * 2 * steps


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_it_is_the_balance_of_the_other_tokens_alone(tokens, loss_type, dispatcher):
    """As though the layer had got no padding at all."""
    x, padding = tokens
    changes = dict(mone_ng_loss_type=loss_type, moe_token_dispatcher_type=dispatcher)
    masked = balance_of(x, padding, **changes)
    alone = balance_of(x[~padding.t()].unsqueeze(1), None, **changes)
    for name in ("ng_loss", "counts", "rows", "fc1"):
        assert_near(masked[name], alone[name], name)


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_the_outputs_and_their_gradients_stay(tokens, backend):
    """Megatron routes padding like any token: the mask changes no output, and to the bit."""
    x, padding = tokens
    changes = dict(mone_ng_loss_type="bias", loss_alone=False, mone_backend=backend)
    with_mask, without = balance_of(x, padding, **changes), balance_of(x, None, **changes)
    for name in ("y", "fc1"):
        assert torch.equal(with_mask[name], without[name]), name


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_recompute_changes_nothing(tokens, scope, backend):
    x, padding = tokens
    seen = [
        balance_of(x, padding, mone_ng_loss_scope=scope, mone_backend=backend, steps=2,
                   loss_alone=False, **changes)
        for changes in ({}, dict(recompute_granularity="selective", recompute_modules=["moe"]))
    ]  # fmt: skip
    for name in ("ng_loss", "counts", "rows", "fc1"):
        assert_same(seen[1][name], seen[0][name], backend)


@pytest.mark.parametrize(
    "changes",
    [
        dict(moe_expert_capacity_factor=0.5),
        dict(moe_expert_capacity_factor=2.0, moe_pad_expert_input_to_capacity=True),
        dict(moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5),
        dict(mone_selection="threshold"),
        dict(moe_shared_expert_intermediate_size=16),
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_with_whatever_else_the_layer_does(tokens, changes):
    """The weakest statement that holds where tokens compete for a capacity: the counts."""
    x, padding = tokens
    masked = balance_of(x, padding, **changes)
    if "moe_expert_capacity_factor" in changes and changes["moe_expert_capacity_factor"] < 1:
        assert 0 < masked["rows"].sum() < (~padding).sum() * 2
        return
    other = balance_of(moved(x, padding), padding, **changes)
    assert masked["rows"].sum() == (~padding).sum() * 2
    for name in ("ng_loss", "counts", "rows", "fc1"):
        assert torch.equal(masked[name], other[name]), name


def test_a_mask_of_no_padding_is_no_mask(tokens):
    x, padding = tokens
    masked, without = balance_of(x, torch.zeros_like(padding)), balance_of(x, None)
    for name in ("ng_loss", "counts", "rows", "fc1"):
        assert_near(masked[name], without[name], name)


def test_nothing_but_padding_is_a_balance_of_nothing(tokens):
    x, padding = tokens
    masked = balance_of(x, torch.ones_like(padding))
    assert masked["ng_loss"].item() == 0
    assert masked["rows"].sum() == masked["counts"].sum() == 0
    assert not masked["fc1"].any()


def test_a_loss_per_token_weighs_a_micro_batch_by_its_own_tokens(tokens):
    """Megatron divides by the tokens that are no padding: the router's loss and ours alike."""
    x, padding = tokens
    plain, per_token = (balance_of(x, padding, calculate_per_token_loss=on) for on in (False, True))
    assert torch.equal(plain["ng_loss"], per_token["ng_loss"])
    real = (~padding).sum()
    assert_near(per_token["fc1"], plain["fc1"] * real, "gradient")


def test_masks_are_recorded_and_replayed_for_padding_too(tokens):
    from megatron_mone.moe.masks.tape import record_masks, replay_masks
    from megatron_mone.moe.masks.trace import MaskTrace

    x, padding = tokens
    layer, trace = build_layer(mone_backend="reference"), MaskTrace()
    with record_masks(layer, trace):
        wanted, _ = layer(x, padding_mask=padding)
    assert len(trace.recorded(0, 1).merged()[0]) == SEQUENCE * BATCH * 2
    with replay_masks(layer, trace):
        assert torch.equal(layer(x, padding_mask=padding)[0], wanted)


def test_without_a_mask_nothing_is_done(tokens, monkeypatch):
    from megatron_mone.moe import layer as module
    from megatron_mone.moe.dispatch import carrier as mask_dispatch

    def fail(*arguments):
        raise AssertionError

    monkeypatch.setattr(module, "unmark_padding", fail)
    monkeypatch.setattr(mask_dispatch, "mark_padding", fail)
    balance_of(tokens[0], None)
    layer = build_layer().eval()
    layer(tokens[0], padding_mask=tokens[1])  # evaluation counts nothing


def test_marks_are_exact_in_both_passes():
    probs = torch.tensor([[0.25, 0.0], [0.5, 0.125]], requires_grad=True)
    marked = mark_padding(probs, torch.tensor([True, False]))
    read, padding = unmark_padding(marked.flatten())
    assert torch.equal(read, probs.flatten())
    assert padding.tolist() == [True, True, False, False]
    read.backward(torch.arange(1.0, 5.0))
    assert probs.grad.tolist() == [[1.0, 2.0], [3.0, 4.0]]


def test_a_mark_that_this_rank_did_not_expect_is_told(tokens):
    """A mask on some ranks of an expert group alone would be read as negative probabilities."""
    x, padding = tokens
    layer = build_layer()
    dispatch = layer.token_dispatcher.dispatch_preprocess

    def marked(hidden, routing_map, probs):
        return dispatch(hidden, routing_map, mark_padding(probs, padding.t().reshape(-1)))

    layer.token_dispatcher.dispatch_preprocess = marked
    with pytest.raises(ValueError, match="padding_mask = None here, and another rank"):
        layer(x)
