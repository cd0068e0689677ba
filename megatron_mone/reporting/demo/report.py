"""The demo's report: plots, statement, numbers and commands on one page, and the JSON beside it."""

import math
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_mone.common import machine
from megatron_mone.common.files import write_json
from megatron_mone.reporting.demo.statement import neuron_statement, noise_note, statement
from megatron_mone.reporting.page import plots
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.results import LayerLoad, RunResult, median_after_first, summary
from megatron_mone.reporting.page.scores import add_scores, columns_of

_INTRO = (
    "Three small models, trained on the same tokens in the same order from the same seed, each on "
    "2 CPU ranks with the experts split over them (EP = 2): a Mixture of Neuron Experts that keeps "
    "1/4 of each expert's neurons for a token, a dense MoE of the same total size, and a dense MoE "
    "with experts cut to the parameters that MoNE activates. One seed and a few hundred steps: a "
    "demonstration that the parts work together, not evidence about large models."
)


@dataclass(frozen=True)
class NeuronLoads:
    """The two windows that end at `step`, by layer, with and without the neuron balance loss."""

    step: int
    with_ng: dict[str, LayerLoad]
    without_ng: dict[str, LayerLoad]


@dataclass(frozen=True)
class Scores:
    """What the runs' last checkpoints scored.

    Attributes:
        documents: name of a run -> results.json of its evaluation; empty without lm-eval.
        commands: that make them, from the repository.
    """

    documents: dict[str, dict[str, Any]]
    commands: tuple[tuple[str, ...], ...] = ()


def common_loads(mone: RunResult, without_ng: RunResult) -> NeuronLoads | None:
    """The loads of the last step at which both runs logged them; None if there is none."""
    steps = {load.histogram.step for loads in mone.neuron_load.values() for load in loads}
    others = {load.histogram.step for loads in without_ng.neuron_load.values() for load in loads}
    if not steps & others:
        return None
    step = max(steps & others)
    return NeuronLoads(step, mone.load_at(step), without_ng.load_at(step))


def write_report(
    out: Path, unigram_loss: float, runs: list[RunResult], without_ng: RunResult,
    preparation: tuple[str, ...], scores: Scores,
) -> Path:  # fmt: skip
    """Write plots, summary.json, details.json and report.html under `out`.

    Args:
        out: the demo's folder.
        unigram_loss: nats per token.
        runs: mone, moe_total and moe_active, in this order.
        without_ng: the shorter MoNE run without the neuron balance loss.
        preparation: the command that made the data.
        scores: of `runs`.

    Returns:
        The page's path.
    """
    facts = machine.facts()
    loads = common_loads(runs[0], without_ng)
    sentences = statement(unigram_loss, {run.name: run for run in runs})
    if loads is not None:
        sentences.append(neuron_statement(loads.step, loads.with_ng, loads.without_ng))
    sentences += noise_note(runs)
    page = Page("Mixture of Neuron Experts on two CPU ranks")
    page.paragraph(_INTRO)
    page.heading("What happened")
    page.bullets(sentences)
    _add_losses(page, out, unigram_loss, runs)
    _add_scores(page, scores)
    _add_costs(page, out, runs)
    _add_neurons(page, out, loads, without_ng)
    _add_commands(page, preparation, [*runs, without_ng], scores.commands)
    page.heading("Made with")
    page.bullets([f"{label}: {value}" for label, value in facts.items()])
    summary(unigram_loss, runs).write(out / "summary.json")
    details = _details(unigram_loss, [*runs, without_ng], sentences, facts)
    write_json(out / "details.json", details | {"scores": scores.documents})
    return page.write(out / "report.html")


def table_rows(runs: list[RunResult]) -> tuple[list[str], list[list[str]]]:
    """Header and one row a run of the main numbers, formatted."""
    header = ["run", "val. loss", "perplexity", "tokens", "active FLOPs", "ms/step",
              "peak MiB"]  # fmt: skip
    rows = [
        [
            plots.NAMES.get(run.name, run.name),
            f"{run.val_loss:.3f}",
            f"{math.exp(run.val_loss):.1f}",
            f"{run.tokens:,}",
            f"{run.active_flops:.3g}",
            f"{run.step_ms:.0f}",
            f"{run.peak_bytes / 2**20:.0f}",
        ]
        for run in runs
    ]
    return header, rows


