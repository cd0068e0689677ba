"""Time each part of the CPU backend's layer and print the table of docs/KERNELS.md.

    python -m tests.unit.kernels.measure_cpu_parts [--rows 4096 --ratio 0.25 --threads 2]

A part's limit is the longer of its operations at this machine's fastest product (torch's, of 2,048)
and its bytes, each tensor once, at its copy bandwidth. Balanced experts, float32, single neurons.
"""

import argparse
import time
from collections.abc import Callable

import torch

from megatron_mone.benchmarking.machine_limits import measure_peaks
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu import native
from megatron_mone.kernels.cpu.backend import _gate_backward, _gated
from megatron_mone.kernels.cpu.gate import choose_rows, kept_gates
from megatron_mone.kernels.cpu.products import SparseProducts, empty
from megatron_mone.kernels.weight_views import Gradient

Part = tuple[str, float, float, Callable[[], object]]  # name, bytes, operations


def parse() -> argparse.Namespace:
    """Shapes and repeats."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096, help="N, split evenly")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1408, help="F")
    parser.add_argument("--ratio", type=float, default=0.25)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def parts_of(options: argparse.Namespace) -> list[Part]:
    """In the order of a step."""
    torch.manual_seed(0)
    E, N, H, F = options.experts, options.rows, options.hidden, options.width
    choose = Selection(round(options.ratio * F))
    layout = native.layout([N // E] * E, F, H)
    x, dy, probs = torch.randn(N, H), torch.randn(N, H), torch.rand(N)
    gate, up, down = (torch.randn(E, F, H) * H**-0.5 for _ in range(3))
    a, _, indices, offsets = kept_gates(x, gate, layout, choose, "silu")
    assert a is not None
    products, dense = SparseProducts(layout, indices, offsets), torch.randn(N, F)
    chosen = torch.empty_like(indices)
    K, u, v, h = a.numel(), *(torch.randn_like(a) for _ in range(3))
    grads = [Gradient(empty((E, F, H), torch.float32), False) for _ in range(3)]
    by_expert = list(zip(x.split(N // E), gate, strict=True))

    rows, weight, entry, once = 4.0 * N * H, 4.0 * E * F * H, 4.0 * K, 2.0 * K * H
    gates = 4.0 * N * F
    return [
        ("gate product, by torch", rows + weight + gates, 2.0 * N * F * H,
         lambda: [torch.mm(part, w.t()) for part, w in by_expert]),
        ("sigma and choice", gates + 2.5 * entry, 0,
         lambda: choose_rows(dense, "silu", choose, chosen, h, v)),
        ("lists of runs", 3.0 * K, 0, lambda: SparseProducts(layout, indices, offsets)),
        ("up", rows + weight + 1.5 * entry, once, lambda: products.sampled(x, up, u)),
        ("down", rows + weight + 1.5 * entry, once,
         lambda: products.accumulate([(h, down)], torch.float32)),
        ("dh", rows + weight + 1.5 * entry, once, lambda: products.sampled(dy, down, v)),
        ("h", 3 * entry, 0, lambda: _gated(products, probs, a, u)),
        ("da, du, dprobs", 6 * entry, 0, lambda: _gate_backward(
            products, "silu", a, u, probs, None, v, a.clone(), h, torch.empty_like(probs))),
        ("dx", rows + 2 * weight + 2.5 * entry, 2 * once,
         lambda: products.accumulate([(a, gate), (u, up)], torch.float32)),
        ("entries by neuron", 6.75 * entry, 0, lambda: products.by_neuron([a, u, h])),
        ("gradients of gate and up", rows + 2 * weight + 2.25 * entry, 2 * once,
         lambda: products.weight_grads([(a, grads[0]), (u, grads[1])], x)),
        ("gradient of down", rows + weight + 1.25 * entry, once,
         lambda: products.weight_grads([(h, grads[2])], dy)),
    ]  # fmt: skip


def main() -> None:
    """Print the table: minima over the repeats, parts in turn."""
    options = parse()
    torch.set_num_threads(options.threads)
    parts, peaks = parts_of(options), measure_peaks(torch.device("cpu"))
    best = dict.fromkeys((name for name, *_ in parts), float("inf"))
    for _ in range(options.repeats):
        for name, _, _, run in parts:
            start = time.perf_counter()
            run()
            best[name] = min(best[name], time.perf_counter() - start)
    flops = peaks.flops["fp32"]
    best_set = native.INSTRUCTION_SETS[native.load().mone_best_set()]
    print(
        f"{flops / 1e9:.0f} GFLOP/s, copy {peaks.bandwidth / 1e9:.1f} GB/s, {best_set}, "
        f"{options.threads} threads"
    )
    print("| part | MB | GFLOP | ms | limit ms | share of the limit |")
    print("| --- | --: | --: | --: | --: | --: |")
    for name, size, operations, _ in parts:
        limit = max(operations / flops, size / peaks.bandwidth)
        print(f"| {name} | {size / 1e6:.1f} | {operations / 1e9:.2f} | {1e3 * best[name]:.1f} | "
              f"{1e3 * limit:.1f} | {limit / best[name]:.2f} |")  # fmt: skip


if __name__ == "__main__":
    main()
