"""Predictions of steps worked out on paper, and what must hold of all of them."""

from dataclasses import replace

import pytest

from megatron_mone.common.phases import (
    ATTENTION,
    BACKWARD,
    COMBINE,
    EXPOSED_COMMUNICATION,
    FORWARD,
    OPTIMIZER,
    PHASES,
    RECOMPUTE,
    UP_DOWN_GEMM,
)
from megatron_mone.planning.composed import scaled_facts, scaled_traces
from megatron_mone.planning.cost.hardware import Host
from megatron_mone.planning.cost.measured_times import MeasuredTimes, wait_key
from megatron_mone.planning.cost.prediction import predict, schedule_of
from megatron_mone.planning.cost.rank_cost import chunk_cost, collective_seconds, step_cost
from megatron_mone.planning.cost.rank_memory import rank_memory
from megatron_mone.planning.plan_parts import model_document
from megatron_mone.planning.terminal_tables import stage_line
from megatron_mone.planning.tracing.trace import DEVICE_WAIT, FUNCTION_NODE, NODE, Collective, Op
from tests.unit.planning.made_jobs import (
    CLUSTER,
    EXACT,
    FACTS,
    MEMORY,
    STAGE,
    TRACES,
    exchange,
    facts,
    move,
    product,
    trace,
)

MS = 1e-3
ALONE = facts(pp=1, dp=16, micro_batches=2)


def predicted(traces=None, of=FACTS, cluster=CLUSTER, efficiency=EXACT):
    return predict(traces or TRACES, of, cluster, efficiency)


def test_a_pass_is_its_compute_and_its_exposed_communication():
    cost = chunk_cost(STAGE, FACTS, CLUSTER, EXACT)
    assert cost.forward.seconds == pytest.approx(11 * MS)
    assert cost.backward.seconds == pytest.approx(22 * MS)
    assert cost.backward.expert == pytest.approx(2 * MS)
    assert cost.forward.by_phase == {ATTENTION: pytest.approx(10 * MS)}


def test_recomputation_belongs_to_the_backward():
    again = trace(product(10), product(20, BACKWARD), product(7, RECOMPUTE), exchange(1, RECOMPUTE))
    cost = chunk_cost(again, FACTS, CLUSTER, EXACT)
    assert cost.forward.seconds == pytest.approx(10 * MS)
    assert cost.backward.seconds == pytest.approx(28 * MS)


def test_launches_bound_a_pass_of_small_kernels():
    slow_host = replace(EXACT, kernel_seconds=1 * MS, pass_seconds=2 * MS)
    small = trace(move(0.01, name="fused.swiglu", count=50), product(30, BACKWARD, count=2))
    cost = chunk_cost(small, ALONE, CLUSTER, slow_host)
    assert cost.forward.seconds == pytest.approx(50 * MS)
    assert cost.forward.late == pytest.approx(49.5 * MS)
    assert cost.backward.seconds == pytest.approx(60 * MS)
    assert cost.backward.late == 0.0
    # A collective is launched, too, beside which the host goes on; a pipeline's pass is one more.
    more = trace(move(0.01, name="fused.swiglu", count=50), exchange(1))
    assert chunk_cost(more, ALONE, CLUSTER, slow_host).forward.seconds == pytest.approx(51 * MS)
    assert chunk_cost(more, FACTS, CLUSTER, slow_host).forward.seconds == pytest.approx(53 * MS)


def test_nodes_of_autograd_and_waits_cost_the_host():
    """3 Python nodes at 4 ms and 10 in C++ at 1 ms keep the device waiting; a wait costs both."""
    slow_host = replace(EXACT, function_seconds=4 * MS, node_seconds=1 * MS, wait_seconds=5 * MS)
    beside = [
        Op(name, (), (), "none", 0, 0, 0, ATTENTION, FORWARD, count)
        for name, count in ((FUNCTION_NODE, 3), (NODE, 10), (DEVICE_WAIT, 2))
    ]
    short = chunk_cost(trace(product(6), *beside), ALONE, CLUSTER, slow_host).forward
    assert short.seconds == pytest.approx((12 + 10 + 10) * MS)
    assert short.late == pytest.approx(16 * MS)
    long = chunk_cost(trace(product(60), *beside), ALONE, CLUSTER, slow_host).forward
    assert long.seconds == pytest.approx(70 * MS)
    assert chunk_cost(trace(product(6), *beside), ALONE, CLUSTER, EXACT).forward.seconds == (
        pytest.approx(6 * MS)
    )


