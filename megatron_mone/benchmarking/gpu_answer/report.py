"""The answer as Markdown, tables by section. Touches nothing."""

from collections.abc import Iterator, Sequence

from megatron_mone.benchmarking.gpu_answer.sections.machine import BF16, COPY
from megatron_mone.kernels.gpu_answer_results import DENSE, GpuAnswer, LayerTime, Section, Sizes

INTERPRETED = (
    "**Triton's interpreter, not a GPU.** Values are checked; every time below is the "
    "interpreter's and says nothing of a GPU. No table is made of it."
)
_TITLES = {
    "machine": "Machine", "agreement": "Kernels against float64",
    "kernels": "Kernels: time, TFLOP/s, GB/s", "layers": "Layer: experts forward and backward",
    "waits": "Host waits, graph capture and replay", "decode": "Decode: few rows, no gradients",
    "gaps": "Kernels of a layer and the gaps between them",
}  # fmt: skip


def markdown(answer: GpuAnswer) -> str:
    """The whole report."""
    lines = ["# What the first GPU at hand answers", ""]
    if answer.interpreter:
        lines += [INTERPRETED, ""]
    lines += [
        f"Device: {answer.device} ({answer.machine_class}); {answer.seconds:g} s asked for. "
        "Times are of this run; TFLOP/s and GB/s are its times against the flops and bytes that "
        "each launch is said to make, the planner's numbers, which no counter of the device gave.",
    ]
    peaks = answer.sections[0].peaks
    for section in answer.sections:
        state = section.state + (f": {section.error}" if section.error else "")
        lines += ["", f"## {_TITLES[section.name]}", "", f"{state}; {section.seconds:.0f} s.", ""]
        lines += list(_tables(section, peaks))
        lines += [f"- {note}" for note in section.notes]
    return "\n".join(lines) + "\n"


def _tables(section: Section, peaks: dict[str, float]) -> Iterator[str]:
    for label, value in section.facts.items():
        yield f"- {label}: {value}"
    for label, rate in section.peaks.items():
        yield f"- {label}: {rate:.3g}"
    if section.agreements:
        good = sum(row.agrees and row.same_bits for row in section.agreements)
        yield f"{good} of {len(section.agreements)} agree, with the same bits in every run."
        yield ""
        yield from _table(
            ("kernel", "shape", "error", "allowed", "agrees", "same bits"),
            [(row.kernel, row.shape, "no number" if row.error is None else f"{row.error:.1e}",
              f"{row.tolerance:.0e}", _yes(row.agrees), _yes(row.same_bits))
             for row in section.agreements],
        )  # fmt: skip
    if section.kernels:
        yield from _table(
            ("kernel", "shape", "ms", "TFLOP/s", "of the peak", "GB/s", "of the copy"),
            [(row.kernel, _shape(row), f"{row.ms:.4g}", *_rate(row.flops, row.ms, 1e12,
              peaks.get(BF16)), *_rate(row.bytes, row.ms, 1e9, peaks.get(COPY)))
             for row in section.kernels],
        )  # fmt: skip
    if section.layers:
        yield from _table(
            ("layer", "shape", "forward ms", "+ backward ms", "replayed ms", "to dense", "peak MB"),
            [_layer(row, section.layers) for row in section.layers],
        )  # fmt: skip
    if section.checks:
        yield from _table(
            ("check", "passed", "words"),
            [(row.name, _yes(row.passed), row.words) for row in section.checks],
        )
    if section.gaps:
        yield from _table(
            ("layer", "kernels", "busy ms", "span ms", "idle"),
            [(row.name, str(row.kernels), f"{row.busy_ms:.4g}", f"{row.span_ms:.4g}",
              f"{1 - row.busy_ms / row.span_ms:.1%}" if row.span_ms else "")
             for row in section.gaps],
        )  # fmt: skip


def _layer(row: LayerTime, rows: Sequence[LayerTime]) -> tuple[str, ...]:
    extra = [word for word, on in (("balance loss", row.balance_loss), ("NaN check", row.nan_check))
             if on]  # fmt: skip
    name = ", ".join([row.name if row.name == DENSE else f"{row.name} B {row.block}", *extra])
    dense = [one for one in rows if one.name == DENSE and _place(one) == _place(row)]
    ratio = f"{_ratio(row, dense[0]):.2f}" if dense else ""
    return (
        name, _shape(row), f"{row.forward_ms:.4g}", _ms(row.forward_backward_ms),
        _ms(row.replay_ms), ratio, "" if row.peak_bytes is None else f"{row.peak_bytes / 1e6:.0f}",
    )  # fmt: skip


def _ratio(row: LayerTime, dense: LayerTime) -> float:
    """Of their times on the device alone where both were measured, else with the host's."""
    pairs = zip(_times(row), _times(dense), strict=True)
    return next(mine / theirs for mine, theirs in pairs if mine and theirs)


def _times(row: LayerTime) -> tuple[float | None, ...]:
    return row.replay_ms, row.forward_backward_ms, row.forward_ms


def _place(row: Sizes) -> tuple[object, ...]:
    return row.rows, row.experts, row.hidden, row.neurons, row.dtype


def _shape(row: Sizes) -> str:
    return (
        f"N {row.rows}, E {row.experts}, H {row.hidden}, F {row.neurons}, S {row.kept}, {row.dtype}"
    )


def _rate(amount: int, ms: float, unit: float, peak: float | None) -> tuple[str, str]:
    if not amount:
        return "", ""
    rate = amount / ms * 1e3
    return f"{rate / unit:.4g}", f"{rate / peak:.0%}" if peak else ""


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _yes(value: bool | None) -> str:
    return "not checked" if value is None else ("yes" if value else "**no**")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"| {' | '.join('---' for _ in head)} |"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
    yield ""
