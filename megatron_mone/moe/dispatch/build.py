"""Which dispatcher a model has. Touches nothing."""

from collections.abc import Callable

from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_mone.config import MoNEConfig
from megatron_mone.moe.dispatch.carrier import MaskCarrier
from megatron_mone.moe.dispatch.flex import MaskFlexTokenDispatcher
from megatron_mone.moe.dispatch.stock import (
    MaskAllGatherTokenDispatcher,
    MaskAlltoAllTokenDispatcher,
)


def build_dispatcher(
    num_local_experts: int,
    local_expert_indices: list[int],
    config: MoNEConfig,
    pg_collection: ProcessGroupCollection,
) -> MaskCarrier:
    """The mask-carrying dispatcher of `moe_token_dispatcher_type`, as MoELayer picks Megatron's."""
    kinds: dict[str, Callable[..., MaskCarrier]] = {
        "allgather": MaskAllGatherTokenDispatcher,
        "alltoall": MaskAlltoAllTokenDispatcher,
        "flex": MaskFlexTokenDispatcher,
    }
    kind = kinds[config.moe_token_dispatcher_type]
    return kind(num_local_experts, local_expert_indices, config=config, pg_collection=pg_collection)
