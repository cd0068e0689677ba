"""Traces: merging, adding up, files; and what a tracer supplies, held to what is asked of it."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_mone.common.phases import ATTENTION, BACKWARD, FORWARD, RECOMPUTE, ROUTER
from megatron_mone.planning.tracing.recorder import Recorder, held_bytes, stage_memory
from megatron_mone.planning.tracing.stand_ins.values import balanced_rows, routing_map
from megatron_mone.planning.tracing.trace import (
    DEVICE_WAIT,
    FUNCTION_NODE,
    NODE,
    Collective,
    Op,
    StageMemory,
    Trace,
    merged,
)
from megatron_mone.planning.tracing.unknown_values import UnknownValues
from megatron_mone.planning.tracing.zero_step import sent_by_any
from megatron_mone.profiling.clock import HostStamps, PhaseClock

MM = Op(
    name="aten.mm", inputs=((2, 3), (3, 5)), outputs=((2, 5),), dtype="float32", bytes_read=84,
    bytes_written=40, flops=60, phase=ATTENTION, pass_=FORWARD,
)  # fmt: skip
GATHER = Collective("all_gather", 100, "tp", ranks=4, stride=1, phase=ATTENTION, pass_=FORWARD)
TRACE = Trace(
    world_size=8, rank=5, micro_batches=1, backend="cpu", rows={1: 64, 2: 63},
    ops=(replace(MM, count=3), replace(MM, flops=7)),
    collectives=(replace(GATHER, count=2), replace(GATHER, kind="all_reduce", bytes=10)),
    memory=StageMemory(weights=1, gradients=2, optimizer=3, activations=4),
)  # fmt: skip


def test_equal_neighbours_are_one():
    back = replace(MM, pass_=BACKWARD)
    assert merged([MM, MM, back, MM, MM, MM]) == (
        replace(MM, count=2), back, replace(MM, count=3),
    )  # fmt: skip
    assert merged([GATHER, replace(GATHER, count=4)]) == (replace(GATHER, count=5),)
    assert merged([]) == ()


def test_counts_weigh_in_sums():
    assert TRACE.flops == 3 * 60 + 7
    # An all-gather of 4 ranks sends to 3 others; a ring all-reduce sends 3/4 of it twice.
    assert TRACE.traffic() == {"all_gather tp": (2, 600), "all_reduce tp": (1, 15)}


def test_a_file_gives_the_trace_back(tmp_path):
    TRACE.write(tmp_path / "t.json")
    assert json.loads((tmp_path / "t.json").read_text())["schema"] == "megatron-mone/trace/1"
    assert Trace.read(tmp_path / "t.json") == TRACE


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda t: t.update(schema="megatron-mone/trace/2"), "schema is megatron-mone/trace/2"),
        (lambda t: t.pop("memory"), "no field 'memory'"),
        (lambda t: t["ops"][1].update(flops=-1), r"ops\[1\].flops: -1"),
        (lambda t: t["ops"][0].update(phase="lunch"), "'lunch' is none of"),
        (lambda t: t["ops"][0].update(inputs=[[2, "3"]]), r"ops\[0\].inputs\[0\]\[1\]"),
        (lambda t: t["rows"].update(first=1), "'first' is not the number of a layer"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, change, fault):
    TRACE.write(tmp_path / "t.json")
    document = json.loads((tmp_path / "t.json").read_text())
    change(document)
    (tmp_path / "t.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=fault) as failure:
        Trace.read(tmp_path / "t.json")
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("tokens", "topk", "experts"), [(64, 2, 4), (7, 3, 5), (5, 5, 5), (1, 1, 9)]
)
def test_balanced_rows_add_up_and_differ_by_one(tokens, topk, experts):
    rows = balanced_rows(tokens, topk, experts)
    assert len(rows) == experts
    assert sum(rows) == tokens * topk
    assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize("rows", [[3, 3, 3, 3], [6, 0, 5, 1], [0, 6, 6, 0], [2, 4, 1, 5]])
def test_a_routing_map_has_the_rows_asked_for(rows):
    found = routing_map(rows, tokens=6, topk=2)
    assert found.sum(dim=0).tolist() == rows
    assert found.sum(dim=1).tolist() == [2] * 6


@pytest.mark.parametrize("rows", [[7, 5, 0, 0], [3, 3, 3, 2], [-1, 6, 6, 1]])
def test_rows_that_no_map_has_are_refused(rows):
    with pytest.raises(ValueError, match="rows_per_expert"):
        routing_map(rows, tokens=6, topk=2)


@pytest.fixture
def recorder():
    recorder = Recorder(PhaseClock(HostStamps()))
    recorder.clock.begin()
    return recorder


def test_floats_have_no_values_and_integers_do(recorder):
    with UnknownValues(recorder.saw_operator):
        weights = torch.ones(3, 5)
        counts = torch.tensor([1, 2]).cumsum(0)
        mixed = weights[torch.tensor([0, 2, 2])]
        chosen = weights[0].masked_select(torch.tensor([True, False, True, True, False]))
        known = torch.zeros(5, dtype=torch.int64)
        known += weights[0].to(torch.int64)
    assert weights.is_meta
    assert counts.tolist() == [1, 3]
    assert mixed.is_meta
    assert mixed.shape == (3, 5)
    assert chosen.shape == (3,)
    assert known.tolist() == [0] * 5  # unknown values leave a known tensor as it was


def test_an_unknown_integer_is_never_answered(recorder):
    with UnknownValues(recorder.saw_operator):
        unknown = torch.ones(3).to(torch.int64)
        with pytest.raises(RuntimeError, match="not known"):
            unknown.sum().item()
        with pytest.raises(RuntimeError, match="not known"):
            torch.ones(3).masked_select(unknown > 0)


def test_operators_are_taken_down_with_phase_bytes_and_operations(recorder):
    with UnknownValues(recorder.saw_operator):
        a, b = torch.ones(2, 3), torch.ones(3, 5, dtype=torch.bfloat16)
        recorder.ops.clear()
        recorder.clock.enter_forward(ROUTER)
        product = a @ b.float()
        product.view(10).add_(1.0)
    cast, mm, add = recorder.ops
    assert (cast.name, cast.bytes_read, cast.bytes_written) == ("aten._to_copy", 30, 60)
    assert mm == replace(MM, phase=ROUTER)
    assert (add.inputs, add.outputs, add.flops) == (((10,),), ((10,),), 0)  # the view is no work


def test_tensors_kept_for_backward_count_once(recorder):
    with UnknownValues(recorder.saw_operator):
        x = torch.ones(4, 8, requires_grad=True)
        with recorder.watch_kept():
            (x.sin() * x.cos()).sum()
        kept = recorder.kept()
    # sin and cos keep x, the product both of its factors
    assert sorted(size for _, size in kept) == [128] * 3


def test_what_is_written_over_is_not_read(recorder):
    with UnknownValues(recorder.saw_operator):
        a, b = torch.ones(10), torch.ones(10, dtype=torch.bfloat16)
        recorder.ops.clear()
        a.zero_()
        a.copy_(b)
        a.mul_(2.0)
    moved = [(op.name, op.bytes_read, op.bytes_written) for op in recorder.ops]
    assert moved == [("aten.zero_", 0, 40), ("aten.copy_", 20, 40), ("aten.mul_", 40, 40)]


class _Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def beside(recorder):
    return {(op.name, op.pass_): op.count for op in recorder.work_beside()}


def test_nodes_of_autograd_count_as_they_are_made_and_run(recorder):
    """sin and sum in C++, the leaf's accumulation, and one of Python."""
    x = torch.ones(4, requires_grad=True)
    with recorder.watch_nodes():
        _Twice.apply(x.sin()).sum().backward()
    assert beside(recorder) == {
        (FUNCTION_NODE, FORWARD): 1, (FUNCTION_NODE, BACKWARD): 1,
        (NODE, FORWARD): 3, (NODE, BACKWARD): 3,
    }  # fmt: skip
    _Twice.apply(x.sin()).sum().backward()  # nobody watches
    assert beside(recorder)[NODE, BACKWARD] == 3


