"""Routing and dispatch of a GPU job without values: rows that arrive against all choices counted
one by one, traffic, shapes and kept bytes against what is written out here."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from megatron_mone.planning.cost.collectives import expected_parts
from megatron_mone.planning.tracing.recorder import Recorder
from megatron_mone.planning.tracing.stand_ins import deep_ep
from megatron_mone.planning.tracing.stand_ins import op as fused_op
from megatron_mone.planning.tracing.stand_ins.deep_ep import Exchange, arriving_tokens
from megatron_mone.planning.tracing.stand_ins.permutation import (
    permute,
    permute_and_pad_with_probs,
    permute_with_probs,
    sort_chunks,
    sort_chunks_with_probs,
    unpermute,
)
from megatron_mone.planning.tracing.stand_ins.router import (
    router,
    router_aux_loss,
    router_product,
    router_scores,
)
from megatron_mone.planning.tracing.stand_ins.values import balanced_rows, routing_map
from megatron_mone.planning.tracing.unknown_values import UnknownValues
from megatron_mone.profiling.clock import HostStamps, PhaseClock

T, H, E, K, RANKS = 64, 32, 16, 3, 8
MINE = E // RANKS


class Group:
    """The TP x EP group of 8 ranks, of which this is the third."""

    group_desc = "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP"

    def size(self):
        return RANKS

    def rank(self):
        return 2


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(
        torch.distributed, "get_process_group_ranks", lambda group: list(range(group.size()))
    )
    found = Recorder(PhaseClock(HostStamps()))
    found.clock.begin()
    with fused_op.recording(found), UnknownValues(found.saw_operator):
        yield found


def config_of(**changes):
    values = {
        "num_moe_experts": E, "moe_router_num_groups": None, "moe_router_group_topk": None,
        "moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "deepep",
    }  # fmt: skip
    return SimpleNamespace(**{**values, **changes})


def hidden(rows=T, dtype=torch.bfloat16):
    return torch.empty(rows, H, dtype=dtype, requires_grad=True)


def kept_bytes(recorder):
    return sum(size for _, size in recorder.kept())


def hits(experts, topk, held, groups=1, group_topk=1):
    """(choices that hit the first `held` experts, all choices) of equally likely ones."""
    size, hit, every = experts // groups, 0, 0
    for chosen in itertools.combinations(range(groups), group_topk):
        pool = [g * size + e for g in chosen for e in range(size)]
        for choice in itertools.combinations(pool, topk):
            every += 1
            hit += any(expert < held for expert in choice)
    return hit, every


@pytest.mark.parametrize(
    ("experts", "topk", "held", "groups", "group_topk"),
    [(16, 3, 2, 1, 1), (16, 3, 4, 1, 1), (8, 8, 2, 1, 1), (16, 4, 2, 4, 2), (16, 4, 4, 4, 2),
     (16, 4, 8, 4, 2), (16, 3, 8, 8, 3), (12, 2, 12, 4, 1)],
)  # fmt: skip
def test_arrivals_are_the_share_of_all_choices(experts, topk, held, groups, group_topk):
    """A rank inside a group of experts, a whole group, several groups, or all experts."""
    hit, every = hits(experts, topk, held, groups, group_topk)
    rows = [1000 * topk / experts] * held
    found = arriving_tokens(rows, 1000, topk, experts, groups, group_topk)
    assert found == pytest.approx(1000 * hit / every, rel=1e-9)


def test_arrivals_are_those_that_the_cost_model_expects():
    """256 experts on 64 ranks, 8 a token, as in DeepSeek-V3; in 4 of 8 groups, half the ranks."""
    balanced = [4096 * 8 / 256] * 4
    assert arriving_tokens(balanced, 4096, 8, 256) * 64 == pytest.approx(
        4096 * expected_parts(8, 256, 64)
    )
    assert arriving_tokens(balanced, 4096, 8, 256, 8, 4) * 64 == pytest.approx(
        4096 * expected_parts(8, 128, 32)
    )


def test_a_hotter_rank_gets_more_tokens_and_never_more_than_there_are():
    found = [arriving_tokens([rows, 12], T, K, E) for rows in (0, 6, 12, 24, 48, 64)]
    assert found == sorted(found)
    assert found[-1] == T
    assert arriving_tokens([0, 0], T, K, E) == 0
    # one expert here: every routed row is a token of its own
    assert arriving_tokens([20], T, K, E) == pytest.approx(20)


def dispatched(recorder, rows=None, **changes):
    """(hidden, indices, probs, counts, handle) of a first dispatch, and its inputs."""
    exchange = Exchange(config_of(**changes), recorder)
    routed = routing_map(balanced_rows(T, K, E) if rows is None else rows, T, K)
    indices = deep_ep._indices(routed, K)
    x, probs = hidden(), torch.empty(T, K, requires_grad=True)
    made = exchange.fused_dispatch(x, indices, probs, E, Group(), async_finish=True)
    return exchange, made, (x, probs)


def test_a_token_arrives_once_on_a_rank_and_is_routed_to_its_experts_there(recorder):
    _, (x, indices, probs, counts, handle), _ = dispatched(recorder)
    assert counts.tolist() == [RANKS * T * K // E] * MINE
    arrived = round(RANKS * arriving_tokens([12, 12], T, K, E))
    assert x.shape == (arrived, H)
    assert probs.shape == indices.shape == (arrived, K)
    for expert, rows in enumerate(counts.tolist()):
        assert int((indices == expert).sum()) == rows
        assert int((indices == expert).any(dim=1).sum()) == rows  # never twice in a token
    assert bool((indices >= 0).any(dim=1).all())
    assert handle.tokens == T


def test_uneven_rows_reach_this_rank(recorder):
    rows = [64, 10, 10, 10, 64, 20, *[2] * 7, 0, 0, 0]
    _, (x, indices, _, counts, _), _ = dispatched(recorder, rows)
    assert counts.tolist() == [8 * 64, 8 * 20]
    assert x.shape[0] == 8 * 64  # every token goes to expert 4
    assert int((indices >= 0).sum()) == 8 * 84


def test_traffic_of_both_ways_in_both_passes(recorder):
    exchange, (x, _, probs, _, handle), inputs = dispatched(recorder)
    y, _ = exchange.fused_combine(x * 1, Group(), handle, async_finish=True)
    assert y.shape == (T, H)
    (y.float().sum() + probs.sum()).backward()
    assert [t.grad.shape for t in inputs] == [(T, H), (T, K)]
    states, weights = 2 * T * H, 4 * T * K
    assert [(c.kind, c.bytes, c.group, c.ranks) for c in recorder.collectives] == [
        ("dispatch", states + weights, "tp-ep", RANKS), ("combine", states, "tp-ep", RANKS),
        ("dispatch", states, "tp-ep", RANKS), ("combine", states + weights, "tp-ep", RANKS),
    ]  # fmt: skip


def test_a_handle_is_kept_once_for_both_ways(recorder):
    """A byte and an int32 for each token and rank, an int32 for each arrived token."""
    with recorder.watch_kept():
        exchange, (x, *_, handle), _ = dispatched(recorder)
        exchange.fused_combine(x, Group(), handle)
    assert kept_bytes(recorder) == T * RANKS * (1 + 4) + 4 * handle.arrived


def test_group_limited_routing_spreads_a_token_less(recorder):
    """4 of 8 groups: arrivals are those of half the experts on half the ranks."""
    limited = {"moe_router_num_groups": 8, "moe_router_group_topk": 4}
    _, (x, *_), _ = dispatched(recorder, **limited)
    _, (plain, *_), _ = dispatched(recorder)
    assert x.shape[0] == round(T * expected_parts(K, E // 2, RANKS // 2)) < plain.shape[0]


def test_expert_tensor_ranks_each_get_the_token(recorder):
    """Two of them: 8 ranks hold 2 of 8 experts each, and every choice counts twice."""
    exchange = Exchange(config_of(num_moe_experts=8), recorder)
    once = routing_map(balanced_rows(T, 2, 8), T, 2).view(T, 4, 1, 2)
    routed = once.expand(T, 4, 2, 2).reshape(T, E)
    indices = deep_ep._indices(routed, 4)
    made = exchange.fused_dispatch(hidden(), indices, torch.empty(T, 4), E, Group())
    assert made[0].shape[0] == round(RANKS * T * expected_parts(2, 8, 4) / 4)
    assert made[3].tolist() == [RANKS * 16] * 2


@pytest.mark.parametrize("align", [None, 64])
def test_hybridep_permutes_and_pads_on_its_way(recorder, align):
    config = config_of(moe_flex_dispatcher_backend="hybridep")
    exchange, probs = Exchange(config, recorder), torch.empty(T, E, requires_grad=True)
    routed, x = routing_map(balanced_rows(T, K, E), T, K), hidden()
    rows, weights, _, counts, handle = exchange.hybrid_dispatch(
        x, routed, probs, Group(), num_local_experts=MINE, pad_multiple=align
    )
    each = 96 if align is None else -(-96 // align) * align
    assert counts.tolist() == [each] * MINE
    assert rows.shape == (MINE * each, H)
    assert weights.shape == (MINE * each,)
    assert int(handle[-1]) == 0
    y = exchange.hybrid_combine(rows * 1, handle, num_permuted_tokens=rows.shape[0])
    (y.float().sum() + weights.sum()).backward()
    assert [t.grad.shape for t in (y, x, probs) if t.grad is not None] == [(T, H), (T, E)]
    states, each_pair = 2 * T * H, 4 * T * K
    assert [(c.kind, c.bytes) for c in recorder.collectives] == [
        ("all_gather", T * E), ("dispatch", states + each_pair), ("combine", states),
        ("dispatch", states), ("combine", states + each_pair),
    ]  # fmt: skip
    names = [op.name for op in recorder.ops if op.name.startswith("fused.")]
    assert names == [
        "fused.permute", "fused.unpermute", "fused.unpermute_backward", "fused.permute_backward",
    ]  # fmt: skip


def test_indices_become_the_map_they_came_from(recorder):
    routed = routing_map([20, 0, 40, 4], T, 1)
    routed[:7] = torch.tensor([True, False, True, False])
    indices = deep_ep._indices(routed, K)
    probs = torch.empty(T, K, requires_grad=True)
    with recorder.watch_kept():
        found, spread = deep_ep.indices_to_multihot(indices, probs, 4)
    assert torch.equal(found, routed)
    spread.backward(torch.empty_like(spread))
    assert probs.grad.shape == (T, K)
    assert kept_bytes(recorder) == 4 * T * 4


def test_a_permutation_keeps_its_row_map_alone(recorder):
    """int32 [T, 2 E + 1], the same of the way there and back; an op reads and writes rows once."""
    routed, x = routing_map(balanced_rows(T, K, E), T, K), hidden()
    probs = torch.empty(T, E, requires_grad=True)
    row_map = 4 * T * (2 * E + 1)
    with recorder.watch_kept():
        rows, weights, kept = permute_with_probs(x, probs, routed, T * K)
        y = unpermute(rows, kept, restore_shape=x.shape, pad_offsets=None)
    assert kept_bytes(recorder) == row_map
    (y.float().sum() + weights.sum()).backward()
    assert (x.grad.shape, probs.grad.shape) == ((T, H), (T, E))
    ops = {op.name: op for op in recorder.ops if op.name.startswith("fused.")}
    assert ops["fused.permute"].bytes_read == 2 * T * H + 4 * T * E + row_map
    assert ops["fused.permute"].bytes_written == 2 * T * K * H + 4 * T * K
    assert ops["fused.unpermute"].bytes_written == 2 * T * H
    assert set(ops) == {
        "fused.permute", "fused.unpermute", "fused.permute_backward", "fused.unpermute_backward",
    }  # fmt: skip
    alone, _ = permute(x, routed, T * K)
    assert alone.shape == (T * K, H)


def test_a_permutation_that_pads(recorder):
    routed = routing_map([20, 0, 40, 4], T, 1)
    counts = torch.tensor([20, 0, 40, 4])
    rows, weights, kept, offsets, padded = permute_and_pad_with_probs(
        hidden(), torch.empty(T, 4), routed, counts, 16
    )
    assert padded.tolist() == [32, 0, 48, 16]
    assert (rows.shape, weights.shape) == ((96, H), (96,))
    y = unpermute(rows, kept, restore_shape=(T, H), pad_offsets=offsets)
    assert y.shape == (T, H)


def test_sorted_chunks_keep_an_index_a_row(recorder):
    x, probs = hidden(), torch.empty(T, requires_grad=True)
    sizes, order = torch.tensor([40, 24]), torch.tensor([1, 0])
    with recorder.watch_kept():
        rows, weights = sort_chunks_with_probs(x, probs, sizes, order)
        again = sort_chunks(rows, sizes, order)
    assert (rows.shape, weights.shape, again.shape) == ((T, H), (T,), (T, H))
    assert kept_bytes(recorder) == 2 * 4 * T


def test_a_fused_router_is_one_op_a_pass(recorder):
    """Kept: float32 scores and the map of the choice, float32 scores for the loss, the counts."""
    logits = torch.empty(T, E, requires_grad=True)
    with recorder.watch_kept():
        probs, routed = router(logits=logits, topk=K)
        again, scores = router_scores(logits=logits, topk=K, score_function="sigmoid")
        counts = torch.empty(E, dtype=torch.int64, device="meta")
        loss = router_aux_loss(
            probs=scores, tokens_per_expert=counts, total_num_tokens=T, topk=K, num_experts=E,
            coeff=0.1,
        )  # fmt: skip
    assert routed.dtype == again.dtype == torch.bool
    assert kept_bytes(recorder) == T * E * (4 + 1) + T * E * 4 + 8 * E
    (probs.sum() + loss).backward()
    assert logits.grad.shape == (T, E)
    names = [op.name for op in recorder.ops if op.name.startswith("fused.")]
    once = ["fused.router", "fused.router_scores", "fused.router_aux_loss"]
    assert sorted(names) == sorted([*once, *(f"{name}_backward" for name in once)])


@pytest.mark.parametrize(
    ("layout", "a", "b", "result", "name"),
    [("TN", (E, H), (T, H), (T, E), "fused.linear"),
     ("NN", (E, H), (T, E), (T, H), "fused.linear_dgrad"),
     ("NT", (T, H), (T, E), (E, H), "fused.linear_wgrad")],
)  # fmt: skip
def test_products_of_the_router(recorder, layout, a, b, result, name):
    left, right = (torch.empty(shape, dtype=torch.bfloat16) for shape in (a, b))
    [product] = router_product(left, right, torch.float32, layout=layout)
    assert (product.shape, product.dtype) == (result, torch.float32)
    [op] = recorder.ops
    assert (op.name, op.flops, op.dtype) == (name, 2 * T * E * H, "bfloat16")


def nccl(recorder, capacity):
    """Through NCCL EP: the exchange, its buffer, what a dispatch made, and its inputs."""
    config = config_of(moe_flex_dispatcher_backend="ncclep", moe_expert_rank_capacity_factor=2.0)
    exchange, buffer = Exchange(config, recorder), deep_ep.Slots(recv_capacity_per_rank=capacity)
    exchange.bootstrap(Group(), num_experts=E, hidden_dim=H)
    indices = deep_ep._indices(routing_map(balanced_rows(T, K, E), T, K), K)
    x, probs = hidden(), torch.empty(T, K, requires_grad=True)
    return exchange, buffer, exchange.nccl_dispatch(buffer, x, indices, probs), (x, probs)


def test_nccl_ep_fills_a_buffer_of_its_capacity(recorder):
    capacity = 2 * T * K
    exchange, buffer, (rows, counts, weights), inputs = nccl(recorder, capacity)
    assert counts.tolist() == [RANKS * T * K // E] * MINE
    assert (rows.shape, weights.shape) == ((capacity, H), (capacity,))
    handle = buffer.handle
    exchange.nccl_dispatch(
        buffer,
        rows[:T] * 1,
        deep_ep._indices(  # masks, by the same slots
            routing_map(balanced_rows(T, K, E), T, K), K
        ),
        torch.empty(T, K),
    )
    assert buffer.handle is handle
    y = exchange.nccl_combine(buffer, rows * 1, num_local_tokens=T)
    (y.float().sum() + weights.sum()).backward()
    assert y.shape == (T, H)
    assert [t.grad.shape for t in inputs] == [(T, H), (T, K)]
    states, each_pair = 2 * T * H, 4 * T * K
    assert [(c.kind, c.bytes) for c in recorder.collectives] == [
        ("dispatch", states + each_pair), ("dispatch", states + each_pair), ("combine", states),
        ("dispatch", states), ("combine", states + each_pair),
    ]  # fmt: skip


def test_more_rows_than_nccl_ep_has_room_for_are_one_line(recorder):
    with pytest.raises(
        ValueError, match=r"moe_expert_rank_capacity_factor = 2\.0 holds"
    ) as failure:
        nccl(recorder, MINE * RANKS * T * K // E - 1)
    assert "\n" not in str(failure.value)


def test_everything_replaced_is_put_back(recorder):
    from megatron.core.transformer.moe import token_dispatcher

    before = dict(vars(token_dispatcher)), dict(vars(token_dispatcher._DeepepManager))
    with deep_ep.installed(config_of(), recorder):
        assert token_dispatcher.fused_indices_to_multihot is deep_ep.indices_to_multihot
    assert (dict(vars(token_dispatcher)), dict(vars(token_dispatcher._DeepepManager))) == before