def test_experts_of_a_grouped_product_are_a_launch_each():
    slow_host = replace(EXACT, kernel_seconds=1 * MS)
    grouped = Op(
        "fused.grouped_gemm", ((16, 4), (8, 4, 2)), ((16, 2),), "bfloat16", 1, 1, 256,
        UP_DOWN_GEMM, FORWARD,
    )  # fmt: skip
    ours = replace(grouped, name="mone.gate_product", outputs=((16, 4),))
    assert chunk_cost(trace(grouped), ALONE, CLUSTER, slow_host).forward.host == (
        pytest.approx(8 * MS)
    )
    assert chunk_cost(trace(ours), ALONE, CLUSTER, slow_host).forward.host == pytest.approx(1 * MS)


def gather(milliseconds, kind, pass_):
    """A tensor-parallel collective of 2 ranks of a domain that takes so long."""
    size = {"all_gather": 1e6, "reduce_scatter": 2e6, "all_reduce": 1e6}[kind] * milliseconds
    return Collective(kind, round(size), "tp", 2, 1, ATTENTION, pass_)


@pytest.mark.parametrize(
    ("kind", "pass_", "overlap", "left"),
    [
        ("all_gather", FORWARD, False, 4.0),  # nothing goes on beside a forward's
        ("all_gather", BACKWARD, False, 2.0),  # of two, the column-parallel one's is hidden
        ("reduce_scatter", BACKWARD, False, 0.0),
        ("all_reduce", BACKWARD, False, 0.0),
        ("all_reduce", RECOMPUTE, False, 4.0),
        ("all_gather", FORWARD, True, 2.0),  # piece by piece, of which there are 2
    ],
)
def test_tensor_parallel_communication_that_gemms_hide(kind, pass_, overlap, left):
    one = trace(product(10), product(20, BACKWARD), gather(4, kind, pass_))
    cost = chunk_cost(one, facts(overlap_tp=overlap, tp=2), CLUSTER, EXACT)
    exposed = cost.forward.exposed if pass_ == FORWARD else cost.backward.exposed
    assert exposed["tp"] == pytest.approx(left * MS)


def test_short_gemms_hide_less_and_hiding_costs_compute():
    one = trace(product(1, BACKWARD), gather(4, "all_reduce", BACKWARD))
    cost = chunk_cost(one, FACTS, CLUSTER, replace(EXACT, overlap_tax=0.5))
    assert cost.backward.hidden == pytest.approx(1 * MS)
    assert cost.backward.compute == pytest.approx(1.5 * MS)
    assert cost.backward.exposed["tp"] == pytest.approx(3 * MS)


def test_what_a_timed_step_waits_for_is_not_hidden_once_more():
    one = trace(product(10, BACKWARD), sent := gather(4, "all_reduce", BACKWARD))
    waits = {wait_key(sent): ((sent.bytes, 3 * MS),)}
    timed = replace(EXACT, measured=MeasuredTimes(waits=waits))
    assert chunk_cost(one, FACTS, CLUSTER, EXACT).backward.exposed["tp"] == 0
    assert chunk_cost(one, FACTS, CLUSTER, timed).backward.exposed["tp"] == pytest.approx(3 * MS)


def test_a_step_without_pipeline_adds_up():
    one = predicted({(0, 0): STAGE}, ALONE)
    # 2 micro-batches of 33 ms; 8 MB over a card of 100 MB/s: 7 of 8 parts leave through 8 ranks of
    # one domain at 1 GB/s; 7 MB gathered likewise; 3 ms of optimizer.
    assert one.seconds == pytest.approx((2 * 33 + 7 + 7 + 3) * MS)
    assert one.parts == {
        "compute": pytest.approx(60 * MS), "expert parallel": pytest.approx(6 * MS),
        "bubble": pytest.approx(0.0), "data parallel": pytest.approx(14 * MS),
        "optimizer": pytest.approx(3 * MS),
    }  # fmt: skip
    assert one.exposed == pytest.approx(20 * MS)
    assert one.flops_per_second == pytest.approx(3e15 / one.seconds / 16)
    assert one.utilisation == pytest.approx(3e15 / one.seconds / 16 / 1e12)