def _add_losses(page: Page, out: Path, unigram_loss: float, runs: list[RunResult]) -> None:
    page.heading("Loss")
    png = plots.save(plots.validation_loss(runs, unigram_loss), out / "demo")
    page.figure(
        png,
        "Validation loss against tokens (left) and against active floating-point operations "
        "(right). Dotted: the loss of a model that knows only how often each token occurs.",
    )
    page.table(*table_rows(runs))
    png = plots.save(plots.training_loss(runs, unigram_loss), out / "training_loss")
    page.figure(png, "Training loss of each step (faint) and its running mean.")


def _add_scores(page: Page, scores: Scores) -> None:
    page.heading("Scores")
    if not scores.documents:
        page.paragraph(
            "Not scored: the package lm-eval is not installed. pip install 'megatron-mone[eval]', "
            "then the same command adds the scores and repeats nothing else."
        )
        return
    page.paragraph(
        "The three last checkpoints on the quick tasks: sentences, questions, paragraphs and "
        "sequences of our own, a few of each. They show that a model has learnt something and rank "
        "no models: a difference of the size of these standard errors says nothing."
    )
    named = {plots.NAMES.get(name, name): [one] for name, one in scores.documents.items()}
    add_scores(page, columns_of(named))


def _add_costs(page: Page, out: Path, runs: list[RunResult]) -> None:
    page.heading("Time, memory, arithmetic")
    page.figure(
        plots.save(plots.cost(runs), out / "cost"),
        "Executed operations are what the backend runs, active operations what the kept "
        "neurons need. They are equal for the dense models.",
    )
    header = ["run", "executed FLOPs / step", "active FLOPs / step", "executed TFLOP/s per rank",
              "active TFLOP/s per rank"]  # fmt: skip
    rows = [
        [
            plots.NAMES.get(run.name, run.name),
            f"{run.executed_flops_per_step:.4g}",
            f"{run.active_flops_per_step:.4g}",
            f"{median_after_first(run.executed_tflops):.4f}",
            f"{median_after_first(run.active_tflops):.4f}",
        ]
        for run in runs
    ]
    page.table(header, rows)
    page.figure(
        plots.save(plots.step_time(runs), out / "step_time"),
        "Mean time of a step in each logging window, evaluation left out.",
    )


def _add_neurons(page: Page, out: Path, loads: NeuronLoads | None, without_ng: RunResult) -> None:
    page.heading("Neuron load with and without the neuron balance loss")
    page.paragraph(
        "How often each neuron was kept over the last logging window, in multiples of a balanced "
        f"load. Without the loss (NG-LBL): a fourth run, equal to MoNE's in all else but stopped "
        f"after {without_ng.steps} steps; MoNE is shown at the same step. The first bar "
        "holds everything below 1/32, neurons never kept included; the right end is 1/r = 4, a "
        "neuron kept for every token."
    )
    if loads is None:
        page.paragraph("The two runs logged no common step, so there is nothing to compare.")
        return
    figure = plots.neuron_load(loads.step, loads.with_ng, loads.without_ng)
    page.figure(
        plots.save(figure, out / "neuron_load"),
        "Share of neurons by load. Dotted: a perfectly balanced load.",
    )


def _add_commands(
    page: Page, preparation: tuple[str, ...], runs: list[RunResult],
    scoring: tuple[tuple[str, ...], ...],
) -> None:  # fmt: skip
    page.heading("The exact commands")
    page.paragraph("Run in the repository, after make setup.")
    page.code(shlex.join(preparation))
    for run in runs:
        page.code(f"# {run.name}\n{shlex.join(run.command)}")
    if scoring:
        page.code("\n".join(["# scores", *map(shlex.join, scoring)]))


def _details(
    unigram_loss: float, runs: list[RunResult], sentences: list[str], facts: dict[str, str]
) -> dict[str, Any]:
    return {
        "schema": "megatron-mone/demo/1",
        "unigram_loss": unigram_loss,
        "statement": sentences,
        "machine": facts,
        "runs": [asdict(run) for run in runs],
    }
