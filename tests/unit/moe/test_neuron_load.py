"""Load facts from counts: by hand, and the window and step bookkeeping."""

import pytest
import torch

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.gate_shares import kept_counts
from megatron_mone.moe.metrics import install_tracker
from megatron_mone.moe.neuron_load import SUMMARY_FIELDS, NeuronLoad, summarise_counts
from tests.unit.moe.builders import build_layer


def facts(counts, rows):
    summary = summarise_counts(torch.tensor(counts), torch.tensor(rows))
    return dict(zip(SUMMARY_FIELDS, summary.values, strict=True)), summary.histogram


def test_by_hand():
    # expert 0: 4 rows keep 2 of 4 neurons; expert 1: 2 rows, one neuron takes all it can
    got, histogram = facts([[4, 4, 0, 0], [2, 1, 1, 0]], [4, 2])
    assert got["kept_ratio"] == (8 + 4) / (6 * 4)
    assert got["neuron_load_max_over_mean"] == 2.0
    assert got["dead_neurons"] == 3
    assert got["expert_load_max_over_mean"] == pytest.approx(4 * 2 / 6)
    assert got["neuron_load_p50"] == 1.0
    assert got["neuron_load_p1"] == 0.0
    assert histogram.sum() == 8
    assert histogram[0] == 3  # the dead ones
    assert histogram[LOAD_EDGES.index(1.0) + 1] == 2


def test_balanced_is_one():
    got, _ = facts([[3] * 8] * 2, [12, 12])
    for field in ("neuron_load_max_over_mean", "neuron_load_p1", "neuron_load_p99"):
        assert got[field] == 1.0
    assert got["kept_ratio"] == 0.25


def test_experts_without_rows_are_left_out_of_the_percentiles():
    got, histogram = facts([[2, 2], [0, 0]], [2, 0])
    assert got["neuron_load_p1"] == 1.0
    assert histogram.sum() == 2
    assert facts([[0, 0]], [0])[0]["routed_rows"] == 0


def test_steps_flow_into_the_window():
    load = NeuronLoad(2, 3, torch.device("cpu"))
    mask = NeuronMask.from_bool(torch.tensor([[True, False, False], [True, True, False]]))
    output = GroupedMLPOutput(torch.ones(2, 1), mask, torch.ones(3))
    load.add(kept_counts(output, torch.tensor([0, 1]), 2), torch.tensor([1, 1]))
    load.end_step()
    # two blocks (micro-batches) of each expert
    load.add(kept_counts(output, torch.tensor([2, 3]), 4), torch.tensor([0, 0, 1, 1]))
    assert load.step_counts_EF.tolist() == [[0, 0, 0], [2, 1, 0]]
    load.end_step()
    counts, rows = load.take_window()
    assert counts.tolist() == [[1, 0, 0], [3, 2, 0]]
    assert rows.tolist() == [1, 3]
    assert load.take_window()[0].sum() == 0


@pytest.mark.usefixtures("one_rank")
def test_the_warm_up_of_a_graph_is_not_counted():
    """Megatron ends it by clearing its metrics, and puts back a layer's buffers."""
    layer = build_layer()
    load, tracker = layer.neuron_balancer.load, install_tracker()
    tracker.register(layer)
    layer(torch.randn(5, 1, 16))
    layer.end_step()
    window = load.window_rows_E.clone()
    layer(torch.randn(5, 1, 16))
    assert load.step_rows_E.sum() == load.step_counts_EF.sum() / 6 == 10
    tracker.clear()
    assert not load.step_rows_E.any()
    assert not load.step_counts_EF.any()
    assert torch.equal(load.window_rows_E, window)
    of_layer = {id(buffer) for buffer in layer.buffers()}
    assert {id(load.step_counts_EF), id(load.step_rows_E)} <= of_layer
    assert {id(load.window_counts_EF), id(load.window_rows_E)} <= of_layer
    assert not [name for name in layer.state_dict() if "load" in name]
