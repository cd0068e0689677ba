"""Time the CPU backend against the dense torch expert, interleaved, and print ratios.

    python -m tests.unit.kernels.measure_cpu_backend [--rows 4096 --ratios 0.25 --blocks 1 16]
    python -m tests.unit.kernels.measure_cpu_backend --rows 8 32 64 --forward       decode
    python -m tests.unit.kernels.measure_cpu_backend --grid --dtype bfloat16        never slower?

The dense expert is the arithmetic of Megatron's SequentialMLP: for each expert one product with
[2F, H], silu * up * probability, one product with [H, F]; its backward pass is autograd's. Minima
and medians are printed because the machine may be shared; with --threads 1 they are of the thread's
own CPU time, which other processes do not lengthen; "selection" is the native top-S and
compaction alone, as a share of the dense forward. With --grid one line per case and only the ratio
of minima, the largest last.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.cpu.backend import masked_grouped_mlp
from megatron_mone.kernels.cpu.gate import select_rows

GRID = [(8, 512, 1408), (64, 512, 1408), (1024, 512, 1408), (16384, 256, 512), (64, 2048, 1024)]
GRID += [(1024, 96, 160), (16384, 64, 96), (8, 64, 96), (256, 1024, 704)]  # N, H, F


class Run(NamedTuple):
    """One way to compute the experts."""

    name: str
    choose: Selection | None
    forward: Callable[[], Tensor]
    leaves: list[Tensor]


def dense_experts(x_NH: Tensor, probs_N: Tensor, counts: list[int], fc1, fc2) -> Tensor:
    """The stock experts: fc1 is a list of [2F, H], fc2 of [H, F]."""
    outs = []
    for x, p, w1, w2 in zip(x_NH.split(counts), probs_N.split(counts), fc1, fc2, strict=True):
        a, u = x.matmul(w1.t()).chunk(2, dim=-1)
        h = torch.nn.functional.silu(a) * u * p.unsqueeze(-1)
        outs.append(h.to(x.dtype).matmul(w2.t()))
    return torch.cat(outs)


def parse() -> argparse.Namespace:
    """Shapes and repeats."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, nargs="+", default=[4096], help="N, split evenly")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1408, help="F")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--forward", action="store_true", help="no backward pass")
    parser.add_argument("--grid", action="store_true", help="many small shapes, ratios 1 to 1/16")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def runs_of(options: argparse.Namespace, rows: int, hidden: int, width: int) -> list[Run]:
    """Dense first."""
    torch.manual_seed(0)
    experts, dtype = options.experts, getattr(torch, options.dtype)
    counts = [rows // experts] * experts
    x = torch.randn(sum(counts), hidden).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts)).requires_grad_()
    shape = (experts, width, hidden)
    weights = [(torch.randn(shape) * hidden**-0.5).to(dtype).requires_grad_() for _ in range(3)]
    fc1 = [torch.cat((g, u)).detach().requires_grad_() for g, u in zip(*weights[:2], strict=True)]
    fc2 = [w.detach().t().contiguous().requires_grad_() for w in weights[2]]
    dense = lambda: dense_experts(x, probs, counts, fc1, fc2)  # noqa: E731
    runs = [Run("dense", None, dense, [x, probs, *fc1, *fc2])]
    for block in options.blocks:
        for ratio in options.ratios:
            choose = Selection(max(1, round(ratio * width / block)) * block, 1, block)

            def ours(choose: Selection = choose) -> Tensor:
                return masked_grouped_mlp(
                    x, probs, counts, *weights, choose=choose, activation="silu"
                )[0]

            runs.append(Run(f"r = {ratio:g}, B = {block}", choose, ours, [x, probs, *weights]))
    return runs


Times = dict[tuple[str, str], list[float]]


def time_runs(runs: list[Run], width: int, options: argparse.Namespace) -> Times:
    """Milliseconds of each repeat but the first by (name, phase)."""
    times: Times = {}

    now = time.thread_time if options.threads == 1 else time.perf_counter

    def clock(name: str, phase: str, call: Callable[[], object]) -> None:
        start = now()
        call()
        times.setdefault((name, phase), []).append(1e3 * (now() - start))

    dy = torch.randn_like(runs[0].leaves[0])
    gate = torch.randn(dy.shape[0], width)
    chosen = torch.empty(gate.numel(), dtype=torch.int32)
    for _ in range(options.repeats + 1):
        for run in runs:
            with torch.no_grad():
                clock(run.name, "forward", run.forward)
            if not options.forward:
                grads = lambda r=run: torch.autograd.grad(r.forward(), r.leaves, dy)  # noqa: E731
                clock(run.name, "both", grads)
            if run.choose is not None:
                part = chosen[: gate.shape[0] * run.choose.kept]
                select = lambda c=run.choose, p=part: select_rows(gate, c, p)  # noqa: E731
                clock(run.name, "selection", select)
    return {key: values[1:] for key, values in times.items()}


def print_shape(options: argparse.Namespace, rows: int) -> None:
    """One line per run and phase."""
    times = time_runs(runs_of(options, rows, options.hidden, options.width), options.width, options)
    print(
        f"E {options.experts}, N {rows}, H {options.hidden}, F {options.width}, {options.dtype}, "
        f"{options.threads} threads, torch {torch.__version__}, {options.repeats} repeats; "
        "ms as minimum / median"
    )
    best = {key: (min(t), statistics.median(t)) for key, t in times.items()}
    for (name, phase), (low, middle) in best.items():
        base = best["dense", "forward" if phase == "selection" else phase]
        print(f"{name:18s} {phase:10s} {low:9.2f} / {middle:9.2f}   of dense "
              f"{low / base[0]:.3f} / {middle / base[1]:.3f}")  # fmt: skip


def print_grid(options: argparse.Namespace) -> None:
    """One line per shape, run and phase; those above 1.05 are marked."""
    options.ratios, worst = [1.0, 0.5, 0.25, 0.125, 0.0625], []
    for rows, hidden, width in GRID:
        times = time_runs(runs_of(options, rows, hidden, width), width, options)
        for (name, phase), values in times.items():
            if name == "dense" or phase == "selection":
                continue
            ratio = min(values) / min(times["dense", phase])
            line = f"N {rows}, H {hidden}, F {width}, {name}, {phase}: {ratio:.3f}"
            print(line + " *" * (ratio > 1.05), flush=True)
            worst.append((ratio, line))
    print("largest:", max(worst)[1])


def main() -> None:
    """Time what the options say."""
    options = parse()
    torch.set_num_threads(options.threads)
    if options.grid:
        print_grid(options)
        return
    for rows in options.rows:
        print_shape(options, rows)


if __name__ == "__main__":
    main()