def test_two_stages_wait_for_each_other_and_all_parts_add_up():
    one = predicted()
    # 1F1B of 4 micro-batches on 2 stages: (4 + 1) of 33 ms, without transfers.
    assert one.run.end_P.max() == pytest.approx(5 * 33 * MS)
    assert sum(one.parts.values()) == pytest.approx(one.seconds)
    assert one.parts["bubble"] == pytest.approx(33 * MS)
    assert one.last == 0


def test_a_bubble_is_fill_and_waiting_for_a_slower_stage():
    """M = 4 passes of 33 ms on stage 0, of 66 on stage 1, which is busy but for the first pass."""
    slow = trace(product(22), product(44, BACKWARD))
    quick = trace(product(11), product(22, BACKWARD))
    found = predicted({(0, 0): quick, (1, 0): slow})
    assert found.busy_P == pytest.approx([4 * 33 * MS, 4 * 66 * MS])
    assert found.imbalance_P == pytest.approx([4 * 33 * MS, 0])
    assert found.fill == pytest.approx(33 * MS)
    assert found.last == 0
    assert found.imbalance == pytest.approx(4 * 33 * MS)
    assert found.parts["bubble"] == pytest.approx(found.fill + found.imbalance)
    model = model_document("moe", found, {(0, 0): "moe*2", (1, 0): "moe*4"})
    assert model.bubble_ms == pytest.approx(model.fill_ms + model.imbalance_ms)
    assert [stage.imbalance_ms for stage in model.stages] == pytest.approx([132, 0])
    line = stage_line(model)
    assert "the slowest stage, 1 (moe*4), works 264 ms, stages on average 198 ms" in line
    alike = predicted({(0, 0): quick, (1, 0): quick})
    assert alike.imbalance == 0
    assert alike.parts["bubble"] == pytest.approx(alike.fill) == pytest.approx(33 * MS)


def test_transfers_between_stages_delay_the_next():
    send = Collective("send", 2_000_000, "pp", 2, 8, "pipeline bubble", FORWARD)
    slow = {place: trace(*STAGE.ops, *STAGE.collectives, send) for place in TRACES}
    assert collective_seconds(send, FACTS, CLUSTER, EXACT) == pytest.approx(20 * MS)
    assert predicted(slow).run.end_P.max() > predicted().run.end_P.max() + 0.02


def test_gradient_reduction_hides_in_the_last_backward():
    plain = predicted({(0, 0): STAGE}, ALONE)
    buckets = [c for c in STAGE.collectives if c.group != "dp-cp"] + [
        Collective("reduce_scatter", 2_000_000, "dp-cp", 8, 1, "grad reduce", FORWARD, count=4)
    ]
    hidden = predicted(
        {(0, 0): trace(*STAGE.ops, *buckets)}, replace(ALONE, overlap_grad_reduce=True)
    )
    # 7 ms in 4 buckets beside a backward of 22 ms: the last bucket is left.
    assert plain.parts["data parallel"] == pytest.approx(14 * MS)
    assert hidden.parts["data parallel"] == pytest.approx(7 / 4 * MS)


def test_parameters_gather_beside_the_first_forward():
    gathers = [c for c in STAGE.collectives if c.kind != "all_gather"] + [
        Collective("all_gather", 250_000, "dp-cp", 8, 1, "other", FORWARD, count=4)
    ]
    one = predicted(
        {(0, 0): trace(*STAGE.ops, *gathers)}, replace(ALONE, overlap_param_gather=True)
    )
    assert one.gathering == pytest.approx(7 / 4 * MS)


