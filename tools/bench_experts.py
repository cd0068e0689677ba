"""Time one MoE layer's experts, MoNE against stock, in one process, and print ratios.

    python -m tools.bench_experts [--hidden 512 --width 1408 --experts 8 --rows 4096 --ratio 0.25]

Forward and forward + backward are timed in interleaved repeats; medians and the ratio to the stock
experts (Megatron's SequentialMLP) are printed. CPU only; the MoNE experts run on the fastest
backend that is usable, named in the first line.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_mone.files import write_json
from megatron_mone.kernels import resolve_backend


def main() -> None:
    """Parse, build both experts, time, print a table; --json writes the same numbers."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--hidden", type=int, default=512, help="H")
    parser.add_argument("--width", type=int, default=1408, help="F, neurons of one expert")
    parser.add_argument("--experts", type=int, default=8, help="E")
    parser.add_argument("--rows", type=int, default=4096, help="N, routed rows, split evenly")
    parser.add_argument("--ratio", type=float, default=0.25, help="r, kept neurons / F")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    if options.rows % options.experts:
        parser.error(f"--rows {options.rows} must be a multiple of --experts {options.experts}")
    results = _measure(options)
    _print(options, results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, {"config": vars(options) | {"json": None}, **results})


def _measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{experts: {phase: median ms}}."""
    mone, stock = _build(options)
    dtype = getattr(torch, options.dtype)
    x = torch.randn(options.rows, options.hidden, dtype=dtype, requires_grad=True)
    probs = torch.rand(options.rows)
    counts = torch.full((options.experts,), options.rows // options.experts)
    with torch.no_grad():
        gate = torch.randn(options.rows, options.width, dtype=dtype)

    runs = {
        "mone": lambda: mone(x, counts, probs).y_NH,
        "stock": lambda: stock(x, counts, probs)[0],
    }
    times: dict[str, dict[str, list[float]]] = {name: {} for name in runs}

    def clock(name: str, phase: str, call: Callable[[], Any]) -> None:
        start = time.perf_counter()
        call()
        times[name].setdefault(phase, []).append(1e3 * (time.perf_counter() - start))

    for _ in range(options.repeats + 1):
        for name, run in runs.items():
            with torch.no_grad():
                clock(name, "forward", run)
            clock(name, "forward + backward", lambda r=run: r().sum().backward())  # type: ignore[misc]
        clock("mone", "selection", lambda: mone.select(gate))
    # the first repeat is a warm-up
    return {
        n: {p: statistics.median(t[1:]) for p, t in phases.items()} for n, phases in times.items()
    }


def _build(options: argparse.Namespace) -> tuple[torch.nn.Module, torch.nn.Module]:
    if torch.cuda.is_available():
        sys.exit("bench_experts measures CPU ranks; hide the GPUs with CUDA_VISIBLE_DEVICES=''")
    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron.core import parallel_state
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mone.config import MoNEConfig
    from megatron_mone.moe.experts import MoNEExperts

    with tempfile.TemporaryDirectory() as folder:
        store = torch.distributed.FileStore(f"{folder}/store", 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    config = MoNEConfig(
        num_layers=1,
        hidden_size=options.hidden,
        num_attention_heads=1,
        num_moe_experts=options.experts,
        moe_ffn_hidden_size=options.width,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        params_dtype=getattr(torch, options.dtype),
        transformer_impl="local",
        mone_neuron_ratio=options.ratio,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stock = LocalSpecProvider().grouped_mlp_modules(False)
    return (
        MoNEExperts(options.experts, config, pg_collection=groups),
        stock(options.experts, config, pg_collection=groups),
    )


def _print(options: argparse.Namespace, results: dict[str, dict[str, float]]) -> None:
    print(
        f"backend {resolve_backend('auto', dtype=getattr(torch, options.dtype))}, "
        f"experts E {options.experts}, N {options.rows}, H {options.hidden}, F {options.width}, "
        f"r {options.ratio:g}, {options.dtype}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, median of {options.repeats}"
    )
    stock = results["stock"]
    for phase in stock:
        ours = results["mone"][phase]
        print(f"{phase:20s} mone {ours:8.1f} ms   stock {stock[phase]:8.1f} ms   "
              f"ratio {ours / stock[phase]:.2f}")  # fmt: skip
    share = results["mone"]["selection"] / stock["forward"]
    print(f"{'selection alone':20s} mone {results['mone']['selection']:8.1f} ms   "
          f"= {share:.2f} of the stock forward")  # fmt: skip


if __name__ == "__main__":
    main()
