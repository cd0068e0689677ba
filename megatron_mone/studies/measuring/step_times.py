"""Times beside losses: a step as the planner has it for GPUs, and the CPU kernels' own.

May touch: a child process of the planner, its cache, a temporary folder.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from megatron_mone.common.child_processes import tied
from megatron_mone.common.phases import GATE_GEMM, SELECTION, UP_DOWN_GEMM
from megatron_mone.studies.tasks import Found

DOES_NOT_FIT = 4
_EXPERTS = (GATE_GEMM, SELECTION, UP_DOWN_GEMM)
CPU_MONE = "MoNE's experts of a layer on one CPU core, ms"
CPU_DENSE = "dense experts of a layer on one CPU core, ms"
LOAD = "processes that wanted a core in the minute before"


def planned_steps(
    config: str, gpus: int, cluster: str, layouts: Mapping[str, str]
) -> list[Found]:  # fmt: skip
    """Milliseconds of steps that `megatron-mone plan` predicts, and of the experts' products and
    choice in each; nothing runs on a GPU.

    Args:
        config: of configs/plan.
        gpus: devices of the job.
        cluster: of configs/cluster/hardware.
        layouts: what a step is called -> what differs from the config, as `--layout` takes it.

    Raises:
        ValueError: the planner refused; its line.
    """
    words = ["--config", config, "--gpus", str(gpus), "--cluster", cluster]
    models = {one: _plan([*words, "--layout", one]) for one in dict.fromkeys(layouts.values())}
    found: list[Found] = []
    for name, layout in layouts.items():
        model = models[layout]
        inside = sum(model["phases_ms"].get(phase, 0.0) for phase in _EXPERTS)
        found += [(name, [0], [model["step_ms"]]), (experts_of(name), [0], [inside])]
    return found


def experts_of(step: str) -> str:
    """What the experts' part of a planned step is called."""
    return f"{step}, of it experts"


def _plan(words: Sequence[str]) -> Any:
    """The first model of a plan's document."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "plan.json"
        done = subprocess.run(
            [sys.executable, "-m", "megatron_mone", "plan", *words, "--json", str(file)],
            check=False, capture_output=True, text=True, preexec_fn=tied(),
        )  # fmt: skip
        if done.returncode not in (0, DOES_NOT_FIT):
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise ValueError(f"plan {' '.join(words)}: {last}")
        return json.loads(file.read_text(encoding="utf-8"))["models"][0]


def cpu_experts(
    rows: int, hidden: int, neurons: int, experts: int, ratio: float, blocks: Sequence[int],
    dense: Sequence[int], seconds: float,
) -> list[Found]:  # fmt: skip
    """Milliseconds of one layer's experts forward and backward, fp32, on one core.

    All run once a round, in an order that rotates, so that a busy moment meets all alike; the
    median of the rounds is kept.

    Args:
        rows: N, split evenly over the experts.
        hidden, neurons, experts: H, F, E.
        ratio: r of the layers that choose.
        blocks: B of each.
        dense: F of each dense layer, run by torch's grouped_mm.
        seconds: time for all rounds.

    Returns:
        Of MoNE at B, of dense experts at F, and how busy the machine was.
    """
    import torch

    from megatron_mone.benchmarking.adapters import MoNE, TorchGroupedMM
    from megatron_mone.benchmarking.adapters.base import Adapter
    from megatron_mone.benchmarking.cases import Cell, make_inputs
    from megatron_mone.benchmarking.timing import Call, race

    torch.set_num_threads(1)

    def timed(adapter: Adapter, cell: Cell) -> dict[str, Call]:
        cell.check()
        inputs = make_inputs(cell, torch.device("cpu"))
        built = adapter.build(cell, inputs)
        x_NH, probs_N = inputs.leaves()
        wanted = [x_NH, probs_N, *built.parameters]

        def step() -> object:
            return torch.autograd.grad(built.forward(x_NH, probs_N), wanted, inputs.dy_NH)

        return {"step": step}

    cell_of = partial(Cell, tokens=rows, hidden=hidden, experts=experts)
    entries = [
        timed(MoNE("auto", ratio),
              cell_of(neurons=neurons, ratios=(ratio,), neuron_block=block))
        for block in blocks
    ]  # fmt: skip
    entries += [timed(TorchGroupedMM(), cell_of(neurons=one, ratios=())) for one in dense]
    medians = [each["step"].median for each in race(entries, seconds=seconds, least=10)]
    return [
        (CPU_MONE, blocks, medians[: len(blocks)]), (CPU_DENSE, dense, medians[len(blocks) :]),
        (LOAD, [0], [os.getloadavg()[0]]),
    ]  # fmt: skip
