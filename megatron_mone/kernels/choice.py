"""How an expert's neurons are chosen, as every backend takes it. May touch: torch, NeuronMask."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_mone.kernels.neuron_mask import NeuronMask


@dataclass(frozen=True)
class Selection:
    """Exact top-S of |g| per row, ties to the lower index, NaN above every number.

    With blocks, the S / B blocks of B adjacent neurons with the largest sums of |g|, added as
    `neuron_selection.block_scores` says.

    Attributes:
        kept: S neurons of each row.
        groups: G equal contiguous groups of the F neurons; each keeps S / G.
        block: B, divides F / G and S / G; 1 is the paper's choice of single neurons.
    """

    kept: int
    groups: int = 1
    block: int = 1

    def check(self, neurons: int) -> None:
        """Refuse a selection that F neurons do not allow.

        Raises:
            ValueError: names the argument of `mone_grouped_mlp`, its value and what is allowed.
        """
        kept, groups, block = self.kept, self.groups, self.block
        if block < 1 or neurons % block:
            raise ValueError(f"neuron_block = {block}: it must divide the {neurons} neurons")
        if groups < 1 or neurons % (groups * block) or kept % (groups * block):
            raise ValueError(
                f"neurons_per_token = {kept} with neuron_groups = {groups} and neuron_block = "
                f"{block}: groups of whole blocks must divide both it and the {neurons} neurons"
            )
        if not groups * block <= kept <= neurons:
            raise ValueError(
                f"neurons_per_token = {kept}: it must be {groups * block} (a block of each group) "
                f"to {neurons}"
            )


@dataclass(frozen=True, eq=False)
class BiasedRule:
    """A rule over all gates, for which each expert may add a bias of its own.

    Attributes:
        select: (gate activations [N, F], bias [N, F] or None) -> [N, F] bool.
        bias_EF: of the experts, or None.
        counts_E: rows of each expert; on the device of the bias, choosing waits for nothing.
    """

    select: Callable[[Tensor, Tensor | None], Tensor]
    bias_EF: Tensor | None
    counts_E: Tensor

    def __call__(self, gate_NF: Tensor) -> Tensor:
        """[N, F] bool of the gate activations [N, F]."""
        if self.bias_EF is None:
            return self.select(gate_NF, None)
        counts_E, rows = self.counts_E.to(self.bias_EF.device), gate_NF.shape[0]
        return self.select(
            gate_NF, self.bias_EF.repeat_interleave(counts_E, dim=0, output_size=rows)
        )


Choose = Selection | NeuronMask | Callable[[Tensor], Tensor]
"""A selection; a ready mask; or gate activations [N, F] (detached) -> [N, F] bool."""


def promised(choose: Choose) -> tuple[int, int | None]:
    """(B, S) that a choice promises of every row: whole blocks of B neurons, S neurons or None."""
    return (1, None) if callable(choose) else (choose.block, choose.kept)
