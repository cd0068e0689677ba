"""What runs on fake CUDA tensors, in a process of its own: under the CPU emulation, which a session
of tests installs for good, "cuda" is the CPU.

    python -m tests.unit.moe.no_waits_cases FOLDER

runs each case in a fork, and leaves FOLDER/N with the traceback of the Nth where it fails.
"""

import itertools
import os
import sys
import traceback
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megatron_mone.kernels.triton import launch
from megatron_mone.planning.tracing.recorder import _UNWRITTEN, _is_view
from tests.conftest import mone_config
from tests.unit.moe.no_waits import HostWait, backward, no_waits

SEQUENCE, BATCH, HIDDEN, TOPK, NEURONS = 8, 2, 16, 2, 24
PAIRS = SEQUENCE * BATCH * TOPK  # sent by a rank, and got by one: all are alike
CUDA = torch.device("cuda", 0)
FAKE = FakeTensorMode()  # tensors of two modes do not mix


class Stream:
    """A queue of torch.cuda whose events nobody may wait for but Megatron, which has them made."""

    def wait_stream(self, _other):
        pass

    def record_event(self):
        raise AssertionError("Megatron's copies to the host are stood in for")


@contextmanager
def job(expert_parallel, device):
    """This process as rank 0 of a job whose collectives move nothing; `device[0]` is current."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group(
        "fake", rank=0, world_size=expert_parallel, store=FakeStore()
    )
    parallel_state.initialize_model_parallel(
        expert_model_parallel_size=expert_parallel, create_gloo_process_groups=False
    )
    with ExitStack() as stack:
        for name, stub in (
            ("Stream", Stream),
            ("current_stream", Stream),
            ("current_device", lambda: device[0]),
        ):
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        yield


def fake_layer(expert_parallel, experts, device, **changes):
    """A MoNE layer whose weights and counters are on the fake device; call it in a FakeTensorMode.

    Its sources are micro-batches of their own, and Megatron's one copy of row counts to the host
    answers as if all ranks and experts were alike.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.model.layer_spec import mone_layer_spec
    from megatron_mone.moe import neuron_balancer
    from megatron_mone.moe.dispatch.row_sources import SourceMap
    from megatron_mone.moe.layer import MoNELayer
    from megatron_mone.moe.neuron_load import NeuronLoad

    def sources_of_ranks(**_groups):
        ranks = tuple(range(expert_parallel))
        return SourceMap(ranks, len(ranks), None, ranks)

    config = mone_config(
        num_moe_experts=experts, moe_router_topk=TOPK, hidden_size=HIDDEN,
        moe_ffn_hidden_size=NEURONS, expert_model_parallel_size=expert_parallel,
        use_cpu_initialization=True, perform_initialization=False,
        **{"mone_ng_loss_coeff": 0.5, **changes},
    )  # fmt: skip
    config.mone_layer_freq = [1]
    submodules = mone_layer_spec(config).layer_specs[0].submodules.mlp
    groups = ProcessGroupCollection.use_mpu_process_groups()
    with mock.patch.object(neuron_balancer, "build_source_map", sources_of_ranks):
        layer = submodules(config=config, layer_number=1, pg_collection=groups)
    assert isinstance(layer, MoNELayer)
    device[0] = CUDA
    local = experts // expert_parallel
    with FAKE as mode:
        for module in layer.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        moved = torch.empty(value.shape, dtype=value.dtype, device=CUDA)
                        is_weight = held is module._parameters
                        held[name] = torch.nn.Parameter(moved) if is_weight else moved
        balancer = layer.neuron_balancer
        balancer.load = NeuronLoad(local, NEURONS, CUDA)
        for numbers in ("block_of_cell", "expert_of_cell", "microbatch_of_rank"):
            value = getattr(balancer, numbers)
            setattr(balancer, numbers, torch.empty(value.shape, dtype=value.dtype, device=CUDA))
    dispatcher = layer.token_dispatcher
    dispatcher._maybe_dtoh_and_synchronize = partial(known_counts, dispatcher)
    for name in ("sort_input_by_local_experts", "restore_output_by_local_experts"):
        if hasattr(dispatcher, name):  # not of allgather
            setattr(dispatcher, name, getattr(dispatcher, name).numpy())
    return layer, mode


