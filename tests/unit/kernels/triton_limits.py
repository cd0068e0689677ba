"""Bytes and operations of each kernel against an H100's limits: model, not measured.

    python -m tests.unit.kernels.triton_limits        a table of a few shapes

Pure functions of a shape. A kernel's time is taken as its slowest limit alone, which no kernel
reaches; use the ratios to decide what is worth running, not as timings. What is counted:
- every operand once from memory, but gathered rows of x and of weights each time they are read
  (an L2 cache that holds them makes this pessimistic), float32 partial sums written and read;
- a scattered access to a [N, F] row as the whole row, since at S / F > 1/16 nearly every 32-byte
  sector is touched; a scattered store also as the zero fill before it;
- 2 tensor-core operations for a multiply-add; 2 integer instructions per gate and bisected bit.
Shapes: N rows, E experts, F neurons, H hidden, S kept in Q = S / B blocks.
"""

from dataclasses import dataclass

from megatron_mone.common.device import device_of

H100 = device_of("h100-ndr")  # SXM
INTEGER_PER_SECOND = 16.7e12  # 132 multiprocessors x 64 lanes x 1.98 GHz


@dataclass(frozen=True)
class Shape:
    """The sizes a cost depends on.

    Attributes:
        rows, hidden, neurons, kept, experts: N, H, F, S, E.
        block: B adjacent neurons kept together; 1 when unstructured.
        itemsize: bytes of an activation or weight.
    """

    rows: int
    hidden: int
    neurons: int
    kept: int
    experts: int
    block: int = 1
    itemsize: int = 2

    @property
    def weights(self) -> int:
        """Bytes of one of the three weights, all experts."""
        return self.experts * self.neurons * self.hidden * self.itemsize

    @property
    def x(self) -> int:
        """Bytes of [N, H]."""
        return self.rows * self.hidden * self.itemsize

    @property
    def wide(self) -> int:
        """Bytes of [N, F]."""
        return self.rows * self.neurons * self.itemsize

    @property
    def compact(self) -> int:
        """Bytes of [N, S]."""
        return self.rows * self.kept * self.itemsize

    @property
    def indices(self) -> int:
        """Bytes of the kept entries' 16-bit indices."""
        return self.rows * self.kept * 2

    @property
    def active(self) -> int:
        """Operations of one sparse product."""
        return 2 * self.rows * self.kept * self.hidden


@dataclass(frozen=True)
class Cost:
    """What a kernel moves and computes."""

    bytes: int
    tensor: int = 0
    integer: int = 0

    @property
    def seconds(self) -> float:
        """The slowest limit alone (model, not measured)."""
        return max(self.limits().values())

    @property
    def bound(self) -> str:
        """The name of that limit."""
        limits = self.limits()
        return max(limits, key=lambda name: limits[name])

    def limits(self) -> dict[str, float]:
        """Seconds under each limit."""
        return {
            "bytes": self.bytes / H100.memory_bandwidth,
            "tensor": self.tensor / H100.peak("bf16"),
            "integer": self.integer / INTEGER_PER_SECOND,
        }


def select(s: Shape) -> Cost:
    """select.py: gates in, index and kept values out."""
    bits = 15 if s.itemsize == 2 else 31
    return Cost(s.wide + s.compact + s.indices, integer=2 * bits * s.rows * s.neurons)


def gate_forward(s: Shape, scattered: bool = True) -> Cost:
    """gated.py: a, index, u in; gate, u, h out."""
    if not scattered:
        return Cost(4 * s.compact)
    return Cost(3 * s.compact + s.indices + 3 * s.wide)


def gate_backward(s: Shape, scattered: bool = True) -> Cost:
    """gated.py: a, u, index, dgate, dh in; da, du, h out."""
    if not scattered:
        return Cost(7 * s.compact)
    return Cost(3 * s.compact + s.indices + 7 * s.wide)


def dense_product(s: Shape) -> Cost:
    """One per-expert GEMM between [N, H] and [N, F]."""
    return Cost(s.x + s.weights + s.wide, tensor=2 * s.rows * s.neurons * s.hidden)


