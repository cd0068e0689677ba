"""What the interpreter's cases share: their registry, inputs, and the comparison with torch.

Not run on a GPU. The interpreter truncates where a GPU rounds to bfloat16, which the bfloat16
tolerances allow for.
"""

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace as replace_fields
from functools import cache

import torch
from torch import Tensor
from triton.runtime import interpreter

from megatron_mone.kernels import grouped_mlp_with_gates
from megatron_mone.kernels.neuron_mask import NeuronMask

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
PLAIN = torch.empty, torch.empty_like, torch.Tensor.new_empty
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


def inputs(
    counts: list[int], hidden: int, neurons: int, dtype: torch.dtype, spare: int = 0
) -> list[Tensor]:
    """x, p, w_gate, w_up, w_down as leaves; `spare` rows of NaN after the experts'."""
    rows, size = sum(counts) + spare, (len(counts), neurons, hidden)
    weights = [torch.randn(size) * hidden**-0.5 for _ in range(3)]
    tensors = [torch.randn(rows, hidden).to(dtype), torch.rand(rows)]
    for tensor in tensors:
        tensor[rows - spare :] = torch.nan
    return [t.requires_grad_() for t in (*tensors, *(w.to(dtype) for w in weights))]


def poison() -> None:
    """From here on, memory that torch hands out uninitialised holds NaN or the lowest integer."""

    def filled(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args, **kwargs):
            space = make(*args, **kwargs)
            if space.is_floating_point():
                return space.fill_(torch.nan)
            return space if space.dtype == torch.bool else space.fill_(torch.iinfo(space.dtype).min)

        return made

    torch.empty, torch.empty_like = filled(torch.empty), filled(torch.empty_like)
    torch.Tensor.new_empty = filled(torch.Tensor.new_empty)


@contextmanager
def unpoisoned() -> Iterator[None]:
    """Memory as torch hands it out, untouched: for tensors larger than the machine's."""
    filled = torch.empty, torch.empty_like, torch.Tensor.new_empty
    torch.empty, torch.empty_like, torch.Tensor.new_empty = PLAIN
    try:
        yield
    finally:
        torch.empty, torch.empty_like, torch.Tensor.new_empty = filled


def quicken_interpreter() -> None:
    """Leave out what takes the interpreter two thirds of its time, and changes no value: at every
    call of a device function it replaces the functions of triton.language, for every type it asks
    for it builds a table, and for every sum of integers a check that it then drops."""
    replace, seen = interpreter._patch_lang, set()

    def once(function):
        if id(function.__globals__) not in seen:  # a module's
            seen.add(id(function.__globals__))
            replace(function)
        return interpreter._LangPatchScope()  # of what is to be put back: nothing

    interpreter._patch_lang = once
    look_up = interpreter._get_np_dtype
    known = cache(look_up)
    interpreter._get_np_dtype = lambda kind: (
        look_up(kind) if kind.scalar.is_ptr() else known(kind.scalar)
    )
    interpreter.interpreter_builder.options = replace_fields(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )


def against_reference(
    run, leaves: list[Tensor], counts: list[int], activation: str, spare: int = 0
) -> NeuronMask:
    """y, and all its gradients. The first rows of x and p are the experts'; `spare` more follow,
    which hold NaN and must stay out of everything."""
    dtype, real = leaves[0].dtype, sum(counts)
    y, mask = run(*leaves[:2], counts, *leaves[2:])
    assert y.shape[0] == real + spare
    twins = [leaf.detach().double() for leaf in leaves]
    twins = [twin[:real] for twin in twins[:2]] + twins[2:]
    twins = [twin.requires_grad_() for twin in twins]
    only = NeuronMask.from_bool(mask.to_bool()[:real])
    want = grouped_mlp_with_gates(
        *twins[:2], counts, *twins[2:], choose=only, activation=activation, backend="reference"
    )
    dy = torch.randn_like(y)
    close(y[:real], want.y_NH, dtype)
    if spare:
        dy[real:] = torch.nan
    grads = torch.autograd.grad(y, leaves, dy)
    wants = torch.autograd.grad(want.y_NH, twins, dy[:real].double(), allow_unused=True)
    for leaf, grad, twin, right in zip(leaves, grads, twins, wants, strict=True):
        assert grad.dtype == leaf.dtype
        right = torch.zeros_like(twin) if right is None else right
        close(grad[: twin.shape[0]] if grad.dim() < 3 else grad, right, dtype)
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
