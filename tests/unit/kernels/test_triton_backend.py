"""The Triton backend without a GPU: interpreted values, compiled resources, modelled costs.

The interpreter and the compiler each run once, in processes of their own, at the same time. Nothing
here ran on a GPU: values come from the interpreter, registers from the compiler, seconds from a
model.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from megatron_mone.kernels import Selection, resolve_backend
from megatron_mone.kernels import triton as triton_backend
from megatron_mone.kernels.triton import unstructured
from tests.unit.kernels import triton_interpreter_cases  # noqa: F401  (registers CASES)
from tests.unit.kernels import triton_limits as limits
from tests.unit.kernels.triton_aot import ARCHITECTURES, cases
from tests.unit.kernels.triton_case_tools import CASES
from tests.unit.kernels.triton_limits import Cost, Shape

TABLE = Path(__file__).with_name("triton_aot_table.json")
COMPILED = [f"{name} sm_{number}" for name in cases() for number in ARCHITECTURES]
GEMMS = [name for name in COMPILED if name.startswith("block_")]
LOOPED_GEMMS = [name for name in GEMMS if "expand" not in name]
INSTRUCTION = {"sm_80": "mma.sync", "sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """{module: its JSON}, both started before either is waited for."""
    folder = tmp_path_factory.mktemp("triton")
    runs = {}
    for module, extra in (
        ("triton_interpreter_cases", {"TRITON_INTERPRET": "1"}),
        ("triton_aot", {"TRITON_CACHE_DIR": str(folder / "cache")}),
    ):
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | extra
        command = [sys.executable, "-m", f"tests.unit.kernels.{module}", str(folder / module)]
        log = (folder / f"{module}.log").open("w+")
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[3]
        )
        runs[module] = (process, log, folder / module)
    results = {}
    for module, (process, log, out) in runs.items():
        code = process.wait(timeout=600)
        log.seek(0)
        assert code == 0, f"{module}: {log.read()[-3000:]}"
        log.close()
        results[module] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("name", CASES)
def test_interpreted_values(processes, name):
    assert processes["triton_interpreter_cases"][name] == ""


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(processes, name):
    """Spilled registers live on the stack; shared memory must fit a multiprocessor (227 KB)."""
    row = processes["triton_aot"]["kernels"][name]
    assert row["stack"] == 0
    assert row["registers"] <= 255
    assert row["dynamic_shared"] <= (163 if name.endswith("sm_80") else 227) * 1024


@pytest.mark.parametrize("name", GEMMS)
def test_products_use_tensor_cores(processes, name):
    row = processes["triton_aot"]["kernels"][name]
    assert row["tensor_core"] == INSTRUCTION[name.split()[1]]


@pytest.mark.parametrize("name", LOOPED_GEMMS)
def test_loads_are_pipelined_in_16_byte_copies(processes, name):
    """They are when F, S and H are known to be multiples of 16, as the launcher tells Triton."""
    assert processes["triton_aot"]["kernels"][name]["async_copies_16"] > 0


def test_table_is_of_this_source(processes):
    """The kept table is the compiler's answer; rewrite it with tests.unit.kernels.triton_aot."""
    kept, now = json.loads(TABLE.read_text()), processes["triton_aot"]
    assert kept["kernels"].keys() == now["kernels"].keys()
    if kept["triton"] != now["triton"]:
        pytest.skip(f"the table is triton {kept['triton']}'s, this is {now['triton']}")
    assert kept == now


