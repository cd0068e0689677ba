"""`block`: times beside losses, who is on the front of both, and where times are from."""

import json
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_mone.reporting.page.results import RunResult
from megatron_mone.studies.catalogue import study_of
from megatron_mone.studies.catalogue.block import (
    DENSE,
    PLANNED,
    PLANNED_SHARE,
    RUN,
    SINGLE,
    front,
    times,
)
from megatron_mone.studies.document import Measure
from megatron_mone.studies.measuring import step_times
from megatron_mone.studies.measuring.step_times import (
    CPU_DENSE,
    CPU_MONE,
    LOAD,
    cpu_experts,
    experts_of,
    planned_steps,
)
from megatron_mone.studies.page import study_page
from megatron_mone.studies.study import Trained
from tests.unit.studies.made_up import made_up

STUDY = study_of("block")
CPU = STUDY.presets["cpu"]
BLOCKS = [1, 2, 8, 16, 32, 64]


def measure(of: str, cell: str, y: list[float], x=(0.0,)) -> Measure:
    return Measure(of=of, cell=cell, seed=0, x=list(x), y=y)


@pytest.fixture
def results():
    """The wider the faster and the worse; dense experts slow and no better than single neurons."""
    cells = STUDY.grid(CPU)
    losses = {
        cell.name: {seed: 4 + n / 100 + seed / 1000 for seed in range(1, 5)}
        for n, cell in enumerate(cells)
    }
    measures = [
        measure(CPU_MONE, SINGLE, [9.0, 8.0, 7.0, 6.0, 5.0, 4.0], BLOCKS),
        measure(CPU_DENSE, SINGLE, [10.0, 4.5], [256.0, 128.0]),
        measure(LOAD, SINGLE, [1.25]),
        *(measure(PLANNED, cell.name, [100.0 - n]) for n, cell in enumerate(cells)),
        *(measure(PLANNED_SHARE, f"B = {block}", [200.0 - block]) for block in BLOCKS),
        *(measure(PLANNED_SHARE, name, [90.0]) for name in DENSE),
        measure(experts_of(PLANNED), "B = 64", [33.0]),
        measure(RUN, SINGLE, [300.0]),
    ]
    return made_up(STUDY, losses, measures=measures)


def test_the_front_is_of_those_that_nothing_beats():
    points = {"slow": (9.0, 1.0), "fast": (1.0, 3.0), "both": (2.0, 1.0), "neither": (3.0, 3.0)}
    assert front(points) == ["fast", "both"]
    assert front({"a": (1.0, 1.0), "b": (1.0, 1.0)}) == ["a", "b"]
    assert front({}) == []


def test_each_time_is_of_its_cell(results):
    same, share, cpu = times(results).values()
    assert [*cpu] == [cell.name for cell in results.cells]
    assert (cpu["B = 8"], cpu[DENSE[0]], cpu[DENSE[1]]) == (7.0, 10.0, 4.5)
    assert (same[SINGLE], same[DENSE[1]]) == (100, 93)
    assert (share["B = 64"], share[DENSE[1]]) == (136, 90)
    few = results.model_copy(update={"cells": results.cells[:2]})
    assert [*times(few)["one CPU core (measured)"]] == ["B = 1", "B = 2"]


def test_the_page_says_who_is_on_which_front(results, tmp_path):
    """Both dense cells lose more than any block here; planned they are the fastest."""
    said = [one for one in STUDY.findings(results) if "None is both faster" in one]
    assert said[0].endswith("; ".join(cell.name for cell in results.cells) + ".")
    assert said[2].endswith("than: B = 1; B = 2; B = 8; B = 16; B = 32; B = 64.")
    page = study_page(STUDY, results, tmp_path)
    assert "not run on a GPU yet" in page
    assert "a load of 1.2 processes" in page
    assert "<td>136</td><td>4</td><td>33</td>" in page  # the row of B = 64
    without = results.model_copy(update={"measures": []})
    assert STUDY.sections(without) == []


def test_what_is_asked_of_the_planner_and_of_the_kernels():
    """Blocks of B, and as many of them of 768 neurons; dense experts of 768 and of half."""
    result = RunResult.__new__(RunResult)
    runs = [Trained(cell, 1, Path("run"), result) for cell in STUDY.grid(CPU)]
    race, *plans = STUDY.tasks(runs, {}, CPU)
    assert race.arguments == {
        "rows": 4096, "hidden": 64, "neurons": 256, "experts": 8, "ratio": 0.25, "blocks": BLOCKS,
        "dense": [256, 128], "seconds": 30.0,
    }  # fmt: skip
    asked = {one.cell: one.arguments["layouts"] for one in plans}
    assert [*asked] == [cell.name for cell in STUDY.grid(CPU)]
    assert asked["B = 16"][PLANNED] == "mone_neuron_block=16"
    for block in BLOCKS[1:]:
        wide = int(asked[f"B = {block}"][PLANNED_SHARE].partition("=")[2])
        assert 192 // wide * wide == 192
        assert 192 // wide == 64 // block
    for cell, layout in zip(DENSE, ("moe_ffn_hidden_size=768", "moe_ffn_hidden_size=384"),
                            strict=True):  # fmt: skip
        assert asked[cell] == {PLANNED: layout, PLANNED_SHARE: layout}
    assert len(STUDY.tasks(runs, {}, STUDY.presets["tiny"])) == 1


def test_a_plan_is_asked_of_the_command_and_its_refusal_is_told(monkeypatch):
    asked = []

    def run(words, **_named):
        layout = words[words.index("--layout") + 1]
        asked.append(layout)
        if layout == "mone_neuron_block=5":
            error = "megatron-mone: error: mone_neuron_block = 5: no"
            return subprocess.CompletedProcess(words, 2, "", f"beside\n{error}\n")
        phases = {"gate GEMM": 1.0, "up/down GEMM": 2.0, "selection": 0.5, "attention": 3.0}
        plan = {"models": [{"step_ms": 7.5, "phases_ms": phases}, {}]}
        Path(words[-1]).write_text(json.dumps(plan))
        return subprocess.CompletedProcess(words, step_times.DOES_NOT_FIT, "", "")

    monkeypatch.setattr(step_times.subprocess, "run", run)
    words = ("moe-30b-a3b-mone-128", 128, "h100-ndr")
    layouts = {"a": "mone_neuron_block=1", "b": "mone_neuron_block=1"}
    found = planned_steps(*words, layouts)
    assert found == [("a", [0], [7.5]), ("a, of it experts", [0], [3.5]),
                     ("b", [0], [7.5]), ("b, of it experts", [0], [3.5])]  # fmt: skip
    assert asked == ["mone_neuron_block=1"]  # planned once
    with pytest.raises(ValueError, match=r"plan --config moe-30b.*mone_neuron_block = 5: no"):
        planned_steps(*words, {"a": "mone_neuron_block=5"})


def test_experts_are_timed_at_each_block_and_width():
    threads = torch.get_num_threads()
    try:
        mone, dense, load = cpu_experts(64, 16, 64, 4, 0.25, [1, 16], [64, 32], 0.0)
    finally:
        torch.set_num_threads(threads)
    assert mone[:2] == (CPU_MONE, [1, 16])
    assert dense[:2] == (CPU_DENSE, [64, 32])
    assert len(mone[2]) == len(dense[2]) == 2
    assert all(value > 0 for value in [*mone[2], *dense[2]])
    assert load[0] == LOAD
