"""A mask given with a routed pair arrives with that pair's row through the flex dispatcher, with
either library; without a mask the dispatcher is Megatron's own.

Not run on a GPU: stand-ins for deep_ep and for Transformer Engine's ep move the bytes
(stand_in_deep_ep.py, stand_in_te_ep.py)."""

import multiprocessing
from contextlib import ExitStack
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from megatron_mone.config_checks import check_flex
from megatron_mone.kernels.neuron_bits import pack_bits
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.padding import unmark_padding
from tests.conftest import mone_config
from tests.unit.cpu_emulation.emulation_ranks import run_cases
from tests.unit.moe import stand_in_deep_ep, stand_in_te_ep
from tests.unit.moe.test_mask_dispatch import InLayout, all_ranks, combine, dispatch, pairs, routing

if multiprocessing.current_process().name != "MainProcess":  # the ranks' launcher, before Megatron
    stand_in_deep_ep.install()

WORLD, HIDDEN, TOPK = 4, 16, 2  # a token's row has 32 bytes
BACKENDS = ("deepep", "hybridep", "ncclep", "hybridep, fused", "hybridep, rank capacity")
NEURONS = (20, 120)  # 3 and 15 bytes of mask: two slots of 5 bytes, and of 17, beyond a token's row
LAYOUTS = {
    "ep2": {"expert_model_parallel_size": 2},
    "ep4": {"expert_model_parallel_size": 4},
    "ep2-tp2-etp2": {
        "expert_model_parallel_size": 2,
        "tensor_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "etp4": {"tensor_model_parallel_size": 4, "expert_tensor_parallel_size": 4},
}


def flex_config(kind, **changes):
    """Of a kind: a library, and how it is asked."""
    backend, _, how = kind.partition(", ")
    more = {"fused": {"moe_permute_fusion_into_hybridep": True}}.get(how, {})
    if backend == "ncclep":
        more = {"moe_expert_rank_capacity_factor": 4.0}  # of every row to one rank
    fields = dict(
        **more,
        moe_token_dispatcher_type="flex",
        moe_flex_dispatcher_backend=backend,
        moe_router_topk=TOPK,
        moe_ffn_hidden_size=20,
        hidden_size=HIDDEN,
        num_attention_heads=4,  # divisible by every TP here
    )
    return mone_config(**{**fields, **changes})


def by_indices(kind):
    """Whether its library is told a token's experts by number, as many as topk."""
    return not kind.startswith("hybridep")


def set_rank_capacity(config, kind):
    """For which Megatron's config asks for Transformer Engine's op fuser."""
    if kind == "hybridep, rank capacity":
        config.moe_expert_rank_capacity_factor = 4.0
        config.use_transformer_engine_op_fuser = True


def build(backend, experts, neurons=20, stock=False, **changes):
    """One dispatcher of this rank, Megatron's or ours."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

    from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher

    stand_in_te_ep.install()
    stand_in_deep_ep.forget()
    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = flex_config(backend, num_moe_experts=experts, moe_ffn_hidden_size=neurons, **changes)
    local = experts // groups.ep.size()
    first = groups.ep.rank() * local
    set_rank_capacity(config, backend)
    cls = MoEFlexTokenDispatcher if stock else MaskFlexTokenDispatcher
    return cls(local, list(range(first, first + local)), config, groups)


def mask_of(rank, token, expert, neurons):
    """[F] bool: the mask of one routed pair, unlike that of any other pair here."""
    generator = torch.Generator().manual_seed((rank * 64 + token) * 16 + expert)
    return torch.rand(neurons, generator=generator) < 0.4


def masks_to_send(rank, routing_map, neurons):
    rows = [mask_of(rank, t, e, neurons) for t, e in pairs(routing_map)]
    return pack_bits(torch.stack(rows) if rows else torch.zeros(0, neurons, dtype=torch.bool))


def inputs_of(rank, routing_map):
    """bf16 tokens whose first columns name their origin, and probabilities above 0 where routed."""
    generator = torch.Generator().manual_seed(rank)
    tokens = routing_map.shape[0]
    hidden = torch.randn(tokens, 1, HIDDEN, generator=generator)
    hidden[:, 0, 0], hidden[:, 0, 1] = rank, torch.arange(tokens)
    probs = (torch.rand(routing_map.shape, generator=generator) + 0.1) * routing_map
    return hidden.bfloat16(), probs


def group_ranks(dispatcher):
    return torch.distributed.get_process_group_ranks(dispatcher.tp_ep_group)


def copies_by_hand(dispatcher, maps, rank):
    """Tokens of `rank`, once for each other rank that holds an expert of them."""
    local, owners = dispatcher.num_local_experts, group_ranks(dispatcher)
    copies = 0
    for index, owner in enumerate(owners):
        first = index // dispatcher.tp_size * local
        if owner != rank:
            copies += int(maps[rank][:, first : first + local].any(dim=1).sum())
    return copies


def check_sources(dispatcher, rows, per_expert):
    """`rows_by_source` against the origins that the rows themselves name."""
    owners = group_ranks(dispatcher)
    got_ER = dispatcher.rows_by_source(per_expert)
    assert all_ranks(got_ER.shape == (dispatcher.num_local_experts, len(owners)))
    named = [owners[r] for row_R in got_ER.tolist() for r, n in enumerate(row_R) for _ in range(n)]
    assert all_ranks(named == rows[:, 0].long().tolist())
    assert all_ranks(got_ER.sum(dim=1).tolist() == per_expert.tolist())


def check_arrival(dispatcher, seed, *, same_tokens, exact_topk):
    """Every row that arrives holds the mask of its origin and expert, this rank's neurons of it."""
    config, rank = dispatcher.config, torch.distributed.get_rank()
    experts, neurons = config.num_moe_experts, config.moe_ffn_hidden_size
    maps = [
        routing(r, experts, seed, same_tokens=same_tokens, exact_topk=exact_topk)
        for r in range(WORLD)
    ]
    hidden, probs = inputs_of(rank, maps[rank])
    carried, wire = dispatcher.bytes_carried, stand_in_deep_ep.WIRE["cached"]
    dispatcher.set_mask(masks_to_send(rank, maps[rank], neurons))
    marked = dispatcher.mark_padding(probs, torch.arange(probs.shape[0]) % 3 == 0)
    rows, per_expert, row_probs = dispatch(dispatcher, hidden, maps[rank].clone(), marked)
    got = dispatcher.take_mask()
    beyond = rows.shape[0] - int(per_expert.sum())
    assert all_ranks(
        (beyond > 0)
        == (
            config.moe_expert_rank_capacity_factor is not None
            and config.moe_flex_dispatcher_backend == "hybridep"
        )
    )
    assert not got.to_bool()[rows.shape[0] - beyond :].any()
    rows, row_probs = rows[: len(rows) - beyond], row_probs[: len(rows) - beyond]
    got = NeuronMask.from_bool(got.to_bool()[: len(rows)])
    row_probs, padding = unmark_padding(row_probs)
    assert dispatcher.take_mask() is None
    row_expert = torch.tensor(dispatcher.local_expert_indices).repeat_interleave(per_expert.cpu())
    want = torch.zeros(rows.shape[0], neurons, dtype=torch.bool)
    arrived = set()
    for n, (source, token) in enumerate(rows[:, :2].long().tolist()):
        expert = int(row_expert[n])
        if maps[source][token, expert]:  # else DeepEP's topk filled up with it
            want[n] = mask_of(source, token, expert, neurons)
            arrived.add((source, token, expert))
            assert padding[n] == (token % 3 == 0)
            assert row_probs[n] == inputs_of(source, maps[source])[1][token, expert]
    wanted = NeuronMask.from_bool(want).shard(dispatcher.tp_rank, dispatcher.tp_size)
    assert all_ranks(got == wanted)
    routed = {(r, t, e) for r in group_ranks(dispatcher) for t, e in pairs(maps[r])}
    routed = {pair for pair in routed if pair[2] in dispatcher.local_expert_indices}
    assert all_ranks(arrived == routed)
    check_sources(dispatcher, rows, per_expert)
    sent = dispatcher.bytes_carried - carried
    assert all_ranks(sent == stand_in_deep_ep.WIRE["cached"] - wire)
    all_rows = torch.nn.functional.pad(rows, (0, 0, 0, beyond))
    combine(dispatcher, all_rows)  # ends the handle, as in a layer
    return sent, copies_by_hand(dispatcher, maps, rank), rows.shape[0] - len(arrived)


def row_bytes_by_hand(backend, neurons):
    """Two slots of a tag and a mask: 10 or 34 bytes, in pieces of up to 32."""
    return {20: 32, 120: 64}[neurons]


def masks_arrive(backend):
    from megatron_mone.moe.dispatch.flex import predicted_flex_mask_bytes

    for experts in (4, 8):
        for neurons in NEURONS:
            dispatcher = build(backend, experts, neurons)
            for seed in range(2):  # the same dispatcher again, as over micro-batches
                sent, copies, _ = check_arrival(
                    dispatcher, seed, same_tokens=backend != "deepep", exact_topk=True
                )
                wanted = copies * row_bytes_by_hand(backend, neurons)
                assert all_ranks(sent == wanted)
                assert all_ranks(sent == predicted_flex_mask_bytes(copies, dispatcher.config))


def masks_arrive_with_dropped_pairs(backend):
    """Rank 0 sends nothing, expert 3 gets nothing; in ep4 it is all its rank has."""
    changes = {"moe_expert_capacity_factor": 1.0} if backend == "deepep" else {}
    for experts in (4, 8):
        dispatcher = build(backend, experts, **changes)
        sent, copies, more = check_arrival(dispatcher, 4, same_tokens=True, exact_topk=False)
        if backend == "ncclep":  # which Megatron tells of no dropped pair
            assert all_ranks(sent >= copies * 32)
        else:
            assert all_ranks(sent == copies * 32 and more == 0)


def masks_arrive_where_topk_fills_up(backend):
    """DeepEP without a capacity sends a token to K experts, be it of probability 0."""
    dispatcher = build(backend, 8)
    sent, copies, more = check_arrival(dispatcher, 4, same_tokens=True, exact_topk=False)
    unrouted = torch.tensor(more)
    torch.distributed.all_reduce(unrouted)
    if by_indices(backend):
        assert unrouted > 0
        assert all_ranks(sent >= copies * 32)
    else:
        assert unrouted == 0
        assert all_ranks(sent == copies * 32)


def masks_arrive_from_uneven_ranks(backend):
    """HybridEP wants as many tokens of every rank; Megatron pads them."""
    padded = {"moe_hybridep_pad_uneven_dispatch_inputs": True}
    dispatcher = build(backend, 8, **({} if by_indices(backend) else padded))
    same = backend == "ncclep"  # whose stand-in asks for as many
    sent, copies, _ = check_arrival(dispatcher, 3, same_tokens=same, exact_topk=True)
    assert all_ranks(sent == copies * 32)


def rows_that_are_not_those_routed_are_told(backend):
    """At once, or when somebody looks."""
    from megatron_mone.moe import faults

    dispatcher = build(backend, 4)
    rank = torch.distributed.get_rank()
    routing_map = routing(rank, 4, 1, same_tokens=True, exact_topk=True)
    hidden, probs = inputs_of(rank, routing_map)
    rows, per_expert, _ = dispatch(dispatcher, hidden, routing_map, probs)
    told = []
    for defer in (False, True):
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(faults, "DEFER", defer))
            stack.enter_context(mock.patch.object(faults, "_first_of_ranks", lambda own: own))
            error = stack.enter_context(pytest.raises(ValueError))
            dispatcher.rows_by_source(per_expert + 1)
            assert defer
            faults.look()
        told.append(str(error.value))
    routed = per_expert.tolist()
    library = dispatcher.config.moe_flex_dispatcher_backend
    assert f"{library!r}: the experts got {[n + 1 for n in routed]} rows for {routed}" in told[0]
    assert told[1] == told[0]
    combine(dispatcher, rows)


