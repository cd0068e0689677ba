"""MoNE's lines in the log and in TensorBoard, through Megatron's own metrics tracker.

Megatron's training loop calls the tracker's `report` once after every optimizer step, on every
rank; that call is also where a layer learns that the step has ended. May touch: the tracker
singleton, through Megatron's setter.
"""

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import (
    MetricEntry,
    MoEMetricsTracker,
    get_moe_metrics_tracker,
    set_moe_metrics_tracker,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.moe.neuron_load import SUMMARY_FIELDS, LoadSummary

TRAFFIC = ("selection_exchange", "mask_dispatch")  # the columns of TrackedLayer.bytes_sent


class TrackedLayer(Protocol):
    """What the tracker needs of a MoNE layer."""

    def table_row(self) -> int | None:
        """0-based row of the layer among decoder, then MTP layers; None before its first use."""

    def end_step(self) -> None:
        """Called on every rank after the optimizer step."""

    def forget_step(self) -> None:
        """What was counted of the step under way was of no training: a CUDA graph's warm-up."""

    def summary(self) -> LoadSummary:
        """Collective over the stage: load facts since the last call."""

    def bytes_sent(self) -> tuple[int, int]:
        """Bytes this rank sent to agree on neurons, and to carry masks, since the last call."""


class MoNEMetricsTracker(MoEMetricsTracker):
    """Megatron's tracker plus, per MoNE layer: balance loss, kept ratio, neuron and expert load.

    Attributes:
        decoder_layers: of the model; Megatron's `report` is told a hybrid model's MoE layers alone.
        predicting_layers: depths of multi-token prediction behind them.
        log_interval: steps between summaries (Megatron's --log-interval).
        interval_seconds: seconds of training since the last summary, evaluation left out.
        step_flops: (executed, active) floating-point operations of one step over all ranks, or
            None; `model.step_flops` sets it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._layers: list[weakref.ref[Any]] = []
        self._steps_in_window = 0
        self._reporting = False  # after `end_step`, which has nothing more to forget
        self.decoder_layers = self.predicting_layers = 0
        self.log_interval = 1
        self.interval_seconds: Callable[[], float] | None = None
        self.step_flops: Callable[[], tuple[float, float]] | None = None

    def register(self, layer: TrackedLayer) -> None:
        """Follow a layer for as long as it lives."""
        self._layers.append(weakref.ref(layer))

    def record(
        self,
        name: str,
        value: Tensor,
        layer_number: int,
        num_layers: int,
        reduce_group: ProcessGroup | None = None,
        avg_group: ProcessGroup | None = None,
        needs_dp_avg: bool = True,
    ) -> None:
        """As Megatron's, in one launch: its `values[i] += value` copies the sum back as well."""
        cell = self.cell(
            name, layer_number, num_layers, value.device, reduce_group, avg_group, needs_dp_avg
        )
        if cell is not None:
            cell.add_(value.detach())

    def cell(
        self, name: str, layer_number: int | None, num_layers: int, device: torch.device,
        reduce_group: ProcessGroup | None, avg_group: ProcessGroup | None = None,
        needs_dp_avg: bool = True,
    ) -> Tensor | None:  # fmt: skip
        """Where `record` adds up, for a kernel that adds there itself: a float32 scalar.

        Args:
            name, layer_number, num_layers, reduce_group, avg_group, needs_dp_avg: as of `record`.
            device: of the values.

        Returns:
            None where the layer has no number.
        """
        if layer_number is None:
            return None
        if name not in self._metrics:
            self._metrics[name] = MetricEntry(values=torch.zeros(num_layers, device=device))
        entry = self._metrics[name]
        entry.reduce_group, entry.avg_group = reduce_group, avg_group
        entry.needs_dp_avg = needs_dp_avg
        return entry.values[layer_number - 1]

    def ensure_initialized(
        self, name: str, num_layers: int, device: torch.device | str | int | None = None
    ) -> None:
        """As Megatron's, in the size of the stages that have MoE layers."""
        known = self.decoder_layers + self.predicting_layers
        super().ensure_initialized(name, max(num_layers, known), device)

    def step(self) -> int:
        """The training step under way, 1-based, as Megatron's loop counts it."""
        from megatron.training.global_vars import get_args

        return get_args().curr_iteration + 1

    def clear(self) -> None:
        """Megatron's, at the end of a step and after the warm-up of CUDA graphs, whose forward
        passes no layer is to count either."""
        super().clear()
        if not self._reporting:
            for layer in self._alive():
                layer.forget_step()

    def report(  # type: ignore[override]
        self, loss_scale: float, iteration: int, **kwargs: Any
    ) -> str:
        """Megatron's report, with the MoNE metrics; returns its log line extended by ours."""
        layers = self._alive()
        for layer in layers:
            layer.end_step()
        writer = kwargs.get("writer")
        decoder = max(kwargs.get("num_layers") or 0, self.decoder_layers)
        num_layers = decoder + (kwargs.get("mtp_num_layers") or 0)
        line = self._report_loss(loss_scale, iteration, num_layers, kwargs)
        self._reporting = True
        line = super().report(loss_scale, iteration, **kwargs) + line
        self._reporting = False
        self._steps_in_window += 1
        if num_layers and iteration % self.log_interval == 0:
            group = _pipeline_group(kwargs.get("pg_collection"))
            summaries, sent = self._summaries(layers, num_layers, group)
            line += _write_summaries(summaries, iteration, writer)
            line += self._write_traffic(sent, iteration, writer)
            line += self._throughput(iteration, writer)
            self._steps_in_window = 0
        return line

    def _alive(self) -> list[Any]:
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def _report_loss(
        self, loss_scale: float, iteration: int, num_layers: int, kwargs: dict[str, Any]
    ) -> str:
        """Mean balance loss over the MoNE layers (Megatron would average over all MoE layers)."""
        self.ensure_initialized("ng_loss", num_layers)
        entry, groups = self._metrics["ng_loss"], kwargs.get("pg_collection")
        # Stages without MoNE layers know no reduce_group, so the stage's own sums come first and
        # the pipeline last (Megatron's order would leave the last stage with partial values).
        if entry.reduce_group is not None:
            torch.distributed.all_reduce(entry.values, group=entry.reduce_group)
            dp_group = groups.dp if groups else parallel_state.get_data_parallel_group()
            torch.distributed.all_reduce(entry.values, group=dp_group)
            entry.values /= dp_group.size()
        torch.distributed.all_reduce(entry.values, group=_pipeline_group(groups))
        values = entry.values.float() * loss_scale
        entry.values.zero_()
        used = values[values != 0]
        if used.numel() == 0:
            return ""
        mean = used.mean()
        writer = kwargs.get("writer")
        if writer is not None:
            writer.add_scalar("mone/ng_loss", mean, iteration)
            for i in values.nonzero().flatten().tolist():
                writer.add_scalar(f"mone/ng_loss_layer_{i + 1}", values[i], iteration)
        return f" ng loss: {float(mean):.6E} |"

    def _summaries(
        self, layers: list[Any], num_layers: int, group: ProcessGroup
    ) -> tuple[dict[int, LoadSummary], dict[int, list[float]]]:
        """Every stage's summaries and sent bytes on every rank, by 1-based layer number."""
        width, bins = len(SUMMARY_FIELDS), len(LOAD_EDGES) + 1
        table = torch.zeros(num_layers, width + bins + len(TRAFFIC), dtype=torch.float64)
        for layer in layers:
            row = layer.table_row()
            if row is None:
                continue
            summary = layer.summary()
            table[row, :width] = torch.tensor(summary.values, dtype=torch.float64)
            table[row, width : width + bins] = summary.histogram.cpu()
            table[row, width + bins :] = torch.tensor(layer.bytes_sent(), dtype=torch.float64)
        if torch.distributed.get_backend(group) == "nccl":
            table = table.cuda()
        torch.distributed.all_reduce(table, group=group)
        table = table.cpu()
        rows = SUMMARY_FIELDS.index("routed_rows")
        used = [i for i in range(num_layers) if table[i, rows] > 0]
        summaries = {
            i + 1: LoadSummary(tuple(table[i, :width].tolist()), table[i, width : width + bins])
            for i in used
        }
        return summaries, {i + 1: table[i, width + bins :].tolist() for i in used}

    def _write_traffic(self, sent: dict[int, list[float]], iteration: int, writer: Any) -> str:
        """Bytes a step that one rank of each stage sent for MoNE, beyond what stock MoE sends."""
        line = ""
        for column, name in enumerate(TRAFFIC):
            per_step = {i: sizes[column] / self._steps_in_window for i, sizes in sent.items()}
            total = sum(per_step.values())
            if total == 0:
                continue
            line += f" {name.replace('_', ' ')} MB a step and rank: {total / 1e6:.4g} |"
            if writer is not None:
                for i, size in per_step.items():
                    writer.add_scalar(f"mone/{name}_bytes_layer_{i}", size, iteration)
        return line

    def _throughput(self, iteration: int, writer: Any) -> str:
        """Executed and active TFLOP/s per rank, side by side, from Megatron's interval timer."""
        if self.step_flops is None or self.interval_seconds is None:
            return ""
        per_step = self.interval_seconds() / self._steps_in_window
        ranks = torch.distributed.get_world_size()
        executed, active = (f / per_step / ranks / 1e12 for f in self.step_flops())
        if writer is not None:
            writer.add_scalar("mone/executed_tflops_per_rank", executed, iteration)
            writer.add_scalar("mone/active_tflops_per_rank", active, iteration)
        return f" executed / active TFLOP/s per rank: {executed:.4g} / {active:.4g} |"


def _pipeline_group(groups: ProcessGroupCollection | None) -> ProcessGroup:
    return groups.pp if groups else parallel_state.get_pipeline_model_parallel_group()


def install_tracker() -> MoNEMetricsTracker:
    """The process's tracker as a MoNEMetricsTracker, put in place of Megatron's on first use."""
    tracker = get_moe_metrics_tracker()
    if not isinstance(tracker, MoNEMetricsTracker):
        ours = MoNEMetricsTracker()
        ours._metrics.update(tracker.metrics)
        set_moe_metrics_tracker(ours)
        return ours
    return tracker


def _write_summaries(summaries: dict[int, LoadSummary], iteration: int, writer: Any) -> str:
    if not summaries:
        return ""
    columns = list(zip(*(s.values for s in summaries.values()), strict=True))
    by_name = dict(zip(SUMMARY_FIELDS, columns, strict=True))
    if writer is not None:
        for layer, summary in summaries.items():
            for name, value in zip(SUMMARY_FIELDS, summary.values, strict=True):
                writer.add_scalar(f"mone/{name}_layer_{layer}", value, iteration)
            _write_histogram(writer, f"mone/neuron_load_layer_{layer}", summary, iteration)
    return (
        f" kept ratio: {sum(by_name['kept_ratio']) / len(summaries):.4f} |"
        f" neuron load max/mean: {max(by_name['neuron_load_max_over_mean']):.2f} |"
        f" dead neurons: {sum(by_name['dead_neurons']):.0f} |"
        f" expert load max/mean: {max(by_name['expert_load_max_over_mean']):.2f} |"
    )


def _write_histogram(writer: Any, tag: str, summary: LoadSummary, iteration: int) -> None:
    """One histogram a layer, never a scalar a neuron. Bins are LOAD_EDGES."""
    counts = summary.histogram.tolist()
    limits = [*LOAD_EDGES, 2 * LOAD_EDGES[-1]]
    middles = [0.5 * (a + b) for a, b in zip([0.0, *limits], limits, strict=False)]
    writer.add_histogram_raw(
        tag,
        min=0.0,
        max=summary.values[SUMMARY_FIELDS.index("neuron_load_max_over_mean")],
        num=sum(counts),
        sum=sum(m * c for m, c in zip(middles, counts, strict=True)),
        sum_squares=sum(m * m * c for m, c in zip(middles, counts, strict=True)),
        bucket_limits=limits,
        bucket_counts=counts,
        global_step=iteration,
    )
