"""The gated feed-forward parts of a transformers model, and keeping only some of their neurons.

A part computes h = act(gate) x up and W_down h, of every token (dense), or an expert of the tokens
that are routed to it. What it hands to W_down goes through a function of ours, which may keep a
share of each row's neurons and may count; weights stay as they are.

Symbols: N rows (tokens, or tokens of an expert), F neurons, H hidden size, E experts (1 of a dense
part), R rank. Touches: the model's hooks, while a `watched` block lasts.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron_mone.conversion.hf_model.modeling_mone import MoNEExperts, largest
from megatron_mone.studies.measuring.sparsity_names import GATE, PRODUCT, R_SPARSE, RANDOM


@dataclass(frozen=True)
class GatedPart:
    """A dense gated FFN, or all experts of a layer.

    Attributes:
        name: of its module.
        layer: counted from 0.
        module: of the model.
    """

    name: str
    layer: int
    module: nn.Module

    @cached_property
    def down_EHF(self) -> Tensor:
        """The weights that neurons' values are multiplied by."""
        down = self.module.down_proj
        if isinstance(down, nn.Linear):
            return down.weight.detach()[None]
        weight = down.detach()  # type: ignore[operator]
        return weight.mT if getattr(self.module, "is_transposed", False) else weight

    @property
    def neurons(self) -> int:
        """F, of one expert."""
        return self.down_EHF.shape[2]

    @cached_property
    def norm_EF(self) -> Tensor:
        """Of each neuron's column of W_down."""
        return self.down_EHF.float().norm(dim=1)

    @cached_property
    def singular_EFR(self) -> Tensor:
        """W_down's right singular vectors, the largest singular value first."""
        return torch.linalg.svd(self.down_EHF.float(), full_matrices=False).Vh.mT


@dataclass(frozen=True)
class Rows:
    """What a part computes of some rows.

    Attributes:
        part: of the model.
        expert_N: whose the rows are; 0 of a dense part.
        gate_NF: act(gate).
        up_NF: of the other projection.
        h_NF: what the model made of both.
    """

    part: GatedPart
    expert_N: Tensor
    gate_NF: Tensor
    up_NF: Tensor
    h_NF: Tensor


Watch = Callable[[Rows], Tensor]
"""Returns the h_NF that the model goes on with."""


def gated_parts(model: Any) -> list[GatedPart]:
    """What of a model can be measured, in order; of a MoNE model the experts that choose.

    Raises:
        ValueError: it has none, or one that computes something else; names what was found.
    """
    found = [
        GatedPart(name, int(number[0]) if (number := re.findall(r"\d+", name)) else 0, module)
        for name, module in model.named_modules()
        if _is_gated(module)
    ]
    kind = type(model).__name__
    if not found:
        there = {name.rpartition(".")[2] for name, one in model.named_modules() if _weights(one)}
        raise ValueError(
            f"{kind} has no gated FFN (gate_proj, up_proj and down_proj): it has "
            f"{', '.join(sorted(there))}; give a model with a gate"
        )
    if any(_is_fused(part.module) for part in found) and not _is_mone(model):
        model.set_experts_implementation("grouped_mm")  # asks `_apply_gate` for all rows at once
    tokens = torch.arange(8, device=model.device)[None]
    with watched(found, partial(_checked, kind)), torch.no_grad():
        model(tokens)
    return [part for part in found if chosen_by_itself(part) < 1] or found


def chosen_by_itself(part: GatedPart) -> float:
    """The share of its neurons that a part keeps as it is: 1, or a MoNE's."""
    module = part.module
    if isinstance(module, MoNEExperts) and not module.choice.every:
        return module.choice.most / part.neurons
    return 1.0


def _weights(module: nn.Module) -> bool:
    return any(weight.dim() > 1 for weight in module.parameters(recurse=False))


def _is_fused(module: nn.Module) -> bool:
    return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)


def _is_mone(model: nn.Module) -> bool:
    return any(isinstance(module, MoNEExperts) for module in model.modules())


def _is_gated(module: nn.Module) -> bool:
    first = ("gate_up_proj",) if hasattr(module, "gate_up_proj") else ("gate_proj", "up_proj")
    kind = nn.Parameter if _is_fused(module) else nn.Linear
    return all(isinstance(getattr(module, one, None), kind) for one in (*first, "down_proj"))


def _checked(kind: str, rows: Rows) -> Tensor:
    """Refuse a part that is not act(gate) x up, an FFN with a limit or a third factor."""
    if not torch.allclose(rows.h_NF, rows.gate_NF * rows.up_NF, rtol=1e-2, atol=1e-6):
        raise ValueError(
            f"{kind}: {rows.part.name} ({type(rows.part.module).__name__}) computes something else "
            "than act(gate) x up; give a model with plain gated FFNs"
        )
    return rows.h_NF


@contextmanager
def watched(parts: Sequence[GatedPart], watch: Watch) -> Iterator[None]:
    """Have what these parts compute go through `watch`."""
    with ExitStack() as stack:
        for part in parts:
            attach = _experts if _is_fused(part.module) else _dense
            stack.enter_context(attach(part, watch))
        yield


