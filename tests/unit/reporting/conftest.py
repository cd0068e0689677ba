"""Synthetic results and event files."""

import json
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

from megatron_mone.evaluation.results import SCHEMA
from megatron_mone.reporting.page.events import Histogram
from megatron_mone.reporting.page.results import LayerLoad, RunResult

LIMITS = (0.25, 0.5, 1.0, 2.0, 4.0)


def make_load(step: int, dead: float = 0.0) -> LayerLoad:
    return LayerLoad(Histogram(step, LIMITS, (dead + 1.0, 1.0, 6.0, 2.0, 0.0)), dead)


def make_result(name: str, loss: float = 4.0, **changes) -> RunResult:
    """40 steps of 100 tokens; `loss` is the final validation loss in nats."""
    fields = dict(
        name=name,
        fingerprint="f",
        command=("python", "-m", "megatron_mone.pretrain"),
        load_average=0.5,
        steps=40,
        world_size=2,
        tokens_per_step=100,
        executed_flops_per_step=2e12,
        active_flops_per_step=2e12,
        training_loss=[(step, 6.0 - step / 20) for step in range(1, 41)],
        validation_loss=[(20, loss + 1.0), (40, loss)],
        step_seconds=[(20, 9.0), (30, 0.2), (40, 0.4)],
        executed_tflops=[(20, 0.01), (40, 0.02)],
        active_tflops=[(20, 0.01), (40, 0.02)],
        peak_bytes=2**30,
        neuron_load={},
    )
    return RunResult(**{**fields, **changes})


def make_evaluation(iteration: int, values: dict[str, float], **model) -> dict:
    """A results.json: task -> accuracy of 100 samples."""
    facts = dict(
        load="x", iteration=iteration, world_size=1, tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1, expert_model_parallel_size=1,
        expert_tensor_parallel_size=1, precision="float32", seq_length=64,
        truncated_requests=0, limit=None,
    )  # fmt: skip
    tasks = {
        task: {"metrics": {"acc": {"value": value, "stderr": 0.05}}, "samples": 100, "shots": 0,
               "version": 1.0, "file": f"samples-{task}.jsonl"}
        for task, value in values.items()
    }  # fmt: skip
    return {"schema": SCHEMA, "lm_eval": "0", "model": {**facts, **model}, "tasks": tasks}


@pytest.fixture
def three_runs():
    """(mone, moe_total, moe_active); MoNE spends half of moe_total's active operations."""
    loads = {"1": [make_load(10), make_load(20)], "2": [make_load(10), make_load(20)]}
    return [
        make_result("mone", active_flops_per_step=1e12, neuron_load=loads),
        make_result("moe_total"),
        make_result("moe_active", active_flops_per_step=1e12),
    ]


def write_run(folder: Path, steps: int = 4, *, first: int = 1, loss: float = 5.0) -> None:
    """Event file and run.json as a child of the demo writes them, evaluated at the last step."""
    with SummaryWriter(str(folder)) as writer:
        for step in range(first, steps + 1):
            writer.add_scalar("lm loss", loss + 1.0 / step, step)
            writer.add_scalar("mem-max-allocated-bytes", 1000 + step, step)
            if step % 2 == 0:
                writer.add_scalar("iteration-time", 0.25, step)
                writer.add_scalar("mone/executed_tflops_per_rank", 0.02, step)
                writer.add_scalar("mone/active_tflops_per_rank", 0.01, step)
                writer.add_scalar("mone/dead_neurons_layer_1", 3, step)
                writer.add_histogram_raw(
                    "mone/neuron_load_layer_1",
                    min=0.0, max=1.5, num=10, sum=10, sum_squares=10,
                    bucket_limits=list(LIMITS), bucket_counts=[3, 1, 3, 2, 1], global_step=step,
                )  # fmt: skip
        writer.add_scalar("lm loss validation", loss, steps)
    facts = {
        "world_size": 2,
        "tokens_per_step": 64,
        "executed_flops_per_step": 2e9,
        "active_flops_per_step": 1e9,
    }
    (folder / "run.json").write_text(json.dumps(facts))