def test_without_triton(monkeypatch):
    """The package imports without triton; using it says what is missing."""
    monkeypatch.setitem(sys.modules, "triton", None)
    usable, reason = triton_backend.available()
    assert not usable
    assert "pip install triton" in reason
    with pytest.raises(RuntimeError, match="the triton package is missing"):
        _call()
    with pytest.raises(ValueError, match="'triton' cannot run here: the triton package is missing"):
        resolve_backend("triton", device="cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_device():
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        _call()
    with pytest.raises(ValueError, match="'triton' cannot run here: triton needs a CUDA device"):
        resolve_backend("triton")


def test_package_imports_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "from megatron_mone.kernels.triton import available, masked_grouped_mlp\n"
        "assert not available()[0]\n"
        "from megatron_mone.kernels import BACKENDS\n"
        "assert not BACKENDS['triton'].automatic and 'GPU' in BACKENDS['triton'].note"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def _call():
    x, w = torch.randn(2, 4), torch.randn(1, 8, 4)
    triton_backend.masked_grouped_mlp(
        x, torch.rand(2), [2], w, w, w, choose=Selection(2), activation="silu"
    )


# The model of an H100: what backend.py and blocks.py say of it. Not measured.

SMALL = Shape(rows=4096, hidden=2048, neurons=1408, kept=352, experts=8)
LARGE = Shape(rows=16384, hidden=2048, neurons=1408, kept=256, experts=8, block=128)


def test_model_by_hand():
    """Two of the formulas written out."""
    cost = limits.select(SMALL)
    assert cost.bytes == 4096 * (1408 * 2 + 352 * 2 + 352 * 2)
    assert cost.integer == 30 * 4096 * 1408
    assert limits.dense_product(SMALL) == Cost(
        bytes=2 * (4096 * 2048 + 8 * 1408 * 2048 + 4096 * 1408), tensor=2 * 4096 * 1408 * 2048
    )
    assert limits.dense_product(SMALL).bound == "tensor"
    assert Cost(bytes=3_350_000).seconds == pytest.approx(1e-6)


def test_model_of_unstructured_training():
    """Dense products dominate: the masked expert costs more time than the dense one, by < 30%."""
    for seconds in (limits.forward_seconds(SMALL), limits.backward_seconds(SMALL)):
        assert 1.0 < seconds["unstructured"] / seconds["dense expert"] < 1.3


@pytest.mark.parametrize(("rows", "pays"), [(1, True), (2, True), (8, False), (64, False)])
def test_model_of_decoding(rows, pays):
    """Gathering pays below F / S rows of one expert, as the backend decides."""
    shape = Shape(rows=rows, hidden=4096, neurons=14336, kept=3584, experts=1)
    seconds = limits.forward_seconds(shape)
    assert (seconds["gathered"] < seconds["dense expert"]) is pays
    assert unstructured.gathering_pays([rows], 3584, 14336) is pays


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_model_of_blocks(block):
    """Gathered rows and partial sums cost more than they save, but for a wide block's backward."""
    shape = Shape(LARGE.rows, LARGE.hidden, LARGE.neurons, LARGE.kept, LARGE.experts, block)
    forward, backward = limits.forward_seconds(shape), limits.backward_seconds(shape)
    assert forward["blocks"] > forward["dense expert"]
    assert (backward["blocks"] < backward["dense expert"]) is (block == 128)


def test_printed_table_says_that_it_is_a_model():
    """Each shape with its routes, in microseconds of the formulas above."""
    text = limits.table()
    assert "model, not measured" in text.splitlines()[0]
    for name, shape in limits.SHAPES.items():
        part = text.split(f"{name}: ")[1].split("\n\n")[0]
        rows = [line.split() for line in part.splitlines()[2:]]
        seconds = {"forward": limits.forward_seconds(shape)}
        seconds["backward"] = limits.backward_seconds(shape)
        for which, *route, microseconds, ratio in rows:
            times = seconds[which]
            assert float(microseconds) == pytest.approx(times[" ".join(route)] * 1e6, abs=0.05)
            want = times[" ".join(route)] / times["dense expert"]
            assert float(ratio) == pytest.approx(want, abs=0.005)
        assert ("gathered" in part) is ("decoding" in name)
        assert ("blocks" in part) is (shape.block > 1)
        assert ("backward" in part) is ("decoding" not in name)