def round_trip(dispatcher, masked):
    """Everything a dispatch and its combine give, and the calls that reach the library."""
    config, rank = dispatcher.config, torch.distributed.get_rank()
    routing_map = routing(rank, config.num_moe_experts, 9, same_tokens=True, exact_topk=True)
    hidden, probs = inputs_of(rank, routing_map)
    hidden.requires_grad_()
    probs.requires_grad_()
    if masked is not None:
        bits = masks_to_send(rank, routing_map, config.moe_ffn_hidden_size)
        dispatcher.set_mask(bits if masked else None)
    stand_in_deep_ep.forget()
    rows, per_expert, row_probs = dispatch(dispatcher, hidden, routing_map, probs)
    output = combine(dispatcher, rows * row_probs.unsqueeze(1).bfloat16())
    output.float().square().sum().backward()
    outputs = (rows, per_expert, row_probs, output, hidden.grad, probs.grad)
    return outputs, list(stand_in_deep_ep.CALLS)


def without_a_mask_it_is_the_stock_dispatcher(backend):
    for experts in (4, 8):
        wanted, stock_calls = round_trip(build(backend, experts, 120, stock=True), None)
        assert all_ranks(bool(wanted[4].any()) and bool(wanted[5].any()))  # gradients there are
        ours = build(backend, experts, 120)
        plain, plain_calls = round_trip(ours, False)
        assert ours.bytes_carried == 0
        assert ours.take_mask() is None
        carried, mask_calls = round_trip(ours, True)
        assert ours.take_mask() is not None
        again, again_calls = round_trip(ours, None)  # the mask served one dispatch
        assert ours.take_mask() is None
        for outputs in (plain, carried, again):
            same = [torch.equal(a.nan_to_num(), b.nan_to_num())
                    for a, b in zip(outputs, wanted, strict=True)]  # fmt: skip
            assert all_ranks(all(same)), same
        assert all_ranks(plain_calls == again_calls == stock_calls)
        # The two pieces of a row go right after the tokens; all else is as it was.
        first = next(i for i, call in enumerate(stock_calls) if call[0].startswith("dispatch"))
        name = stock_calls[first][0]
        made = 2 if backend == "ncclep" else 1  # the stand-in makes a buffer for each
        more = mask_calls[first + 1 : first + 1 + 2 * made]
        assert all_ranks([call[:2] for call in more][made - 1 :: made] == [(name, True)] * 2)
        del mask_calls[first + 1 : first + 1 + 2 * made]
        assert all_ranks(mask_calls == stock_calls)


