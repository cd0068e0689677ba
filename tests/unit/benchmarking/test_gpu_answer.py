"""The script of the first GPU, in Triton's interpreter at toy size: nothing here ran on a GPU.

One run of all sections in a process that cannot import megatron-core serves most tests. Its second
half is cut, and has a section that fails.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from megatron_mone.benchmarking.gpu_answer import float64, plan, report, sections
from megatron_mone.benchmarking.gpu_answer.carry import PACKAGES, carry
from megatron_mone.benchmarking.gpu_answer.sections.gaps import busy_and_span
from megatron_mone.benchmarking.gpu_answer.sections.kernels import facts
from megatron_mone.commands.app import main
from megatron_mone.common.places import ROOT
from megatron_mone.kernels import measured
from megatron_mone.kernels.gpu_answer_results import AGAIN, GpuAnswer, KernelTime, LaunchFacts
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.fitting import kernel_points

BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "megatron":
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
"""
ALL = "from megatron_mone.commands.gpu_answer import main\nsys.exit(main(sys.argv[1:]))\n"
# The second: sections that fail, die, hang, and one after them.
ODD = """
import os, time
from megatron_mone.benchmarking.gpu_answer import plan, sections
from megatron_mone.kernels.gpu_answer_results import Check
def fails(plan, device, book):
    book.add(Check(name="one", passed=True, words=""))
    raise ValueError("of its own\\naccord")
def dies(plan, device, book):
    os.abort()
def hangs(plan, device, book):
    book.add(Check(name="before", passed=True, words=""))
    time.sleep(600)
def passes(plan, device, book):
    book.note("ran")
for name, section in zip(
    list(sections.SECTIONS), (fails, dies, hangs, passes, passes, hangs, passes)
):
    sections.SECTIONS[name] = section
    plan.SHARES[name] = {"kernels": 0.003, "decode": 0.0006}.get(name, 1.0)
"""


def start(code: str, *words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        [sys.executable, "-c", code, "--toy", *words], env=environment, cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str]:
    """Folder and output of a whole run without megatron-core."""
    out = tmp_path_factory.mktemp("answer")
    process = start(BLOCKED + ALL, "--out", str(out))
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return out, said


@pytest.fixture
def answer(run) -> GpuAnswer:
    return GpuAnswer.read(run[0] / "answer.json", AGAIN)


def test_all_sections_are_there(answer):
    assert [one.name for one in answer.sections] == list(plan.SHARES)
    assert {one.state for one in answer.sections} == {"done"}
    assert answer.interpreter
    assert answer.machine_class == "interpreter"
    assert answer.section("machine").peaks.keys() == {"copy bytes/s", "bf16 flops/s"}


def test_every_kernel_agrees_with_float64(answer):
    rows = answer.section("agreement").agreements
    numbers = {name.split()[0] for name in (row.kernel for row in rows)}
    assert numbers == {*(f"K{k}" for k in range(9)), "D1", "D3"}
    assert all(row.agrees and row.same_bits for row in rows)


def test_kernels_have_the_planners_numbers(answer):
    rows = answer.section("kernels").kernels
    gate = next(row for row in rows if row.kernel == "K1 gate")
    x, w, a = 2 * 16, 2 * 32 * 16, 2 * 32
    assert (gate.flops, gate.bytes) == (2 * 2 * 16 * 32, 2 * (x + w + a))
    dh = next(row for row in rows if row.kernel == "K6 dh")
    assert [one.kernel.partition(".")[2] for one in dh.launches] == [
        "dh_product", "probability_grad",
    ]  # fmt: skip
    assert any(row.kernel.startswith("torch grouped_mm") for row in rows)


def test_layers_decode_and_waits_are_there(answer):
    names = {row.name for row in answer.section("layers").layers}
    assert {"dense", "mone"} <= names
    assert "mone 2:4 S 16, B 1" in " ".join(answer.section("layers").notes)  # which says why not
    decode = answer.section("decode")
    assert {row.block for row in decode.layers} == {1, 8}
    shares = [float(share) for share in decode.facts.values()]
    assert len(shares) == 2
    assert all(share == 0.5 for share in shares)  # a row an expert at r = 1/4: (1 + 2 r) / 3
    checks = answer.section("waits").checks
    assert all(check.passed is None for check in checks)  # they need a GPU
    assert "gpu" in " ".join(answer.section("gaps").notes).lower()


def test_the_report_says_what_it_is_of(run):
    text = (run[0] / "report.md").read_text(encoding="utf-8")
    assert "interpreter, not a GPU" in text
    for title in report._TITLES.values():
        assert f"## {title}\n" in text


