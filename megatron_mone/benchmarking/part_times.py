"""What choosing neurons, counting them, balancing them and recording masks takes of a layer.

Shapes: N routed rows, H hidden, F neurons, E experts; experts of the demo's size, r = 1/4, float32.
"""

from types import SimpleNamespace

import torch

from megatron_mone.benchmarking.adapters import all_adapters
from megatron_mone.benchmarking.cases import Cell, make_inputs
from megatron_mone.benchmarking.timing import Call, rounds, summary
from megatron_mone.kernels.choice import Selection
from megatron_mone.kernels.race_results import PartTime

RATIO = 1 / 4
WIDTHS = (256, 512, 1024, 1408, 2048, 4096, 8192)  # F
TOKENS, HIDDEN, NEURONS, EXPERTS = 4096, 512, 1408, 8
CHOOSING, FORWARD = "choosing neurons", "the fastest dense forward"


def measure_parts(repeats: int) -> list[PartTime]:
    """Parts of layers of this size on this CPU; a minute on two cores.

    Args:
        repeats: rounds of each, interleaved with what it is divided by.
    """
    from megatron_mone.benchmarking import whole_layer

    choosing = [choosing_time(TOKENS, width, repeats) for width in WIDTHS]
    options = SimpleNamespace(
        tokens=TOKENS // 2, hidden=HIDDEN, neurons=NEURONS, experts=EXPERTS, ratio=RATIO,
        neuron_block=1, dtype="fp32", fused=False, repeats=4 * repeats,
    )  # fmt: skip
    return choosing + whole_layer.part_times(options)


def choosing_time(tokens: int, width: int, repeats: int) -> PartTime:
    """Top-S and compaction of the gates of all rows, against dense experts' forward."""
    from megatron_mone.kernels.cpu.gate import select_rows

    cell = Cell(tokens, HIDDEN, width, EXPERTS, (RATIO,))
    device = torch.device("cpu")
    inputs = make_inputs(cell, device)
    gate_NF = torch.randn(tokens, width)
    kept = cell.kept(RATIO)
    chosen_K = torch.empty(tokens * kept, dtype=torch.int16)
    entries: list[dict[str, Call]] = [
        {"ms": lambda: select_rows(gate_NF, Selection(kept), chosen_K)}
    ]
    for adapter in all_adapters(cell):
        if adapter.ratio is None and adapter.why_absent(cell, device) is None:
            forward = adapter.build(cell, inputs).forward
            entries.append({"ms": lambda f=forward: f(inputs.x_NH, inputs.probs_N)})
    with torch.no_grad():
        choosing, *dense = (taken["ms"] for taken in rounds(entries, seconds=0.0, least=repeats))
    fastest = min(summary(times).p10 for times in dense)
    return PartTime(
        part=CHOOSING, of=FORWARD, config=cell.config, ms=summary(choosing).p10, of_ms=fastest
    )