@contextmanager
def _dense(part: GatedPart, watch: Watch) -> Iterator[None]:
    module: Any = part.module
    seen: dict[str, Tensor] = {}

    def before_down(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        a, u = seen["a"].chunk(2, dim=-1) if "u" not in seen else (seen["a"], seen["u"])
        seen.clear()
        flat = [one.flatten(0, -2) for one in (_activation(module)(a), u, args[0])]
        expert_N = torch.zeros(len(flat[0]), dtype=torch.int64, device=a.device)
        return (watch(Rows(part, expert_N, *flat)).view_as(args[0]),)

    def see(name: str) -> Callable[..., None]:
        return lambda module, args, output: seen.update({name: output})

    if hasattr(module, "gate_up_proj"):
        hooks = [module.gate_up_proj.register_forward_hook(see("a"))]
    else:
        hooks = [module.gate_proj.register_forward_hook(see("a")),
                 module.up_proj.register_forward_hook(see("u"))]  # fmt: skip
    hooks.append(module.down_proj.register_forward_pre_hook(before_down))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    names = ("act_fn", "activation_fn", "act")
    return next((getattr(module, n) for n in names if hasattr(module, n)), nn.functional.silu)


@contextmanager
def _experts(part: GatedPart, watch: Watch) -> Iterator[None]:
    """Fused experts compute their rows expert by expert, in one call or in one for each expert."""
    module: Any = part.module
    left_N = torch.empty(0, dtype=torch.int64)

    def before(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        nonlocal left_N
        index = args[1] if len(args) > 1 else kwargs["top_k_index"]
        left_N = index.flatten().sort().values

    def through(gate_NF: Tensor, u_NF: Tensor, h_NF: Tensor) -> Tensor:
        nonlocal left_N
        expert_N, left_N = left_N[: len(h_NF)], left_N[len(h_NF) :]
        return watch(Rows(part, expert_N, gate_NF, u_NF, h_NF))

    def apply_gate(gate_up: Tensor) -> Tensor:
        a_NF, u_NF = gate_up.chunk(2, dim=-1)
        h_NF = type(module)._apply_gate(module, gate_up)
        return through(module.act_fn(a_NF), u_NF, h_NF)

    def kept(gate_NF: Tensor, u_NF: Tensor, bias_F: Tensor | None = None) -> Tensor:
        del bias_F
        return through(gate_NF, u_NF, gate_NF * u_NF)

    ours = {"_kept": kept, "_native": lambda *words: None}
    instead = ours if isinstance(module, MoNEExperts) else {"_apply_gate": apply_gate}
    hook = module.register_forward_pre_hook(before, with_kwargs=True)
    for name, function in instead.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        hook.remove()
        for name in instead:
            delattr(module, name)


def kept_of(share: float, neurons: int) -> int:
    """Neurons of a share, at least one."""
    return max(1, round(share * neurons))


class Keep:
    """Keeps a share of each row's neurons, exactly that many.

    Args:
        criterion: of `sparsity_names.CRITERIA`.
        share: of the neurons of a row, in (0, 1]; 1 changes nothing.
        seed: of what is drawn.
    """

    def __init__(self, criterion: str, share: float, seed: int = 1) -> None:
        self.criterion, self.share = criterion, share
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, rows: Rows) -> Tensor:
        """[N, F] of what is kept of h."""
        if self.share == 1:
            return rows.h_NF
        neurons = rows.part.neurons
        if self.criterion == R_SPARSE:
            return self._with_rank(rows, kept_of(self.share / 2, neurons))
        mask_NF = largest(self.scores(rows), kept_of(self.share, neurons))
        return rows.h_NF.masked_fill(~mask_NF, 0.0)

    def scores(self, rows: Rows) -> Tensor:
        """[N, F]: the largest of a row are kept, of equal ones those of a lower index."""
        if self.criterion == GATE:
            return rows.gate_NF.abs()
        if self.criterion == RANDOM:
            return torch.rand(rows.h_NF.shape, generator=self._generator).to(rows.h_NF.device)
        size_NF = rows.h_NF.abs()
        return size_NF if self.criterion == PRODUCT else size_NF * rows.part.norm_EF[rows.expert_N]

    def _with_rank(self, rows: Rows, kept: int) -> Tensor:
        """R-Sparse: what is not kept is projected on W_down's leading right singular vectors, for
        W_down of the projection is W_down of that rank."""
        mask_NF = largest(self.scores(rows), kept)
        rest_NF = rows.h_NF.masked_fill(mask_NF, 0.0)
        _, hidden, neurons = rows.part.down_EHF.shape
        rank = int(self.share / 2 * hidden * neurons / (hidden + neurons))
        kept_NF = rows.h_NF - rest_NF
        for expert in rows.expert_N.unique().tolist():
            here_N = rows.expert_N == expert
            basis_FR = rows.part.singular_EFR[expert, :, :rank].to(rest_NF.dtype)
            kept_NF[here_N] += rest_NF[here_N] @ basis_FR @ basis_FR.mT
        return kept_NF
