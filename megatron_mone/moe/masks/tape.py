"""A layer's masks on their way into a trace and out of it: by context manager or by config.

    trace = MaskTrace()
    with record_masks(model, trace):
        model(...)                      # chooses neurons; every mask lands in the trace
    with replay_masks(model, trace):
        model(...)                      # the same tokens keep the same neurons

A tape knows which tokens of the global batch its rank holds, so that a trace knows no layout.
May touch: the process groups it is given, MaskTrace. Shapes: T tokens of this rank, in the order of
hidden states [s, b]; P routed pairs, expert-major and tokens ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_mone.config import MoNEConfig, mask_steps
from megatron_mone.moe.masks.trace import MaskTrace, MaskTraceError, TraceModel, recorded_steps


@dataclass(frozen=True)
class TokenPlaces:
    """Where this rank's shard of a micro-batch lies in the global batch.

    Attributes:
        tp_rank, tp_size: of the sequence-parallel split; 0 and 1 without it.
        cp_rank, cp_size: of Megatron's zigzag split: rank c holds chunks c and 2 CP - 1 - c.
        dp_rank, dp_size: of the data-parallel ranks, which take micro-batches in turn.
        owns: False where another tensor-parallel rank holds the same tokens and records them.
    """

    tp_rank: int
    tp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    owns: bool = True

    @classmethod
    def of(cls, config: MoNEConfig, groups: ProcessGroupCollection) -> TokenPlaces:
        """From `tp`, `cp` and `tp_dp_cp` (ranks ordered TP fastest, then CP, then DP)."""
        split = groups.tp.size() if config.sequence_parallel else 1
        shards = groups.tp.size() * groups.cp.size()
        return cls(
            tp_rank=groups.tp.rank() if split > 1 else 0,
            tp_size=split,
            cp_rank=groups.cp.rank(),
            cp_size=groups.cp.size(),
            dp_rank=groups.tp_dp_cp.rank() // shards,
            dp_size=groups.tp_dp_cp.size() // shards,
            owns=split > 1 or groups.tp.rank() == 0,
        )

    def seq_length(self, local: int) -> int:
        """Tokens of a whole sample, of which this rank holds `local`."""
        return local * self.tp_size * self.cp_size

    def tokens(self, local: int, batch: int, microbatch: int) -> Tensor:
        """[T] int64, sample * seq_length + position, for hidden states [local, batch].

        Args:
            local: tokens of a sample on this rank.
            batch: samples of the micro-batch.
            microbatch: how many this rank has had before in the step.
        """
        at_S = torch.arange(local) + self.tp_rank * local
        if self.cp_size > 1:
            chunk = local * self.tp_size // 2
            second = 2 * self.cp_size - 1 - self.cp_rank
            at_S = torch.where(
                at_S < chunk, self.cp_rank * chunk + at_S, second * chunk + at_S - chunk
            )
        sample_B = (microbatch * self.dp_size + self.dp_rank) * batch + torch.arange(batch)
        return (at_S.unsqueeze(1) + sample_B * self.seq_length(local)).flatten()


@dataclass
class _Job:
    """A trace in use: `step` names the step of a forward, or None to leave the forward alone."""

    trace: MaskTrace
    step: Callable[[], int | None]
    folder: Path | None = None  # record: written at the end of a step; replay: read when needed


class MaskTape:
    """What one layer records and replays.

    Args:
        config: of the model.
        groups: `tp`, `cp` and `tp_dp_cp` are used.
    """

    def __init__(self, config: MoNEConfig, groups: ProcessGroupCollection) -> None:
        self.config = config
        self.group = groups.tp_dp_cp
        self.places = TokenPlaces.of(config, groups)
        self.recording: _Job | None = None
        self.replaying: _Job | None = None
        self.layer = 0
        self._microbatch = 0
        self._record_step: int | None = None
        self._keys_P = torch.empty(0, dtype=torch.int64)

    @property
    def active(self) -> bool:
        """Whether a trace is in use at all."""
        return self.recording is not None or self.replaying is not None

    def follow_config(self, step: Callable[[], int | None]) -> None:
        """Record and replay as mone_record_masks and mone_replay_masks ask.

        Args:
            step: the training step under way, 1-based; None outside training.
        """
        config = self.config
        if config.mone_record_masks or config.mone_replay_masks:
            self.check_supported()
        if config.mone_record_masks is not None:
            first, last = mask_steps(config.mone_record_mask_steps)
            inside = _between(step, first, last)
            self.recording = _Job(MaskTrace(), inside, Path(config.mone_record_masks))
        if config.mone_replay_masks is not None:
            folder = Path(config.mone_replay_masks)
            first, last = recorded_steps(folder)
            self.replaying = _Job(MaskTrace(), _between(step, first, last), folder)

    def check_supported(self) -> None:
        """Masks are named by their token's place, so a layer must see each token once a step.

        Raises:
            ValueError: the model has a layer that sees tokens again.
        """
        if self.config.mtp_num_layers and self.config.mtp_use_repeated_layer:
            raise ValueError(
                "mtp_use_repeated_layer = True: the repeated layer sees each token several times, "
                "and its masks cannot be told apart; record and replay without it"
            )

    def begin(self, routing_map: Tensor, local: int, batch: int, layer: int) -> Tensor | None:
        """A forward begins; returns the packed masks to replay in it.

        Args:
            routing_map: [T, E].
            local, batch: the first two sizes of the hidden states.
            layer: 1-based, MTP layers after the decoder's.

        Returns:
            [P, ceil(F / 8)] uint8, or None to choose.

        Raises:
            MaskTraceError: a trace that lacks these tokens, or was recorded in another model.
        """
        self.layer = layer
        self._record_step = None if self.recording is None else self.recording.step()
        replay_step = None if self.replaying is None else self.replaying.step()
        if self._record_step is None and replay_step is None:
            return None
        tokens_T = self.places.tokens(local, batch, self._microbatch).to(routing_map.device)
        self._microbatch += 1
        expert_P, token_P = routing_map.T.nonzero(as_tuple=True)
        self._keys_P = tokens_T[token_P] * routing_map.shape[1] + expert_P
        model = self._model(local)
        if self._record_step is not None:
            assert self.recording is not None
            self.recording.trace.model = model
        if replay_step is None:
            return None
        assert self.replaying is not None
        return self._replayed(self.replaying, replay_step, model)

    def _replayed(self, job: _Job, step: int, model: TraceModel) -> Tensor:
        if job.folder is not None:
            masks = job.trace.load(job.folder, step, self.layer, model)
        elif job.trace.model != model:
            raise MaskTraceError(
                f"the masks were recorded in {job.trace.model}, this model is {model}"
            )
        else:
            masks = job.trace.recorded(step, self.layer)
        try:
            return masks.lookup(self._keys_P)
        except MaskTraceError as error:
            raise MaskTraceError(f"layer {self.layer}, step {step}: {error}") from error

    @property
    def records(self) -> bool:
        """Whether the forward that has begun is to be recorded."""
        return self._record_step is not None

    def record(self, bits_PB: Tensor) -> None:
        """Put the masks of the forward that has begun into the trace, in `begin`'s pair order."""
        assert self.recording is not None
        assert self._record_step is not None
        if self.places.owns:
            masks = self.recording.trace.layer(self._record_step, self.layer)
            masks.add(self._keys_P, bits_PB)

    def restart(self) -> None:
        """The next forward is the first micro-batch of a global batch."""
        self._microbatch, self._record_step = 0, None

    def end_step(self) -> None:
        """After the optimizer step, on every rank: write what a folder is to hold, forget it."""
        self.restart()
        for job in (self.recording, self.replaying):
            if job is not None and job.folder is not None:
                if job is self.recording:
                    for step in job.trace.steps:
                        job.trace.save(job.folder, step, self.group)
                job.trace.steps.clear()

    def _model(self, local: int) -> TraceModel:
        config = self.config
        return TraceModel(
            hidden_size=config.hidden_size,
            num_layers=config.num_layers,
            num_experts=config.num_moe_experts,
            moe_ffn_hidden_size=config.moe_ffn_hidden_size,
            seq_length=self.places.seq_length(local),
        )


