"""install(), the command line, and the parts that need no ranks."""

import subprocess
import sys
import time

import pytest
import torch

from megatron_mone.cpu_emulation import install as install_emulation
from megatron_mone.cpu_emulation import memory, optimizer, rng
from megatron_mone.cpu_emulation.context_parallel import causal_mask, zigzag_positions
from megatron_mone.cpu_emulation.device import cpu_for


def run_python(*arguments, **kwargs):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, **kwargs
    )


def test_refuses_on_cuda(monkeypatch):
    module = sys.modules["megatron_mone.cpu_emulation.install"]
    monkeypatch.setattr(module, "_installed", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    empty = torch.empty
    with pytest.raises(RuntimeError, match="refuses to install") as error:
        install_emulation()
    assert "\n" not in str(error.value)
    assert torch.empty is empty
    assert not module.is_installed()


SCRIPT = """
import sys
import torch
assert __name__ == "__main__"
import neighbour
print("ARGUMENTS", sys.argv[1:], torch.zeros(1, device="cuda").device, torch.cuda.is_available())
"""


def test_command_runs_a_script(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "neighbour.py").write_text("")
    done = run_python("-m", "megatron_mone.cpu_emulation", str(tmp_path / "script.py"), "--a", "1")
    assert "ARGUMENTS ['--a', '1'] cpu False" in done.stdout, done.stderr


def test_command_runs_a_module_after_which_install_is_idempotent(tmp_path):
    (tmp_path / "some_module.py").write_text(
        "import torch\n"
        "from megatron_mone.cpu_emulation import install, is_installed\n"
        "before = torch.empty\n"
        "install()\n"
        "print('MODULE', is_installed(), torch.empty is before)\n"
    )
    import os

    paths = os.pathsep.join([str(tmp_path), *(p for p in sys.path if p)])
    done = run_python(
        "-m",
        "megatron_mone.cpu_emulation",
        "-m",
        "some_module",
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert "MODULE True True" in done.stdout, done.stderr


def test_command_without_a_script_prints_usage():
    done = run_python("-m", "megatron_mone.cpu_emulation")
    assert done.returncode != 0
    assert "usage" in done.stderr


AFTER_IMPORT = """
import megatron.core.tensor_parallel.mappings
from megatron.training import training
from megatron_mone.cpu_emulation import install
install()
from megatron.training import initialize
from megatron.core.jit import jit_fuser
assert training.initialize_megatron is initialize.initialize_megatron
calls = []
fused = jit_fuser(lambda x: x + len(calls.append(1) or calls))
import torch
assert fused(torch.zeros(1)).item() == 1 and fused(torch.zeros(1)).item() == 2, "compiled"
print("DONE")
"""


def test_install_after_megatron_was_imported():
    done = run_python("-c", AFTER_IMPORT)
    assert "DONE" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cuda", "cpu"),
        ("cuda:3", "cpu"),
        (2, "cpu"),
        (torch.device("cuda", 1), "cpu"),
        ("meta", "meta"),
        (torch.device("meta"), "meta"),
    ],
)
def test_cpu_for(device, expected):
    assert str(cpu_for(device)) == expected


def test_cpu_for_passes_dtypes_and_none():
    assert cpu_for(torch.float32) is torch.float32
    assert cpu_for(None) is None


def test_memory_peak_sees_an_allocation():
    memory.reset_peak()
    before = memory.peak_resident_bytes()
    block = torch.ones(64 * 2**20 // 4)
    assert memory.resident_bytes() > 0
    assert memory.peak_resident_bytes() - before > 32 * 2**20
    stats = memory.memory_stats()
    assert stats["allocated_bytes.all.peak"] >= stats["allocated_bytes.all.current"] > 0
    del block


def test_host_generator_keeps_two_states_apart(monkeypatch):
    monkeypatch.setattr(rng, "_host_state", None)
    torch.manual_seed(5)
    expected = [torch.rand(1).item() for _ in range(4)]
    torch.manual_seed(5)
    device, host = [], []
    for _ in range(2):
        device.append(torch.rand(1).item())
        with rng.host_generator():
            host.append(torch.rand(1).item())
    assert device == expected[:2]
    assert host == expected[1:3]


def test_filled_adam_state_is_the_state_before_a_first_update():
    results = []
    for fill in (False, True):
        weight = torch.nn.Parameter(torch.arange(4.0))
        adam = torch.optim.AdamW([weight], lr=0.1)
        if fill:
            optimizer.fill_state(adam)
        for _ in range(2):
            weight.grad = torch.ones(4) * 0.5
            adam.step()
        results.append(weight.detach().clone())
    assert torch.equal(*results)


def test_zigzag_positions_and_mask():
    assert zigzag_positions(8, 2, 0).tolist() == [0, 1, 6, 7]
    assert zigzag_positions(8, 2, 1).tolist() == [2, 3, 4, 5]
    mask = causal_mask(torch.tensor([1, 3]), 4)
    assert mask.tolist() == [[[[False, False, True, True], [False, False, False, False]]]]
    with pytest.raises(ValueError, match="multiple of"):
        zigzag_positions(6, 2, 0)


def test_event_times_are_milliseconds():
    from megatron_mone.cpu_emulation.cuda_calls import Event

    start, end = Event(), Event()
    with pytest.raises(RuntimeError, match="recorded"):
        start.elapsed_time(end)
    start.record()
    time.sleep(0.02)
    end.record()
    assert 15 < start.elapsed_time(end) < 5000