def test_expert_communication_hides_behind_the_other_micro_batch():
    overlapped = predicted({(0, 0): STAGE}, replace(ALONE, overlap_expert_parallel=True))
    assert overlapped.parts["expert parallel"] == pytest.approx(0.0, abs=1e-12)
    taxed = predicted(
        {(0, 0): STAGE},
        replace(ALONE, overlap_expert_parallel=True),
        efficiency=replace(EXACT, hidden_share=0.5),
    )
    assert taxed.parts["expert parallel"] == pytest.approx(3 * MS)


def test_in_a_pipeline_only_the_1f1b_phase_hides_expert_communication():
    plain = predicted().parts["expert parallel"]
    left = predicted(of=facts(overlap_expert_parallel=True)).parts["expert parallel"]
    # Stage 0 of 2: one of 4 forwards is warm-up, one of 4 backwards cool-down.
    assert left == pytest.approx(plain / 4)


def weight_gradient(milliseconds):
    """Of one expert's [100, 100] weight, on the paper GPU."""
    rows = round(milliseconds * 1e9 / (2 * 100 * 100))
    return Op(
        "fused.grouped_gemm_wgrad", ((rows, 100), (rows, 100)), ((1, 100, 100),), "bfloat16", 1, 1,
        2 * rows * 100 * 100, UP_DOWN_GEMM, BACKWARD,
    )  # fmt: skip


def test_kernels_in_a_graph_cost_the_host_one_launch():
    slow_host = replace(EXACT, kernel_seconds=1 * MS)
    layer = [product(0.01, count=20), product(0.01, phase=UP_DOWN_GEMM, count=30)]
    attention = replace(product(0.01), name="fused.attention")
    passes = trace(*layer, attention, exchange(0))
    plain = chunk_cost(passes, facts(pp=1), CLUSTER, slow_host).forward.seconds
    assert plain == pytest.approx((20 + 30 + 1 + 1) * MS)
    of_attention = facts(pp=1, graphed=(ATTENTION,), graphs_per_layer=1)
    captured = chunk_cost(passes, of_attention, CLUSTER, slow_host).forward
    assert captured.seconds == pytest.approx((30 + 1 + 1) * MS)
    assert captured.by_phase == chunk_cost(passes, FACTS, CLUSTER, EXACT).forward.by_phase
    whole = facts(pp=1, graphed=tuple(PHASES))
    in_one = chunk_cost(passes, whole, CLUSTER, slow_host).forward.compute
    assert in_one == pytest.approx(0.51 * MS)  # of the kernels themselves


@pytest.mark.parametrize(("made_in", "left"), [(5, 1), (0.5, 2.5)])
def test_the_backward_of_a_dispatch_hides_behind_its_experts_weight_gradients(made_in, left):
    """And neither its forward nor the exchange of combine."""
    passes = trace(
        product(10), exchange(1), product(20, BACKWARD), weight_gradient(made_in),
        exchange(2, BACKWARD), exchange(1, BACKWARD, COMBINE),
    )  # fmt: skip
    plain = chunk_cost(passes, FACTS, CLUSTER, EXACT)
    beside = chunk_cost(passes, facts(overlap_dispatch_backward=True), CLUSTER, EXACT)
    assert plain.backward.expert == pytest.approx(3 * MS)
    assert beside.backward.expert == pytest.approx(left * MS)
    assert beside.backward.seconds == pytest.approx((20 + made_in + left) * MS)
    assert beside.forward == plain.forward


def test_interleaving_sums_its_chunks():
    half = trace(product(5), product(10, BACKWARD))
    of = facts(vp=2)
    one = predicted({(p, v): half for p in range(2) for v in range(2)}, of)
    assert one.parts["compute"] == pytest.approx(4 * 30 * MS)
    assert one.parts["bubble"] == pytest.approx(15 * MS)  # half of what two stages have without
    assert schedule_of(of).chunks == 2


