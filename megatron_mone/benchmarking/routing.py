"""How rows fall on experts: balanced, or as in a recorded training run.

    python -m megatron_mone.benchmarking.routing MASKS --out configs/bench/routing.json --text "..."

counts the rows of every expert in the files that a run with `mone_record_masks` wrote (the command
of the run that made the committed file is kept in it).
"""

import json
import sys
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from megatron_mone.common.files import write_json
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.common.program import Program

RECORDED = CONFIG_ROOT / "bench" / "routing.json"
program = Program()


def rows_of_experts(routing: str, tokens: int, experts: int) -> list[int]:
    """E row counts that sum to `tokens`, the largest first.

    "skewed" reads the recorded loads (multiples of a balanced load, of all layers, sorted) at
    E evenly spaced quantiles, so that any number of experts gets the recorded run's skew.
    """
    if routing == "balanced":
        weights = [1.0] * experts
    else:
        loads = recorded_loads()
        weights = [_quantile(loads, 1 - (e + 0.5) / experts) for e in range(experts)]
    return _whole(weights, tokens)


@cache
def recorded_loads() -> tuple[float, ...]:
    """Loads of the recorded run's experts in multiples of a balanced load, ascending."""
    content = json.loads(RECORDED.read_text(encoding="utf-8"))
    return tuple(sorted(load for counts in content["layers"].values() for load in _loads(counts)))


def record(folder: Path) -> dict[str, Any]:
    """Rows of each expert by layer, over all recorded steps.

    Raises:
        ValueError: the folder holds no masks.
    """
    import torch

    layers: dict[str, list[int]] = {}
    steps = sorted(path for path in folder.glob("step-*") if path.is_dir())
    for path in sorted(file for step in steps for file in step.glob("layer-*.pt")):
        content = torch.load(path, weights_only=True)
        experts = content["manifest"]["num_experts"]
        rows = torch.bincount(content["keys_P"] % experts, minlength=experts).tolist()
        name = str(int(path.stem.removeprefix("layer-")))
        layers[name] = [a + b for a, b in zip(layers.get(name, [0] * experts), rows, strict=True)]
    if not layers:
        raise ValueError(f"{folder} holds no masks: name the folder that mone_record_masks named")
    numbers = [int(step.name.removeprefix("step-")) for step in steps]
    return {"steps": [numbers[0], numbers[-1]], "layers": layers}


def _loads(counts: list[int]) -> list[float]:
    mean = sum(counts) / len(counts)
    return [count / mean for count in counts]


def _quantile(values: tuple[float, ...], share: float) -> float:
    """Linear between the values, which stand at (i + 0.5) / n."""
    place = min(max(share * len(values) - 0.5, 0.0), len(values) - 1.0)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def _whole(weights: list[float], total: int) -> list[int]:
    """Integers in proportion that sum to `total` (largest remainders)."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(value) for value in exact]
    order = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
    for i in order[: total - sum(counts)]:
        counts[i] += 1
    return counts


@program.command()
def write(
    masks: Annotated[Path, Argument(metavar="MASKS", help="the folder of mone_record_masks")],
    out: Annotated[Path, Option(help="configs/bench/routing.json", show_default=False)] = RECORDED,
    text: Annotated[str, Option(help="what was run, kept in the file")] = "",
) -> None:
    """Write the rows of every expert in recorded masks, as the skewed routing reads them."""
    write_json(out, {"recorded_by": text, **record(masks)})


if __name__ == "__main__":
    sys.exit(program.main())
