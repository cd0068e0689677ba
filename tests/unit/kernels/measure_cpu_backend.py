"""Time the CPU backend against the dense torch expert, interleaved, and print ratios.

    python -m tests.unit.kernels.measure_cpu_backend [--rows 4096 --ratios 0.25 0.125]

The dense expert is the arithmetic of Megatron's SequentialMLP: for each expert one product with
[2F, H], silu * up * probability, one product with [H, F]; its backward pass is autograd's. Minima
and medians are printed because the machine may be shared; "selection" is the native top-S and
compaction alone, as a share of the dense forward.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_mone.kernels.cpu.backend import Selection, masked_grouped_mlp, select_rows


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
    parser.add_argument("--rows", type=int, default=4096, help="N, split evenly")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1408, help="F")
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def runs_of(options: argparse.Namespace) -> dict[str, tuple[Callable[[], Tensor], list[Tensor]]]:
    """{name: (forward, leaves)}, dense first."""
    torch.manual_seed(0)
    E, N, H, F = options.experts, options.rows, options.hidden, options.width
    dtype = getattr(torch, options.dtype)
    counts = [N // E] * E
    x = torch.randn(sum(counts), H).to(dtype).requires_grad_()
    probs = torch.rand(sum(counts)).requires_grad_()
    weights = [(torch.randn(E, F, H) * H**-0.5).to(dtype).requires_grad_() for _ in range(3)]
    fc1 = [torch.cat((g, u)).detach().requires_grad_() for g, u in zip(*weights[:2], strict=True)]
    fc2 = [w.detach().t().contiguous().requires_grad_() for w in weights[2]]
    runs = {"dense": (lambda: dense_experts(x, probs, counts, fc1, fc2), [x, probs, *fc1, *fc2])}
    for ratio in options.ratios:
        choose = Selection(max(1, round(ratio * F)))

        def sparse(choose: Selection = choose) -> Tensor:
            return masked_grouped_mlp(x, probs, counts, *weights, choose=choose, activation="silu")[
                0
            ]

        runs[f"r = {ratio:g}"] = (sparse, [x, probs, *weights])
    return runs


def main() -> None:
    """Print one line per ratio and phase."""
    options = parse()
    torch.set_num_threads(options.threads)
    runs = runs_of(options)
    times: dict[tuple[str, str], list[float]] = {}

    def clock(name: str, phase: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times.setdefault((name, phase), []).append(1e3 * (time.perf_counter() - start))

    dy = torch.randn(options.rows // options.experts * options.experts, options.hidden)
    dy = dy.to(getattr(torch, options.dtype))
    gate = torch.randn(dy.shape[0], options.width)
    chosen = torch.empty(gate.numel(), dtype=torch.int32)
    for _ in range(options.repeats + 1):
        for name, (run, leaves) in runs.items():
            with torch.no_grad():
                clock(name, "forward", run)
            clock(name, "both", lambda r=run, t=leaves: torch.autograd.grad(r(), t, dy))
        for ratio in options.ratios:
            choose = Selection(max(1, round(ratio * options.width)))
            part = chosen[: gate.shape[0] * choose.kept]
            clock(f"r = {ratio:g}", "selection", lambda c=choose, p=part: select_rows(gate, c, p))
    print(
        f"E {options.experts}, N {options.rows}, H {options.hidden}, F {options.width}, "
        f"{options.dtype}, {options.threads} threads, torch {torch.__version__}, "
        f"{options.repeats} repeats; ms as minimum / median"
    )
    best = {key: (min(t[1:]), statistics.median(t[1:])) for key, t in times.items()}
    for (name, phase), (low, middle) in best.items():
        base = best["dense", "forward" if phase == "selection" else phase]
        print(f"{name:10s} {phase:10s} {low:9.2f} / {middle:9.2f}   of dense "
              f"{low / base[0]:.3f} / {middle / base[1]:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