def test_memory_is_the_trace_times_the_micro_batches_in_flight():
    first, last = rank_memory([[STAGE], [STAGE]], schedule_of(FACTS), FACTS)
    assert (first.weights, first.gradients, first.optimizer) == (10e6, 20e6, 15e6)
    assert first.activations == 2 * MEMORY.activations
    assert last.activations == MEMORY.activations
    assert last.transient == MEMORY.backward_peak - MEMORY.activations
    assert first.peak == first.allocated + first.buffers + first.context + first.fragmentation


def test_what_does_not_fit_is_named():
    one = rank_memory([[STAGE], [STAGE]], schedule_of(FACTS), FACTS)[0]
    assert one.first_that_does_not_fit(replace(CLUSTER.device, memory_bytes=5e6)) == "weights"
    assert one.first_that_does_not_fit(replace(CLUSTER.device, memory_bytes=29e6)) == "gradients"
    assert one.first_that_does_not_fit(replace(CLUSTER.device, memory_bytes=50e6)) == "activations"
    assert one.first_that_does_not_fit(replace(CLUSTER.device, memory_bytes=1e13)) is None


def test_more_memory_never_fits_less():
    verdicts = [
        predicted(cluster=replace(CLUSTER, device=replace(CLUSTER.device, memory_bytes=size))).fits
        for size in (1e7, 1e8, 1e9, 3e9, 1e10)
    ]
    assert verdicts == sorted(verdicts)
    assert verdicts[0] is False
    assert verdicts[-1] is True


HOST = Host(bandwidth=1e9, memory_bytes=50e6, memory_bandwidth=5e8, efficiency=1.0)
WITH_HOST = replace(CLUSTER, host=HOST)


def on_host(name, milliseconds, count=1):
    """Equal ops of the host, or copies, of so long together."""
    rate = HOST.memory_bandwidth / 2 if name.startswith("host") else HOST.bandwidth
    size = round(rate * milliseconds * MS / count)
    return Op(name, (), (), "float32", size, size, 0, OPTIMIZER, FORWARD, count)


@pytest.mark.parametrize(
    ("overlapped", "own", "expected"),
    [
        (False, 0, 8 + 20 + 4),  # one after the other
        (False, 30, 8 + 30),  # the device's part beside the host's, behind the gradients
        (True, 0, 20 + 4 + 8 / 4),  # the first of four parameters is waited for
        (True, 30, 30),
    ],
)
def test_an_update_on_the_host(overlapped, own, expected):
    update = Op(
        "fused.adam", (), (), "float32", own * 500_000, own * 500_000, 0, OPTIMIZER, FORWARD
    )
    made = trace(
        product(1), on_host("link.to_host", 8, 4), update, on_host("host.adam", 20, 4),
        on_host("link.to_device", 4, 4),
    )  # fmt: skip
    step = step_cost([made], facts(overlap_host_copies=overlapped), WITH_HOST, EXACT)
    assert step.optimizer == pytest.approx(expected * MS)
    assert step.host.copying(HOST) == pytest.approx((8 * MS, 4 * MS))
    with pytest.raises(ValueError, match=r"cluster 'paper' has no section host") as failure:
        step_cost([made], FACTS, CLUSTER, EXACT)
    assert "\n" not in str(failure.value)


def copies(milliseconds, pass_):
    """Of activations, to the host forward and back backward."""
    name = "link.to_host" if pass_ == FORWARD else "link.to_device"
    return replace(on_host(name, milliseconds), phase=ATTENTION, pass_=pass_)


