"""The result of one training run: read from its TensorBoard folder, kept as JSON.

Losses are nats per token, times seconds, memory bytes, operations floating-point operations of all
ranks together unless a name says otherwise.
"""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from megatron_mone.common.documents import Document, Number, Part, Text, Whole
from megatron_mone.common.files import atomic_write, write_json
from megatron_mone.reporting.page.events import Curve, Events, Histogram, read_events

LOAD_TAG = "mone/neuron_load_layer_"


class ResultError(RuntimeError):
    """A run's files do not hold what its result needs."""


@dataclass(frozen=True)
class LayerLoad:
    """Neuron load of one layer over one logging window.

    Attributes:
        histogram: neurons by load, in multiples of a balanced load.
        dead: neurons never kept in the window.
    """

    histogram: Histogram
    dead: float


@dataclass(frozen=True)
class RunResult:
    """What one finished run did.

    Attributes:
        fingerprint: of the configuration, the data and the steps it was made from.
        command: the words that started it, relative to the repository.
        load_average: the machine's 1-minute load, the larger of before and after the run;
            about `world_size` on a quiet machine.
        step_seconds: mean seconds of a step in each logging window, evaluation left out.
        peak_bytes: peak memory of rank 0; on CPU ranks its whole resident memory.
        executed_tflops, active_tflops: 1e12 operations a second and rank, by logging window; none
            of a model without experts.
        neuron_load: 1-based layer number, as text -> one entry a logging window.
    """

    name: str
    fingerprint: str
    command: tuple[str, ...]
    load_average: float
    steps: int
    world_size: int
    tokens_per_step: int
    executed_flops_per_step: float
    active_flops_per_step: float
    training_loss: Curve
    validation_loss: Curve
    step_seconds: Curve
    executed_tflops: Curve
    active_tflops: Curve
    peak_bytes: int
    neuron_load: dict[str, list[LayerLoad]]

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    @property
    def val_loss(self) -> float:
        """Nats per token after the last step."""
        return self.validation_loss[-1][1]

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.steps * self.tokens_per_step

    @property
    def active_flops(self) -> float:
        """Operations the kept neurons needed, over the whole run."""
        return self.steps * self.active_flops_per_step

    @property
    def step_ms(self) -> float:
        """Median milliseconds of a step, the first window (start-up) left out if there are more."""
        return 1e3 * median_after_first(self.step_seconds)

    def load_at(self, step: int) -> dict[str, LayerLoad]:
        """Layer -> neuron load of the window that ends at `step`."""
        return {
            layer: load
            for layer, loads in self.neuron_load.items()
            for load in loads
            if load.histogram.step == step
        }


_RESULT = TypeAdapter(RunResult)


def median_after_first(curve: Curve) -> float:
    """Median value without the first point, where there is more than one."""
    return statistics.median(value for _, value in (curve[1:] or curve))


def collect(
    name: str,
    folder: Path,
    *,
    steps: int,
    fingerprint: str,
    command: tuple[str, ...],
    load_average: float,
) -> RunResult:
    """Read a finished run.

    Args:
        name: of the run.
        folder: TensorBoard folder with Megatron's event files and pretrain's run.json.
        steps: the last step, which must have been trained and evaluated.
        fingerprint: kept with the result.
        command: kept with the result.
        load_average: kept with the result.

    Raises:
        ResultError: something is missing.
    """
    events = read_events(folder)
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        result = RunResult(
            name=name,
            fingerprint=fingerprint,
            command=command,
            load_average=load_average,
            steps=steps,
            world_size=int(facts["world_size"]),
            tokens_per_step=int(facts["tokens_per_step"]),
            executed_flops_per_step=float(facts["executed_flops_per_step"]),
            active_flops_per_step=float(facts["active_flops_per_step"]),
            training_loss=events.scalars["lm loss"],
            validation_loss=events.scalars["lm loss validation"],
            step_seconds=events.scalars["iteration-time"],
            executed_tflops=events.scalars.get("mone/executed_tflops_per_rank", []),
            active_tflops=events.scalars.get("mone/active_tflops_per_rank", []),
            peak_bytes=int(max(v for _, v in events.scalars["mem-max-allocated-bytes"])),
            neuron_load=_neuron_load(events),
        )
    except (OSError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ResultError(f"{name}: {folder} is incomplete ({reason})") from error
    for what in ("training_loss", "validation_loss"):
        last = getattr(result, what)[-1][0]
        if last != steps:
            raise ResultError(f"{name}: {what} in {folder} ends at step {last}, not {steps}")
    return result


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside `path` and rename: never half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, data)


def save_result(path: Path, result: RunResult) -> None:
    """Keep a result for `load_result`."""
    write_json(path, asdict(result))


def load_result(path: Path) -> RunResult | None:
    """The result kept at `path`; None if there is none or it is of another version or damaged."""
    try:
        return _RESULT.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


class RunSummary(Part):
    """One run in summary.json."""

    name: Text
    val_loss: Number
    """Nats per token after the last step."""
    tokens: Whole
    active_flops: Number
    step_ms: Number
    peak_bytes: Whole


class Summary(Document, again="run the demo again", indent=1):
    """The demo's summary.json."""

    unigram_loss: Number
    """Nats per token of the best model that ignores its context."""
    runs: list[RunSummary]
    """In the order they appear."""


def summary(unigram_loss: float, results: list[RunResult]) -> Summary:
    """The demo's summary.json.

    Args:
        unigram_loss: nats per token of the best model that ignores its context.
        results: the runs, in the order they appear.
    """
    fields = RunSummary.model_fields
    runs = [RunSummary(**{name: getattr(run, name) for name in fields}) for run in results]
    return Summary(unigram_loss=unigram_loss, runs=runs)


def _neuron_load(events: Events) -> dict[str, list[LayerLoad]]:
    loads: dict[str, list[LayerLoad]] = {}
    for tag, histograms in events.histograms.items():
        if not tag.startswith(LOAD_TAG):
            continue
        layer = tag.removeprefix(LOAD_TAG)
        dead = dict(events.scalars[f"mone/dead_neurons_layer_{layer}"])
        loads[layer] = [LayerLoad(h, dead[h.step]) for h in histograms]
    return loads
