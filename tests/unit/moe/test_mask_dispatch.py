"""A mask given with a routed pair arrives with that pair's row, in every layout; without a mask
the dispatchers are Megatron's own."""

from collections import Counter
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch

from megatron_mone.kernels.neuron_bits import pack_bits
from megatron_mone.kernels.neuron_mask import NeuronMask
from tests.conftest import mone_config
from tests.unit.cpu_emulation.emulation_ranks import run_cases

WORLD, NEURONS, HIDDEN, TOPK = 4, 20, 16, 2  # 20 neurons: 3 bytes a row, and 10 are no whole byte
EMPTY_EXPERT = 3
LAYOUTS = {
    "ep4": {"expert_model_parallel_size": 4},
    "ep2-tp2-etp2": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "ep4-tp2-etp1": {
        "expert_model_parallel_size": 4,
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    },
    "etp4": {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 4},
    "ep1": {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 1},
}


def build(kind, experts, **changes):
    """One dispatcher of this rank: kind is the name of a class, Megatron's or ours."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import token_dispatcher as stock

    from megatron_mone.moe.dispatch import stock as mask_dispatch

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = mone_config(
        num_moe_experts=experts, moe_router_topk=TOPK, moe_ffn_hidden_size=NEURONS, **changes
    )
    local = experts // groups.ep.size()
    first = groups.ep.rank() * local
    cls = getattr(mask_dispatch, kind, None) or getattr(stock, kind)
    return cls(local, list(range(first, first + local)), config, groups)


def routing(rank, experts, seed, *, same_tokens, exact_topk):
    """[T, E] map of a rank; EMPTY_EXPERT gets nothing, and rank 2 leaves most experts alone."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    tokens = 17 if same_tokens else 17 + 3 * rank
    score = torch.rand(tokens, experts, generator=generator)
    score[:, EMPTY_EXPERT] = -1
    if rank == 2:
        score[:, :TOPK] += 1
    chosen = score.topk(TOPK, dim=1).indices
    routing_map = torch.zeros(tokens, experts, dtype=torch.bool).scatter_(1, chosen, True)
    if not exact_topk:  # then ranks have unequal numbers of rows, rank 0 none
        routing_map &= torch.rand(tokens, experts, generator=generator) < 0.3 * rank
    return routing_map


def mask_of(rank, token, expert):
    """[F] bool: the mask of one routed pair, unlike that of any other pair here."""
    code = (rank * 64 + token) * 16 + expert
    generator = torch.Generator().manual_seed(code)
    return torch.rand(NEURONS, generator=generator) < 0.4


def pairs(routing_map):
    """(token, expert) in the order of the contract."""
    tokens, experts = routing_map.shape
    return [(t, e) for e in range(experts) for t in range(tokens) if routing_map[t, e]]


def masks_to_send(rank, routing_map):
    rows = [mask_of(rank, t, e) for t, e in pairs(routing_map)]
    return pack_bits(torch.stack(rows) if rows else torch.zeros(0, NEURONS, dtype=torch.bool))


def masks_that_return(dispatcher, rank, routing_map):
    """What was sent, with nothing for the pairs beyond an expert's capacity."""
    bits = masks_to_send(rank, routing_map)
    if getattr(dispatcher, "drop_and_pad", False):
        taken = Counter()
        for n, (_, e) in enumerate(pairs(routing_map)):
            taken[e] += 1
            if taken[e] > dispatcher.capacity:
                bits[n] = 0
    return bits


def inputs_of(rank, routing_map):
    """Hidden states whose first columns name their origin, and probabilities."""
    tokens = routing_map.shape[0]
    hidden = torch.randn(tokens, 1, HIDDEN, generator=torch.Generator().manual_seed(rank))
    hidden[:, 0, 0], hidden[:, 0, 1] = rank, torch.arange(tokens)
    return hidden, torch.rand(routing_map.shape) * routing_map