@pytest.mark.parametrize(("longer", "left"), [(4, 0), (15, 15 - 10 - 1)])
def test_copies_of_activations_hide_behind_their_pass(longer, left):
    made = trace(
        product(10), exchange(1), copies(longer, FORWARD), product(20, BACKWARD),
        copies(longer, BACKWARD),
    )  # fmt: skip
    cost = chunk_cost(made, FACTS, WITH_HOST, EXACT)
    plain = chunk_cost(
        trace(product(10), exchange(1), product(20, BACKWARD)), FACTS, CLUSTER, EXACT
    )
    assert cost.forward.exposed["host"] == pytest.approx(left * MS)
    assert cost.forward.seconds == pytest.approx(plain.forward.seconds + left * MS)
    assert cost.forward.hidden - plain.forward.hidden == pytest.approx((longer - left) * MS)
    assert cost.backward.seconds == pytest.approx(plain.backward.seconds)
    with pytest.raises(ValueError, match="has no section host"):
        chunk_cost(made, FACTS, CLUSTER, EXACT)
    # As many micro-batches are on the host as are in flight, and each crosses twice.
    step = predicted({(p, 0): made for p in range(2)}, cluster=WITH_HOST)
    size = HOST.bandwidth * longer * MS
    assert [memory.host for memory in step.memory_P] == pytest.approx([2 * size, size])
    assert step.parts["host copies"] == pytest.approx(FACTS.micro_batches * left * MS)
    assert step.host_P[0].to_host == pytest.approx(FACTS.micro_batches * size)
    assert step.host_P[0].to_host == step.host_P[0].to_device
    assert sum(step.parts.values()) == pytest.approx(step.seconds)


def test_what_the_host_keeps_is_its_own_limit():
    def kept(size):
        stage = replace(STAGE, memory=replace(MEMORY, host_optimizer=size))
        roomy = replace(WITH_HOST, device=replace(CLUSTER.device, memory_bytes=1e13))
        return predicted({(p, 0): stage for p in range(2)}, cluster=roomy)

    assert kept(0).first_unfit is None
    fits, unfit = kept(50_000_000), kept(50_000_001)
    assert (fits.fits, fits.first_unfit) == (True, None)
    assert (unfit.fits, unfit.first_unfit) == (False, "host")
    assert unfit.peak == fits.peak
    document = model_document("one", fits, dict.fromkeys(((0, 0), (1, 0)), "x")).plain()
    assert document["host"]["memory_gib"] == pytest.approx(50e6 / 2**30)


@pytest.mark.parametrize("part", ["device", "domain", "network"])
def test_more_bandwidth_is_never_slower(part):
    field = "memory_bandwidth" if part == "device" else "bandwidth"
    seconds = []
    for factor in (1, 2, 4, 8):
        faster = replace(
            getattr(CLUSTER, part), **{field: factor * getattr(getattr(CLUSTER, part), field)}
        )
        seconds.append(predicted(cluster=replace(CLUSTER, **{part: faster})).seconds)
    assert seconds == sorted(seconds, reverse=True)


def test_the_same_twice():
    first, second = predicted(), predicted()
    names = dict.fromkeys(TRACES, "moe*2")
    assert (
        model_document("moe", first, names).plain() == model_document("moe", second, names).plain()
    )


def test_more_replicas_share_the_optimizer_and_lengthen_the_ring():
    wide = scaled_facts(FACTS, 64)
    assert (wide.dp, wide.edp, wide.global_batch_size) == (32, 8, 128)
    assert wide.micro_batches == FACTS.micro_batches
    scaled = scaled_traces(TRACES, FACTS, 64)
    assert scaled[0, 0].memory.optimizer == MEMORY.optimizer / 4
    sizes = {c.kind: (c.ranks, c.bytes) for c in scaled[0, 0].collectives if c.group == "dp-cp"}
    assert sizes == {"reduce_scatter": (32, 8_000_000), "all_gather": (32, 250_000)}
    assert scaled[0, 0].ops is scaled[1, 0].ops
    assert step_cost([scaled[0, 0]], wide, CLUSTER, EXACT).optimizer == pytest.approx(0.75 * MS)


def test_a_layout_that_does_not_divide_is_no_point_of_a_curve():
    assert scaled_facts(FACTS, 24) is not None  # dp 12, edp 3
    assert scaled_facts(FACTS, 8) is not None
    assert scaled_facts(FACTS, 4) is None


def test_a_document_holds_what_the_prediction_does():
    one = predicted()
    kinds = {(0, 0): "embedding, mone*2", (1, 0): "mone*2, head"}
    document = model_document("mone", one, kinds).plain()
    assert document["step_ms"] == pytest.approx(1e3 * one.seconds)
    assert sum(document["parts_ms"].values()) == pytest.approx(document["step_ms"])
    assert document["first_unfit"] == "buffers"
    assert document["stages"][1]["layers"] == "mone*2, head"
    assert [len(events) for events in document["timeline"]["stages"]] == [8, 8]
    rows = {(c["kind"], c["group"], c["bytes"]): c["calls"] for c in document["collectives"]}
    assert rows["all_to_all", "ep", 1_333_333] == 4  # forward, one of each micro-batch
    assert rows["reduce_scatter", "dp-cp", 8_000_000] == 1