def sources_are_in_group_order(backend):
    """The balance loss counts a source into the micro-batch that its rank holds a shard of."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.moe.neuron_balancer import NeuronBalancer

    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = SimpleNamespace(
        num_local_experts=4, w_gate_EFH=torch.zeros(4, 20, HIDDEN), neuron_bias=None
    )
    balancer = NeuronBalancer(flex_config(backend), experts, groups, is_mtp_layer=False)
    owners = torch.distributed.get_process_group_ranks(groups.tp_ep)
    names = [owner // groups.tp_cp.size() for owner in owners]  # TP ranks are neighbours
    seen = sorted(set(names))
    wanted = tuple(seen.index(name) for name in names)
    assert balancer.source_map.microbatch_of_source == wanted


def layer_pass(dispatcher_type, backend, experts):
    """Output, input gradient, balance loss and weight gradients of a MoNE layer in bf16."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mone.model.layer_spec import mone_layer_spec
    from megatron_mone.moe import layer as layer_module
    from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher
    from megatron_mone.moe.dispatch.stock import MaskAlltoAllTokenDispatcher

    stand_in_te_ep.install()
    stand_in_deep_ep.forget()
    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    config = flex_config(
        backend if dispatcher_type == "flex" else "deepep",
        num_moe_experts=experts,
        moe_token_dispatcher_type=dispatcher_type,
        tensor_model_parallel_size=tensor_parallel,
        sequence_parallel=tensor_parallel > 1,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=parallel_state.get_expert_tensor_parallel_world_size(),
        bf16=True,
        params_dtype=torch.bfloat16,
        moe_router_dtype="fp32",
        mone_ng_loss_scope="micro_batch",
        mone_ng_loss_coeff=0.5,
    )
    config.mone_layer_freq = [1]
    if dispatcher_type == "flex":
        set_rank_capacity(config, backend)
    kinds = {"flex": MaskFlexTokenDispatcher, "alltoall": MaskAlltoAllTokenDispatcher}
    spec = mone_layer_spec(config).layer_specs[0]
    model_parallel_cuda_manual_seed(11, force_reset_rng=True)
    with mock.patch.object(layer_module, "build_dispatcher", kinds[dispatcher_type]):
        groups = ProcessGroupCollection.use_mpu_process_groups()
        layer = spec.submodules.mlp(config=config, layer_number=1, pg_collection=groups)
    layer.train()
    generator = torch.Generator().manual_seed(100 + torch.distributed.get_rank())
    hidden = torch.randn(24, 2, HIDDEN, generator=generator).bfloat16().requires_grad_()
    losses = []
    with mock.patch.object(layer.neuron_balancer, "_record", losses.append):
        output, _ = layer(hidden)
    output.float().square().sum().backward()
    weights = dict(layer.named_parameters())
    grads = {f"grad of {name}": weight.grad for name, weight in weights.items()}
    return {"output": output, "grad of input": hidden.grad, **grads}, torch.stack(losses)