def _between(step: Callable[[], int | None], first: int, last: int) -> Callable[[], int | None]:
    def inside() -> int | None:
        now = step()
        return now if now is not None and first <= now <= last else None

    return inside


@contextmanager
def record_masks(model: Iterable, trace: MaskTrace, step: int = 0) -> Iterator[MaskTrace]:
    """Every MoNE layer of `model` records its masks into `trace` as step `step`.

    Args:
        model: a module, or the list of model chunks Megatron works with.
        trace: gets the tokens this rank holds; `MaskTrace.save` joins the ranks' parts.
        step: a global batch; the forwards inside are its micro-batches, in order.
    """
    with _jobs(model, "recording", _Job(trace, lambda: step)):
        yield trace


@contextmanager
def replay_masks(
    model: Iterable, trace: MaskTrace | Path, step: int = 0
) -> Iterator[MaskTrace | Path]:
    """Every MoNE layer of `model` keeps the neurons recorded in `trace` as step `step`.

    Args:
        model: a module, or the list of model chunks Megatron works with.
        trace: recorded in this layout by this process, or the folder `MaskTrace.save` wrote.
        step: of the recorded ones; the forwards inside are its micro-batches, in order.

    Raises:
        MaskTraceError: on a forward whose tokens or routing were not recorded.
    """
    folder = None if isinstance(trace, MaskTrace) else trace
    source = trace if isinstance(trace, MaskTrace) else MaskTrace()
    with _jobs(model, "replaying", _Job(source, lambda: step, folder)):
        yield trace


@contextmanager
def _jobs(model: Iterable, name: str, job: _Job) -> Iterator[None]:
    chunks = [model] if isinstance(model, torch.nn.Module) else list(model)
    tapes: list[MaskTape] = [
        module.mask_tape  # type: ignore[misc]
        for chunk in chunks
        for module in chunk.modules()
        if isinstance(getattr(module, "mask_tape", None), MaskTape)
    ]
    if not tapes:
        raise ValueError("the model has no MoNE layer to record or replay")
    before = [getattr(tape, name) for tape in tapes]
    for tape in tapes:
        tape.check_supported()
        setattr(tape, name, job)
        tape.restart()
    try:
        yield
    finally:
        for tape, value in zip(tapes, before, strict=True):
            setattr(tape, name, value)
            tape.restart()