def test_nodes_made_again_belong_to_the_recompute(recorder):
    x = torch.ones(4, requires_grad=True)
    with recorder.watch_nodes():
        checkpoint(_Twice.apply, x, use_reentrant=True).sum().backward()
    found = beside(recorder)
    assert found[FUNCTION_NODE, RECOMPUTE] == 1
    assert found[FUNCTION_NODE, FORWARD] == 1  # the checkpoint's own
    assert found[FUNCTION_NODE, BACKWARD] == 2


def test_asking_the_device_is_a_wait(recorder):
    with UnknownValues(recorder.saw_operator):
        (torch.ones(3).sum() > 0).item()
        torch.arange(3).sum().item()  # known: the host's
    assert beside(recorder) == {(DEVICE_WAIT, FORWARD): 1}


def test_work_outside_a_step_is_not_taken_down(recorder):
    recorder.clock.end()
    with UnknownValues(recorder.saw_operator):
        a = torch.ones(2, 3)
        recorder.note("mone.gate", [a], [a], 7)
    assert recorder.ops == []


def test_known_truth_masks_give_shapes(recorder):
    """A mask of rows by index, a count with a least length, repetitions whose sum is given."""
    with UnknownValues(recorder.saw_operator):
        values = torch.ones(4, 3)
        rows = values[torch.tensor([True, False, True, True])]
        counts = torch.bincount(values[0].to(torch.int64), minlength=7)
        repeated = values.repeat_interleave(torch.tensor([2, 0, 1, 3]), dim=0, output_size=6)
    assert rows.shape == (3, 3)
    assert counts.shape == (7,)
    assert repeated.shape == (6, 3)


