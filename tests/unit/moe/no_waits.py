"""Refuses what makes the host wait for a GPU, on a machine without one.

Tensors of torch's fake CUDA device have shapes and no values. Torch itself refuses some of what
needs a value there; `no_waits` refuses all of it, and copies between devices, which fake tensors
let pass. What Megatron's own files ask for is Megatron's to wait for: the innermost frame that is
not torch's says whose it is.
"""

import sys
from contextlib import contextmanager
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

WAIT = {
    aten._local_scalar_dense, aten.nonzero, aten.bincount, aten.masked_select, aten.equal,
    aten.is_nonzero, aten._unique2, aten.unique_dim, aten.unique_consecutive,
}  # fmt: skip
"""Operators whose result's shape, or value on the host, is made of values."""
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
TRUTH = (torch.bool, torch.uint8)


class HostWait(AssertionError):
    """An operator waits for the device."""


class NoWaits(TorchDispatchMode):
    """The operators of a block, none of which may wait.

    Attributes:
        megatrons: what Megatron's own files waited for or copied, in order.
    """

    def __init__(self):
        super().__init__()
        self.megatrons = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reason := _reason(func.overloadpacket, args, kwargs):
            self.refuse(reason)
        return func(*args, **kwargs)

    def refuse(self, reason):
        """Fail, unless Megatron asked."""
        place = _place()
        if "/megatron/core/" not in place:
            raise HostWait(f"{reason} at {place}")
        self.megatrons.append(f"{reason} at {place}")


def _reason(packet, args, kwargs):
    """What is wrong with an operator; None where it only queues work."""
    if packet is aten._to_copy:
        return _copy(args[0].device, kwargs.get("device") or args[0].device)
    if packet is aten.copy_:
        return _copy(args[1].device, args[0].device)
    if not _on_a_device((args, kwargs)):
        return None
    if packet in WAIT:
        return str(packet)
    if packet in INDEXING and any(i is not None and i.dtype in TRUTH for i in args[1]):
        return f"{packet} by truth values"
    if packet is aten.repeat_interleave and kwargs.get("output_size") is None:
        return f"{packet} of unknown size"
    return None


def _copy(source, target):
    return None if source.type == target.type else f"a copy from {source} to {target}"


def _on_a_device(tree):
    if isinstance(tree, torch.Tensor):
        return tree.device.type == "cuda"
    if isinstance(tree, dict):
        tree = tuple(tree.values())
    return isinstance(tree, list | tuple) and any(map(_on_a_device, tree))


def _place():
    """FILE:LINE of the innermost frame that is neither torch's nor of this file."""
    frame = sys._getframe(1)
    while frame.f_code.co_filename == __file__ or "/torch/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


@contextmanager
def no_waits():
    """Context that refuses waits; to be entered inside a FakeTensorMode.

    Raises:
        HostWait: an operator, or a call of torch.cuda, that waits; names it and the line. What
            torch's fake tensors refuse themselves is raised by them.
    """
    mode = NoWaits()

    def synchronize(_device=None):
        mode.refuse("torch.cuda.synchronize")

    with mock.patch.object(torch.cuda, "synchronize", synchronize), mode:
        yield mode


def backward(output, grad):
    """What `output.backward(grad)` does, node by node: torch's engine asks for a real device.

    Returns:
        Leaf -> its gradient.
    """
    order, seen = [], set()

    def visit(node):
        if node is not None and node not in seen:
            seen.add(node)
            for parent, _ in node.next_functions:
                visit(parent)
            order.append(node)

    root = output.grad_fn
    visit(root)
    held, leaves = {root: {output.output_nr: grad}}, {}
    for node in reversed(order):
        grads = held.pop(node, None)
        if grads is None:
            continue
        if hasattr(node, "variable"):
            leaves[node.variable] = grads[0]
            continue
        outputs = len(node._input_metadata)
        given = [grads.get(n) for n in range(outputs)]
        with torch.no_grad():
            answers = _answers(node, given)
        for (parent, slot), answer in zip(node.next_functions, answers, strict=True):
            if parent is not None and answer is not None:
                wanted = parent._input_metadata[slot]  # to which the engine sums and casts
                answer = answer.sum_to_size(wanted.shape).to(wanted.dtype)
                slots = held.setdefault(parent, {})
                slots[slot] = answer if slot not in slots else slots[slot] + answer
    return leaves


def _answers(node, given):
    """A gradient, or None, for each of `node.next_functions`."""
    if not isinstance(node, torch.autograd.function.BackwardCFunction):
        answers = node(*given)
        return answers if isinstance(answers, tuple) else (answers,)
    answers = node.apply(*given)
    answers = answers if isinstance(answers, tuple) else (answers,)
    # One for each argument of `forward`; the functions are those of its tensors alone.
    wanted = iter([a for a, need in zip(answers, node.needs_input_grad, strict=True) if need])
    return [None if parent is None else next(wanted) for parent, _ in node.next_functions]
