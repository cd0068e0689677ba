"""What is raced: one cell's shape, and the tensors every implementation gets.

Cells of one shape and dtype share their weights, which take longer to make than to run.

Shapes: N routed rows grouped by expert, H hidden size, F neurons of an expert, E experts,
S = r F neurons kept.
"""

from dataclasses import asdict, dataclass, replace
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from megatron_mone.benchmarking.routing import rows_of_experts
from megatron_mone.kernels.race_results import DTYPES, ROUTINGS, CellConfig

ALIGNMENT = 16
"""Bytes that torch's grouped_mm wants a row to be a multiple of."""


@dataclass(frozen=True)
class Cell:
    """One race: a shape, a dtype, a routing, and the neuron ratios that MoNE runs at.

    Attributes:
        tokens: N, routed rows.
        hidden: H.
        neurons: F.
        experts: E.
        ratios: r = S / F of each MoNE entry.
        dtype: a name of DTYPES.
        routing: a name of ROUTINGS.
        neuron_block: B adjacent neurons that are kept or dropped together.
    """

    tokens: int
    hidden: int
    neurons: int
    experts: int
    ratios: tuple[float, ...]
    dtype: str = "fp32"
    routing: str = "balanced"
    neuron_block: int = 1

    def check(self) -> None:
        """Refuse a cell that cannot be raced.

        Raises:
            ValueError: names the command line's option, its value and what is allowed.
        """
        for option in ("tokens", "hidden", "neurons", "experts", "neuron_block"):
            if getattr(self, option) < 1:
                _refuse(option, getattr(self, option), "at least 1")
        if self.dtype not in DTYPES:
            _refuse("dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        if self.routing not in ROUTINGS:
            _refuse("routing", self.routing, f"one of {', '.join(ROUTINGS)}")
        step = ALIGNMENT // DTYPES[self.dtype].itemsize
        for option in ("hidden", "neurons"):
            if getattr(self, option) % step:
                _refuse(option, getattr(self, option), f"a multiple of {step} in {self.dtype} "
                        "(rows of 16 bytes, as grouped_mm needs)")  # fmt: skip
        if self.neurons % self.neuron_block:
            _refuse("neuron_block", self.neuron_block, f"a divisor of --neurons {self.neurons}")
        for ratio in self.ratios:
            self._check_ratio(ratio)

    def _check_ratio(self, ratio: float) -> None:
        if not 0.0 < ratio <= 1.0:
            _refuse("ratio", ratio, "above 0 and at most 1")
        exact, block = ratio * self.neurons, self.neuron_block
        kept = round(exact)
        if abs(kept - exact) > 1e-6 * self.neurons or kept % block or kept < block:
            below = max(block, int(exact) // block * block)
            _refuse(
                "ratio", ratio,
                f"a whole number of {f'blocks of {block} ' if block > 1 else ''}neurons, and it is "
                f"{exact:g} of --neurons {self.neurons}: {below}/{self.neurons} keeps {below}",
            )  # fmt: skip

    def kept(self, ratio: float) -> int:
        """S, the neurons a row keeps at `ratio`."""
        return round(ratio * self.neurons)

    @property
    def counts(self) -> list[int]:
        """E row counts that sum to N."""
        return rows_of_experts(self.routing, self.tokens, self.experts)

    @property
    def label(self) -> str:
        """One line for people."""
        return self.config.shape

    @property
    def config(self) -> CellConfig:
        """As files have it."""
        return CellConfig(**{**asdict(self), "ratios": list(self.ratios)})

    def bytes_needed(self) -> int:
        """A generous estimate of the memory that a race of this cell takes at its peak."""
        weights = self.experts * self.neurons * self.hidden * DTYPES[self.dtype].itemsize
        rows = self.tokens * (24 * self.neurons + 10 * self.hidden) * 4
        # Weights in two layouts, one more for a peer that holds its own, and gradients beside the
        # copies that the reference joins and keeps; of activations it keeps about twenty values a
        # neuron. In bf16 there are weights and gradients in float32, too.
        held = 15 if self.dtype == "fp32" else 30
        return held * weights + rows + (1 << 28)


@dataclass(frozen=True)
class Inputs:
    """The same values for everybody; weights are leaves that adapters view or rearrange.

    Attributes:
        x_NH, dy_NH: input rows and incoming gradient.
        probs_N: float32 router probabilities.
        counts: rows of each expert.
        gate_up_E2FH: [E, 2 F, H], gate first.
        down_EHF: [E, H, F], as linear layers hold it.
        down_EFH: the same values neuron by neuron.
    """

    x_NH: Tensor
    dy_NH: Tensor
    probs_N: Tensor
    counts: list[int]
    gate_up_E2FH: Tensor
    down_EHF: Tensor
    down_EFH: Tensor

    @property
    def neurons(self) -> int:
        """F."""
        return self.down_EFH.shape[1]

    @cached_property
    def in_float32(self) -> "Inputs":
        """The same, converted once for all who multiply in float32."""
        return replace(
            self, x_NH=self.x_NH.float(), dy_NH=self.dy_NH.float(),
            gate_up_E2FH=self.gate_up_E2FH.float(), down_EHF=self.down_EHF.float(),
            down_EFH=self.down_EFH.float(),
        )  # fmt: skip

    @property
    def expert_of_N(self) -> Tensor:
        """The expert of each row."""
        counts = torch.tensor(self.counts, device=self.x_NH.device)
        return torch.arange(counts.numel(), device=counts.device).repeat_interleave(counts)

    def leaves(self) -> tuple[Tensor, Tensor]:
        """(x_NH, probs_N), fresh leaves that ask for gradients and share the storage."""
        return leaf(self.x_NH), leaf(self.probs_N)

    def shared_storages(self) -> set[int]:
        """Addresses of the storages that every implementation is given."""
        tensors = (self.x_NH, self.dy_NH, self.probs_N, self.gate_up_E2FH, self.down_EHF,
                   self.down_EFH)  # fmt: skip
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def leaf(tensor: Tensor) -> Tensor:
    """The same storage as a leaf of its own graph that asks for a gradient."""
    return tensor.detach().requires_grad_()


def make_inputs(cell: Cell, device: torch.device) -> Inputs:
    """Random values, the same for the same cell; weights are scaled to keep variances near 1."""
    generator = torch.Generator(device).manual_seed(20)
    n, h, dtype = cell.tokens, cell.hidden, DTYPES[cell.dtype]
    gate_up_E2FH, down_EHF, down_EFH = _weights(h, cell.neurons, cell.experts, dtype, device)
    return Inputs(
        x_NH=_normal((n, h), 1.0, generator, dtype),
        dy_NH=_normal((n, h), 1.0, generator, dtype),
        probs_N=torch.rand(n, generator=generator, device=device).mul_(0.9).add_(0.1),
        counts=cell.counts,
        gate_up_E2FH=gate_up_E2FH,
        down_EHF=down_EHF,
        down_EFH=down_EFH,
    )


@lru_cache(maxsize=1)
def _weights(
    h: int, f: int, e: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate and up, down, and down neuron by neuron; nobody writes to them."""
    generator = torch.Generator(device).manual_seed(21)
    gate_up_E2FH = _normal((e, 2 * f, h), h**-0.5, generator, dtype)
    down_EHF = _normal((e, h, f), f**-0.5, generator, dtype)
    return gate_up_E2FH, down_EHF, down_EHF.transpose(1, 2).contiguous()


def _normal(
    shape: tuple[int, ...], scale: float, generator: torch.Generator, dtype: torch.dtype
) -> Tensor:
    values = torch.randn(shape, generator=generator, device=generator.device)
    return values.mul_(scale).to(dtype)


def _refuse(option: str, value: object, allowed: str) -> None:
    raise ValueError(f"--{option.replace('_', '-')} {value} is not allowed: it must be {allowed}")
