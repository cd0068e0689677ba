"""What happened, in plain sentences computed from the numbers, whoever won."""

import math

from megatron_mone.common.machine import cores
from megatron_mone.reporting.page.events import Curve
from megatron_mone.reporting.page.results import LayerLoad, RunResult

TIE_NATS = 0.02
"""Validation losses closer than this are called equal: each run is one seed on few tokens."""

LABELS = {
    "mone": "MoNE",
    "moe_total": "the dense MoE with the same total parameters",
    "moe_active": "the dense MoE cut to the same activated parameters",
    "mone_without_ng": "MoNE without the neuron balance loss",
}


def statement(unigram_loss: float, runs: dict[str, RunResult]) -> list[str]:
    """Sentences on quality, compute, time and memory.

    Args:
        unigram_loss: nats per token.
        runs: "mone", "moe_total" and "moe_active".
    """
    mone = runs["mone"]
    others = [runs["moe_total"], runs["moe_active"]]
    return [
        _against_unigram(unigram_loss, [mone, *others]),
        *(_at_equal_tokens(mone, other) for other in others),
        *(_at_equal_flops(mone, other) for other in others),
        _time(mone, runs["moe_total"]),
        _memory(mone, runs["moe_total"]),
    ]


def verdict(loss: float, other: float) -> str:
    """ "better", "worse" or "equal" (within TIE_NATS) of `loss` against `other`, in nats."""
    if abs(loss - other) < TIE_NATS:
        return "equal"
    return "better" if loss < other else "worse"


def loss_at_flops(run: RunResult, flops: float) -> float | None:
    """Validation loss where the run had spent `flops` active operations.

    Linear between evaluations; None outside the evaluated range.
    """
    curve: Curve = [(step, loss) for step, loss in run.validation_loss]
    spent = [step * run.active_flops_per_step for step, _ in curve]
    if spent and math.isclose(flops, spent[-1]):
        return curve[-1][1]
    for i in range(1, len(curve)):
        if spent[i - 1] <= flops <= spent[i]:
            share = (flops - spent[i - 1]) / (spent[i] - spent[i - 1])
            return curve[i - 1][1] + share * (curve[i][1] - curve[i - 1][1])
    return None


def neuron_statement(
    step: int, with_ng: dict[str, LayerLoad], without_ng: dict[str, LayerLoad]
) -> str:
    """How even the neuron load is, with and without the balance loss.

    Args:
        step: where both windows end.
        with_ng: layer -> load with the loss.
        without_ng: layer -> load without it.
    """
    near, near_without = near_balance(with_ng), near_balance(without_ng)
    dead, dead_without = (
        int(sum(load.dead for load in layers.values())) for layers in (with_ng, without_ng)
    )
    if abs(near - near_without) < 0.01:
        effect = "no visible difference"
    else:
        effect = "a more even load" if near > near_without else "a less even load"
    return (
        f"With the neuron balance loss, in the window that ends at step {step}, {near:.1%} of "
        f"the neurons carried between half and twice a balanced load, against {near_without:.1%} "
        f"without it: {effect}. Never kept in that window: {dead} with it, {dead_without} without."
    )


def near_balance(layers: dict[str, LayerLoad]) -> float:
    """Share of neurons, 0 to 1, with a load between 1/2 and 2 times a balanced one."""
    histograms = [load.histogram for load in layers.values()]
    total = sum(sum(histogram.counts) for histogram in histograms)
    near = sum(
        count
        for histogram in histograms
        for limit, count in zip(histogram.limits, histogram.counts, strict=True)
        # limits are upper limits; a hair of room for the float32 of event files
        if 0.5001 < limit < 2.0001
    )
    return near / total if total else 0.0


