"""The backends of the masked expert by name: what each can run here, and which one `auto` takes.

A backend is a module that calls `register` when it is imported (kernels/__init__.py imports them).
May touch: what backends say of themselves, the table of measured times.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.measured import nearest_cell
from megatron_mone.kernels.neuron_mask import NeuronMask

if TYPE_CHECKING:
    from megatron_mone.kernels.triton.grouped_experts import KeptEntries


class GroupedMLPOutput(NamedTuple):
    """What a backend, and `grouped_mlp_with_gates`, return."""

    y_NH: Tensor
    """[N, H] expert outputs, the router's probability applied."""
    mask: NeuronMask
    """The neurons computed."""
    gate_K: Tensor | None = None
    """[K] gate activations of the mask's entries, with their graph, for a balance loss; None where
    there are `entries`."""
    gate_NF: Tensor | None = None
    """[N, F] all gate activations, with their graph, where they were asked for."""
    a_K: Tensor | None = None
    """[K] pre-activations of the entries, without graph, where backward keeps them: who needs the
    gates in its own backward pass makes them again and keeps nothing."""
    entries: KeptEntries | None = None
    """Of the kept entries on their device, which a balance loss sums and gives its slope to."""
    sums_by: type | None = None
    """What sums the gates of a mask (moe/gate_shares.py: gate_sums); None: what runs here."""


@dataclass(frozen=True)
class Call:
    """What a choice of backend depends on. Sizes are None before the first batch."""

    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    activation: str = "silu"
    all_gates: bool = False
    """Whether the balance loss needs the gates of unchosen neurons."""
    by_rule: bool = False
    """Whether neurons are chosen by a function of all gates (threshold, bias, other ranks)."""
    block: int = 1
    groups: int | None = 1
    """None where a mask is given, which does not say."""
    rows: int | None = None
    experts: int | None = None
    neurons: int | None = None
    hidden: int | None = None
    kept_share: float | None = None
    """S / F; None where asking a given mask would wait for its device."""

    def sized(self, rows: int, weight_EFH: Tensor, choose: Choose) -> Call:
        """The same call with the sizes of a batch."""
        experts, neurons, hidden = weight_EFH.shape
        sized = replace(self, rows=rows, experts=experts, neurons=neurons, hidden=hidden)
        if isinstance(choose, Selection):
            share: float | None = choose.kept / max(1, neurons)
            return replace(sized, block=choose.block, groups=choose.groups, kept_share=share)
        if isinstance(choose, NeuronMask):
            share = None if choose.known_entries is None else choose.density
            return replace(sized, block=choose.block, groups=None, kept_share=share)
        return replace(sized, by_rule=True)


@dataclass(frozen=True)
class Backend:
    """One implementation.

    Attributes:
        name: what `backend=` and mone_backend call it.
        why_not: the reason a call cannot run on it here, or None.
        run: (x, probs, counts, w_gate, w_up, w_down, *, choose, activation, etp_group, all_gates)
            -> GroupedMLPOutput; arguments are checked.
        counts_on_device: whether `run` takes counts as a tensor on x's device, and rows past their
            sum; else a list of numbers, for which it waits for the device.
        automatic: whether `auto` may take it: one that never ran on its hardware is not, unless it
            can be doubted there.
        note: what a reader must know of it, or "".
        doubt: asked by `auto` alone, of a call that it can run: why its answers are not to be
            trusted on this device, or None.
    """

    name: str
    why_not: Callable[[Call], str | None]
    run: Callable[..., GroupedMLPOutput]
    automatic: bool = True
    note: str = ""
    counts_on_device: bool = False
    doubt: Callable[[Call], str | None] = lambda call: None


class Chosen(NamedTuple):
    """A backend and why."""

    backend: Backend
    reason: str


BACKENDS: dict[str, Backend] = {}
"""By name, in the order that `auto` asks them."""


def register(backend: Backend) -> None:
    """Make a backend known under its name; `reference` stays last, as what always runs."""
    BACKENDS[backend.name] = backend
    if "reference" in BACKENDS:
        BACKENDS["reference"] = BACKENDS.pop("reference")


def choose_backend(name: str, call: Call) -> Chosen:
    """The backend that `name` runs on here, and why.

    Raises:
        ValueError: the name is unknown, or what it needs is not here; says what.
    """
    if name not in ("auto", *BACKENDS):
        raise ValueError(f"backend = {name!r} is not one of auto, {', '.join(BACKENDS)}")
    if name != "auto":
        backend = BACKENDS[name]
        reason = backend.why_not(call)
        if reason is not None:
            raise ValueError(
                f"backend = {name!r} cannot run here: {reason}; use 'reference' or 'auto'"
            )
        return Chosen(backend, f"mone_backend = {name}")
    usable, skipped = [], []
    for backend in BACKENDS.values():
        reason = backend.note
        if backend.automatic:
            reason = backend.why_not(call) or backend.doubt(call)
        if reason is None:
            usable.append(backend)
        else:
            skipped.append(f"not {backend.name}: {reason}")
    return _fastest(usable, skipped, call)


def _fastest(usable: list[Backend], skipped: list[str], call: Call) -> Chosen:
    """By the nearest measured cell; the first usable where nothing like the call was measured."""
    if len(usable) == 1:
        return Chosen(usable[0], "; ".join(skipped) or "the only one")
    cell = None
    if call.rows is not None and call.experts and call.kept_share is not None:
        per_expert = call.rows / call.experts
        cell = nearest_cell(call.device, call.dtype, per_expert, call.kept_share, call.block)
    if cell is None or not all(backend.name in cell.ms for backend in usable):
        return Chosen(usable[0], "the first usable one: no measurement is like this call")
    times = {backend.name: cell.ms[backend.name] for backend in usable}
    best = min(usable, key=lambda backend: times[backend.name])
    measured = ", ".join(f"{name} {ms:.3g} ms" for name, ms in times.items())
    return Chosen(
        best,
        f"fastest at {cell.rows_per_expert:g} rows an expert, S / F {cell.kept_share:g}, "
        f"block {cell.block}, {cell.dtype} on {cell.machine}: {measured}",
    )


def resolve_backend(name: str, **facts: Any) -> str:
    """Name of the backend that `name` runs on here; `facts` are fields of `Call`.

    Raises:
        ValueError: as `choose_backend`.
    """
    return choose_backend(name, Call(**facts)).backend.name
