"""Prints what the emulation costs a call: `python -m tests.unit.cpu_emulation.measure_overhead`.

Nanoseconds a call, unpatched, patched, and under a `TorchFunctionMode` that rewrites the device
(the other way to do it, which every torch call pays for).
"""

import timeit

import torch
from torch.overrides import TorchFunctionMode

X = torch.ones(8)
CALLS = {
    "x + x": lambda: X + X,
    "x.view(2, 4)": lambda: X.view(2, 4),
    "torch.relu(x)": lambda: torch.relu(X),
    "torch.empty(8)": lambda: torch.empty(8),
    "x.to(torch.float32)": lambda: X.to(torch.float32),
}


class RewriteDevice(TorchFunctionMode):
    """Sends device="cuda" to the CPU for every call."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in kwargs and str(kwargs["device"]).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def measure() -> dict[str, float]:
    """Nanoseconds of each call, the best of 7 rounds of 20,000."""
    return {
        name: min(timeit.repeat(call, number=20_000, repeat=7)) / 20_000 * 1e9
        for name, call in CALLS.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    plain = measure()
    with RewriteDevice():
        mode = measure()
    from megatron_mone.cpu_emulation import install

    install()
    patched = measure()
    print(f"torch {torch.__version__}; ns a call: unpatched, patched, function mode")
    for name in CALLS:
        print(f"{name:22s} {plain[name]:8.0f} {patched[name]:8.0f} {mode[name]:8.0f}")