def dispatch(dispatcher, hidden, routing_map, probs):
    rows = dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    return dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*rows))


def combine(dispatcher, rows):
    return dispatcher.combine_postprocess(
        dispatcher.token_combine(dispatcher.combine_preprocess(rows))
    )


def all_ranks(holds):
    """Whether it holds on every rank: a wrong result fails on all, so none waits for another."""
    flag = torch.tensor(int(holds))
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)


def check_sources(dispatcher, rows, per_expert):
    """`rows_by_source` against the origins that the rows themselves name."""
    owners = torch.distributed.get_process_group_ranks(dispatcher.tp_ep_group)
    if dispatcher.config.moe_token_dispatcher_type == "alltoall":  # which gathers EP, then ETP
        owners = [
            owner for t in range(dispatcher.tp_size) for owner in owners[t :: dispatcher.tp_size]
        ]
    got_ER = dispatcher.rows_by_source(per_expert)
    assert all_ranks(got_ER.shape == (dispatcher.num_local_experts, len(owners)))
    assert all_ranks(got_ER.dtype == torch.int64)
    named = [owners[r] for row_R in got_ER.tolist() for r, n in enumerate(row_R) for _ in range(n)]
    assert all_ranks(named == rows[:, 0].long().tolist())
    assert all_ranks(got_ER.sum(dim=1).tolist() == per_expert.tolist())


def check_arrival(dispatcher, experts, seed, *, same_tokens, exact_topk):
    """Every arrived row holds the mask of its origin and expert, this rank's neurons of it."""
    rank = torch.distributed.get_rank()
    maps = [
        routing(r, experts, seed, same_tokens=same_tokens, exact_topk=exact_topk)
        for r in range(WORLD)
    ]
    hidden, probs = inputs_of(rank, maps[rank])
    before = dispatcher.bytes_carried
    dispatcher.set_mask(masks_to_send(rank, maps[rank]))
    rows, per_expert, _ = dispatch(dispatcher, hidden, maps[rank].clone(), probs)
    got = dispatcher.take_mask()
    assert dispatcher.take_mask() is None
    row_expert = torch.tensor(dispatcher.local_expert_indices).repeat_interleave(per_expert.cpu())
    want = torch.zeros(rows.shape[0], NEURONS, dtype=torch.bool)
    for n, (source, token) in enumerate(rows[:, :2].long().tolist()):
        if maps[source][token, row_expert[n]]:  # else a row that Megatron padded
            want[n] = mask_of(source, token, int(row_expert[n]))
    wanted = NeuronMask.from_bool(want).shard(dispatcher.tp_rank, dispatcher.tp_size)
    assert all_ranks(got == wanted)
    check_sources(dispatcher, rows, per_expert)
    returned = dispatcher.return_mask(got, maps[rank])
    assert all_ranks(torch.equal(returned, masks_that_return(dispatcher, rank, maps[rank])))
    return dispatcher.bytes_carried - before, maps, rank


def rows_to_other_ranks(dispatcher, maps, rank):
    """Counted from the maps alone: rows out by alltoall, then rows received, out by ETP gather."""
    groups = torch.distributed.get_process_group_ranks(dispatcher.ep_group)
    per_owner = {r: i for i, r in enumerate(groups)}
    local = dispatcher.num_local_experts

    def rows(source, owner):
        return int(maps[source][:, owner * local : (owner + 1) * local].sum())

    mine = per_owner[rank]
    out = sum(rows(rank, owner) for owner in range(len(groups)) if owner != mine)
    received = sum(rows(source, mine) for source in groups)
    return out + received * (dispatcher.tp_size - 1)


def alltoall_carries():
    from megatron_mone.moe.dispatch.carrier import predicted_mask_bytes

    for experts in (4, 8):
        dispatcher = build("MaskAlltoAllTokenDispatcher", experts)
        for seed in range(3):  # the same dispatcher again and again, as over micro-batches
            sent, maps, rank = check_arrival(
                dispatcher, experts, seed, same_tokens=False, exact_topk=True
            )
            sent_rows = rows_to_other_ranks(dispatcher, maps, rank)
            assert all_ranks(sent == predicted_mask_bytes(sent_rows, NEURONS) == 3 * sent_rows)


