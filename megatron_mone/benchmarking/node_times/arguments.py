"""Torch's operators as calls, from what a trace says of them: names, shapes, the type written.

What a trace leaves out (dimensions, numbers, types of indices) follows from the shapes, or does not
matter to the time. An operator of which nothing here makes a call has a stand-in (operators.py).
Shapes of a case: as recorded. Touches the random state.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from megatron_mone.planning.tracing.trace import Op

aten = torch.ops.aten
Shape = tuple[int, ...]
Call = Callable[[], object]


@dataclass(frozen=True)
class Given:
    """An operator's tensors.

    Attributes:
        op: of the trace.
        device: of the tensors.
        dtype: of its values.
    """

    op: Op
    device: torch.device
    dtype: torch.dtype

    @property
    def out(self) -> Shape:
        """Shape of the first output."""
        return self.op.outputs[0]

    def values(self, shape: Shape) -> Tensor:
        """Around 1, so that products repeated in place neither grow nor vanish."""
        if self.dtype == torch.bool:
            return torch.rand(shape, device=self.device) < 0.5
        if not self.dtype.is_floating_point:
            return torch.ones(shape, dtype=self.dtype, device=self.device)
        if self.op.name.endswith("_"):
            return torch.ones(shape, device=self.device).to(self.dtype)
        return (0.5 + torch.rand(shape, device=self.device)).to(self.dtype)

    def indices(self, shape: Shape, below: int) -> Tensor:
        """Random places."""
        return torch.randint(0, max(1, below), shape, device=self.device)

    def all(self) -> list[Tensor]:
        """A tensor of values for every input."""
        return [self.values(shape) for shape in self.op.inputs]


_FAULTS = (RuntimeError, TypeError, IndexError, ValueError, StopIteration, NotImplementedError)
Maker = Callable[[Given], Call]


def call_of(op: Op, device: torch.device) -> Call | None:
    """A call of the operator itself that has run once; None where none could be made."""
    name = op.name.removeprefix("aten.")
    if name == op.name or not hasattr(aten, name) or not op.outputs:
        return None
    given = Given(op, device, value_type(op))
    makers = [MAKERS[name]] if name in MAKERS else [_plain, _with_number]
    for maker in makers:
        try:
            call = maker(given)
            made = call()
        except _FAULTS:
            continue
        if _shape_of(made) in (None, op.outputs[0]) or name.endswith("_"):
            return call
    return None


_TYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_TRUTHS = ("bool", "int64", "int32", "int8", "uint8", "int16")


def value_type(op: Op) -> torch.dtype:
    """Of the inputs: what is written, or, where those are truths and numbers of places, what the
    bytes read say; float32 where nothing does."""
    if op.dtype not in _TRUTHS:
        return getattr(torch, op.dtype, torch.float32)
    entries = sum(math.prod(shape) for shape in op.inputs)
    size = op.bytes_read / entries if entries else 4
    if op.dtype == "bool":
        return {1: torch.bool, 8: torch.int64}.get(round(size), torch.float32)
    return {8: torch.int64, 1: torch.bool}.get(round(size), torch.float32)


def _shape_of(made: object) -> Shape | None:
    first = made[0] if isinstance(made, list | tuple) and made else made
    return tuple(first.shape) if isinstance(first, Tensor) else None


def _function(given: Given) -> Callable[..., object]:
    """The overload that takes the arguments of the first call.

    Called by name torch looks for it every time, which of a scatter takes 400 us and of a run
    nothing; and tries overloads of Python's lists, as which a gradient buffer takes 11 GB.
    """
    packet = getattr(aten, given.op.name.removeprefix("aten."))
    every = [getattr(packet, name) for name in packet.overloads()]
    overloads = [
        one for one in every if all(str(of.type) != "List[t]" for of in one._schema.arguments)
    ]

    def call(*arguments: object, **named: object) -> object:
        for overload in overloads:
            try:
                made = overload(*arguments, **named)
            except _FAULTS:
                continue
            overloads[:] = [overload]
            return made
        raise TypeError(f"no overload of {packet} takes these")

    return call


def _plain(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    return lambda: function(*tensors)


def _with_number(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    return lambda: function(*tensors, 1)


def _reduced(given: Given) -> Call:
    """sum, mean, ...: over all, or over the dimensions that the result has not, or has as 1."""
    function, (x,) = _function(given), given.all()[:1]
    shape, out = tuple(x.shape), given.out
    if out in ((), shape):
        return lambda: function(x)
    if len(out) == len(shape):
        over = [at for at, (a, b) in enumerate(zip(shape, out, strict=True)) if a != b]
        return lambda: function(x, over, True)
    over = _missing(shape, out)
    return lambda: function(x, over)


def _missing(shape: Shape, out: Shape) -> list[int]:
    """The dimensions of `shape` that `out` lacks.

    Raises:
        ValueError: `out` is not what is left of it.
    """
    for left in combinations(range(len(shape)), len(out)):
        if tuple(shape[at] for at in left) == out:
            return [at for at in range(len(shape)) if at not in left]
    raise ValueError(f"{out} is no part of {shape}")


def _largest(given: Given) -> Call:
    function, (x,) = _function(given), given.all()[:1]
    if len(given.op.outputs) == 2:
        return lambda: function(x, -1)
    if given.out == ():
        return lambda: function(x)
    return _reduced(given)


def _joined(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    if len(given.out) > len(tensors[0].shape):
        return lambda: function(tensors)
    at = next(
        d for d, size in enumerate(given.out) if sum(t.shape[d] for t in tensors) == size
        and all(t.shape[:d] == given.out[:d] for t in tensors)
    )  # fmt: skip
    return lambda: function(tensors, at)


def _indexed(given: Given) -> Call:
    x = given.values(given.op.inputs[0])
    places = [given.indices(s, x.shape[at]) for at, s in enumerate(given.op.inputs[1:])]
    function = _function(given)
    return lambda: function(x, places)


def _selected(given: Given) -> Call:
    x, places = given.values(given.op.inputs[0]), given.op.inputs[1]
    index = given.indices(places, x.shape[0])
    function = _function(given)
    return lambda: function(x, 0, index)


def _index_added(given: Given) -> Call:
    function = _function(given)
    shapes = given.op.inputs
    x, source = given.values(shapes[0]), given.values(shapes[2])
    index = given.indices(shapes[1], shapes[0][0])
    return lambda: function(x, 0, index, source)


def _put(given: Given) -> Call:
    """Where one index of several dimensions has those of x, it is a mask, true at every other."""
    function, shapes = _function(given), given.op.inputs
    x, values = given.values(shapes[0]), given.values(shapes[-1])
    places = [given.indices(s, shapes[0][at]) for at, s in enumerate(shapes[1:-1])]
    if len(places) == 1 and len(shapes[1]) > 1 and shapes[1] == shapes[0][: len(shapes[1])]:
        places = [given.indices(shapes[1], 2) == 0]
    return lambda: function(x, places, values)


def _gathered(given: Given) -> Call:
    """gather, scatter, scatter_add_: along the dimension in which index and values differ."""
    function, shapes = _function(given), given.op.inputs
    x = given.values(shapes[0])
    at = next((d for d, (a, b) in enumerate(zip(shapes[0], shapes[1], strict=True)) if a != b), 0)
    index = given.indices(shapes[1], shapes[0][at])
    rest = [given.values(shape) for shape in shapes[2:]]
    if given.op.name == "aten.scatter" and not rest:
        return lambda: function(x, at, index, 1.0)
    return lambda: function(x, at, index, *rest)


def _embedded(given: Given) -> Call:
    table, places = given.values(given.op.inputs[0]), given.op.inputs[1]
    index = given.indices(places, table.shape[0])
    function = _function(given)
    return lambda: function(table, index)


def _embedding_back(given: Given) -> Call:
    gradient, rows = given.values(given.op.inputs[0]), given.out[0]
    index = given.indices(given.op.inputs[1], rows)
    function = _function(given)
    return lambda: function(gradient, index, rows, -1, False)


def _masked(given: Given) -> Call:
    function, shapes = _function(given), given.op.inputs
    x, mask = given.values(shapes[0]), torch.rand(shapes[1], device=given.device) < 0.5
    return lambda: function(x, mask, 1.0)


def _chosen(given: Given) -> Call:
    condition = torch.rand(given.op.inputs[0], device=given.device) < 0.5
    rest = [given.values(shape) for shape in given.op.inputs[1:]] + [1.0, 0.0]
    function = _function(given)
    return lambda: function(condition, *rest[:2])


def _softmax(given: Given) -> Call:
    function, (x,) = _function(given), given.all()[:1]
    return lambda: function(x, -1, False)


def _softmax_back(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    return lambda: function(tensors[0], tensors[1], -1, given.dtype)


def _topk(given: Given) -> Call:
    x, count = torch.rand(given.op.inputs[0], device=given.device), given.out[-1]
    function = _function(given)
    return lambda: function(x, count, -1)


def _sorted(given: Given) -> Call:
    function, x = _function(given), torch.rand(given.op.inputs[0], device=given.device)
    x = x < 0.5 if given.dtype == torch.bool else x
    return lambda: function(x)


def _searched(given: Given) -> Call:
    edges = torch.sort(given.values(given.op.inputs[0])).values
    found = given.values(given.op.inputs[1])
    function = _function(given)
    return lambda: function(edges, found)


def _repeated(given: Given) -> Call:
    rows, total = given.op.inputs[0][0], given.out[0]
    counts = torch.full((rows,), total // max(1, rows), device=given.device)
    counts[: total - int(counts.sum())] += 1
    function = _function(given)
    return lambda: function(counts)


def _summed(given: Given) -> Call:
    x = given.values(given.op.inputs[0])
    function = _function(given)
    return lambda: function(x, 0)


def _converted(given: Given) -> Call:
    shape = given.op.inputs[0]
    size = given.op.bytes_read / max(1, math.prod(shape))
    source = torch.int64 if not given.dtype.is_floating_point else _TYPES.get(
        round(size), torch.float32
    )  # fmt: skip
    x = torch.ones(shape, dtype=source, device=given.device)
    wanted = getattr(torch, given.op.dtype)
    if wanted == source:
        return lambda: x.clone()
    return lambda: x.to(wanted)


def _new(given: Given) -> Call:
    dtype = getattr(torch, given.op.dtype)
    return lambda: torch.zeros(given.out, dtype=dtype, device=given.device)


def _counted(given: Given) -> Call:
    length = given.out[0]
    return lambda: torch.arange(length, device=given.device)


def _weighed(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    return lambda: function(*tensors[:2], 0.1)


def _squared(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    return lambda: function(tensors[0], 2.0)


def _cut_back(given: Given) -> Call:
    """The gradient of a slice, or of one element: zeros, and what there is of it."""
    gradient, out = given.values(given.op.inputs[0]), given.out
    shape = tuple(gradient.shape)
    if len(shape) < len(out):
        (at,) = _missing(out, shape)
        function = _function(given)
        return lambda: function(gradient, out, at, 0)
    at = next((d for d, (a, b) in enumerate(zip(shape, out, strict=True)) if a != b), 0)
    function = _function(given)
    return lambda: function(gradient, out, at, 0, shape[at], 1)


def _products(given: Given) -> Call:
    function, tensors = _function(given), given.all()
    if given.op.name == "aten.baddbmm":
        return lambda: function(*tensors, beta=0.0)
    return lambda: function(*tensors)


MAKERS: dict[str, Maker] = {
    **dict.fromkeys(("sum", "mean", "amax", "amin"), _reduced),
    **dict.fromkeys(("max", "min"), _largest),
    **dict.fromkeys(("cat", "stack"), _joined),
    "index": _indexed,
    "index_select": _selected,
    **dict.fromkeys(("index_add", "index_add_"), _index_added),
    **dict.fromkeys(("index_put", "index_put_"), _put),
    **dict.fromkeys(("gather", "scatter", "scatter_add", "scatter_add_"), _gathered),
    "embedding": _embedded,
    "embedding_dense_backward": _embedding_back,
    **dict.fromkeys(("masked_fill", "masked_fill_"), _masked),
    "where": _chosen,
    **dict.fromkeys(("_softmax", "_log_softmax"), _softmax),
    **dict.fromkeys(("_softmax_backward_data", "_log_softmax_backward_data"), _softmax_back),
    "topk": _topk,
    **dict.fromkeys(("sort", "argsort"), _sorted),
    "searchsorted": _searched,
    "repeat_interleave": _repeated,
    "cumsum": _summed,
    "_to_copy": _converted,
    **dict.fromkeys(
        ("new_zeros", "zeros", "ones", "zeros_like", "ones_like", "full", "full_like",
         "new_ones", "new_full", "scalar_tensor"), _new,
    ),
    "arange": _counted,
    **dict.fromkeys(("lerp", "lerp_"), _weighed),
    "pow": _squared,
    **dict.fromkeys(("slice_backward", "select_backward"), _cut_back),
    **dict.fromkeys(("mm", "bmm", "addmm", "baddbmm", "mv", "dot"), _products),
}  # fmt: skip
"""Name -> what makes its call; the others take their tensors, or these and a number."""