def noise_note(runs: list[RunResult]) -> list[str]:
    """A warning where other work ran beside the runs; nothing on a quiet machine."""
    busiest = max(run.load_average for run in runs)
    own = max(run.world_size for run in runs)
    if busiest <= own + 1.0:
        return []
    return [
        f"The machine was busy with other work (load average up to {busiest:.1f}, of "
        f"which the ranks make {own}, on {cores()} cores): take no step time here for more than a "
        "rough figure."
    ]


def _against_unigram(unigram_loss: float, runs: list[RunResult]) -> str:
    limit = math.exp(unigram_loss)
    worst = max(runs, key=lambda run: run.val_loss)
    worst_ppl = math.exp(worst.val_loss)
    if worst_ppl < limit:
        return (
            f"All three learn from context: their validation perplexities are at most "
            f"{worst_ppl:.1f}, below the {limit:.1f} of a model that knows only how often each "
            "token occurs."
        )
    return (
        f"Not every run learned from context: {_label(worst)} ends at a validation perplexity of "
        f"{worst_ppl:.1f}, not below the {limit:.1f} of a model that knows only how often each "
        "token occurs. More steps are needed before the comparison means anything."
    )


def _at_equal_tokens(mone: RunResult, other: RunResult) -> str:
    ours, theirs = mone.val_loss, other.val_loss
    ending = {
        "better": f"MoNE wins by {theirs - ours:.3f}",
        "worse": f"MoNE loses by {ours - theirs:.3f}",
        "equal": f"a tie (they differ by less than {TIE_NATS})",
    }[verdict(ours, theirs)]
    return (
        f"At equal tokens ({mone.tokens:,}) MoNE's validation loss is {ours:.3f} nats against "
        f"{theirs:.3f} for {_label(other)}: {ending}."
    )


def _at_equal_flops(mone: RunResult, other: RunResult) -> str:
    flops = min(mone.active_flops, other.active_flops)
    ours, theirs = loss_at_flops(mone, flops), loss_at_flops(other, flops)
    ratio = mone.active_flops_per_step / other.active_flops_per_step
    head = (
        f"Counting only the neurons it keeps, MoNE needs {ratio:.2f} times the operations per "
        f"step of {_label(other)}"
    )
    if ours is None or theirs is None:
        return f"{head}; there is no common point of active FLOPs to compare at."
    ending = {"better": "MoNE is ahead", "worse": "MoNE is behind", "equal": "a tie"}
    return (
        f"{head}. At equal active FLOPs ({flops / 1e12:.2f} TFLOP) the losses are {ours:.3f} "
        f"and {theirs:.3f}: {ending[verdict(ours, theirs)]}. "
        "(The learning rates differ at that point, as the longer schedule is not over.)"
    )


def _time(mone: RunResult, total: RunResult) -> str:
    ratio = mone.step_ms / total.step_ms
    if ratio > 1.02:
        compared = f"{ratio:.2f} times as long as"
    elif ratio < 0.98:
        compared = f"{ratio:.2f} times the time of"
    else:
        compared = "about as long as"
    took = (
        f"A MoNE step took {mone.step_ms:.0f} ms, {compared} a step of {_label(total)} "
        f"({total.step_ms:.0f} ms). "
    )
    if mone.executed_flops_per_step <= mone.active_flops_per_step:
        return took + (
            "The backend used here computes only the kept neurons, after every gate; choosing and "
            "gathering them costs time that the dense model's matrix products do not need."
        )
    return took + (
        "The reference backend used here computes every neuron and masks afterwards, so selection "
        "saves no time in this demo and costs the search for the largest gates; the active FLOPs "
        "say what a kernel that skips neurons would compute, not what this machine did."
    )


def _memory(mone: RunResult, total: RunResult) -> str:
    return (
        f"Rank 0 held at most {mone.peak_bytes / 2**20:.0f} MiB with MoNE and "
        f"{total.peak_bytes / 2**20:.0f} MiB with {_label(total)}; on CPU ranks that is the whole "
        "process, libraries and the interpreter included."
    )


def _label(run: RunResult) -> str:
    return LABELS.get(run.name, run.name)