def test_times_of_the_interpreter_make_no_table(run, tmp_path, capsys):
    with pytest.raises(ValueError, match="interpreter = true"):
        measured.write_table(run[0] / "answer.json", tmp_path / "table.json")
    words = ["plan", "--calibrate", str(run[0] / "answer.json"), "--json", str(tmp_path / "e.json")]
    with pytest.raises(SystemExit):
        sys.exit(main(words))
    assert "interpreter = true" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_fails_dies_or_hangs_stops_no_other(tmp_path):
    """And a cut leaves what was there before."""
    process = start(BLOCKED + ODD + ALL, "--out", str(tmp_path), "--seconds", "9000")
    said, _ = process.communicate(timeout=100)
    assert process.returncode == 1, said
    found = GpuAnswer.read(tmp_path / "answer.json", AGAIN)
    states = [one.state for one in found.sections]
    assert states == ["failed", "failed", "cut", "done", "done", "cut", "done"]
    fails, dies, hangs, *_ = found.sections
    assert fails.error is not None
    assert fails.error.startswith("ValueError: of its own accord")
    assert dies.error == f"its process ended with status -{int(signal.SIGABRT)}"
    assert [one.name for one in (*fails.checks, *hangs.checks)] == ["one", "before"]
    assert "its share of the time" in str(hangs.error)
    assert "ValueError: of its own accord" in (tmp_path / "report.md").read_text()


def test_a_stop_leaves_what_is_there(tmp_path):
    process = start(BLOCKED + ODD + ALL, "--out", str(tmp_path), "--seconds", "900000")
    file = tmp_path / "sections" / "kernels.json"
    while not (file.exists() and "before" in file.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    found = GpuAnswer.read(tmp_path / "answer.json", AGAIN)
    assert [one.state for one in found.sections[:4]] == ["failed", "failed", "cut", "not started"]
    assert [one.name for one in found.section("kernels").checks] == ["before"]
    assert found.section("kernels").error == "the run was stopped"


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if torch.cuda.is_available():
        pytest.skip("has a CUDA device")
    for words, said in (
        (["gpu-answer", "--out", "nowhere"], "needs a CUDA device"),
        (["gpu-answer", "--seconds", "0"], "--seconds 0 is not allowed"),
    ):
        with pytest.raises(SystemExit):
            sys.exit(main(words))
        assert said in capsys.readouterr().err


def measured_answer(answer: GpuAnswer, **changes) -> GpuAnswer:
    """As if a GPU had said it."""
    facts = {"interpreter": False, "machine_class": "sm_90", "device": "NVIDIA H100 80GB HBM3"}
    return answer.model_copy(update=facts | changes)


def test_a_gpus_answer_becomes_cells_beside_those_of_other_machines(answer, tmp_path):
    path, table = tmp_path / "answer.json", tmp_path / "table.json"
    measured_answer(answer).write(path)
    other = {"machine": "avx2", "dtype": "float32", "rows_per_expert": 8.0, "kept_share": 0.5,
             "block": 1, "ms": {"cpu": 1.0}}  # fmt: skip
    old = {**other, "machine": "sm_90"}
    table.write_text(json.dumps({"cells": [other, old]}))
    cells = measured.write_table(path, table)
    found = measured.KernelTable.read(table, AGAIN).cells
    assert len(found) == cells
    assert found[0].plain() == other
    assert {cell.machine for cell in found[1:]} == {"sm_90"}
    assert {(cell.block, cell.kept_share) for cell in found[1:]} == {(1, 0.25), (8, 0.25)}
    rows = {row.block: row for row in answer.layers if row.name == "mone" and not row.nan_check
            and row.forward_backward_ms is not None}  # fmt: skip
    assert found[1].ms == {"triton": rows[1].forward_backward_ms}


def test_a_gpus_answer_becomes_an_efficiency(answer, tmp_path, capsys):
    """Kernels that take 1.6 times what the bandwidth allows: the curve found says so."""

    def kernel(size: int) -> KernelTime:
        launches = [
            LaunchFacts(
                kernel="selection.rebuild",
                reads=[[16384, 44]],
                writes=[[16384, 44]],
                dtype="int32",
                bytes_read=size,
                bytes_written=0,
                flops=0,
            )
        ]
        return KernelTime(
            rows=16384, experts=8, hidden=2048, neurons=1408, kept=352, dtype="bf16",
            kernel="K2 rebuild", ms=size / 3.352e12 * 1.6e3, launches=launches,
        )  # fmt: skip

    timed = answer.section("kernels").model_copy(
        update={"kernels": [kernel(10**9 * n) for n in (1, 2, 4)]}
    )
    others = [one for one in answer.sections if one.name != "kernels"]
    path, out = tmp_path / "answer.json", tmp_path / "efficiency.json"
    measured_answer(answer, sections=[*others, timed]).write(path)
    words = ["plan", "--calibrate", str(path), "--cluster", "h100-ndr", "--json", str(out)]
    assert main(words) == 0
    found = Efficiency.read(out)
    assert found.curves["memory"].bandwidth_share == pytest.approx(1 / 1.6, rel=0.02)
    assert found.kernel_seconds == Efficiency().kernel_seconds
    assert "fitted to 3 kernels of NVIDIA H100 80GB HBM3" in found.source
    assert "K2 rebuild" in capsys.readouterr().out
    measured_answer(answer, device="NVIDIA A100", sections=[*others, timed]).write(path)
    with pytest.raises(SystemExit):
        sys.exit(main(words))
    assert "was measured on NVIDIA A100" in capsys.readouterr().err


def test_a_bare_machine_gets_what_it_lacks(tmp_path):
    """The folder alone is enough: what it names is imported from there."""
    size = carry(tmp_path / "carried")
    assert size < 32 << 20
    code = (
        "import pydantic, typer\nfrom megatron_mone.benchmarking.gpu_answer import conduct\n"
        "for one in (pydantic, typer, conduct): assert 'carried' in one.__file__, one.__file__"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "carried", check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "carried")},
    )  # fmt: skip
    assert "pydantic-core" in PACKAGES
    with pytest.raises(ValueError, match="has files: name a new folder"):
        carry(tmp_path / "carried")


