"""The shapes of what pipeline stages send one another, where Megatron's stages ask each other.

They do when a multi-token-prediction layer has a stage of its own: behind it the hidden states of
each depth travel, one behind the other. Megatron's exchange of shapes takes place, and what it
brings is filled in from the layout. May touch: Megatron's communicator, while `known_shapes` lasts.
"""

from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from megatron_mone.common.patch import Replaced


def mtp_layers_before(layout: Any, stage: int) -> int:
    """Multi-token-prediction layers in stages 0 to `stage` - 1 of a layout without interleaving.

    Args:
        layout: Megatron's PipelineParallelLayerLayout.
        stage: 0 to P.
    """
    from megatron.core.transformer.enums import LayerType

    return sum(chunks[0].count(LayerType.mtp) for chunks in layout.layout[:stage])


@contextmanager
def known_shapes(args: Namespace, config: Any) -> Iterator[None]:
    """While it lasts messages that arrive have the shapes that the layout gives them.

    Args:
        args: Megatron's, validated.
        config: the transformer config.

    Raises:
        ValueError: an interleaved schedule with a multi-token-prediction layer that is not last.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    if not config.mtp_standalone:
        yield
        return
    if config.virtual_pipeline_model_parallel_size is not None:
        raise ValueError(
            "pipeline_model_parallel_layout has its MTP layer before the last stage, which cannot "
            "be traced interleaved: trace each virtual stage as a stage of a longer pipeline"
        )
    split = args.context_parallel_size
    if args.sequence_parallel:
        split *= args.tensor_model_parallel_size

    def shape(stage: int) -> list[int]:
        depths = 1 + mtp_layers_before(config.pipeline_model_parallel_layout, stage)
        return [depths * args.seq_length // split, args.micro_batch_size, args.hidden_size]

    exchange = P2PCommunicator._communicate_shapes

    def answered(
        self: Any, send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool
    ) -> Any:
        exchange(self, send_next, send_prev, recv_prev, recv_next)
        stage = self.pp_group.rank()
        nothing = [0, 0, 0]
        return (
            shape(stage) if recv_prev else nothing,
            shape(stage + 1) if recv_next else nothing,
        )

    with Replaced(P2PCommunicator, "_communicate_shapes", answered):
        yield
