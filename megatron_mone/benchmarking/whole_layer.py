"""Time and meter one MoE layer on one rank: stock Megatron's, and MoNE's with ever more of it.

    python -m tools.bench_layer [--tokens 2048 --hidden 512 --neurons 1408 --experts 8 --ratio 0.25]

Router, dispatcher, experts and combine, timed in interleaved rounds: medians in ms, bytes kept for
backward beside parameters and inputs, the most that torch's allocator hands out in forward and in
backward. "mone alone" neither counts nor balances, "mone" has load counters, "+ loss" the balance
loss too, "+ masks" also records its masks. What each adds is the median of the rounds' differences,
shown as a share of "mone + loss". --fused adds gradients into main_grad, as Megatron does with
gradient_accumulation_fusion; stock layers cannot on CPU ranks, and stay as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from torch import Tensor

from megatron_mone.benchmarking import environment
from megatron_mone.benchmarking.adapters.megatron_sequential import start_one_rank, swiglu_experts
from megatron_mone.benchmarking.cases import DTYPES, Cell
from megatron_mone.benchmarking.goals import PARTS
from megatron_mone.benchmarking.memory import measure_peaks, saved_bytes
from megatron_mone.benchmarking.timing import rounds
from megatron_mone.common.files import write_json
from megatron_mone.kernels.race_results import PartTime
from megatron_mone.profiling.process_memory import keep_freed_blocks

STOCK, ALONE, COUNTED, BALANCED, RECORDED = (
    "stock", "mone alone", "mone", "mone + loss", "mone + loss + masks",
)  # fmt: skip
ADDED = {"load counters": (ALONE, COUNTED), "balance loss": (COUNTED, BALANCED),
         "masks recorded": (BALANCED, RECORDED)}  # fmt: skip
"""Part -> the layer without it, the layer with it."""
LAYER = "forward + backward of the layer"
Times = dict[str, dict[str, list[float]]]
"""Layer -> phase -> ms of each round."""


def run(options: Any) -> None:
    """Build two layers, time and meter what of them there is, print tables.

    Args:
        options: of the command (commands/bench.py).
    """
    for name in ("tokens", "hidden", "neurons", "experts", "repeats"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} = {getattr(options, name)}: it must be at least 1")
    results, times = measure(options)
    parts = parts_of(times, options)
    print_table(options, results)
    for part in parts:
        print(f"{part.part}: {part.ms:.2f} ms, {part.share:.1%} of the {part.of}")
    together = sum(part.share for part in parts)
    print(f"together {together:.1%} (goal {PARTS[LAYER][1]:.0%})")
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        config = {k: v for k, v in vars(options).items() if k != "json"}
        write_json(
            options.json,
            {"config": config, "machine": environment.describe(), "results": results,
             "parts": [part.plain() for part in parts]},
        )  # fmt: skip


def part_times(options: Any) -> list[PartTime]:
    """What counting, balancing and recording add to a layer; options as of `run`."""
    return parts_of(measure(options)[1], options)


def measure(options: Any) -> tuple[dict[str, dict[str, float]], Times]:
    """({layer: {"forward_ms", "forward_backward_ms", "saved_bytes", "peak_forward_bytes",
    "peak_backward_bytes"}}, the times of each round)."""
    start_one_rank()
    stock, mone = _build(options, mone=False), _build(options)
    x = torch.randn(options.tokens, 1, options.hidden, dtype=DTYPES[options.dtype])
    x.requires_grad_()
    dy = torch.randn_like(x)
    results: dict[str, dict[str, float]] = {}
    phases: dict[str, dict[str, Callable[[], object]]] = {}
    for name in (STOCK, ALONE, COUNTED, BALANCED, RECORDED):
        layer = stock if name == STOCK else mone
        forward, backward = _halves(layer, x, dy)
        given = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), x)}
        with _only(mone, name):
            backward(forward())  # what is made once is not this pass's
            saved = saved_bytes(forward, given)
            peaks = measure_peaks(forward, backward)
        results[name] = {
            "saved_bytes": saved,
            "peak_forward_bytes": peaks.forward,
            "peak_backward_bytes": peaks.backward,
        }
        phases[name] = _phases(mone, name, forward, backward)
    with keep_freed_blocks():  # as in the race
        taken = rounds(list(phases.values()), seconds=0.0, least=options.repeats)
    times = dict(zip(phases, taken, strict=True))
    for name, found in results.items():
        found |= {f"{phase}_ms": median(values) for phase, values in times[name].items()}
    return results, times


@contextmanager
def _only(mone: Any, name: str) -> Iterator[None]:
    """MoNE's layer with what `name` says; one layer, since weights lie elsewhere in another."""
    from megatron_mone.moe.masks.tape import record_masks
    from megatron_mone.moe.masks.trace import MaskTrace

    mone.train(name != ALONE)
    mone.neuron_balancer.has_loss = name in (BALANCED, RECORDED)
    if name != RECORDED:
        yield
        return
    with record_masks(mone, MaskTrace()):
        yield


def parts_of(times: Times, options: Any) -> list[PartTime]:
    """What each part adds to forward and backward."""
    both = {name: phases["forward_backward"] for name, phases in times.items()}
    cell = Cell(
        2 * options.tokens, options.hidden, options.neurons, options.experts, (options.ratio,),
        options.dtype, neuron_block=options.neuron_block,
    )  # fmt: skip
    return [
        PartTime(
            part=part,
            of=LAYER,
            config=cell.config,
            ms=median(b - a for a, b in zip(both[without], both[with_it], strict=True)),
            of_ms=median(both[BALANCED]),
        )
        for part, (without, with_it) in ADDED.items()
    ]


def _halves(
    layer: torch.nn.Module, x: Tensor, dy: Tensor
) -> tuple[Callable[[], Tensor], Callable[[Tensor], None]]:
    def backward(y: Tensor) -> None:
        y.backward(dy)
        for tensor in (x, *layer.parameters()):
            tensor.grad = None

    return lambda: layer(x)[0], backward


def _phases(mone: Any, name: str, forward: Any, backward: Any) -> dict[str, Callable[[], object]]:
    def without_graph() -> None:
        with _only(mone, name), torch.no_grad():
            forward()

    def with_graph() -> None:
        with _only(mone, name):
            backward(forward())

    return {"forward": without_graph, "forward_backward": with_graph}


def _build(options: Any, mone: bool = True) -> torch.nn.Module:
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
        mone_ng_loss_coeff=0.1 * mone,
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
    print(f"{'layer':20s}" + "".join(f"{name.replace('_bytes', ' MiB'):>28s}" for name in columns))
    stock = results["stock"]
    for name, found in results.items():
        cells = [
            f"{found[c] / (2**20 if c.endswith('bytes') else 1):.1f} ({found[c] / stock[c]:.2f})"
            for c in columns
        ]
        print(f"{name:20s}" + "".join(f"{cell:>28s}" for cell in cells))
