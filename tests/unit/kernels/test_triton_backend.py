"""The Triton backend without a GPU: interpreted values and compiled resources.

The interpreter and the compiler each run once, in processes of their own, at the same time. Nothing
here ran on a GPU: values come from the interpreter, registers from the compiler.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from megatron_mone.kernels import BACKENDS, Call, Selection, choose_backend, resolve_backend
from megatron_mone.kernels import triton as triton_backend
from megatron_mone.kernels.triton import self_check
from tests.unit.kernels import triton_interpreter_cases  # noqa: F401  (registers CASES)
from tests.unit.kernels.triton_aot import cases, compiled, digest
from tests.unit.kernels.triton_case_tools import CASES

TABLE = Path(__file__).with_name("triton_aot_table.json")
KEPT = json.loads(TABLE.read_text())
COMPILED = [row for row, _, _ in compiled()]
GEMMS = [name for name in COMPILED if "product" in name or "weight_grad" in name]
GEMMS = [name for name in GEMMS if "fp32" not in name]
DECODE = [name for name in COMPILED if name.startswith("decode_")]
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
        command += ["again"] if module == "triton_aot" else []
        log = (folder / f"{module}.log").open("w+")
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, cwd=Path(__file__).parents[3]
        )
        runs[module] = (process, log, folder / module)
    results = {}
    for module, (process, log, out) in runs.items():
        code = process.wait(timeout=1800)  # a guard: a loaded machine is slow
        log.seek(0)
        assert code == 0, f"{module}: {log.read()[-3000:]}"
        log.close()
        results[module] = json.loads(out.read_text())
    return results


@pytest.mark.parametrize("name", CASES)
def test_interpreted_values(processes, name):
    assert processes["triton_interpreter_cases"][name] == ""


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_spills(name):
    """Spilled registers live on the stack; shared memory must fit a multiprocessor (227 KB)."""
    row = KEPT["kernels"][name]
    assert row["stack"] == 0
    assert row["registers"] <= 255
    assert row["dynamic_shared"] <= (163 if name.endswith("sm_80") else 227) * 1024


@pytest.mark.parametrize("name", GEMMS)
def test_products_use_tensor_cores(name):
    row = KEPT["kernels"][name]
    assert row["tensor_core"] == INSTRUCTION[name.split()[1]]


@pytest.mark.parametrize("name", GEMMS)
def test_operands_come_by_tma(name):
    """Where there is TMA; on sm_80 in pipelined copies of 16 bytes."""
    row = KEPT["kernels"][name]
    if name.endswith("sm_80"):
        assert row["async_copies_16"] > 0
    else:
        assert row["tma_loads"] > 0


@pytest.mark.parametrize("name", DECODE)
def test_products_of_few_rows_are_of_sixteen(name):
    """Rows of the instruction's least height, on every device; operands in pipelined copies of 16
    bytes, whole programs enough for a multiprocessor to have several."""
    row = KEPT["kernels"][name]
    assert row["tensor_core"] == "mma.sync"
    assert row["async_copies_16"] > 0
    assert 3 * row["dynamic_shared"] <= 163 * 1024
    assert 3 * 32 * row["warps"] * row["registers"] <= 65_536


def test_table_is_of_these_kernels():
    """Rewrite it with tests.unit.kernels.triton_aot after a change of theirs."""
    assert KEPT["kernels"].keys() == set(COMPILED)
    found = {name: digest(*given) for name, given in cases().items()}
    assert {row: KEPT["kernels"][row]["of"] for row in COMPILED} == {
        row: found[name] for row, name, _ in compiled()
    }


def test_table_is_the_compilers_answer(processes):
    now = processes["triton_aot"]
    if KEPT["triton"] != now["triton"]:
        pytest.skip(f"the table is triton {KEPT['triton']}'s, this is {now['triton']}")
    for row, answer in now["kernels"].items():
        assert KEPT["kernels"][row] == answer, row


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
        "from megatron_mone.kernels.triton import available, masked_experts\n"
        "assert not available()[0]\n"
        "from megatron_mone.kernels import BACKENDS\n"
        "assert 'not run on a GPU yet' in BACKENDS['triton'].note"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


def test_a_device_that_passed_is_remembered(monkeypatch, tmp_path):
    """Between processes, by device and versions, and by what was checked; a fault is not."""
    cuda, facts = torch.device("cuda", 0), {"device": "H100", "versions": ["2.11"]}
    answers, asked = [None, "kernel select is wrong", None, None], []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(self_check, "_facts", lambda device: dict(facts))
    monkeypatch.setattr(
        self_check, "_first_wrong", lambda *call: (asked.append(call), answers[len(asked) - 1])[1]
    )

    def of_a_new_process(dtype, compare=self_check.comparisons):
        return self_check._fault.__wrapped__(cuda, dtype, compare)

    assert [of_a_new_process(torch.bfloat16) for _ in range(2)] == [None, None]
    assert len(asked) == 1
    assert of_a_new_process(torch.float32) == "kernel select is wrong"
    assert of_a_new_process(torch.float32) is None
    of_a_new_process(torch.bfloat16, self_check.block_comparisons)
    assert len(asked) == 4
    facts["versions"] = ["2.12"]
    answers.append("kernel gate_product is wrong")
    assert of_a_new_process(torch.bfloat16) == "kernel gate_product is wrong"


@pytest.mark.parametrize("fault", [None, "kernel select is wrong on H100"])
def test_auto_takes_it_on_a_gpu_after_its_check(monkeypatch, fault):
    """And says why not where the check finds a fault; by name it is not checked."""
    triton = BACKENDS["triton"]
    checked = []
    doubt = lambda call: (checked.append(call.device), fault)[1]  # noqa: E731
    usable = replace(triton, why_not=lambda call: None, doubt=doubt)
    monkeypatch.setitem(BACKENDS, "triton", usable)
    assert choose_backend("triton", Call(device="cuda")).backend is usable
    assert not checked
    chosen = choose_backend("auto", Call(device="cuda"))
    assert checked == ["cuda"]
    if fault is None:
        assert chosen.backend is usable
    else:
        assert chosen.backend.name == "reference"
        assert f"not triton: {fault}" in chosen.reason


def _call():
    x, w = torch.randn(2, 4), torch.randn(1, 8, 4)
    triton_backend.masked_experts(
        x, torch.rand(2), torch.tensor([2]), w, w, w, choose=Selection(2), activation="silu"
    )
