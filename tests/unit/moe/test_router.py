"""The router's balance loss of probabilities after top-k, against the formula by hand."""

import pytest
import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from megatron_mone.config import validate
from megatron_mone.moe.router import AfterTopKRouter
from tests.conftest import mone_config
from tests.unit.moe.builders import build_layer

pytestmark = pytest.mark.usefixtures("one_rank")

COEFF, EXPERTS, TOPK = 0.5, 6, 2
NAMES = {"aux_loss": "load_balancing_loss", "seq_aux_loss": "seq_load_balancing_loss",
         "global_aux_loss": "global_load_balancing_loss"}  # fmt: skip


def by_hand(weight_EH, x_TH, *, before, first):
    """E * sum of f_i P_i, token by token.

    Args:
        before: whether a softmax over all experts comes before the choice.
        first: whether P is of all experts, before the choice.
    """
    tokens = len(x_TH)
    f, p = torch.zeros(EXPERTS), [torch.zeros(()) for _ in range(EXPERTS)]
    for x_H in x_TH:
        logits = weight_EH @ x_H
        chosen = sorted(range(EXPERTS), key=lambda i, of=logits: -float(of[i]))[:TOPK]
        among = list(range(EXPERTS)) if before or first else chosen
        total = sum(logits[i].exp() for i in among)
        for i in range(EXPERTS) if first else chosen:
            p[i] = p[i] + logits[i].exp() / total / tokens
        for i in chosen:
            f[i] += 1 / (tokens * TOPK)
    return EXPERTS * sum(f[i] * p[i] for i in range(EXPERTS))


def layer_of(**changes):
    return build_layer(
        num_moe_experts=EXPERTS, moe_router_topk=TOPK, moe_aux_loss_coeff=COEFF,
        mone_ng_loss_coeff=0.0, moe_router_dtype="fp32",
        **{"moe_router_load_balancing_type": "aux_loss", **changes},
    )  # fmt: skip


def asked(layer, x, padding=None):
    """The router's loss as it is logged, without its coefficient, and its gradient alone."""
    get_moe_metrics_tracker().clear()
    layer.set_layer_number(1)
    probs, _ = layer.router(x, padding)
    (probs * 0).sum().backward()
    metrics = get_moe_metrics_tracker().metrics
    kind = layer.config.moe_router_load_balancing_type
    return metrics[NAMES[kind]].values.sum(), layer.router.weight.grad


@pytest.mark.parametrize("before", [False, True], ids=["softmax after", "softmax before"])
@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("probs", ["before_topk", "after_topk"])
def test_the_loss_and_its_gradient_are_the_formulas(probs, kind, before):
    """Per sequence for seq_aux_loss, whose mean over sequences it is; scaled by the coefficient."""
    layer = layer_of(
        moe_router_load_balancing_type=kind, mone_router_loss_probs=probs,
        moe_router_pre_softmax=before,
    )  # fmt: skip
    x = torch.randn(9, 3, 16)
    loss, grad = asked(layer, x)
    weight = layer.router.weight.detach().clone().requires_grad_()
    parts = x.unbind(1) if kind == "seq_aux_loss" else [x.reshape(-1, 16)]
    first = probs == "before_topk"
    want = sum(by_hand(weight, part, before=before, first=first) for part in parts) / len(parts)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    (want_grad,) = torch.autograd.grad(COEFF * want, weight)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-7)


def test_tokens_of_padding_count_for_nothing():
    layer, x = layer_of(mone_router_loss_probs="after_topk"), torch.randn(8, 2, 16)
    padding = torch.zeros(8, 2, dtype=torch.bool)
    padding[5:, 1] = True
    loss, grad = asked(layer, x, padding)
    weight = layer.router.weight.detach().clone().requires_grad_()
    want = by_hand(weight, x[~padding], before=False, first=False)
    torch.testing.assert_close(loss, want.detach(), rtol=1e-5, atol=1e-6)
    (want_grad,) = torch.autograd.grad(COEFF * want, weight)
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-7)


def test_what_is_routed_is_the_same():
    x = torch.randn(9, 3, 16)
    stock, ours = layer_of(), layer_of(mone_router_loss_probs="after_topk")
    assert type(stock.router) is TopKRouter
    assert type(ours.router) is AfterTopKRouter
    for one, other in zip(stock.router(x), ours.router(x), strict=True):
        assert torch.equal(one, other)


def test_stock_moe_layers_of_the_model_have_it_too():
    layer = build_layer(
        "stock", moe_aux_loss_coeff=COEFF, moe_router_load_balancing_type="aux_loss",
        mone_router_loss_probs="after_topk",
    )  # fmt: skip
    assert type(layer.router) is AfterTopKRouter


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(moe_router_load_balancing_type="none"), "mone_router_loss_probs = 'after_topk'"),
        (dict(moe_router_load_balancing_type="sinkhorn"), "before_topk where no moe_router_load"),
        (dict(moe_router_load_balancing_type="aux_loss"), "has a moe_aux_loss_coeff > 0"),
        (dict(moe_router_load_balancing_type=["seq_aux_loss", "aux_loss"],
              moe_aux_loss_coeff=[0.0, 0.0]), "has a moe_aux_loss_coeff > 0"),
    ],
)  # fmt: skip
def test_without_a_loss_it_is_refused(changes, said):
    with pytest.raises(ValueError, match=said) as error:
        mone_config(mone_router_loss_probs="after_topk", **changes)
    assert "\n" not in str(error.value)


def test_megatrons_fused_loss_is_refused(monkeypatch):
    config = mone_config(mone_router_loss_probs="before_topk")
    config.mone_router_loss_probs, config.moe_router_fusion = "after_topk", True
    config.moe_router_load_balancing_type, config.moe_aux_loss_coeff = "aux_loss", 0.1
    with pytest.raises(ValueError, match=r"moe_router_fusion = True .* False with mone_router"):
        validate(config)