def test_new_floats_are_unknown_whatever_makes_them(recorder):
    with UnknownValues(recorder.saw_operator):
        made = [
            torch.empty(2), torch.zeros(2), torch.full((2,), 1.5, dtype=torch.float32),
            torch.randn(2), torch.arange(2, dtype=torch.float32), torch.empty(2, device="cpu"),
            torch.empty(2).to("cpu"), torch.zeros_like(torch.empty(2), device="cpu"),
        ]  # fmt: skip
        known = [torch.zeros(2, dtype=torch.int32), torch.arange(3), torch.tensor([True])]
    assert all(tensor.is_meta for tensor in made)
    assert not any(tensor.is_meta for tensor in known)


def test_gradients_are_unknown_too(recorder):
    with UnknownValues(recorder.saw_operator):
        weight = torch.nn.Parameter(torch.empty(5, 3))
        (torch.ones(2, 3) @ weight.t()).sum().backward()
    assert weight.grad is not None
    assert weight.grad.is_meta
    products = [op for op in recorder.ops if op.flops]
    assert [op.flops for op in products] == [60, 60]  # forward, and the weight's gradient


class _Group:
    """What the recorder asks a process group."""

    def __init__(self, description):
        self.group_desc = description


def test_collectives_are_taken_down_with_their_group(recorder, monkeypatch):
    ranks = {"EXPERT_MODEL_PARALLEL_GROUP": [3, 11, 19], "MINE": [0, 1]}
    monkeypatch.setattr(
        torch.distributed, "get_process_group_ranks", lambda group: ranks[group.group_desc]
    )
    recorder.clock.switch(ROUTER, BACKWARD)
    for name in ranks:
        recorder.saw_collective("all_to_all", 96, _Group(name))
    assert recorder.collectives == [
        Collective("all_to_all", 96, "ep", ranks=3, stride=8, phase=ROUTER, pass_=BACKWARD),
        Collective("all_to_all", 96, "mine", ranks=2, stride=1, phase=ROUTER, pass_=BACKWARD),
    ]


def test_what_two_kinds_share_is_the_first_ones(recorder):
    weight, gradient = torch.zeros(10), torch.zeros(6)
    with recorder.watch_kept():
        x = torch.ones(10, requires_grad=True)
        (x * weight).sin()  # keeps the weight, and the argument of sin
    held = {"weights": [weight, weight[:3]], "gradients": [gradient, weight], "optimizer": []}
    found = stage_memory(held_bytes(held), held_bytes({}), recorder)
    assert found == StageMemory(weights=40, gradients=24, optimizer=0, activations=40)


def test_what_is_of_experts_is_told_apart(recorder):
    dense, expert, state = torch.zeros(10), torch.zeros(6), torch.zeros(3)
    held = {"weights": [dense, expert], "gradients": [], "optimizer": [state, expert]}
    of_experts = {"weights": [expert], "gradients": [], "optimizer": [state, expert]}
    found = stage_memory(held_bytes(held), held_bytes(of_experts), recorder)
    assert (found.weights, found.expert_weights) == (64, 24)
    assert (found.optimizer, found.expert_optimizer) == (12, 12)
    assert (found.gradients, found.expert_gradients) == (0, 0)


def test_what_picks_entries_reads_those_alone(recorder):
    with UnknownValues(recorder.saw_operator):
        table = torch.ones(1000, 4)
        table[torch.tensor([3, 5])]
        table.index_select(0, torch.tensor([3, 5, 7]))
        table.mm(torch.ones(4, 2))
    read = {op.name: op.bytes_read for op in recorder.ops}
    assert read["aten.index"] == 2 * 4 * 4 + 2 * 8
    assert read["aten.index_select"] == 3 * 4 * 4 + 3 * 8
    assert read["aten.mm"] == 1000 * 4 * 4 + 4 * 2 * 4


def sent(kind: str, size: int, in_pass: bool = True) -> Collective:
    return Collective(kind, size, "dp-cp", 2, 1, ROUTER, FORWARD, in_pass=in_pass)


def test_what_every_micro_batch_sends_is_told_from_what_a_step_does():
    """Megatron FSDP gathers embeddings (7) in a step's first micro-batch alone, and reduces some
    gradients (5) in its last; a layer (3) it gathers in each, of the first ahead of the step."""
    first = [sent("all_gather", 7), sent("reduce_scatter", 2)]
    last = [sent("all_gather", 3), sent("reduce_scatter", 2), sent("all_reduce", 5)]
    around = [sent("all_reduce", 4, in_pass=False), sent("all_gather", 3, in_pass=False)]
    found = [(one.kind, one.bytes, one.in_pass) for one in sent_by_any(first, last + around)]
    assert sorted(found) == [
        ("all_gather", 3, True), ("all_gather", 7, False), ("all_reduce", 4, False),
        ("all_reduce", 5, False), ("reduce_scatter", 2, True),
    ]  # fmt: skip


def test_what_is_of_one_micro_batch_is_not_of_each():
    with pytest.raises(RuntimeError, match="is not of each of 2 micro-batches"):
        sent_by_any([], [sent("all_gather", 3)])
