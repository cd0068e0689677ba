"""Time and meter one MoE layer on one rank: stock Megatron's, MoNE's, MoNE's with its balance loss.

    python -m tools.bench_layer [--tokens 2048 --hidden 512 --neurons 1408 --experts 8 --ratio 0.25]

Router, dispatcher, experts, combine and balance loss together, timed in interleaved rounds: medians
in ms, bytes kept for backward beside parameters and inputs, the most that torch's allocator hands
out in forward and in backward. --fused adds gradients into main_grad, as Megatron does with
gradient_accumulation_fusion; stock layers cannot on CPU ranks, and stay as they are.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking import environment
from megatron_mone.benchmarking.adapters.megatron_sequential import start_one_rank, swiglu_experts
from megatron_mone.benchmarking.cases import DTYPES
from megatron_mone.benchmarking.memory import measure_peaks, saved_bytes
from megatron_mone.benchmarking.timing import race
from megatron_mone.common.files import write_json


def run(options: Any) -> None:
    """Build three layers, time and meter them, print a table.

    Args:
        options: of the command (commands/bench.py).
    """
    for name in ("tokens", "hidden", "neurons", "experts", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} = {getattr(options, name)}: it must be at least 1")
    start_one_rank()
    layers = {
        "stock": _build(options, loss=0.0, mone=False),
        "mone": _build(options, loss=0.0),
        "mone + loss": _build(options, loss=0.1),
    }
    results = measure(layers, options)
    print_table(options, results)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in vars(options).items() if k != "json"}
        write_json(
            options.json,
            {"config": config, "machine": environment.describe(), "results": results},
        )


def measure(layers: dict[str, torch.nn.Module], options: Any) -> dict[str, dict[str, float]]:
    """{layer: {"forward_ms", "forward_backward_ms", "saved_bytes", "peak_forward_bytes",
    "peak_backward_bytes"}}."""
    x = torch.randn(options.tokens, 1, options.hidden, dtype=DTYPES[options.dtype])
    x.requires_grad_()
    dy = torch.randn_like(x)
    results: dict[str, dict[str, float]] = {}
    for name, layer in layers.items():
        forward, backward = _halves(layer, x, dy)
        given = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), x)}
        backward(forward())  # what is made once is not this pass's
        saved = saved_bytes(forward, given)
        peaks = measure_peaks(forward, backward)
        results[name] = {
            "saved_bytes": saved,
            "peak_forward_bytes": peaks.forward,
            "peak_backward_bytes": peaks.backward,
        }
    times = race(
        [_phases(*_halves(layer, x, dy)) for layer in layers.values()],
        seconds=0.0,
        least=options.repeats,
    )
    for found, phases in zip(results.values(), times, strict=True):
        found |= {f"{phase}_ms": spent.median for phase, spent in phases.items()}
    return results


def _halves(
    layer: torch.nn.Module, x: Tensor, dy: Tensor
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    def backward(y: Tensor) -> None:
        y.backward(dy)
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    return lambda: layer(x)[0], backward


def _phases(forward: Any, backward: Any) -> dict[str, Callable[[], object]]:
    def without_graph() -> None:
        with torch.no_grad():
            forward()

    return {"forward": without_graph, "forward_backward": lambda: backward(forward())}


def _build(options: Any, loss: float, mone: bool = True) -> torch.nn.Module:
    """A layer of the model; the same initial weights for all.

    Raises:
        ValueError: the sizes are no MoNE layer.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mone.config import MoNEConfig
    from megatron_mone.model.layer_spec import mone_layer_spec

    config = MoNEConfig(
        **swiglu_experts(options.hidden, options.neurons, options.experts),
        moe_router_topk=2,
        moe_router_dtype="fp32",
        transformer_impl="local",
        moe_token_dispatcher_type="alltoall",
        params_dtype=DTYPES[options.dtype],
        bf16=options.dtype == "bf16",
        mone_neuron_ratio=options.ratio,
        mone_neuron_block=options.neuron_block,
        mone_ng_loss_coeff=loss,
        mone_layer_freq=[int(mone)],
    )
    specs: Any = mone_layer_spec(config).layer_specs
    model_parallel_cuda_manual_seed(1)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = specs[0].submodules.mlp(config=config, layer_number=1, pg_collection=groups).train()
    if mone and options.fused:
        config.gradient_accumulation_fusion = True
        for parameter in layer.experts.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
    return layer


def print_table(options: Any, results: dict[str, dict[str, float]]) -> None:
    """One row a layer, ratios to the stock layer."""
    print(
        f"T {options.tokens}, top-2, H {options.hidden}, F {options.neurons}, E {options.experts}, "
        f"r {options.ratio:g}, block {options.neuron_block}, {options.dtype}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, median of "
        f"{options.repeats}{', gradients fused' if options.fused else ''}"
    )
    columns = ("forward_ms", "forward_backward_ms", "saved_bytes", "peak_forward_bytes",
               "peak_backward_bytes")  # fmt: skip
    print(f"{'layer':12s}" + "".join(f"{name.replace('_bytes', ' MiB'):>28s}" for name in columns))
    stock = results["stock"]
    for name, found in results.items():
        cells = [
            f"{found[c] / (2**20 if c.endswith('bytes') else 1):.1f} ({found[c] / stock[c]:.2f})"
            for c in columns
        ]
        print(f"{name:12s}" + "".join(f"{cell:>28s}" for cell in cells))
