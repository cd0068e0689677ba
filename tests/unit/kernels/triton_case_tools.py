"""What the interpreter's cases share: their registry, inputs, and the comparison with torch.

Not run on a GPU. The interpreter truncates where a GPU rounds to bfloat16, which the bfloat16
tolerances allow for.
"""

import traceback
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_mone.kernels import grouped_mlp_with_gates
from megatron_mone.kernels.neuron_mask import NeuronMask

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
BOTH = (torch.float32, torch.bfloat16)
CASES: dict[str, Callable[[], None]] = {}


def case(*arguments, name: str = ""):
    """Register a function under its name and arguments."""

    def register(function):
        words = [function.__name__, name, *(str(a).removeprefix("torch.") for a in arguments)]
        CASES["-".join(word for word in words if word)] = lambda: function(*arguments)
        return function

    return register


def close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Equal shapes, and a relative error of the whole tensor within the type's tolerance."""
    assert got.shape == want.shape, (got.shape, want.shape)
    error = (got.double() - want.double()).norm()
    scale = want.double().norm()
    assert error <= TOLERANCE[dtype] * scale + 1e-12, f"error {error:.3g} of {scale:.3g}"


def inputs(counts: list[int], hidden: int, neurons: int, dtype: torch.dtype) -> list[Tensor]:
    """x, p, w_gate, w_up, w_down as leaves."""
    rows, size = sum(counts), (len(counts), neurons, hidden)
    weights = [torch.randn(size) * hidden**-0.5 for _ in range(3)]
    tensors = [torch.randn(rows, hidden).to(dtype), torch.rand(rows)]
    return [t.requires_grad_() for t in (*tensors, *(w.to(dtype) for w in weights))]


def against_reference(
    run, leaves: list[Tensor], counts: list[int], activation: str, through: tuple[str, ...] = ("y",)
) -> NeuronMask:
    """Outputs, and all gradients through `through`: y, the gates or both."""
    dtype = leaves[0].dtype
    y, mask, gate_K = run(*leaves[:2], counts, *leaves[2:])
    twins = [leaf.detach().double().requires_grad_() for leaf in leaves]
    want = grouped_mlp_with_gates(
        *twins[:2], counts, *twins[2:], choose=mask, activation=activation, backend="reference"
    )
    outputs = {"y": (y, want.y_NH), "gate": (gate_K, want.gate_K)}
    used = [outputs[name] for name in through]
    d = [torch.randn_like(ours) for ours, _ in used]
    for ours, right in outputs.values():
        close(ours, right, dtype)
    grads = torch.autograd.grad([ours for ours, _ in used], leaves, d, allow_unused=True)
    wants = torch.autograd.grad(
        [right for _, right in used], twins, [t.double() for t in d], allow_unused=True
    )
    for leaf, grad, right in zip(leaves, grads, wants, strict=True):
        assert grad is not None
        assert grad.dtype == leaf.dtype
        close(grad, torch.zeros_like(leaf) if right is None else right, dtype)
    return mask


def run_all() -> dict[str, str]:
    """{case: "" or its traceback}."""
    results = {}
    for name, run in CASES.items():
        torch.manual_seed(len(results))
        try:
            run()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    return results
