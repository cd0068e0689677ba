"""The linears around experts of a latent width (moe_latent_size), which Megatron has in Transformer
Engine alone.

As TELinear with parallel_mode "duplicated": the whole weight on every tensor-parallel rank, drawn
from the random state that these share, its gradient summed over them by finalize_model_grads. May
touch: the names of Megatron's MoE layer that it replaces.
"""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.random import (
    get_cuda_rng_tracker,
    get_data_parallel_rng_tracker_name,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from megatron.core.utils import get_tensor_model_parallel_group_if_none
from torch import Tensor

from megatron_mone.common.patch import Patch, in_source


class EmulatedDuplicatedLinear(MegatronModule):
    """y = x W^T + b with W [out, in] on every rank. Arguments and keys are TELinear's."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        parallel_mode: str | None,
        config: Any,
        init_method: Callable[[Tensor], Any],
        bias: bool,
        **_rest: Any,
    ) -> None:
        assert parallel_mode == "duplicated", parallel_mode
        super().__init__(config=config)
        options: Any = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.empty(output_size, input_size, **options))
        self.bias = torch.nn.Parameter(torch.zeros(output_size, **options)) if bias else None
        if config.perform_initialization:
            with get_cuda_rng_tracker().fork(get_data_parallel_rng_tracker_name()):
                init_method(self.weight)
        parameters: Any = self.parameters()
        for parameter in parameters:
            parameter.allreduce = True
            parameter.sequence_parallel = config.sequence_parallel
            parameter.tensor_model_parallel = False
        self._tp_group = get_tensor_model_parallel_group_if_none(None)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """[..., in] -> ([..., out], no bias left to add)."""
        return torch.nn.functional.linear(x, self.weight, self.bias), None

    def backward_dw(self) -> None:
        """Nothing is left to do: the weight's gradient is made in the backward pass itself."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """TELinear's: the same tensor on all ranks."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True), prefix, None, sharded_offsets,
            tp_group=self._tp_group, dp_cp_group=(metadata or {})["dp_cp_group"],
        )  # fmt: skip


def _apply() -> None:
    from megatron.core.transformer.moe import moe_layer

    if not moe_layer.HAVE_TE:
        moe_layer.TELinear = EmulatedDuplicatedLinear
        moe_layer.HAVE_TE = True  # read by the assertion before these linears alone


PATCHES = (
    Patch(
        name="latent-projections",
        needed_by="megatron/core/transformer/moe/moe_layer.py: TELinear = None",
        why="moe_latent_size projects tokens to the experts' width and back by Transformer "
        "Engine's linear; there is no other",
        apply=_apply,
        still_needed=in_source(
            "core/transformer/moe/moe_layer.py",
            "TransformerEngine is required for MoE latent projections",
        ),
    ),
)
