"""What to remove of a model: formulas by hand on small tensors, and a model that is made up."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.studies.catalogue import prune
from megatron_mone.studies.measuring import expert_scores, neuron_scores
from megatron_mone.studies.measuring.neuron_scores import ExpertRows

LOGITS = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 1.0], [1.0, 0.0, -1.0]])


def test_a_removed_expert_is_never_chosen_and_others_are_in_its_place():
    weight = expert_scores.routed(LOGITS, 2)
    top = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weight[0], torch.tensor([top, 1 - top, 0]))
    without = expert_scores.routed(LOGITS, 2, [0])
    assert without[:, 0].tolist() == [0, 0, 0]
    torch.testing.assert_close(without[0], torch.tensor([0, top, 1 - top]))
    assert torch.equal(expert_scores.routed(LOGITS, 2, []), weight)


def test_to_remove_what_nobody_chose_changes_nothing():
    logits = torch.cat([LOGITS, torch.full((3, 1), -9.0)], dim=1)
    assert torch.equal(expert_scores.routed(logits, 2, [3]), expert_scores.routed(logits, 2))


def test_scores_of_experts():
    weight = torch.tensor([[0.75, 0.25, 0], [0, 1.0, 0], [0.5, 0.5, 0]])
    output = torch.zeros(3, 3, 2)
    output[:, 0], output[0, 1], output[1, 1] = torch.tensor([3.0, 4]), torch.tensor([1.0, 0]), 2.0
    assert expert_scores.frequency(weight).tolist() == pytest.approx([2 / 3, 1, 0])
    assert expert_scores.output_norm(weight, output).tolist() == pytest.approx(
        [5, (1 + math.sqrt(8)) / 3, 0]
    )
    assert expert_scores.reap(weight, output).tolist() == pytest.approx(
        [(0.75 * 5 + 0.5 * 5) / 2, (0.25 + math.sqrt(8)) / 3, 0]
    )
    assert expert_scores.lowest(expert_scores.reap(weight, output), 2) == (1, 2)
    assert expert_scores.lowest(torch.tensor([1.0, 1, 0]), 2) == (0, 2)
    flat = expert_scores.mean_probability(torch.zeros(2, 4))
    assert flat.tolist() == [0.25] * 4


def test_reconstruction_finds_the_set_whose_output_differs_least():
    """Experts 0 and 2 give the same, so that either can stand for the other; 1 is another."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 3, generator=generator)
    output = torch.randn(50, 3, 4, generator=generator)
    output[:, 2] = output[:, 0]
    assert expert_scores.by_reconstruction(logits, output, 1, 1) in ((0,), (2,))
    assert expert_scores.by_reconstruction(logits, output, 1, 0) == ()
    whole = torch.einsum("te,teh->th", expert_scores.routed(logits, 1), output)
    errors = {
        one: float((torch.einsum("te,teh->th", expert_scores.routed(logits, 1, one), output)
                    - whole).norm())
        for one in itertools.combinations(range(3), 2)
    }  # fmt: skip
    assert expert_scores.by_reconstruction(logits, output, 1, 2) == min(errors, key=errors.get)


def test_similar_rows_of_the_router_are_one_cluster():
    router = torch.tensor([[0.0, 0], [10, 0], [0.1, 0], [10, 0.3], [0.2, 0]])
    weight = torch.tensor([[0.0], [5], [1], [6], [5]])
    assert expert_scores.by_similarity(router, weight, 0) == ()
    assert expert_scores.by_similarity(router, weight, 1) == (2,)  # 0 and 2; a tie stays first
    # of 0, 2 and 4 the second is nearest to their mean, 2; of 1 and 3 the first
    assert expert_scores.by_similarity(router, weight, 3) == (0, 3, 4)


def test_clusters_are_merged_by_their_farthest_members():
    """The third is nearer to the second than to the fourth, but farther from the first."""
    router, weight = torch.tensor([[0.0], [1], [2.1], [3.3]]), torch.tensor([[0.0], [1], [5], [9]])
    assert expert_scores.by_similarity(router, weight, 2) == (1, 3)


