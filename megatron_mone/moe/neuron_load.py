"""How often each neuron was kept: counted per layer, summarised over all ranks of a stage.

May touch: torch and process groups given as arguments. Shapes: E_l experts and F_l neurons of this
rank, E and F over all ranks, f_EF relative load of a neuron (1 when its expert is balanced).
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.common.load_edges import LOAD_EDGES

SUMMARY_FIELDS = (
    "kept_ratio", "neuron_load_max_over_mean", "neuron_load_p1", "neuron_load_p50",
    "neuron_load_p99", "dead_neurons", "expert_load_max_over_mean", "routed_rows",
)  # fmt: skip


class NeuronLoad(torch.nn.Module):
    """Kept counts of one layer on one rank, by step (for the bias) and by window (for the log).

    They are buffers that no checkpoint has: Megatron restores a layer's buffers after the forward
    passes with which it warms up a CUDA graph (core/transformer/cuda_graphs.py).

    Attributes:
        step_counts_EF, step_rows_E: [E_l, F_l] int64, rows of this step that kept the neuron; [E_l]
            its routed rows.
        window_counts_EF, window_rows_E: the same of the steps since the last summary.
    """

    step_counts_EF: Tensor
    step_rows_E: Tensor
    window_counts_EF: Tensor
    window_rows_E: Tensor

    def __init__(self, experts: int, neurons: int, device: torch.device) -> None:
        super().__init__()
        for name, shape in (("counts_EF", (experts, neurons)), ("rows_E", (experts,))):
            for since in ("step", "window"):
                zeros = torch.zeros(shape, dtype=torch.int64, device=device)
                self.register_buffer(f"{since}_{name}", zeros, persistent=False)

    @torch.no_grad()
    def add(self, counts_BF: Tensor, rows_B: Tensor) -> None:
        """Count the rows of one forward.

        Args:
            counts_BF: [B, F_l] rows that kept each neuron, by block; each expert's B / E_l blocks
                follow each other.
            rows_B: [B] rows.
        """
        experts, neurons = self.step_counts_EF.shape
        self.step_counts_EF += counts_BF.view(experts, -1, neurons).sum(dim=1)
        self.step_rows_E += rows_B.view(experts, -1).sum(dim=1)

    def end_step(self) -> None:
        """Move the step's counts into the window."""
        self.window_counts_EF += self.step_counts_EF
        self.window_rows_E += self.step_rows_E
        self.forget_step()

    def forget_step(self) -> None:
        """Count the step anew."""
        self.step_counts_EF.zero_()
        self.step_rows_E.zero_()

    def take_window(self) -> tuple[Tensor, Tensor]:
        """The window's (counts_EF, rows_E); a new window begins."""
        counts, rows = self.window_counts_EF.clone(), self.window_rows_E.clone()
        self.window_counts_EF.zero_()
        self.window_rows_E.zero_()
        return counts, rows


@dataclass(frozen=True)
class LoadSummary:
    """Facts about one layer over a window, equal on every rank of its stage.

    Attributes:
        values: one float per SUMMARY_FIELDS.
        histogram: [len(LOAD_EDGES) + 1] neurons per bin of relative load.
    """

    values: tuple[float, ...]
    histogram: Tensor


def summarise(
    counts_EF: Tensor,
    rows_E: Tensor,
    *,
    expt_dp_group: ProcessGroup,
    tp_ep_group: ProcessGroup,
    etp_size: int,
) -> LoadSummary:
    """Sum over expert replicas, gather all experts and neurons, and summarise.

    Args:
        counts_EF: [E_l, F_l] int64 kept counts of this rank.
        rows_E: [E_l] int64 routed rows of this rank.
        expt_dp_group: replicas of these experts.
        tp_ep_group: ranks of the other experts and neurons, ETP fastest.
        etp_size: ranks an expert's neurons are split over.
    """
    packed = torch.cat((counts_EF, rows_E.unsqueeze(1)), dim=1)
    torch.distributed.all_reduce(packed, group=expt_dp_group)
    parts = [torch.empty_like(packed) for _ in range(tp_ep_group.size())]
    torch.distributed.all_gather(parts, packed, group=tp_ep_group)
    rows = torch.cat([part[:, -1] for part in parts[::etp_size]])
    counts = torch.cat(
        [
            torch.cat([part[:, :-1] for part in parts[i : i + etp_size]], dim=1)
            for i in range(0, len(parts), etp_size)
        ]
    )
    return summarise_counts(counts, rows)


def relative_load(counts_EF: Tensor) -> Tensor:
    """f_EF = F * counts / the expert's kept neurons; 1 is balanced, an idle expert has 0."""
    kept_E1 = counts_EF.sum(dim=1, keepdim=True).clamp(min=1)
    return counts_EF.double() * counts_EF.shape[1] / kept_E1


def summarise_counts(counts_EF: Tensor, rows_E: Tensor) -> LoadSummary:
    """Summary of whole-model counts; percentiles are over all neurons of experts with rows.

    Args:
        counts_EF: [E, F] int64 kept counts.
        rows_E: [E] int64 routed rows.
    """
    rows = int(rows_E.sum())
    used_EF = counts_EF[rows_E > 0]
    if rows == 0:
        return LoadSummary((0.0,) * len(SUMMARY_FIELDS), torch.zeros(len(LOAD_EDGES) + 1))
    load = relative_load(used_EF).flatten()
    # torch.quantile refuses more than 16M values; kthvalue has no such bound
    p1, p50, p99 = (
        float(load.kthvalue(max(1, min(load.numel(), round(q * load.numel())))).values)
        for q in (0.01, 0.50, 0.99)
    )
    values = (
        int(counts_EF.sum()) / (rows * counts_EF.shape[1]),
        float(load.max()),
        p1,
        p50,
        p99,
        float((counts_EF == 0).sum()),
        float(rows_E.max() * rows_E.numel() / rows),
        float(rows),
    )
    edges = torch.tensor(LOAD_EDGES, dtype=torch.float64, device=load.device)
    bins = torch.bucketize(load, edges, right=True)
    return LoadSummary(values, torch.bincount(bins, minlength=len(LOAD_EDGES) + 1).float())
