"""Published runs as jobs to plan, and predictions held against what was published.

The figures stand in files (docs/PUBLISHED_RUNS.md says what these hold); none is known here.
May touch: the files it is given; the tracer's processes and cache, by way of the Planner.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_mone.common.checked_yaml import read_yaml
from megatron_mone.common.phases import COMBINE, DISPATCH, PERMUTE, ROUTER, UP_DOWN_GEMM
from megatron_mone.model.run_config import read_part
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.routing_skew import ZIPF, Skew
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.plan_parts import GIB
from megatron_mone.planning.planner import Planned, Planner
from megatron_mone.planning.tracing.trace_server import Tracer

STEP, MEMORY, EXPOSED, LAYER = "step", "memory", "exposed", "layer"
STEP_MS = "step ms"
_PARTS = (("model", "model"), ("layout", "parallel"), ("train", "train"))
_LAYER_PHASES = (ROUTER, PERMUTE, DISPATCH, UP_DOWN_GEMM, COMBINE)


@dataclass(frozen=True)
class PublishedRun:
    """One file of published runs.

    Attributes:
        name: of the file.
        kind: STEP, MEMORY, EXPOSED or LAYER.
        gpus, cluster: W, and the cluster's name.
        routing: "balanced" or "skewed".
        extra: whether it is beyond the first list.
        job: model, layout and flags.
        figures: what was published.
        full_attention: whether the operations published count attention's whole square.
        calibrates: whether efficiencies, or the spread of its routing, are fitted to it, so that it
            proves nothing.
        skew: how tokens are taken to spread over experts.
        peer: another program's own prediction of the same figures, by name; empty without one.
    """

    name: str
    kind: str
    gpus: int
    cluster: str
    routing: str
    extra: bool
    job: JobSpec
    figures: dict[str, Any]
    full_attention: bool
    calibrates: bool
    skew: Skew
    peer: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One predicted figure beside the published one.

    Attributes:
        run: of the file.
        figure: "step ms", "memory optimizer GiB", ....
        predicted, published: in that unit.
    """

    run: PublishedRun
    figure: str
    predicted: float
    published: float

    @property
    def error(self) -> float:
        """predicted / published - 1."""
        return self.predicted / self.published - 1


def read_published(path: Path) -> PublishedRun:
    """A published run.

    Raises:
        ValueError: one line naming the file and the field.
    """
    file = read_yaml(path, "docs/PUBLISHED_RUNS.md describes the file")
    values = file.values
    if file.text("kind") not in (STEP, MEMORY, EXPOSED, LAYER):
        file.fail("kind", f"must be one of {STEP}, {MEMORY}, {EXPOSED}, {LAYER}")
    flags: dict[str, Any] = read_part(path, "cluster", "gpu")
    for part, folder in _PARTS:
        flags |= read_part(path, folder, dict(file.section(part).values))
    return PublishedRun(
        name=path.stem,
        kind=file.text("kind"),
        gpus=file.whole("gpus"),
        cluster=file.text("cluster"),
        routing=file.text("routing"),
        extra=bool(values.get("extra", False)),
        job=JobSpec(path.stem, {k: v for k, v in flags.items() if v is not None}, {}, {}, {}),
        figures=file.section("published").values,
        full_attention=values.get("attention_flops") == "full",
        calibrates=bool(values.get("calibrates", False)),
        skew=Skew(ZIPF, file.number("zipf")) if "zipf" in values else Skew(),
        peer=file.section("peer").values if "peer" in values else {},
    )


def plan_published(run: PublishedRun, tracer: Tracer, efficiency: Efficiency) -> Planned:
    """Plan a run as it was published."""
    planner = Planner(tracer, load_cluster(run.cluster), efficiency, run.skew)
    return planner.plan(run.job, run.gpus)