def test_skipping_leaves_out_small_weights():
    weight = torch.tensor([[0.8, 0.2, 0], [0, 0.4, 0.6]])
    torch.testing.assert_close(
        expert_scores.skipped_by_score(weight, 0.5), torch.tensor([[1.0, 0, 0], [0, 0.4, 0.6]])
    )
    third = torch.full((1, 3), 1 / 3)
    for share in (0.0, 0.2):
        assert torch.equal(expert_scores.skipped_by_score(third, share), third)


def test_skipping_by_use_leaves_out_who_is_rare_in_its_sequence():
    first = torch.tensor([[0.5, 0.5, 0], [0.5, 0.5, 0], [0.5, 0, 0.5], [0.5, 0.5, 0]])
    second = torch.tensor([[0, 0, 1.0]] * 4)
    found = expert_scores.skipped_by_use(torch.cat([first, second]), 0.6, 4)
    assert found[2].tolist() == [1, 0, 0]  # the third expert has one of four, even are two
    assert torch.equal(found[[0, 1, 3]], first[[0, 1, 3]])
    assert torch.equal(found[4:], second)
    alone = torch.tensor([[0, 1.0], [1, 0], [1, 0], [1, 0]])
    assert torch.equal(expert_scores.skipped_by_use(alone, 0.9, 4), alone)  # keeps its only one


def test_an_expert_goes_that_is_below_the_share_of_an_even_part():
    """PESF: c < l K / N alpha. Of four tokens with two experts of four an even part is 2; the
    experts are chosen 4, 3, 1 and 0 times."""
    weight = torch.tensor([[0.5, 0.5, 0, 0]] * 3 + [[0.75, 0, 0.25, 0]])
    assert torch.equal(expert_scores.skipped_by_use(weight, 0.5, 4), weight)  # 1 is not below 1
    found = expert_scores.skipped_by_use(weight, 0.6, 4)
    assert found[3].tolist() == [1, 0, 0, 0]
    assert torch.equal(found[:3], weight[:3])


def rows() -> ExpertRows:
    return ExpertRows(
        x_NH=torch.tensor([[3.0, 0], [4, 1]]), p_N=torch.tensor([1.0, 0.5]),
        g_NF=torch.tensor([[1.0, -2, 0, 0], [0, 3, 4, 0]]),
        u_NF=torch.tensor([[2.0, 1, 1, 9], [2, -1, 0.5, 9]]),
        kept_NF=torch.tensor([[True, True, False, False], [False, True, True, False]]),
        w_gate_FH=torch.tensor([[1.0, -1], [0, 0], [0, 2], [0, 0]]),
        w_up_FH=torch.tensor([[0.0, 1], [1, 0], [0, 0], [0, 0]]),
        w_down_FH=torch.tensor([[3.0, 4], [1, 0], [0, -2], [1, 1]]),
    )  # fmt: skip


def test_scores_of_neurons():
    assert neuron_scores.frequency(rows()).tolist() == [0, 0.5, 0.5, 0]  # one of four a row
    assert neuron_scores.gate(rows()).tolist() == [0.5, 2.5, 2, 0]
    assert neuron_scores.product(rows()).tolist() == [1, 2.5, 1, 0]
    assert neuron_scores.weight_informed(rows()).tolist() == [5, 2.5, 2, 0]
    first, second = math.sqrt(9 + 4), 0.5  # |p x| of the two inputs
    expected = [
        first + 2 * second + 7 * 2,  # |p g u| of the first neuron is 2
        first + math.sqrt(4 + 1.5**2),
        2 * second + 2 * 0.5 * 2,
        0,
    ]
    assert neuron_scores.moe_pruner(rows()).tolist() == pytest.approx(expected)
    assert (*neuron_scores.SCORES,) == prune.NEURON_CRITERIA


