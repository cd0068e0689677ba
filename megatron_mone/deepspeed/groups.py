"""DeepSpeed's view of Megatron's process groups, and how it knows expert parameters.

May touch: DeepSpeed's table of expert groups, attributes of parameters.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch.nn import Parameter


@dataclass(frozen=True)
class MegatronGroups:
    """What DeepSpeed asks of an `mpu`, answered by Megatron's groups.

    Data-parallel ranks are those of context parallelism too, as gradients are averaged over both.
    """

    groups: ProcessGroupCollection

    def get_data_parallel_group(self):
        """Over which parameters that are no experts' are replicated."""
        return self.groups.dp_cp

    def get_data_parallel_world_size(self) -> int:
        """Its size."""
        return self.groups.dp_cp.size()

    def get_data_parallel_rank(self) -> int:
        """In it."""
        return self.groups.dp_cp.rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of it."""
        return torch.distributed.get_process_group_ranks(self.groups.dp_cp)

    def get_model_parallel_group(self):
        """Tensor parallel: there is no pipeline."""
        return self.groups.tp

    def get_model_parallel_world_size(self) -> int:
        """Its size."""
        return self.groups.tp.size()

    def get_model_parallel_rank(self) -> int:
        """In it."""
        return self.groups.tp.rank()

    # Newer names of the same.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def mark_experts(parameters: Iterable[Parameter], groups: ProcessGroupCollection) -> bool:
    """Tell DeepSpeed which parameters are experts', and over which ranks each of them is one.

    Megatron marks them by `allreduce` = False, as DeepSpeed does, which also asks for the name of
    their group.

    Returns:
        Whether the rank has any: without expert parallelism they are like others.
    """
    from deepspeed.utils import groups as table

    name = f"ep_size_{groups.ep.size()}"
    experts = [one for one in parameters if _is_experts(one)]
    for one in experts:
        one.group_name = name  # type: ignore[attr-defined]
    ranks = torch.distributed.get_process_group_ranks
    table._EXPERT_PARALLEL_GROUP = {name: groups.ep}
    table._EXPERT_PARALLEL_GROUP_RANKS = {name: ranks(groups.ep)}
    table._EXPERT_DATA_PARALLEL_GROUP = {name: groups.expt_dp}
    table._EXPERT_DATA_PARALLEL_GROUP_RANKS = {name: ranks(groups.expt_dp)}
    return bool(experts)


def copies(parameter: Parameter, groups: ProcessGroupCollection) -> int:
    """Ranks of data parallelism that hold the same parameter."""
    return (groups.expt_dp if _is_experts(parameter) else groups.dp_cp).size()


def _is_experts(parameter: Parameter) -> bool:
    return not getattr(parameter, "allreduce", True)
