"""The numbers of nodes of a profile: which can hold the layout, and with what global batch.

Weak scaling: every rank keeps its micro-batches, so that the global batch grows with the
data-parallel size. Strong scaling: the global batch stays. Reads and starts nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.spec.megatron_flags import whole_number

_SPLIT = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
_BATCH = "global_batch_size"


@dataclass(frozen=True)
class Size:
    """One job of a profile.

    Attributes:
        nodes: of the job.
        batch: global batch in samples; None: Megatron's own, a micro-batch a rank.
    """

    nodes: int
    batch: int | None

    @property
    def folder(self) -> str:
        """Its folder's name, in an order that lists show."""
        return f"{self.nodes:03d}-nodes"

    @property
    def flags(self) -> tuple[str, ...]:
        """Megatron flags, to follow all others."""
        return () if self.batch is None else ("--global-batch-size", str(self.batch))

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' if self.nodes > 1 else ''}"


class Sizes:
    """The sizes that a job can be profiled at.

    Args:
        values: Megatron's arguments of the run file.
        words: Megatron flags, which win.
        nodes: that the run file's global batch is meant for.
        ranks_per_node: of every size.
        strong: keep the global batch.

    Raises:
        ValueError: the batch cannot be scaled; one line naming the argument, its value and the fix.
    """

    def __init__(
        self, values: Mapping[str, Any], words: Sequence[str], nodes: int, ranks_per_node: int,
        strong: bool,
    ) -> None:  # fmt: skip
        self._values, self._words = values, words
        self._nodes, self._ranks_per_node = nodes, ranks_per_node
        tp, pp, cp = (self._whole(name) or 1 for name in _SPLIT)
        self._split = tp * pp * cp
        ep = self._whole("expert_model_parallel_size") or 1
        # Megatron's default of the expert tensor parallel size is the tensor parallel size.
        self._expert_split = ep * pp * (self._whole("expert_tensor_parallel_size") or tp)
        self._micro = self._whole("micro_batch_size") or 1
        self._batch = self._whole(_BATCH)
        self._strong = strong
        if strong and self._batch is None:
            raise ValueError("--strong keeps the global batch, and global_batch_size is not set")
        if not strong and self._batch is not None:
            self._check_base(self._batch)

    def of(self, text: str | None) -> tuple[list[Size], list[str]]:
        """The sizes, by rising nodes, and why others are left out.

        Args:
            text: `1,2,4`; None: powers of two up to the nodes, and these.

        Raises:
            ValueError: not such numbers.
        """
        sizes, left_out = [], []
        for nodes in self._asked(text):
            size = Size(nodes, self._batch_of(nodes))
            why = self._why_not(size)
            if why:
                left_out.append(f"{size}: {why}")
            else:
                sizes.append(size)
        return sizes, left_out

    def check_steps(self, steps: int) -> None:
        """Refuse a run that ends before its profile.

        Raises:
            ValueError: `train_iters` is fewer than `steps`.
        """
        train_iters = self._whole("train_iters")
        if train_iters is not None and train_iters < steps:
            raise ValueError(
                f"train_iters = {train_iters} is fewer than the {steps} steps that a profile of "
                "each model takes: lower --profile-steps, or give --train-iters after --"
            )

    def _asked(self, text: str | None) -> list[int]:
        if text is None:
            powers = {1 << power for power in range(self._nodes.bit_length())}
            return sorted({*powers, self._nodes})
        words = text.split(",")
        if not all(word.isascii() and word.isdecimal() and int(word) for word in words):
            raise ValueError(f"--profile-nodes {text!r} must be numbers of nodes, like 1,2,4")
        return sorted({int(word) for word in words})

    def _check_base(self, batch: int) -> None:
        ranks = self._nodes * self._ranks_per_node
        replicas, rest = divmod(ranks, self._split)
        if rest:
            raise ValueError(
                f"nodes = {self._nodes} has {ranks} ranks, which are no multiple of tensor x "
                f"pipeline x context parallel size = {self._split}: give the --nodes that "
                f"global_batch_size = {batch} is meant for, or --strong"
            )
        if batch % (replicas * self._micro):
            raise ValueError(
                f"global_batch_size = {batch} is no multiple of micro_batch_size x data-parallel "
                f"size = {self._micro} x {replicas} on --nodes {self._nodes}: give the --nodes "
                "that it is meant for, or another --global-batch-size after --"
            )

    def _batch_of(self, nodes: int) -> int | None:
        if self._strong or self._batch is None:
            return self._batch
        return self._batch * nodes // self._nodes

    def _why_not(self, size: Size) -> str:
        ranks = size.nodes * self._ranks_per_node
        if ranks % self._split:
            return (
                f"{ranks} ranks are no multiple of tensor x pipeline x context parallel size = "
                f"{self._split}"
            )
        if ranks % self._expert_split:
            return (
                f"{ranks} ranks are no multiple of expert x expert tensor x pipeline parallel "
                f"size = {self._expert_split}"
            )
        replicas = ranks // self._split
        if size.batch is not None and size.batch % (replicas * self._micro):
            return (
                f"global_batch_size = {size.batch} is no multiple of micro_batch_size x "
                f"data-parallel size = {self._micro} x {replicas}"
            )
        return ""

    def _whole(self, name: str) -> int | None:
        """A whole number that the run file or a flag sets."""
        return whole_number(name, self._values, self._words)