def known_counts(dispatcher, point, tokens_per_expert=None):
    """In place of Megatron's copy to the host and its wait for it."""
    if point == dispatcher.cuda_dtoh_point and dispatcher.ep_size > 1:
        each = np.full(dispatcher.ep_size, PAIRS // dispatcher.ep_size)
        dispatcher.input_splits = dispatcher.output_splits = each
    if point == dispatcher.cuda_dtoh_point:
        sources, experts = dispatcher.ep_size, dispatcher.num_local_experts
        table = np.full((sources, experts), PAIRS // (sources * experts))
        table[0, 0] += PAIRS - table.sum()
        dispatcher.num_global_tokens_per_local_expert = table
    return tokens_per_expert


def stand_in_experts(experts, rows_NH, tokens_per_expert, probs_N, mask=None, rows_ER=None):
    """In place of `MoNEExperts.forward`: its outputs and their graph, by two dense products."""
    from megatron_mone.kernels import GroupedMLPOutput
    from megatron_mone.kernels.neuron_mask import NeuronMask

    kept = NEURONS // 4
    gate_NF = rows_NH @ experts.w_gate_EFH[0].t()
    words_NW = torch.empty(rows_NH.shape[0], 1, dtype=torch.int32, device=rows_NH.device)
    chosen = NeuronMask.of_words(words_NW, NEURONS, kept=kept)
    y_NH = (gate_NF * probs_N.unsqueeze(1)) @ experts.w_down_EFH[0]
    return GroupedMLPOutput(y_NH, chosen, gate_NF[:, :kept].flatten(), gate_NF)


def through_a_layer(layer, padded):
    """Forward and backward from the router's answer on; what Megatron waited for."""
    tokens, experts = SEQUENCE * BATCH, layer.config.num_moe_experts
    hidden = torch.empty(SEQUENCE, BATCH, HIDDEN, device=CUDA, requires_grad=True)
    probs = torch.empty(tokens, experts, device=CUDA, requires_grad=True)
    routing_map = torch.empty(tokens, experts, dtype=torch.bool, device=CUDA)
    layer._padding_T = None
    if padded:
        layer._padding_T = torch.empty(tokens, dtype=torch.bool, device=CUDA)
    with no_waits() as seen:
        rows = layer.dispatch(*layer.preprocess(hidden, probs, routing_map))
        output, _ = layer.routed_experts_compute(*rows)
        output = layer.token_dispatcher.combine_postprocess(layer.combine(output))
        leaves = backward(output, torch.empty_like(output))
    assert leaves[hidden].shape == hidden.shape
    assert leaves[probs].shape == probs.shape
    assert leaves[layer.experts.linear_fc1].shape == layer.experts.linear_fc1.shape
    return seen.megatrons


def a_layer(expert_parallel, experts, padded, changes):
    """Twice over, as over micro-batches."""
    from megatron_mone.moe import faults

    device = [torch.device("cpu")]
    with job(expert_parallel, device):
        layer, fake = fake_layer(expert_parallel, experts, device, **changes)
        layer.experts.forward = partial(stand_in_experts, layer.experts)  # drop for the real
        with fake:
            for _ in range(2):
                megatrons = through_a_layer(layer, padded)
            assert len(faults._kept) == 1  # found, if anything, when somebody looks
            faults._kept.clear()
            with no_waits():
                layer.neuron_balancer.end_step()
    assert not megatrons, megatrons


STATIC = {
    "moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True,
    "mone_backend": "triton", "cuda_graph_impl": "full_iteration",
}  # fmt: skip


def a_captured_layer(experts, changes, refused=False):
    """As a CUDA graph holds it, router included: nobody waits, and no step of the host that a
    replay leaves out changes anything; where the run check refuses a capture it is not so."""
    if not refused:
        _captured(experts, changes)
        return
    with pytest.raises((AssertionError, DynamicOutputShapeException, RuntimeError)):
        _captured(experts, changes, refused)


def _captured(experts, changes, refused=False):
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_mone.moe import faults
    from megatron_mone.moe.metrics import install_tracker

    device = [torch.device("cpu")]
    with job(2, device), launch.recording(lambda one: None):
        layer, fake = fake_layer(2, experts, device, **{**STATIC, **changes})
        check_capture(layer.config, refused)
        vars(layer.token_dispatcher).pop("_maybe_dtoh_and_synchronize")  # Megatron's own
        balancer, tracker = layer.neuron_balancer, install_tracker()
        layer.neuron_load = balancer.load

        def held():
            own = {name: id(one) for name, one in vars(balancer).items()}
            counted = [(id(b), b.shape) for b in layer.buffers()]
            logged = {name: id(entry.values) for name, entry in tracker.metrics.items()}
            lasting = (len(faults._kept), layer.recompute_masks.bytes_held, len(balancer._tables))
            watches = [(id(one._first), id(one._first_EX)) for one in faults._kept]
            assert all(one.lasting for one in faults._kept)
            counted += watches
            return own, counted, logged, lasting, layer.bytes_sent()

        with fake:
            MoEAuxLossAutoScaler.set_loss_scale(torch.ones((), device=CUDA))  # as a run has one
            seen = []
            for _ in range(3):
                hidden = torch.empty(SEQUENCE, BATCH, HIDDEN, device=CUDA, requires_grad=True)
                with no_waits() as waited:
                    output, _ = layer(hidden)
                    leaves = backward(output, torch.empty_like(output))
                assert leaves[hidden].shape == hidden.shape
                assert leaves[layer.experts.linear_fc1].shape == layer.experts.linear_fc1.shape
                assert not waited.megatrons, waited.megatrons
                seen.append(held())
    assert seen[1] == seen[2], seen
    assert seen[0][-2] == (int(layer.config.mone_check_for_nan), 0, 1)


def check_capture(config, refused):
    """What the run check says of the model."""
    from argparse import Namespace

    from megatron_mone.config_checks import captures_experts
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.checks.graphs import check_graphs

    args = Namespace(**{**vars(flag_parser().parse_args([])), **vars(config)})
    assert captures_experts(args)
    try:
        check_graphs(args)
    except ValueError as error:
        if not refused:
            raise AssertionError(str(error)) from error
        return
    if refused:
        raise SystemExit("not refused")


class Launches(TorchDispatchMode):
    """Counts what would be launched on the device: operators that write, and kernels of ours."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor) and t.is_cuda]
        if made and not _is_view(func) and func.overloadpacket not in _UNWRITTEN:
            self.names.append(str(func.overloadpacket))
        return result

    @contextmanager
    def counting(self):
        """The names of what is launched in a block."""
        self.names = names = []
        with launch.recording(lambda one: self.names.append(one.kernel)), self:
            yield names


def through_the_kernels(device, local_experts, fused=False, put_off=False, **changes):
    """What the Triton experts of a layer on two ranks launch, forward and backward, and the bytes a
    row that they keep beside x, p and the weights.

    Counted from the rows that the dispatcher has brought to the rows that it takes back: row counts
    by source, choice, experts, check of NaN, load counters, balance loss.
    """
    device[0] = torch.device("cpu")
    with launch.recording(lambda one: None):  # without a GPU the kernels can only be recorded
        layer, fake = fake_layer(2, 2 * local_experts, device, mone_backend="triton", **changes)
    layer.config.gradient_accumulation_fusion = fused  # stock linears ask for apex
    layer.config.delay_wgrad_compute = put_off  # which asks for a schedule
    dispatcher = layer.token_dispatcher
    tokens, experts = SEQUENCE * BATCH, layer.config.num_moe_experts
    with fake:
        dtype = layer.experts.linear_fc1.dtype
        hidden = torch.empty(SEQUENCE, BATCH, HIDDEN, dtype=dtype, device=CUDA)
        probs = torch.empty(tokens, experts, device=CUDA)
        routing_map = torch.empty(tokens, experts, dtype=torch.bool, device=CUDA)
        rows = layer.dispatch(*layer.preprocess(hidden, probs, routing_map))
        x_NH, counts, p_N = dispatcher.dispatch_postprocess(*rows)
        x_NH, p_N = x_NH.requires_grad_(), p_N.requires_grad_()
        dispatcher.dispatch_postprocess = lambda *_: (x_NH, counts, p_N)
        dispatcher.combine_preprocess = lambda y_NH: y_NH
        for weight in layer.experts.parameters():
            weight.main_grad = torch.empty_like(weight, dtype=torch.float32)
        for _ in range(2):  # the first makes what lasts
            kept, launches = [], Launches()
            hooks = torch.autograd.graph.saved_tensors_hooks(
                lambda t, kept=kept: (kept.append(t), t)[1], lambda t: t
            )
            with no_waits() as seen, hooks, launches.counting() as forward:
                output, _ = layer.routed_experts_compute(*rows)
            with no_waits(), launches.counting() as back:
                backward(output, torch.empty_like(output))
            # torch's engine, which ends the parameters' passes, asks for a real device
            ended = mock.patch.object(torch.autograd, "backward")
            with no_waits(), ended, launches.counting() as later:
                layer.backward_dw()
            assert bool(later) == put_off
            back += later
            assert not seen.megatrons
    own = [t for t in kept if t.dim() < 3 and t is not x_NH and t is not p_N]
    return forward, back, sum(t.nbytes for t in own) / x_NH.shape[0]


def launches_are_few_whatever_the_number_of_experts():
    """8 forward and 7 backward (with a loss scale); kept are 4 S + F / 8 bytes a row in bf16."""
    device = [torch.device("cpu")]
    half = {"fused": True, "params_dtype": torch.bfloat16, "bf16": True}
    with job(2, device):
        seen = {local: through_the_kernels(device, local, **half) for local in (2, 8, 64)}
    assert seen[2] == seen[8] == seen[64], seen
    forward, back, kept = seen[2]
    assert back[0] == "aten.ones"  # the loss scale of a run that has none
    assert (len(forward), len(back)) == (8, 1 + 7), seen[2]
    assert kept == 4 * (NEURONS // 4) + 4 * -(-NEURONS // 32), kept


def weight_gradients_that_wait_are_the_same_launches():
    """They come after the other ones of the backward pass, and wait for nobody either."""
    device = [torch.device("cpu")]
    half = {"params_dtype": torch.bfloat16, "bf16": True}
    with job(2, device):
        for fused in (False, True):
            now, later = (
                through_the_kernels(device, 4, fused=fused, put_off=put_off, **half)
                for put_off in (False, True)
            )
            assert now == later, (now, later)


def by_blocks_they_are_as_few():
    """Also where a row keeps several blocks, whose parts are added in a launch of their own."""
    device = [torch.device("cpu")]
    kept = NEURONS // 4
    with job(2, device):
        for blocks in (1, 2, 3):
            seen = [
                through_the_kernels(device, local, mone_neuron_block=kept // blocks)[:2]
                for local in (2, 8, 64)
            ]
            assert seen[0] == seen[1] == seen[2], seen
            forward, back = map(len, seen[0])
            assert (forward, back) == ((9, 1 + 8) if blocks == 1 else (10, 1 + 9)), seen[0]


def what_is_launched_is_what_is_planned():
    """Kernel by kernel: name, shapes of operands and results, bytes and operations, both passes."""
    from megatron_mone.kernels import Selection
    from megatron_mone.kernels.triton import backend as triton
    from megatron_mone.planning.tracing.traced_backend import on_gpu

    rows, experts, hidden, neurons, config = 96, 3, 256, 160, SimpleNamespace()

    def run(device, experts_of):
        seen = []

        def operand(*shape, dtype=torch.bfloat16):
            return torch.empty(shape, dtype=dtype, device=device, requires_grad=True)

        x, p = operand(rows, hidden), operand(rows, dtype=torch.float32)
        weights = [operand(experts, neurons, hidden) for _ in range(3)]
        counts = torch.empty(experts, dtype=torch.int64, device=device)
        with launch.recording(seen.append):
            y = experts_of(x, p, counts, *weights, choose=Selection(40), activation="silu").y_NH
            backward(y, torch.empty_like(y))
        return [
            (one.kernel, one.flops, *(
                [(tuple(t.shape), t.dtype, t.nbytes) for t in tensors]
                for tensors in (one.reads, one.writes)
            ))
            for one in seen
        ]  # fmt: skip

    with FAKE:
        launched = run(CUDA, triton.run)
    planned = run("meta", partial(on_gpu, config))
    assert launched == planned
    assert len(planned) == 12


def transformer_engine_takes_counts_on_the_device():
    """Nine products of a stand-in for its grouped GEMM, our kernels between, no wait."""
    from megatron_mone.kernels import Selection
    from megatron_mone.kernels.te import backend
    from tests.unit.kernels import te_stand_ins

    with pytest.MonkeyPatch.context() as patch, FAKE:
        library = te_stand_ins.install(patch)
        patch.setattr(backend, "triton_available", lambda: (True, ""))
        x = torch.empty(9, 32, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
        p = torch.empty(9, device=CUDA, requires_grad=True)
        weights = [torch.empty(2, 64, 32, dtype=x.dtype, device=CUDA, requires_grad=True)] * 3
        counts = torch.empty(2, 3, dtype=torch.int64, device=CUDA)  # by source
        with no_waits(), launch.recording(lambda one: None):
            made = backend.run(x, p, counts, *weights, choose=Selection(16), activation="silu")
            leaves = backward(made.y_NH, torch.empty_like(made.y_NH))
    assert made.entries is not None
    assert leaves[x].shape == x.shape
    assert library.device_counts
    assert "".join(library.layouts) == "TNTNNNTNNNNNNTNTNT"


def few_rows_wait_for_nothing():
    """Decode: seven launches, whatever the number of experts; its entries count and mark."""
    from megatron_mone.kernels import Selection
    from megatron_mone.kernels.triton import backend as triton
    from megatron_mone.kernels.triton.ops import Blocks, Counters

    seen = []
    with FAKE, torch.no_grad():
        for experts in (2, 8, 64):
            x, p = torch.empty(16, HIDDEN, device=CUDA), torch.empty(16, device=CUDA)
            weights = [torch.empty(experts, NEURONS, HIDDEN, device=CUDA) for _ in range(3)]
            counts = torch.empty(experts, dtype=torch.int64, device=CUDA)
            table = torch.empty(experts, dtype=torch.int32, device=CUDA)
            loads = torch.empty(experts, NEURONS, dtype=torch.int64, device=CUDA)
            first = torch.empty(experts, 3, dtype=torch.int64, device=CUDA)
            launches = Launches()
            with no_waits(), launches.counting() as names:
                made = triton.run(x, p, counts, *weights, choose=Selection(6), activation="silu")
                assert len(names) == 7, names
                made.entries.block_sums(
                    Blocks(table, 1, experts), shares=False, scale_free=True,
                    counters=Counters(loads, counts),
                )  # fmt: skip
                made.entries.note_bad(p, first, 0)
            seen.append(names)
    assert seen[0] == seen[1] == seen[2], seen


def other_losses_launch_as_few():
    device = [torch.device("cpu")]
    with job(2, device):
        for changes in (
            {"mone_ng_loss_type": "raw"},
            {"mone_ng_loss_type": "entropy"},
            {"mone_ng_loss_scope": "global_batch"},
            {"mone_ng_loss_coeff": 0.0},
        ):
            forward, back, _ = through_the_kernels(device, 2, **changes)
            assert len(forward) <= 10, forward
            assert len(back) <= 14, back


def flex_rows(backend):
    """Row counts of the flex dispatcher, from what its library leaves on the device."""
    from megatron_mone.moe import faults
    from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher

    with job(4, [CUDA]), FakeTensorMode():
        dispatcher = object.__new__(MaskFlexTokenDispatcher)  # without the library
        dispatcher.config = SimpleNamespace(moe_flex_dispatcher_backend=backend)
        dispatcher.num_local_experts = 2
        dispatcher._rows_differ = faults.FaultWatch(dispatcher._rows_error)
        dispatcher._comm_manager = SimpleNamespace(
            group=torch.distributed.group.WORLD,
            config=dispatcher.config,
            token_probs=torch.empty(5, TOPK, device=CUDA),
            token_indices=torch.empty(5, TOPK, dtype=torch.int64, device=CUDA),
            routing_map=torch.empty(5, 8, dtype=torch.bool, device=CUDA),
            dispatched_routing_map=torch.empty(9, 2, dtype=torch.bool, device=CUDA),
        )
        counted_on = "cpu" if backend == "deepep" else CUDA
        per_expert = torch.empty(2, dtype=torch.int64, device=counted_on)
        with no_waits() as seen:
            rows_ER = dispatcher.rows_by_source(per_expert)
        assert (rows_ER.shape, rows_ER.device) == ((2, 4), CUDA)
        assert list(faults._kept) == [dispatcher._rows_differ]
        assert not seen.megatrons


def a_layer_on_hybridep(capacity, captured=False):
    """The whole layer and its kernels; with a rank capacity its rows are a bound, and a CUDA graph
    may hold it."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import fused_a2a, token_dispatcher

    from megatron_mone.moe import faults
    from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher

    device, ranks, local = [torch.device("cpu")], 2, 2
    bound = PAIRS if capacity is None else 256  # a multiple of it, says Megatron

    def dispatch(x, routing_map, probs, num_permuted_tokens=None, **_rest):
        assert num_permuted_tokens == (None if capacity is None else bound)
        at = torch.empty(bound, dtype=torch.int64, device=CUDA)
        rows_E = torch.empty(local, dtype=torch.int32, device=CUDA)
        handle = (torch.empty(1, dtype=torch.int32, device=CUDA),)  # tokens over the budget
        return x[at], probs.flatten()[at], None, rows_E, handle

    def combine(x, **_rest):
        return x[torch.empty(SEQUENCE * BATCH, dtype=torch.int64, device=CUDA)]

    with (
        job(ranks, device),
        mock.patch.object(fused_a2a, "HAVE_HYBRIDEP", True),
        mock.patch.multiple(
            token_dispatcher, hybrid_ep_dispatch=dispatch, hybrid_ep_combine=combine
        ),
        launch.recording(lambda one: None),
    ):
        graph = {"cuda_graph_impl": "full_iteration"} if captured else {}
        layer, fake = fake_layer(ranks, ranks * local, device, mone_backend="triton", **graph)
        layer.config.moe_flex_dispatcher_backend = "hybridep"
        layer.config.moe_expert_rank_capacity_factor = capacity
        layer.config.use_transformer_engine_op_fuser = capacity is not None  # it asks for both
        groups = ProcessGroupCollection.use_mpu_process_groups()
        with fake:
            layer.token_dispatcher = MaskFlexTokenDispatcher(local, [0, 1], layer.config, groups)
            kept = []
            for _ in range(2):
                megatrons = through_a_layer(layer, padded=False)
                kept.append([(id(one), id(one._first), id(one._first_EX)) for one in faults._kept])
            assert len(faults._kept) == 2  # a NaN, and rows dropped over the budget
            assert not captured or kept[0] == kept[1]
            faults._kept.clear()
            with no_waits():
                layer.neuron_balancer.end_step()
    assert not megatrons, megatrons


def a_bias_reaches_its_experts_rows():
    """Of the loss type "bias": the rule that adds it knows rows from counts on the device."""
    from megatron_mone.kernels import BiasedRule

    with FakeTensorMode():
        bias_EF = torch.empty(4, NEURONS, device=CUDA)
        counts_E = torch.empty(4, dtype=torch.int64, device=CUDA)
        rule = BiasedRule(lambda gate, bias: gate + bias > 0, bias_EF, counts_E)
        with no_waits() as seen:
            assert rule(torch.empty(9, NEURONS, device=CUDA)).shape == (9, NEURONS)
        assert not seen.megatrons


def what_waits_is_refused():
    with FakeTensorMode():
        x = torch.empty(4, 3, device=CUDA)
        index = torch.empty(4, dtype=torch.int64, device=CUDA)
        truth = torch.empty(4, dtype=torch.bool, device=CUDA)
        on_host = torch.empty(4, dtype=torch.int64)
        waiting = (
            lambda: bool(truth.any()),
            lambda: int(index[0]),
            index.tolist,
            lambda: x.sum().item(),
            lambda: torch.bincount(index, minlength=4),
            truth.nonzero,
            lambda: x[truth],
            lambda: x.masked_select(truth.unsqueeze(1)),
            lambda: x.index_put_((truth,), torch.zeros((), device=CUDA)),
            lambda: torch.arange(4, device=CUDA).repeat_interleave(index),
            lambda: torch.equal(x, x),
            lambda: index.unique(),
            x.cpu,
            lambda: on_host.to(CUDA),
            lambda: index.copy_(on_host),
            lambda: torch.tensor([1, 2], device=CUDA),
            lambda: torch.cuda.synchronize(),  # replaced while it is refused
        )
        for number, wait in enumerate(waiting):
            said = None
            try:
                with no_waits():
                    wait()
            except HostWait as refused:
                said = str(refused)
            assert said, f"number {number} did not wait"
            assert "no_waits_cases.py" in said
        with no_waits() as seen:
            torch.arange(4, device=CUDA).repeat_interleave(index, output_size=9)
            x.index_add_(0, index, x)
            x[index] = 0.0
            torch.where(truth.unsqueeze(1), x, 0.0).to(torch.bfloat16)
            on_host.sum().item  # noqa: B018
        assert not seen.megatrons


def megatron_may_wait():
    """In its own files, and only there."""
    source = "def ask(t):\n    return t.repeat_interleave(t)\n"
    files = ("/env/megatron/core/transformer/moe/moe_utils.py", "/home/me/megatron_mone/x.py")
    with FakeTensorMode():
        index = torch.empty(4, dtype=torch.int64, device=CUDA)
        for file in files:
            names = {}
            exec(compile(source, file, "exec"), names)  # noqa: S102
            with no_waits() as seen:
                try:
                    names["ask"](index)
                except HostWait:
                    assert file == files[1]
                except DynamicOutputShapeException:  # nobody can answer
                    assert file == files[0]
            assert [file in said for said in seen.megatrons] == [True] * (file == files[0])


class Twice(torch.autograd.Function):
    """Two outputs, of which one may have no gradient, and arguments that never have one."""

    @staticmethod
    def forward(ctx, name, x, constant, y):
        ctx.save_for_backward(x, y)
        return x * y, x + 2 * y + constant

    @staticmethod
    def backward(ctx, first, second):
        x, y = ctx.saved_tensors
        first = torch.zeros_like(x) if first is None else first
        second = torch.zeros_like(x) if second is None else second
        return None, first * y + second, None, first * x + 2 * second


def backward_is_that_of_autograd():
    """On the CPU, where both run: to the bit but for the order in which two gradients add up."""
    torch.manual_seed(0)
    leaves = [torch.randn(5, 4, requires_grad=True) for _ in range(3)]

    def forward(one_output):
        a, b, c = leaves
        first, second = Twice.apply("name", a.exp(), torch.ones(4), b)
        left, right = (first @ c.t()).split([2, 3], dim=1)
        mixed = left.sum(dim=1) * right.square().sum(dim=1)
        total = mixed.unsqueeze(1) * a + first
        return total if one_output else total + second

    for one_output in (True, False):
        grad = torch.randn(5, 4)
        got = backward(forward(one_output), grad)
        wanted = torch.autograd.grad(forward(one_output), leaves, grad)
        for leaf, gradient in zip(leaves, wanted, strict=True):
            torch.testing.assert_close(got[leaf], gradient)


def _layers():
    expert_parallel_and_experts = [(1, 4), (2, 4), (4, 4)]  # the last with one expert a rank
    for (ranks, experts), padded in itertools.product(expert_parallel_and_experts, [False, True]):
        yield ranks, experts, padded, {}
    for loss in ("raw", "entropy", "bias", "normalized"):
        yield 2, 8, False, {"mone_ng_loss_type": loss}
    for padded in (False, True):
        yield 2, 8, padded, {"mone_ng_loss_scope": "global_batch"}
    yield 2, 4, True, {"calculate_per_token_loss": True}
    capacity = {"moe_expert_capacity_factor": 1.0, "moe_pad_expert_input_to_capacity": True}
    yield 2, 4, False, capacity


def _words(ranks, experts, padded, changes):
    said = [f"EP {ranks}", f"{experts} experts", *(f"{k} = {v}" for k, v in changes.items())]
    return ", ".join([*said, "padded"] if padded else said)


HARNESS = {
    case.__name__: case
    for case in (what_waits_is_refused, megatron_may_wait, backward_is_that_of_autograd)
}
FLEX = {backend: partial(flex_rows, backend) for backend in ("deepep", "hybridep")}
FLEX |= {
    f"hybridep, rank capacity {capacity}": partial(a_layer_on_hybridep, capacity)
    for capacity in (None, 1.5)
}
FLEX["hybridep, rank capacity 1.5, captured"] = partial(a_layer_on_hybridep, 1.5, captured=True)
LAYERS = {_words(*case): partial(a_layer, *case) for case in _layers()}
KERNELS = {
    case.__name__: case
    for case in (
        launches_are_few_whatever_the_number_of_experts,
        weight_gradients_that_wait_are_the_same_launches,
        by_blocks_they_are_as_few,
        what_is_launched_is_what_is_planned,
        transformer_engine_takes_counts_on_the_device,
        few_rows_wait_for_nothing,
        other_losses_launch_as_few,
    )
}
RULE = {a_bias_reaches_its_experts_rows.__name__: a_bias_reaches_its_experts_rows}
CAPTURED = {
    _words(2, experts, False, changes): partial(a_captured_layer, experts, changes)
    for experts, changes in (
        (4, {}), (2, {}), (8, {"mone_neuron_block": 2}), (4, {"mone_ng_loss_type": "entropy"}),
        (4, {"mone_ng_loss_coeff": 0.0}), (4, {"mone_check_for_nan": False}),
        (4, {"mone_router_loss_probs": "after_topk", "moe_aux_loss_coeff": 0.1}),
        (4, {"moe_router_enable_expert_bias": True, "moe_router_score_function": "sigmoid"}),
    )
}  # fmt: skip
CAPTURED |= {
    "refused: " + _words(2, 4, False, changes): partial(a_captured_layer, 4, changes, refused=True)
    for changes in (
        {"mone_ng_loss_scope": "global_batch"},
        {"mone_ng_loss_type": "bias"}, {"mone_selection": "threshold"},
        {"moe_pad_expert_input_to_capacity": False},
        {"moe_token_dispatcher_type": "allgather", "moe_pad_expert_input_to_capacity": False,
         "moe_expert_capacity_factor": None},
    )
}  # fmt: skip
CASES = {**HARNESS, **KERNELS, **RULE, **FLEX, **LAYERS, **CAPTURED}


def run(folder):
    """Run every case in a fork of this process."""
    from megatron_mone.model import layer_spec  # noqa: F401  # imported once, before the forks

    for number, case in enumerate(CASES.values()):
        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                case()
            except BaseException:
                (folder / str(number)).write_text(traceback.format_exc())
                status = 1
            finally:
                os._exit(status)
        if os.waitpid(pid, 0)[1] and not (folder / str(number)).exists():
            (folder / str(number)).write_text("the process died")
    (folder / "end").touch()


if __name__ == "__main__":
    run(Path(sys.argv[1]))
