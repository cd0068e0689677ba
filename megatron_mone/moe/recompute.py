"""Keeps a recomputed forward on the neurons of the forward it repeats.

Activation recompute runs a layer twice: first without autograd, then again inside the backward
pass. Choosing neurons anew there could differ in the last bit where a GPU sums in another order,
and would exchange scores over expert-tensor ranks a second time. So the first pass leaves its mask,
bit-packed, and the repetition takes it. May touch: torch's and Megatron's recompute state, read
only.
"""

import sys
from collections import deque

import torch
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor

from megatron_mone.kernels.neuron_mask import NeuronMask


def in_recompute() -> bool:
    """Whether a forward running now repeats an earlier one inside a backward pass."""
    # -1 outside a backward pass; torch's own checkpointing reads the same function.
    return torch._C._current_graph_task_id() != -1


def _in_checkpoint() -> bool:
    """Whether a checkpoint's function runs: Megatron's, or in fp8 Transformer Engine's."""
    engine = sys.modules.get("transformer_engine.pytorch.distributed")
    in_fp8 = getattr(engine, "is_fp8_activation_recompute_enabled", lambda: False)
    return is_checkpointing() or in_fp8()


class RecomputeMasks:
    """The masks of one layer between a checkpointed forward and its repetition.

    Micro-batches are repeated in the order of their first pass, in every one of Megatron's
    pipeline schedules, so that a queue is enough.

    Attributes:
        bytes_held: of the packed masks waiting now, ceil(F_l / 8) a routed row.
    """

    def __init__(self) -> None:
        # Of a mask its bits, block, S and K.
        self._waiting: deque[tuple[Tensor, int, int | None, int | None]] = deque()

    @property
    def bytes_held(self) -> int:
        """Bytes of the packed masks that wait for their repetition."""
        return sum(bits.numel() for bits, *_ in self._waiting)

    def keep(self, mask: NeuronMask) -> None:
        """Called after every forward; keeps the mask of a first pass."""
        first_pass = _in_checkpoint() and not torch.is_grad_enabled() and not in_recompute()
        if first_pass:
            self._waiting.append((mask.pack(), mask.block, mask.kept, mask.known_entries))

    def take(self, rows: int, num_neurons: int) -> NeuronMask | None:
        """Called before every forward; the mask of the first pass where this is its repetition.

        Args:
            rows: N, of this forward.
            num_neurons: F_l.

        Raises:
            RuntimeError: the repetition has other rows than the first pass.
        """
        if not in_recompute() or not self._waiting:
            return None
        # A checkpoint inside a checkpoint repeats twice; the one that builds the graph is the last.
        waiting = self._waiting.popleft() if torch.is_grad_enabled() else self._waiting[0]
        bits_NB, block, kept, entries = waiting
        if bits_NB.shape[0] != rows:
            raise RuntimeError(
                f"a recomputed MoNE layer has {rows} routed rows, its first pass had "
                f"{bits_NB.shape[0]}: the router did not repeat its choice"
            )
        return NeuronMask.unpack(bits_NB, num_neurons, block, kept, entries)

    def clear(self) -> None:
        """At the end of a step: a first pass without a repetition (no backward) leaves nothing."""
        self._waiting.clear()
