"""torch's Adam under Megatron's distributed optimizer: its per-parameter `step`.

Apex's and Transformer Engine's Adam keep one step per parameter group; torch's keeps one tensor per
parameter, made at the first update. Megatron's code for it has three gaps, all on load.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from megatron_mone.common.patch import Patch, in_source, megatron_source, wrapping

_NO_PARAMETERS = "this rank's shard holds no parameter"


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter without Adam state zero moments and step 0, as before a first update."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            for key in ("exp_avg", "exp_avg_sq"):
                if key not in state:
                    state[key] = torch.zeros_like(parameter.data)
            if "step" not in state:
                state["step"] = torch.tensor(0.0)


def _is_torch_adam(distributed: Any) -> bool:
    return isinstance(getattr(distributed, "optimizer", None), torch.optim.Adam | torch.optim.AdamW)


def _apply() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    original_state = DistributedOptimizer.state_dict
    original_load = DistributedOptimizer.load_state_dict
    original_set = DistributedOptimizer._set_main_param_and_optimizer_states

    @functools.wraps(original_state)
    def state_dict(self: Any) -> Any:
        if not _is_torch_adam(self):
            return original_state(self)
        inner = self.optimizer
        fill_state(inner)
        if inner.state:
            return original_state(self)
        # The one step that Megatron reads from the states of this rank's shard: there are none.
        inner.state[_NO_PARAMETERS] = {"step": torch.tensor(0.0)}
        try:
            return original_state(self)
        finally:
            del inner.state[_NO_PARAMETERS]

    @functools.wraps(original_load)
    def load_state_dict(self: Any, state_dict: Any) -> None:
        original_load(self, state_dict)
        if _is_torch_adam(self):
            for state in self.optimizer.state.values():
                # Megatron hands one tensor to all; Adam adds 1 to it once per parameter.
                state["step"] = state["step"].clone()

    @functools.wraps(original_set)
    def set_states(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        # The step is loaded from the parameter groups. Here it is missing (fully reshardable
        # format) or the one from before the load (bucket format); None is passed over.
        original_set(self, model_param, {**tensors, "step": None})

    DistributedOptimizer.state_dict = state_dict
    DistributedOptimizer.load_state_dict = load_state_dict
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def _with_all_states(pack: Callable[..., Any]) -> Callable[..., Any]:
    """Under Megatron FSDP a parameter of which a rank holds nothing has no gradient there, and to
    torch's Adam no state; Transformer Engine's makes states for all, in their order. Whoever packs
    them asks all ranks about each."""

    @functools.wraps(pack)
    def packed(self: Any, is_loading: bool = False) -> Any:
        if not _is_torch_adam(self):
            return pack(self, is_loading)
        if is_loading:
            self._init_optimizer_states_with_dummy_values()
        states = self.optimizer.state
        steps = [float(state["step"]) for state in states.values()]
        last = torch.tensor(max(steps, default=0.0))
        torch.distributed.all_reduce(last, op=torch.distributed.ReduceOp.MAX)
        fill_state(self.optimizer)
        held = dict(states)
        states.clear()
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                states[parameter] = held[parameter] | {"step": last.clone()}
        return pack(self)

    return packed


def _loads_with_grad() -> bool:
    source = megatron_source("core/optimizer/distrib_optimizer.py")
    before, found, _ = source.partition("    def load_parameter_state_from_dp_reshardable(")
    return bool(found) and not before.rstrip().endswith("@torch.no_grad()")


PATCHES = (
    Patch(
        name="adam-step",
        needed_by="megatron/core/optimizer/distrib_optimizer.py: state_dict, load_state_dict",
        why="before a load no parameter has a step, and `assert len(steps) == 1` stops; after it "
        "the step is 0 again, in one tensor for all parameters that counts once for each",
        apply=_apply,
        still_needed=in_source(
            "core/optimizer/distrib_optimizer.py", 's["step"] = step', "assert len(steps) == 1"
        ),
    ),
    wrapping(
        "load-without-grad",
        "megatron.core.optimizer.distrib_optimizer: "
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        torch.no_grad(),
        why="copies into views of fp32 parameters without no_grad and stops; in 16 bits, as GPUs "
        "train, the main parameters are copies and it passes",
        needed_while=_loads_with_grad,
    ),
    wrapping(
        "adam-state-of-shards",
        "megatron.core.optimizer.distrib_optimizer: "
        "DistributedOptimizer.sharded_param_state_fsdp_dtensor",
        _with_all_states,
        why="ranks that hold nothing of a parameter have no state of it, and each would wait for "
        "the others over another one",
        needed_while="def sharded_param_state_fsdp_dtensor(self, is_loading: bool = False):",
    ),
)