def a_layer_is_that_of_alltoall(backend):
    """The same layer, its balance loss of scope micro_batch too; sums run in another order."""
    if backend == "hybridep, rank capacity":
        return  # no backend of CPU ranks takes rows of no expert; see no_waits_cases.py
    for experts in (4, 8):
        wanted, wanted_loss = layer_pass("alltoall", backend, experts)
        got, got_loss = layer_pass("flex", backend, experts)
        assert all_ranks(torch.allclose(got_loss, wanted_loss, rtol=1e-5))
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            off = (got[name].float() - value.float()).abs().max()
            assert all_ranks(off <= 0.02 * value.float().abs().max()), (name, off)


def wrong_masks_are_refused(backend):
    dispatcher = build(backend, 4)
    rank = torch.distributed.get_rank()
    routing_map = routing(rank, 4, 1, same_tokens=True, exact_topk=True)
    hidden, probs = inputs_of(rank, routing_map)
    bits = masks_to_send(rank, routing_map, 20)
    dispatcher.set_mask(bits[1:])
    with pytest.raises(ValueError, match="33 rows: the routing map holds 34 routed pairs"):
        dispatcher.dispatch_preprocess(hidden, routing_map, probs)
    rows, *_ = dispatch(dispatcher, hidden, routing_map, probs)  # the refused mask is gone
    combine(dispatcher, rows)
    assert dispatcher.take_mask() is None
    everywhere = torch.ones(5, 4, dtype=torch.bool)
    dispatcher.set_mask(torch.zeros(20, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="moe_router_topk = 2: a token is routed to 4 experts"):
        dispatcher.dispatch_preprocess(hidden[:5], everywhere, probs[:5])
    for name, value in (
        ("fp8", "hybrid"),
        ("moe_router_padding_for_quantization", True),
        ("cuda_graph_impl", "local"),
    ):
        before = getattr(dispatcher.config, name)
        setattr(dispatcher.config, name, value)
        with pytest.raises(ValueError, match=f"{name} = {value!r}"):
            dispatcher.set_mask(bits)
        setattr(dispatcher.config, name, before)
    dispatcher.set_mask(bits)
    dispatcher.set_mask(None)
    dispatch(dispatcher, hidden, routing_map, probs)
    assert dispatcher.take_mask() is None


CASES = (
    masks_arrive,
    masks_arrive_with_dropped_pairs,
    masks_arrive_where_topk_fills_up,
    masks_arrive_from_uneven_ranks,
    without_a_mask_it_is_the_stock_dispatcher,
    rows_that_are_not_those_routed_are_told,
    sources_are_in_group_order,
    a_layer_is_that_of_alltoall,
    wrong_masks_are_refused,
)


class WithBackend:
    """A case for one library, under a name of its own."""

    def __init__(self, case, backend):
        self.case, self.backend, self.__name__ = case, backend, f"{case.__name__}-{backend}"

    def __call__(self):
        self.case(self.backend)


@pytest.fixture(scope="module")
def failures():
    return run_cases(
        WORLD,
        [
            (parallel, [InLayout(WithBackend(case, b), name) for b in BACKENDS for case in CASES])
            for name, parallel in LAYOUTS.items()
        ],
        fresh=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_masks_travel_with_their_rows(failures, case, backend, layout):
    assert failures[f"{case.__name__}-{backend}-{layout}"] == ""


@pytest.mark.parametrize(
    ("backend", "flag", "package"),
    [
        ("deepep", "HAVE_DEEP_EP", "github.com/deepseek-ai/DeepEP"),
        ("hybridep", "HAVE_HYBRIDEP", "hybrid-ep branch"),
        ("ncclep", "HAVE_TE_EP", "NVTE_BUILD_WITH_NCCL_EP=1"),
    ],
)
def test_a_missing_library_is_one_line_that_says_what_to_install(
    monkeypatch, backend, flag, package
):
    from megatron.core.transformer.moe import fused_a2a

    from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher, check_flex_packages

    monkeypatch.setattr(fused_a2a, flag, False)
    config = flex_config(backend)
    for raising in (
        lambda: check_flex_packages(config),
        lambda: MaskFlexTokenDispatcher(4, [0, 1, 2, 3], config),
    ):
        with pytest.raises(ValueError, match=f"moe_flex_dispatcher_backend = '{backend}'") as error:
            raising()
        assert package in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(fused_a2a, flag, True)
    check_flex_packages(config)
    monkeypatch.setattr(fused_a2a, flag, False)
    config.moe_token_dispatcher_type = "alltoall"
    check_flex_packages(config)


@pytest.mark.parametrize("field", ["moe_permute_fusion_into_hybridep",
                                   "moe_hybridep_num_blocks_permute"])  # fmt: skip
def test_a_library_without_a_fused_permutation_is_one_line(monkeypatch, field):
    """Megatron would permute apart, with a warning."""
    from megatron.core.transformer.moe import fused_a2a

    from megatron_mone.moe.dispatch.flex import check_flex_packages

    class Older:
        def dispatch_with_permute(self, *, hidden):
            raise AssertionError

    monkeypatch.setattr(fused_a2a, "HAVE_HYBRIDEP", True)
    monkeypatch.setattr(fused_a2a, "HybridEPBuffer", Older, raising=False)
    check_flex_packages(flex_config("hybridep"))
    with pytest.raises(ValueError, match=f"{field} = (True|8) needs a HybridEP that permutes whi"):
        check_flex_packages(flex_config("hybridep", **{field: 8 if "num" in field else True}))
    monkeypatch.setattr(fused_a2a, "HybridEPBuffer", stand_in_deep_ep.HybridEPBuffer)
    check_flex_packages(flex_config("hybridep, fused"))


def test_an_ep_that_megatron_cannot_start_is_one_line(monkeypatch):
    from megatron.core.transformer.moe import fused_a2a

    from megatron_mone.moe.dispatch.flex import check_flex_packages

    monkeypatch.setattr(fused_a2a, "HAVE_TE_EP", True)
    for bootstrap in (lambda ep_group, num_experts: None, lambda group, num_topk=None: None):
        library = SimpleNamespace(ep_bootstrap=bootstrap)
        monkeypatch.setattr(fused_a2a, "te_ep", library, raising=False)
        check_flex_packages(flex_config("ncclep"))
    library.ep_bootstrap = lambda group, num_topk: None
    with pytest.raises(ValueError, match="'ncclep': the installed transformer-engine asks for num"):
        check_flex_packages(flex_config("ncclep"))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("hybridep", {"moe_pad_expert_input_to_capacity": True, "moe_expert_capacity_factor": 1.0},
         "moe_pad_expert_input_to_capacity = True"),
        ("deepep", {"fp8": "hybrid"}, "fp8 = 'hybrid'"),
        ("hybridep", {"moe_router_padding_for_quantization": True},
         "moe_router_padding_for_quantization = True"),
        ("ncclep", {"moe_expert_rank_capacity_factor": None},
         "moe_expert_rank_capacity_factor = None"),
        ("ncclep", {"moe_ncclep_static_shape": True}, "moe_ncclep_static_shape = True"),
        ("ncclep", {"moe_ncclep_zero_copy": True}, "moe_ncclep_zero_copy = True"),
        ("ncclep", {"use_transformer_engine_op_fuser": True},
         "use_transformer_engine_op_fuser = True"),
        ("deepep", {"use_transformer_engine_op_fuser": True},
         "use_transformer_engine_op_fuser = True"),
    ],
)  # fmt: skip
def test_rows_that_experts_cannot_tell_apart_are_refused(kind, changes, says):
    """Before a model is built, in one line."""
    config = flex_config(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match=f"^{says} is not allowed: it must be ") as error:
        check_flex(config)
    assert "\n" not in str(error.value)
    check_flex(flex_config(kind))