def compare(run: PublishedRun, planned: Planned) -> Iterator[Comparison]:
    """Every figure of the run that a plan predicts."""
    prediction, figures = planned.prediction, run.figures
    if run.kind == STEP:
        yield Comparison(run, STEP_MS, 1e3 * prediction.seconds, published_step_ms(run, planned))
    if run.kind == LAYER:
        layer = sum(prediction.phases.get(phase, 0.0) for phase in _LAYER_PHASES)
        yield Comparison(run, "layer ms", 1e3 * layer, figures["layer_ms"])
    if run.kind == EXPOSED:
        share = prediction.parts["expert parallel"] / prediction.seconds
        published = figures["exposed_expert_comm"]
        middle = (published["from"] + published["to"]) / 2
        yield Comparison(run, "exposed expert share", share, middle)
    memory = figures.get("memory", {})
    unit = GIB if memory.get("unit") == "GiB" else 1e9
    if "peak_allocated" in memory and run.kind == STEP:
        peak = max(one.allocated for one in prediction.memory_P)
        yield Comparison(run, "peak GiB", peak / unit, memory["peak_allocated"])
    if "pipeline_rank" in memory:
        yield from _memory(run, planned, memory, unit)


def _memory(
    run: PublishedRun, planned: Planned, memory: dict[str, Any], unit: float
) -> Iterator[Comparison]:
    one = planned.prediction.memory_P[memory["pipeline_rank"]]
    both = one.weights + one.gradients
    # The published activations still hold what probabilities before fc2 have saved since.
    kept = memory["activations"] - memory.get("saved_by_probabilities_before_fc2", 0.0)
    yield Comparison(run, "weights and gradients", both / unit, memory["weights_and_gradients"])
    yield Comparison(run, "optimizer", one.optimizer / unit, memory["optimizer"])
    yield Comparison(run, "activations", one.activations / unit, kept)


CALIBRATION, HELD_OUT, FURTHER = "calibration", "held out", "further runs"
SKEWED, BYTES, SHARES = "held out, skewed routing", "memory", "exposed communication"


def grouped(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Comparisons by what they are worth; empty groups left out."""
    found: dict[str, list[Comparison]] = {}
    for one in comparisons:
        found.setdefault(_group(one), []).append(one)
    order = (CALIBRATION, HELD_OUT, FURTHER, SKEWED, BYTES, SHARES)
    return {title: found[title] for title in order if title in found}


def _group(one: Comparison) -> str:
    if one.run.kind == EXPOSED:
        return SHARES
    if not one.figure.endswith(" ms"):
        return BYTES
    if one.run.calibrates:
        return CALIBRATION
    if one.run.routing == "skewed":
        return SKEWED
    return FURTHER if one.run.extra else HELD_OUT


def table(title: str, comparisons: list[Comparison]) -> str:
    """One group for a terminal, with its mean absolute error."""
    mean = sum(abs(one.error) for one in comparisons) / len(comparisons)
    worst = max(comparisons, key=lambda one: abs(one.error))
    lines = [
        f"{title}: {len(comparisons)} figures, mean |error| {mean:.1%}, worst {worst.error:+.1%}"
    ]
    lines += [
        f"  {one.run.name:38} {one.figure:22} {one.predicted:10,.2f} {one.published:10,.2f} "
        f"{one.error:+7.1%}"
        for one in comparisons
    ]
    return "\n".join(lines)


def document(groups: dict[str, list[Comparison]]) -> dict[str, Any]:
    """The groups as JSON."""
    return {
        title: [
            {"run": one.run.name, "figure": one.figure, "predicted": one.predicted,
             "published": one.published, "error": one.error}
            for one in comparisons
        ]
        for title, comparisons in groups.items()
    }  # fmt: skip


def published_step_ms(run: PublishedRun, planned: Planned) -> float:
    """Of a run published by its time, its tokens a second, or its operations a second."""
    figures, facts = run.figures, planned.traced.facts
    if "step_ms" in figures:
        return float(figures["step_ms"])
    if "tokens_per_s_per_gpu" in figures:
        tokens = facts.global_batch_size * facts.seq_length / facts.world_size
        return 1e3 * tokens / figures["tokens_per_s_per_gpu"]
    flops = facts.model_flops_per_step + (_upper_half(run) if run.full_attention else 0.0)
    if "tflops_per_gpu" in figures:
        rate = 1e12 * figures["tflops_per_gpu"]
    else:
        rate = figures["mfu"] * planned.prediction.cluster.device.peak("bf16")
    return 1e3 * flops / (rate * facts.world_size)


def _upper_half(run: PublishedRun) -> float:
    """Operations of a step, forward and backward, in the half of attention that causality masks."""
    values = run.job.model
    width = values["num_attention_heads"] * values["kv_channels"]
    tokens = values["global_batch_size"] * values["seq_length"]
    return 6.0 * tokens * values["seq_length"] * width * values["num_layers"]