def test_sections_have_shares_and_titles():
    assert sections.SECTIONS.keys() == plan.SHARES.keys() == report._TITLES.keys()


def test_full_plan_is_what_was_asked():
    """Six shapes, E 8 and 64, H 2048 and 7168, r 1/2 to 1/16, blocks that divide."""
    full = plan.FULL
    assert len(full.agree) == 6
    assert {(s.experts, s.hidden) for s in full.timed} == {
        (8, 2048), (64, 2048), (8, 7168), (64, 7168),
    }  # fmt: skip
    assert full.ratios == (1 / 2, 1 / 4, 1 / 8, 1 / 16)
    for shape in full.layers:
        made = list(sections.layers.variants(full, shape, reference=False))
        assert len(set(made)) == len(made)
        for variant in made:
            assert shape.neurons % variant.block == variant.kept % variant.block == 0
        quarter = plan.kept_of(shape, 1 / 4)
        assert {128, quarter // 2, quarter} <= {variant.block for variant in made}


def test_a_wrong_result_is_seen():
    one = torch.ones(4)
    assert float64.off(one * 1.5, one) == 0.5
    assert float64.off(one, torch.zeros(4)) == 2.0
    assert math.isnan(float64.off(one * math.nan, one))
    assert math.isnan(float64.same(one, one * 2))
    assert float64.same(one, torch.ones(4, dtype=torch.int64)) == 0.0


@pytest.mark.parametrize(
    ("spans", "wanted"),
    [([], (0.0, 0.0)), ([(5, 7)], (2, 2)), ([(0, 4), (2, 6), (9, 10)], (7, 10)),
     ([(0, 9), (1, 2), (3, 4)], (9, 9))],
)  # fmt: skip
def test_busy_time_counts_what_overlaps_once(spans, wanted):
    assert busy_and_span(spans) == wanted


def test_facts_are_of_launches_that_do_not_run():
    """Recorded on a machine without GPU and interpreter."""
    from megatron_mone.kernels.triton import row_map

    made = facts(lambda: row_map.row_map(torch.tensor([2, 1]), 3))
    assert [(one.kernel, one.flops) for one in made] == [("row_map.row_map", 0)]
    assert made[0].bytes_read == 2 * 8
    assert made[0].bytes_written == 4 * (3 + 3 + 3 + 3)
    assert made[0].writes == [[3], [3], [3], [3]]


def test_a_launch_is_the_planners_operation(answer):
    """Of a real launch's facts: the shapes by which the planner costs the same launch."""
    rows = {row.kernel: row for row in answer.section("kernels").kernels if row.launches}

    def operations(name: str):
        return list(kernel_points._phase(rows[name]).operations)

    for name, sizes in (
        ("K1 gate", (1, 32, 16)), ("K4 down", (1, 16, 32)), ("K7 dx", (1, 16, 64)),
        ("K8 into main_grad", (32, 16, 1)),
    ):  # fmt: skip
        (one,) = operations(name)
        kind = "grouped_wgrad" if name.startswith("K8") else "grouped_gemm"
        assert (one.kind, one.dtype) == (kind, "bf16")
        assert (one.rows, one.columns, one.depth) == sizes, name
        assert (one.flops, one.bytes) == (rows[name].flops, rows[name].bytes)
    assert [one.kind for one in operations("K2 select")] == ["selection"]
    assert [one.kind for one in operations("K6 dh")] == ["grouped_gemm", "memory"]