def test_what_a_rank_agrees_on_once_is_not_counted_for_each_chunk():
    norm = Collective("all_reduce", 4, "mp", 2, 8, "exposed communication", FORWARD)
    half = trace(product(5), product(10, BACKWARD), exchange(1), norm)
    of = facts(vp=2)
    one = predicted({(p, v): half for p in range(2) for v in range(2)}, of)
    document = model_document(
        "moe", one, dict.fromkeys(((p, v) for p in range(2) for v in range(2)), "moe")
    ).plain()
    calls = {(c["kind"], c["group"]): c["calls"] for c in document["collectives"]}
    assert calls == {("all_reduce", "mp"): 1, ("all_to_all", "ep"): 2 * of.micro_batches}


def test_loads_of_expert_replicas_are_added_for_every_micro_batch():
    loads = Collective("all_reduce", 1552, "edp", 2, 4, "exposed communication", FORWARD)
    gradients = replace(loads, phase="grad reduce")
    assert loads.of_micro_batch
    assert not gradients.of_micro_batch
    with_loads = chunk_cost(trace(product(1), loads), FACTS, CLUSTER, EXACT)
    assert with_loads.forward.exposed["edp"] > 0
    assert (
        "expert data parallel"
        in predicted({place: trace(*STAGE.ops, loads) for place in TRACES}).parts
    )


def zero(count, *, in_pass=True):
    """Reductions of 7 ms each over 8 ranks of a domain, by DeepSpeed's engine."""
    return Collective("reduce_scatter", 8_000_000, "dp-cp", 8, 1, EXPOSED_COMMUNICATION, BACKWARD,
                      count, in_pass)  # fmt: skip


def zero_step(*records, **changes):
    """Prediction of 4 micro-batches, of 10 ms forward and 20 ms backward."""
    stage = trace(product(10), product(20, BACKWARD), *records)
    of = facts(pp=1, ep=1, edp=8, dispatcher="", zero_stage=2, **changes)
    return predict({(0, 0): stage}, of, CLUSTER, EXACT)


def test_zero_reduces_in_every_micro_batch_or_once():
    assert zero_step(zero(2)).parts["data parallel"] == pytest.approx(4 * 0.014)
    once = zero_step(zero(2, in_pass=False))
    assert once.parts["data parallel"] == pytest.approx(0.014)
    assert once.seconds == pytest.approx(4 * 0.030 + 0.014)


@pytest.mark.parametrize(("buckets", "left"), [(1, 7.0), (2, 7.0), (4, 8.0)])
def test_zero_hides_all_but_one_bucket_in_the_compute_of_a_pass(buckets, left):
    """Of 28 ms the 20 ms of the backward hide that much; the last bucket waits for its end."""
    found = zero_step(zero(buckets), overlap_zero=True)
    assert found.parts["data parallel"] == pytest.approx(4 * left / 1e3)
    assert found.hidden == pytest.approx(4 * (7 * buckets - left) / 1e3)


def test_zero_has_no_scaling_curve():
    assert scaled_facts(facts(pp=1, zero_stage=1), 32) is None
    assert scaled_facts(facts(pp=1, fsdp="optim"), 32) is None
    assert scaled_facts(facts(pp=1), 32) is not None


def test_phases_add_up_to_compute_and_a_late_host_is_in_other():
    late = predicted(efficiency=replace(EXACT, kernel_seconds=30 * MS))
    assert sum(late.phases.values()) == pytest.approx(late.parts["compute"])
    # Of each pass a product and an exchange are launched in 60 ms, and take 11 and 22.
    assert late.phases["other"] == pytest.approx(4 * (49 + 38) * MS)
    assert predicted().phases["other"] == pytest.approx(0.0, abs=1e-12)