def allgather_carries():
    for experts in (4, 8):
        dispatcher = build(
            "MaskAllGatherTokenDispatcher", experts, moe_token_dispatcher_type="allgather"
        )
        for seed, exact in enumerate((True, False, False)):
            sent, maps, rank = check_arrival(
                dispatcher, experts, seed, same_tokens=True, exact_topk=exact
            )
            peers = dispatcher.tp_ep_group.size() - 1
            assert all_ranks(sent == 3 * len(pairs(maps[rank])) * peers)


def alltoall_with_capacity_carries():
    """Padded rows carry an empty mask, dropped pairs none; without padding only pairs that are."""
    for experts, pad, factor in ((4, True, 0.7), (8, True, 1.5), (8, False, 1.0)):
        dispatcher = build(
            "MaskAlltoAllTokenDispatcher",
            experts,
            moe_expert_capacity_factor=factor,
            moe_pad_expert_input_to_capacity=pad,
        )
        check_arrival(dispatcher, experts, 5, same_tokens=True, exact_topk=pad)


def alltoall_with_quantization_padding_carries():
    dispatcher = build("MaskAlltoAllTokenDispatcher", 8)
    dispatcher.config.fp8 = "hybrid"  # after the config's own checks, which need a GPU's library
    dispatcher.config.moe_router_padding_for_quantization = True
    check_arrival(dispatcher, 8, 6, same_tokens=False, exact_topk=True)


def one_expert_a_rank_knows_its_sources():
    """Megatron keeps no table of rows for a single local expert."""
    from megatron.core import parallel_state

    experts = parallel_state.get_expert_model_parallel_world_size()
    if experts < TOPK:
        return
    dispatcher = build("MaskAlltoAllTokenDispatcher", experts)
    rank = torch.distributed.get_rank()
    for seed in range(2):
        generator = torch.Generator().manual_seed(10 * seed + rank)
        order = torch.rand(11 + 2 * rank, experts, generator=generator).argsort(dim=1)
        hidden, probs = inputs_of(rank, order < TOPK)
        rows, per_expert, _ = dispatch(dispatcher, hidden, order < TOPK, probs)
        check_sources(dispatcher, rows, per_expert)


@contextmanager
def counted_collectives():
    """Counts calls by name, where Megatron calls them."""
    from megatron.core.tensor_parallel import mappings

    counts = Counter()
    names = (
        "all_gather", "all_gather_into_tensor", "all_to_all_single", "all_to_all", "all_reduce",
        "reduce_scatter", "reduce_scatter_tensor", "broadcast", "barrier", "all_gather_object",
    )  # fmt: skip
    places = [(torch.distributed, name) for name in names]
    places += [(mappings, "dist_all_gather_func"), (mappings, "dist_reduce_scatter_func")]

    def counting(name, call):
        def counted(*args, **kwargs):
            counts[name] += 1
            return call(*args, **kwargs)

        return counted

    with ExitStack() as stack:
        for place, name in places:
            counter = counting(name, getattr(place, name))
            stack.enter_context(mock.patch.object(place, name, counter))
        yield counts


def round_trip(dispatcher, experts, masked):
    """Everything a dispatch and its combine give, and the collectives that they call."""
    rank = torch.distributed.get_rank()
    routing_map = routing(rank, experts, 9, same_tokens=True, exact_topk=True)
    torch.manual_seed(rank)
    hidden, probs = inputs_of(rank, routing_map)
    hidden.requires_grad_()
    if masked is not None:
        dispatcher.set_mask(masks_to_send(rank, routing_map) if masked else None)
    with counted_collectives() as counts:
        rows, per_expert, row_probs = dispatch(dispatcher, hidden, routing_map, probs)
        output = combine(dispatcher, rows * row_probs.unsqueeze(1))
        output.square().sum().backward()
    return (rows, per_expert, row_probs, output, hidden.grad), counts


