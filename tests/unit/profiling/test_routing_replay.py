"""Every run routes its tokens as the first one did, in recomputes too."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mone.moe import routing_tape
from megatron_mone.profiling.routing_replay import SharedRouting, repeated_routing


def layer(experts=4, topk=2):
    config = SimpleNamespace(num_moe_experts=experts, moe_router_topk=topk)
    return SimpleNamespace(config=config, router=SimpleNamespace(router_replay=None))


def choose(scores, topk, num_groups=None, group_topk=None):
    return scores.topk(topk, dim=1)


def route(layer, scores):
    return layer.router.router_replay.get_replay_topk(scores, 2, default_compute_topk=choose)


@pytest.fixture
def layers():
    return [layer()], [layer()], [layer()]


def test_others_take_the_choices_of_the_first(layers):
    shared = SharedRouting(layers)
    scores = torch.rand(3, 2, 5, 4)  # runs, micro-batches, tokens, experts
    shared.begin_step(0, 7)
    chosen = [route(layers[0][0], micro_batch)[1] for micro_batch in scores[0]]
    shared.end_step(0, 7)
    for run in (1, 2):
        shared.begin_step(run, 7)
        for micro_batch, wanted in zip(scores[run], chosen, strict=True):
            probs, found = route(layers[run][0], micro_batch)
            assert torch.equal(found, wanted)
            assert torch.equal(probs, micro_batch.gather(1, wanted))
        shared.end_step(run, 7)


def test_a_recompute_takes_them_again(layers, monkeypatch):
    shared = SharedRouting(layers)
    for run in (0, 1):
        shared.begin_step(run, 0)
        scores = torch.rand(2, 5, 4)
        monkeypatch.setattr(routing_tape, "in_recompute", lambda: False)
        first = [route(layers[run][0], s)[1] for s in scores]
        monkeypatch.setattr(routing_tape, "in_recompute", lambda: True)
        again = [route(layers[run][0], torch.rand(5, 4))[1] for _ in scores]
        assert all(map(torch.equal, first, again))
        shared.end_step(run, 0)


def test_steps_do_not_mix(layers):
    shared = SharedRouting(layers)
    chosen = {}
    for step in (0, 1):
        shared.begin_step(0, step)
        chosen[step] = route(layers[0][0], torch.rand(5, 4))[1]
        shared.end_step(0, step)
    for step in (0, 1):
        shared.begin_step(1, step)
        assert torch.equal(route(layers[1][0], torch.rand(5, 4))[1], chosen[step])


def test_choices_go_when_all_have_taken_them(layers):
    shared = SharedRouting(layers)
    for run in (0, 2, 1):  # the order turns from window to window
        shared.begin_step(run, 3)
        route(layers[run][0], torch.rand(5, 4))
        assert run == 0 or list(shared._steps) == [3]
        shared.end_step(run, 3)
    assert shared._steps == shared._waiting == {}


@pytest.mark.parametrize("shared", [False, True])
def test_a_step_can_be_repeated(layers, shared):
    if shared:
        SharedRouting(layers).begin_step(0, 0)
    one = layers[0][0]
    before = one.router.router_replay
    with repeated_routing([one]) as repeat:
        first = [route(one, torch.rand(5, 4))[1] for _ in range(2)]
        repeat()
        again = [route(one, torch.rand(5, 4))[1] for _ in range(2)]
    assert all(map(torch.equal, first, again))
    assert one.router.router_replay is before


def test_runs_with_other_experts_are_refused():
    with pytest.raises(ValueError, match="--routing replayed needs the same MoE layers"):
        SharedRouting(([layer()], [layer(experts=8)]))
    with pytest.raises(ValueError, match="--routing replayed needs the same MoE layers"):
        SharedRouting(([layer()], [layer(), layer()]))
