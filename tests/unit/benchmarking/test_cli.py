"""The command line: the promised file, resuming, and one line for a mistake."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mone.benchmarking import grid
from megatron_mone.benchmarking.cases import Cell
from megatron_mone.commands import bench
from megatron_mone.kernels.race_results import CellFile, RaceResults
from tests.unit.benchmarking.conftest import make_cell

ROOT = Path(__file__).parents[3]
TINY = ["--tokens", "16", "--hidden", "32", "--neurons", "64", "--experts", "4", "--ratio", "1/4",
        "--dtype", "fp32", "--seconds", "0.01", "--repeats", "2", "--threads", "1"]  # fmt: skip
PROMISED = {"name", "available", "forward_ms", "forward_backward_ms", "saved_bytes", "peak_bytes",
            "ratio_to_best_dense"}  # fmt: skip


def test_one_cell_writes_the_promised_file(tmp_path):
    path = tmp_path / "new" / "cell.json"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "tools/bench_experts.py", *TINY, "--json", str(path)], cwd=ROOT,
        capture_output=True,
        text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(path.read_text())
    assert CellFile.read(path, "race again").plain() == content
    assert content["config"]["tokens"] == 16
    assert content["config"]["ratio"] == 0.25
    rows = {row["name"]: row for row in content["results"]}
    assert all(row.keys() >= PROMISED for row in content["results"])
    assert {"megatron-sequential", "torch-grouped-mm", "mone-reference", "mone-auto"} <= rows.keys()
    dense = [r for r in rows.values() if r["dense"] and r["available"]]
    assert min(r["ratio_to_best_dense"] for r in dense) == 1.0
    # a and u of the kept neurons, and their indices, of 16 rows; the reference keeps all
    if rows["mone-auto"]["same_as"] == "mone-cpu":
        assert rows["mone-cpu"]["saved_bytes"] == 16 * 16 * (4 + 4 + 2) + 17 * 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--tokens", "0"], "--tokens 0 is not allowed: it must be at least 1"),
        (["--ratio", "0.3"], "--ratio 0.3 is not allowed"),
        (["--ratio", "2"], "--ratio 2.0 is not allowed"),
        (["--ratio", "a"], "argument --ratio: 'a' is not a number like 0.25 or 1/4"),
        (["--dtype", "fp8"], "--dtype fp8 is not allowed: it must be one of fp32, bf16"),
        (["--routing", "even"], "--routing even is not allowed"),
        (["--hidden", "30"], "--hidden 30 is not allowed: it must be a multiple of 4"),
        (["--neurons", "1408", "--neuron-block", "3"],
         "--neuron-block 3 is not allowed: it must be a divisor of --neurons 1408"),
        (["--neurons", "64", "--ratio", "1/16", "--neuron-block", "8"],
         "blocks of 8 neurons, and it is 4 of --neurons 64: 8/64 keeps 8"),
        (["--tokens", "8", "--grid", "quick"], "--tokens asks for one cell"),
        (["--threads", "0"], "--threads 0 is not allowed"),
        (["--repeats", "0"], "--repeats 0 is not allowed"),
        (["--seconds", "0"], "--seconds 0 is not allowed"),
        (["--grid", "quick", "--minutes", "0"], "--minutes 0 is not allowed"),
        (["--tokens", "8", "--minutes", "1"], "--minutes 1 stops a grid: drop it for one cell"),
        (["--instructions", "sse2"], "argument --instructions: 'sse2' is not one of"),
        (["--json", "FILE/cell.json"], "cannot be written"),
        (["--out", "FILE/bench"], "cannot be written"),
        (["--json", "."], "is a folder"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, capsys, words, told):
    (tmp_path / "file").touch()
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    with pytest.raises(SystemExit) as stopped:
        bench.main(["experts", *words])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert told in error
    assert error.count("\n") == 1


def test_an_interrupted_grid_says_how_to_go_on_and_then_does(tmp_path, capsys, monkeypatch):
    cells = [Cell(n, 32, 64, 4, (0.5, 0.25)) for n in (8, 64)]
    done: list[int] = []

    def race(cell, device, *, seconds, repeats, why_out):
        if done == [8]:
            done.append(0)
            raise KeyboardInterrupt
        done.append(cell.tokens)
        return make_cell(cell.tokens, cell.dtype, {0.5: 4.0, 0.25: 2.0}).results

    monkeypatch.setitem(grid.GRIDS, "quick", lambda block: cells)
    monkeypatch.setattr(grid, "run_cell", race)
    monkeypatch.setattr(grid, "measure_parts", lambda repeats: [])
    words = ["--grid", "quick", "--out", str(tmp_path)]
    assert bench.main(["experts", *words]) == 130
    assert "run the same command again to go on" in capsys.readouterr().err
    assert bench.main(["experts", *words]) == 0
    output = capsys.readouterr().out
    assert "going on: 1 of 2 cells were measured before" in output
    assert done == [8, 0, 64]
    results = json.loads((tmp_path / "results.json").read_text())
    assert RaceResults.read(tmp_path / "results.json", "race again").plain() == results
    assert len(results["cells"]) == 2
    assert str(tmp_path) not in (tmp_path / "report.md").read_text()