def without_a_mask_it_is_the_stock_dispatcher():
    for name, kind in (("AlltoAll", "alltoall"), ("AllGather", "allgather")):
        for experts in (4, 8):
            setting = dict(moe_token_dispatcher_type=kind)
            stock = build(f"MoE{name}TokenDispatcher", experts, **setting)
            ours = build(f"Mask{name}TokenDispatcher", experts, **setting)
            wanted, stock_calls = round_trip(stock, experts, None)
            plain, plain_calls = round_trip(ours, experts, False)
            assert ours.bytes_carried == 0
            assert ours.take_mask() is None
            carried, mask_calls = round_trip(ours, experts, True)
            again, again_calls = round_trip(ours, experts, None)  # the mask served one dispatch
            assert ours.take_mask() is None
            for outputs in (plain, carried, again):
                assert all(torch.equal(a, b) for a, b in zip(outputs, wanted, strict=True))
            assert plain_calls == again_calls == stock_calls
            stages = (stock.ep_size > 1) + (stock.tp_size > 1)
            more = min(stages, 1) if kind == "allgather" else stages
            assert mask_calls.total() == stock_calls.total() + more


def wrong_masks_are_refused():
    for name in ("AlltoAll", "AllGather"):
        dispatcher = build(f"Mask{name}TokenDispatcher", 4)
        rank = torch.distributed.get_rank()
        routing_map = routing(rank, 4, 1, same_tokens=True, exact_topk=True)
        hidden, probs = inputs_of(rank, routing_map)
        bits = masks_to_send(rank, routing_map)
        for wrong in (bits[:, :2], bits.int(), bits[0]):
            with pytest.raises(ValueError, match=r"moe_ffn_hidden_size = 20.*packed as"):
                dispatcher.set_mask(wrong)
        dispatcher.set_mask(bits[1:])
        with pytest.raises(ValueError, match="33 rows: the routing map holds 34 routed pairs"):
            dispatcher.dispatch_preprocess(hidden, routing_map, probs)
        dispatch(dispatcher, hidden, routing_map, probs)  # the refused mask is gone
        assert dispatcher.take_mask() is None
        dispatcher.config.cuda_graph_impl = "local"
        with pytest.raises(ValueError, match="cuda_graph_impl"):
            dispatcher.set_mask(bits)


CASES = (
    alltoall_carries,
    allgather_carries,
    alltoall_with_capacity_carries,
    alltoall_with_quantization_padding_carries,
    one_expert_a_rank_knows_its_sources,
    without_a_mask_it_is_the_stock_dispatcher,
)


class InLayout:
    """A case under a name of its own, since results are kept by name."""

    def __init__(self, case, layout):
        self.case, self.__name__ = case, f"{case.__name__}-{layout}"

    def __call__(self):
        self.case()


@pytest.fixture(scope="module")
def failures():
    layouts = [
        (parallel, [InLayout(case, name) for case in CASES]) for name, parallel in LAYOUTS.items()
    ]
    return run_cases(WORLD, [*layouts, ({}, [wrong_masks_are_refused])])


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_masks_travel_with_their_rows(failures, case, layout):
    assert failures[f"{case.__name__}-{layout}"] == ""


@pytest.mark.slow
def test_wrong_masks_are_refused(failures):
    assert failures["wrong_masks_are_refused"] == ""


def test_predicted_bytes_are_the_packed_size():
    from megatron_mone.moe.dispatch.carrier import predicted_mask_bytes

    for rows, neurons in ((0, 8), (5, 8), (5, 9), (7, 20)):
        packed = pack_bits(torch.ones(rows, neurons, dtype=torch.bool))
        assert predicted_mask_bytes(rows, neurons) == packed.numel()
