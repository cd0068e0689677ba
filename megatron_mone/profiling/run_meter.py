"""RunMeter: measures chosen training steps of one run on this rank and says what they showed.

May touch: one run's model and optimizer through Instruments and LoadFacts, both undone whole.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from megatron_mone.deepspeed.settings import is_deepspeed, stage_of
from megatron_mone.profiling.clock import CommunicationTimes, PhaseClock, StepTimes
from megatron_mone.profiling.document_lengths import DocumentLengths
from megatron_mone.profiling.instrument import Instruments, moe_layers
from megatron_mone.profiling.load_facts import LoadFacts

Result = TypeVar("Result")
_DIGITS = 4  # of a millisecond: files of a thousand ranks are read at once


@dataclass(frozen=True)
class Run:
    """One model in training.

    Attributes:
        name: of the run in reports.
        args: Megatron's arguments.
        model: its chunks on this rank.
        optimizer: Megatron's.
        backend: what computes the routed experts.
    """

    name: str
    args: Any
    model: Sequence[torch.nn.Module]
    optimizer: Any
    backend: str


class RunMeter:
    """Times the steps of one run between `attach` and `detach`.

    Args:
        run: to be measured.
        clock: of this rank; runs measured in turn may share it.
    """

    def __init__(self, run: Run, clock: PhaseClock) -> None:
        self.run = run
        self.clock = clock
        self.facts = LoadFacts(moe_layers(run.model))
        self.documents = DocumentLengths()
        self.memory: dict[str, Any] | None = None
        self._instruments = Instruments(clock)
        self._steps: list[tuple[int, int]] = []  # (iteration, window)
        self._times: list[StepTimes] = []

    def attach(self) -> None:
        """Instrument the run."""
        self._instruments.attach(self.run.model, self.run.optimizer)
        self.facts.attach()

    def detach(self) -> None:
        """Leave the run as it was."""
        self.facts.detach()
        self._instruments.detach()
        self._times += self.clock.take()

    def measure(self, iteration: int, window: int, step: Callable[[], Result]) -> Result:
        """Run one step and keep its times.

        Args:
            iteration: its number in the run.
            window: which of the interleaved windows it belongs to.
            step: does one optimizer step; an exception leaves nothing of the step behind.
        """
        self.facts.begin_step()
        self.documents.begin()
        self.clock.begin()
        try:
            result = step()
        except BaseException:
            self.clock.abandon()
            raise
        self.clock.end()
        self.documents.end()
        self.facts.end_step()
        self._steps.append((iteration, window))
        return result

    def record(self) -> dict[str, Any]:
        """This run in a rank record, without what is counted rather than measured."""
        self._times += self.clock.take()
        times = self._times
        phases: dict[str, dict[str, list[float]]] = defaultdict(dict)
        for phase, pass_ in dict.fromkeys(key for step in times for key in step.phases):
            phases[phase][pass_] = [
                round(step.phases.get((phase, pass_), 0.0), _DIGITS) for step in times
            ]
        return {
            "name": self.run.name,
            "backend": self.run.backend,
            "model": model_fields(self.run.args),
            "steps": [iteration for iteration, _ in self._steps],
            "windows": [window for _, window in self._steps],
            "step_ms": [
                round(sum(round(ms, _DIGITS) for ms in step.phases.values()), _DIGITS)
                for step in times
            ],
            "phases": phases,
            "communication": _communication(times),
            "collectives": _collectives(times),
            "rows": self.facts.rows() or [0] * len(times),
            "routing": self.facts.routing(),
            "neurons": self.facts.neurons(),
            "memory": self.memory,
        }


def _communication(times: Sequence[StepTimes]) -> dict[str, dict[str, list[float]]]:
    kinds = dict.fromkeys(kind for step in times for kind in step.communication)
    return {
        kind: {
            field: [
                getattr(step.communication[kind], field) if kind in step.communication else 0
                for step in times
            ]
            for field in ("calls", "bytes", "ms")
        }
        for kind in kinds
    }


def _collectives(times: Sequence[StepTimes]) -> list[dict[str, Any]]:
    return [
        call._asdict() | {
            field: [getattr(step.calls.get(call, _NONE), field) for step in times]
            for field in ("calls", "ms")
        }
        for call in dict.fromkeys(call for step in times for call in step.calls)
    ]  # fmt: skip


_NONE = CommunicationTimes()
MODEL_FIELDS = (
    "hybrid_layer_pattern", "num_layers", "mtp_num_layers", "hidden_size", "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups", "seq_length", "padded_vocab_size", "num_experts", "moe_router_topk",
    "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_layer_freq",
    "moe_token_dispatcher_type", "params_dtype", "mone_neuron_ratio", "mone_neurons_per_token",
    "mone_neuron_block", "mone_neuron_groups", "mone_selection", "mone_activation",
    "mone_ng_loss_type", "mone_ng_loss_coeff", "mone_ng_loss_scope",
)  # fmt: skip


def model_fields(args: Any) -> dict[str, Any]:
    """The arguments that make two runs the same model, those that are set."""
    mone = getattr(args, "mone_neuron_ratio", None) or getattr(args, "mone_neurons_per_token", None)
    fields: dict[str, Any] = {}
    for name in MODEL_FIELDS:
        value = getattr(args, name, None)
        if value is None or (name.startswith("mone_") and not mone):
            continue
        fields[name] = value if isinstance(value, (int, float, str, bool, list)) else str(value)
    if is_deepspeed(args):
        fields |= {"engine": args.engine, "zero_stage": stage_of(args)}
    return fields