def sampled_up(s: Shape) -> Cost:
    """sampled_up.py: a row of weights for each kept entry (vector units, not counted)."""
    gathered = s.rows * s.kept * s.hidden * s.itemsize
    return Cost(s.x + gathered + s.indices + s.compact)


def sparse_down(s: Shape, splits: int = 16) -> Cost:
    """sparse_down.py: a row of weights for each kept entry, and the partial sums."""
    gathered = s.rows * s.kept * s.hidden * s.itemsize
    partial = 2 * splits * s.rows * s.hidden * 4
    return Cost(s.compact + s.indices + gathered + partial + s.x)


def block_sampled(s: Shape) -> Cost:
    """block_sampled.py: a row of x for each kept block."""
    return Cost(s.x * (s.kept // s.block) + s.weights + s.compact, tensor=s.active)


def block_expand(s: Shape, products: int = 1) -> Cost:
    """block_expand.py: a float32 row of partial sums for each kept block, written and read."""
    partial = 2 * s.rows * (s.kept // s.block) * s.hidden * 4
    inputs = products * (s.compact + s.weights)
    return Cost(inputs + partial + s.x, tensor=products * s.active)


def block_weight_grad(s: Shape) -> Cost:
    """block_weight_grad.py: a row of x for each kept block."""
    return block_sampled(s)


def forward_seconds(s: Shape) -> dict[str, float]:
    """Seconds of a forward pass after the dense gate product, by route (model, not measured)."""
    dense = 2 * dense_product(s).seconds
    routes = {
        "dense expert": dense + Cost(3 * s.wide).seconds,
        "unstructured": dense + select(s).seconds + gate_forward(s).seconds,
        "gathered": select(s).seconds
        + sampled_up(s).seconds
        + gate_forward(s, False).seconds
        + sparse_down(s).seconds,
    }
    if s.block > 1:
        routes["blocks"] = (
            2 * block_sampled(s).seconds + gate_forward(s, False).seconds + block_expand(s).seconds
        )
    return routes


def backward_seconds(s: Shape) -> dict[str, float]:
    """Seconds of a backward pass, by route (model, not measured)."""
    dense = 6 * dense_product(s).seconds
    routes = {
        "dense expert": dense + Cost(6 * s.wide).seconds,
        "unstructured": dense + gate_backward(s).seconds,
    }
    if s.block > 1:
        routes["blocks"] = (
            block_sampled(s).seconds
            + gate_backward(s, False).seconds
            + block_expand(s, products=2).seconds
            + 3 * block_weight_grad(s).seconds
        )
    return routes


SHAPES = {
    "fine-grained, training": Shape(16384, 2048, 1408, 352, 8),
    "fine-grained, blocks of 32": Shape(16384, 2048, 1408, 352, 8, block=32),
    "fine-grained, blocks of 128": Shape(16384, 2048, 1408, 384, 8, block=128),
    "wide, training": Shape(8192, 4096, 14336, 3584, 4),
    "wide, decoding": Shape(2, 4096, 14336, 3584, 1),
}


def table() -> str:
    """Modelled microseconds of `SHAPES` by pass and route, and their ratio to the dense expert."""
    head = f"{'pass':<9} {'route':<13} {'us':>10} {'of dense':>9}"
    lines = ["An H100's limits: model, not measured. Forward: after the dense gate product."]
    for name, s in SHAPES.items():
        sizes = f"N {s.rows}, H {s.hidden}, F {s.neurons}, S {s.kept}, E {s.experts}, B {s.block}"
        lines += ["", f"{name}: {sizes}", head]
        passes = {"forward": forward_seconds(s)}
        if s.rows * s.kept < s.neurons * s.experts:  # as the backend decides, without gradients
            del passes["forward"]["unstructured"]
        else:
            del passes["forward"]["gathered"]
            passes["backward"] = backward_seconds(s)
        for which, routes in passes.items():
            dense = routes["dense expert"]
            for route, seconds in routes.items():
                lines.append(
                    f"{which:<9} {route:<13} {seconds * 1e6:>10.1f} {seconds / dense:>9.2f}"
                )
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
