"""`auto` takes the fastest of what was measured nearest to the call, and says which and why."""

import json
import re
import subprocess
import sys

import pytest
import torch

from megatron_mone.kernels import Call, choose_backend, measured, registry
from megatron_mone.kernels.race_results import CellResults
from megatron_mone.kernels.registry import Backend
from tests.unit.benchmarking.conftest import absent_row, make_results, make_row

MACHINE = measured.machine_class("cpu")


@pytest.fixture
def two_backends(monkeypatch):
    """One that claims to run everything, in front of the reference."""
    fast = Backend("fast", why_not=lambda call: None, run=lambda *a, **k: None)
    slow = registry.BACKENDS["reference"]
    monkeypatch.setattr(registry, "BACKENDS", {"fast": fast, "reference": slow})


def write_table(path, monkeypatch, *cells):
    """Cells of (rows per expert, S / F, block, fast ms, reference ms)."""
    names = ("rows_per_expert", "kept_share", "block")
    rows = [
        {"machine": MACHINE, "dtype": "float32", **dict(zip(names, cell, strict=False)),
         "ms": {"fast": cell[3], "reference": cell[4]}}
        for cell in cells
    ]  # fmt: skip
    path.write_text(json.dumps({"cells": rows}))
    monkeypatch.setenv(measured.TABLE_ENV, str(path))
    measured._cells.cache_clear()
    measured._nearest.cache_clear()


CELLS = ((8, 0.25, 1, 2.0, 1.0), (512, 0.25, 1, 5.0, 10.0), (512, 1.0, 1, 12.0, 10.0),
         (512, 0.25, 16, 9.0, 8.0))  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "share", "block", "name"),
    [
        (16, 0.25, 1, "reference"),
        (4000, 0.25, 1, "fast"),
        (4000, 0.0625, 1, "fast"),
        (4000, 0.9, 1, "reference"),
        (4000, 0.25, 16, "reference"),
        (4000, 0.25, 64, "fast"),  # no such block was measured: the first usable one
        (None, None, 1, "fast"),
    ],
)
@pytest.mark.usefixtures("two_backends")
def test_nearest_cell_decides(rows, share, block, name, tmp_path, monkeypatch):
    write_table(tmp_path / "table.json", monkeypatch, *CELLS)
    experts = None if rows is None else 4
    call = Call(rows=rows, experts=experts, kept_share=share, block=block)
    assert choose_backend("auto", call).backend.name == name


@pytest.mark.usefixtures("two_backends")
def test_it_says_what_it_chose_and_why(tmp_path, monkeypatch):
    write_table(tmp_path / "table.json", monkeypatch, *CELLS)
    reason = choose_backend("auto", Call(rows=2048, experts=4, kept_share=0.25)).reason
    assert "512 rows an expert" in reason
    assert "fast 5 ms, reference 10 ms" in reason
    other = choose_backend("auto", Call(dtype=torch.float64, rows=9, experts=1, kept_share=1.0))
    assert "no measurement" in other.reason
    assert "mone_backend = fast" in choose_backend("fast", Call()).reason


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"cells": [{}]}', '{"cells": [{"rows_per_expert": 0, "kept_share": 1, "ms": {}}]}'],
)
@pytest.mark.usefixtures("two_backends")
def test_a_file_that_is_no_table_is_named(text, tmp_path, monkeypatch):
    write_table(tmp_path / "table.json", monkeypatch)
    (tmp_path / "table.json").write_text(text)
    measured._cells.cache_clear()
    with pytest.raises(ValueError, match=r"MONE_KERNEL_TABLE = .* is not a table of kernel times"):
        choose_backend("auto", Call(rows=9, experts=1, kept_share=1.0))


def test_the_choice_can_be_asked_for():
    command = [sys.executable, "-m", "megatron_mone.kernels"]
    said = subprocess.run([*command, "--dtype", "bf16"], check=True, capture_output=True, text=True)
    names = [line.split()[0] for line in said.stdout.splitlines()]
    assert names == [*registry.BACKENDS, "auto"]
    refused = subprocess.run([*command, "--ratio", "2"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "neurons_per_token = 2816" in refused.stderr


def results(**changes):
    config = dict(tokens=4096, experts=8, hidden=64, neurons=128, ratios=[0.25, 1.0], dtype="fp32",
                  routing="balanced", neuron_block=1)  # fmt: skip
    rows = [
        make_row("mone-cpu", 4.0, 0.25),
        make_row("mone-reference", 9.0, 0.25),
        make_row("mone-auto", 4.0, 0.25, same_as="mone-cpu"),
        make_row("mone-cpu", 9.5, 1.0),
        make_row("mone-reference", 9.1, 1.0),
        absent_row("mone-triton", "there is no GPU", 1.0),
        make_row("torch-grouped-mm", 8.0),
    ]
    cell = {"config": {**config, **changes}, "rows_of_experts": [512] * 8, "results": rows}
    return make_results(cells=[CellResults(**cell)])


def test_a_benchmark_becomes_a_table(tmp_path):
    results().write(tmp_path / "results.json")
    command = [sys.executable, "-m", "megatron_mone.kernels", "--table-from",
               str(tmp_path / "results.json"), "--table", str(tmp_path / "table.json")]  # fmt: skip
    subprocess.run(command, check=True)
    command[4] = str(tmp_path / "no.json")
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "no.json" in refused.stderr
    cell, keep_all = json.loads((tmp_path / "table.json").read_text())["cells"]
    assert cell["ms"] == {"cpu": 4.0, "reference": 9.0}
    assert keep_all["ms"] == {"cpu": 9.5, "reference": 9.1}
    assert (cell["machine"], cell["dtype"]) == (MACHINE, "float32")
    assert (cell["rows_per_expert"], cell["kept_share"], cell["block"]) == (512, 0.25, 1)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({}, "has no field 'command'; a benchmark's results come from"),
        ({**results().plain(), "cells": [{}]}, "cells[0]: has no field 'config'; a benchmark's"),
        (results(routing="skewed").plain(), "no backend of ours was measured with balanced"),
    ],
)
def test_results_without_our_backends_are_refused(wrong, told, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(wrong))
    with pytest.raises(ValueError, match=f"^{re.escape(f'{path}: {told}')}.*$"):
        measured.write_table(path, tmp_path / "table.json")