class Router(torch.nn.Module):
    """Weights of the two largest logits, in Megatron's order of tokens."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = weight

    def gating(self, x):
        return x @ self.weight.T

    def forward(self, x):
        weight = expert_scores.routed(self.gating(x).flatten(0, 1), 2)
        return weight, weight > 0


@pytest.fixture
def model(monkeypatch):
    """One layer of four experts, the last never chosen; the loss is the mean of its output."""
    from megatron_mone.studies.measuring.pruned_model import Pruned

    generator = torch.Generator().manual_seed(3)
    experts = torch.nn.Module()
    experts.linear_fc1 = torch.nn.Parameter(torch.randn(4, 2, 6, 5, generator=generator))
    experts.linear_fc2 = torch.nn.Parameter(torch.randn(4, 6, 5, generator=generator))
    router_EH = torch.randn(4, 5, generator=generator)
    router_EH[3] = 0
    embedding_VH = torch.randn(20, 5, generator=generator)
    layer = SimpleNamespace(router=Router(router_EH), experts=experts)

    def loss(rows_RS):
        x_SBH = embedding_VH[rows_RS[:, :-1]].transpose(0, 1)
        weight_TE, _ = layer.router(x_SBH)
        x_TH = x_SBH.flatten(0, 1)
        gate, up = (torch.einsum("th,efh->tef", x_TH, w) for w in experts.linear_fc1.unbind(1))
        hidden_TEF = torch.nn.functional.silu(gate) * up
        return float(torch.einsum("te,tef,efh->th", weight_TE, hidden_TEF, experts.linear_fc2)
                     .square().mean())  # fmt: skip

    def never(x):
        logits = x @ router_EH.T
        logits[..., 3] = logits.amin(-1) - 1
        return logits

    monkeypatch.setattr(Router, "gating", lambda self, x: never(x))
    one = Pruned.__new__(Pruned)
    one.layers, one.topk, one._known, one.window = {1: layer}, 2, {}, 6
    rows_RS = torch.randint(20, (8, 7), generator=generator)
    monkeypatch.setattr(Pruned, "loss", lambda self: loss(rows_RS))
    return one


def test_nothing_removed_is_the_same_loss_to_the_bit(model):
    whole = model.loss()
    assert model.without_experts({1: []}) == whole
    assert model.without_neurons({1: [[]] * 4}) == whole
    assert model.skipping(lambda weight: expert_scores.skipped_by_score(weight, 0.0)) == (whole, 0)


def test_an_expert_that_is_never_chosen_is_not_missed(model):
    whole = model.loss()
    assert model.without_experts({1: [3]}) == whole
    assert model.without_neurons({1: [[], [], [], range(6)]}) == whole
    assert model.without_experts({1: [0]}) != whole
    assert model.without_neurons({1: [[0], [], [], []]}) != whole
    assert model.loss() == whole  # it is as it was


def test_a_removed_neuron_has_no_gate_to_be_chosen_by(model, monkeypatch):
    experts, seen = model.layers[1].experts, []
    before = experts.linear_fc1.detach().clone()
    monkeypatch.setattr(
        type(model), "loss", lambda self: seen.append(experts.linear_fc1.detach().clone()) or 0.0
    )
    model.without_neurons({1: [[1, 4], [], [], []]})
    assert not seen[0][0][:, [1, 4]].any()
    kept = seen[0] != 0
    assert torch.equal(seen[0][kept], before[kept])
    assert torch.equal(experts.linear_fc1, before)


def test_skipping_sees_whole_windows_and_puts_them_back(model):
    whole, seen = model.loss(), []
    assert model.skipping(lambda weight: seen.append(weight) or weight) == (whole, 0)
    embedded = model.layers[1].router
    assert seen[0].shape == (48, 4)
    changed, left_out = model.skipping(lambda weight: expert_scores.skipped_by_score(weight, 1.0))
    assert changed != whole
    assert left_out == 0.5  # the smaller of each token's two
    assert not embedded._forward_hooks
