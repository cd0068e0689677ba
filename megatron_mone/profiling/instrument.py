"""Makes one run's modules say which phase begins: forward by wrapping, backward by tensor hooks.

A wrapped method switches the clock to its phase and back. On each of its outputs that needs a
gradient a hook is set, which autograd calls as it is about to run the node that made the output: so
the backward of a phase lasts from its outputs' node to the node of the next marked output. Wrappers
are attributes of instances and of Megatron's schedule module, and are removed whole: a run that is
not profiled runs Megatron's code alone. May touch: Megatron's modules, its schedules, `phases`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.hybrid import hybrid_model
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.pipeline_parallel import schedules
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from megatron_mone.common import phases
from megatron_mone.common.patch import Replaced
from megatron_mone.profiling.clock import PhaseClock
from megatron_mone.profiling.communication import watch_communication
from megatron_mone.profiling.deepspeed_moe import DeepSpeedMoE
from megatron_mone.profiling.schedule_plan import watch_schedule_plans
from megatron_mone.profiling.step_parts import BUCKETS, GRAD_SYNC, step_parts

# Method of a token dispatcher -> phase. Collectives within permute count as dispatch.
_DISPATCHER = {
    "dispatch_preprocess": phases.PERMUTE,
    "token_dispatch": phases.DISPATCH,
    "dispatch_postprocess": phases.PERMUTE,
    "combine_preprocess": phases.COMBINE,
    "token_combine": phases.COMBINE,
    "combine_postprocess": phases.COMBINE,
}


class Instruments:
    """The wrappers on one run; on from `attach` to `detach`.

    Args:
        clock: told of every phase.
        whole_optimizer: count clipping and the gather of parameters with the optimizer, as the
            planner does, which prices them together.
    """

    def __init__(self, clock: PhaseClock, *, whole_optimizer: bool = False) -> None:
        self.clock = clock
        self._whole_optimizer = whole_optimizer
        self._attached = ExitStack()

    def attach(self, model: Sequence[torch.nn.Module], optimizer: Any) -> None:
        """Wrap a run.

        Args:
            model: Megatron's model chunks of this rank.
            optimizer: Megatron's optimizer.

        Raises:
            ValueError: the model runs in a way that passes its modules by (see `check_visible`).
        """
        for chunk in model:
            check_visible(_config(chunk))
            self._wrap(chunk, "zero_grad_buffer", phases.OPTIMIZER)
        self.attach_modules(model)
        self._wrap(optimizer, "zero_grad", phases.OPTIMIZER)
        self._wrap(optimizer, "step", phases.OPTIMIZER)
        self._wrap(_config(model[0]), "finalize_model_grads_func", phases.GRAD_REDUCE)
        self._wrap(schedules, "forward_step_calc_loss", phases.LOSS)
        self._wrap_backward_step()
        if self._whole_optimizer:
            for name in GRAD_SYNC:
                self._wrap(BUCKETS, name, phases.GRAD_REDUCE)
        else:
            for part in step_parts(optimizer, model):
                self._wrap_within(*part)
        self._attached.callback(watch_communication(self.clock))
        self._attached.callback(watch_schedule_plans(self.clock))

    def attach_modules(self, model: Sequence[torch.nn.Module]) -> None:
        """Wrap the model alone, which says what phase the forward or backward of a module is in."""
        for chunk in model:
            for module in chunk.modules():
                self._wrap_module(module)
        phases.listen(self.clock.enter)
        self._attached.callback(phases.listen, None)

    def detach(self) -> None:
        """Remove every wrapper."""
        self._attached.close()

    def _wrap_module(self, module: torch.nn.Module) -> None:
        if isinstance(module, GPTModel | HybridModel):
            if getattr(module, "embedding", None) is not None:
                self._wrap(module.embedding, "forward", phases.EMBEDDING)
            if module.post_process:
                for owner, name in _end_of(module):
                    self._wrap(owner, name, phases.LOSS)
        elif isinstance(module, MambaLayer):
            self._wrap(module, "forward", phases.MAMBA)
        elif isinstance(module, TransformerLayer):
            self._wrap_layer(module)
        elif isinstance(module, DeepSpeedMoE):
            self._wrap_deepspeed_moe(module)
        elif isinstance(module, MoELayer):
            self._wrap_moe_layer(module)
        elif isinstance(module, MultiTokenPredictionLayer):
            # Forward it lies within the model's _postprocess; backward it follows on attention.
            self._wrap(module.eh_proj, "forward", phases.LOSS)
            if module.mtp_layer_pattern is not None:  # a hybrid model's, which has no such method
                self._wrap(module, "_postprocess", phases.LOSS)
            self._wrap_later(module.eh_proj, phases.LOSS)

    def _wrap_layer(self, layer: TransformerLayer) -> None:
        """A layer of a hybrid model is attention or an MLP, and passes through the other."""
        if not isinstance(layer.self_attention, IdentityOp):
            self._wrap(layer, "_forward_attention", phases.ATTENTION)
            self._wrap_later(layer.self_attention, phases.ATTENTION)
        if isinstance(layer.mlp, IdentityOp):
            return
        self._wrap(layer, "_forward_mlp", phases.LAYER_NORM)
        self._wrap(layer, "_forward_pre_mlp_layernorm", phases.LAYER_NORM)
        if not isinstance(layer.mlp, MoELayer):
            self._wrap(layer.mlp, "forward", phases.DENSE_MLP)
            self._wrap_later(layer.mlp, phases.DENSE_MLP)

    def _wrap_moe_layer(self, layer: MoELayer) -> None:
        self._wrap(layer, "route", phases.ROUTER)
        is_latent = bool(layer.config.moe_latent_size)
        if is_latent:
            self._wrap(layer.fc1_latent_proj, "forward", phases.LATENT)
            self._wrap_later(layer.fc1_latent_proj, phases.LATENT)
            self._wrap_later(layer.fc2_latent_proj, phases.LATENT)
        for name, phase in _DISPATCHER.items():
            self._wrap(layer.token_dispatcher, name, phase)
        self._wrap(layer.experts, "forward", phases.UP_DOWN_GEMM)
        self._wrap_later(layer.experts, phases.UP_DOWN_GEMM)
        # beside the dispatcher's part: the projection back, and what shared experts give
        self._wrap(layer, "postprocess", phases.LATENT if is_latent else phases.COMBINE)
        if layer.use_shared_expert:
            self._wrap(layer, "shared_experts_compute", phases.SHARED_EXPERTS)
            self._wrap_later(layer.shared_experts, phases.SHARED_EXPERTS)
        if hasattr(layer, "balance"):
            self._wrap(layer, "balance", phases.BALANCE_LOSS)

    def _wrap_deepspeed_moe(self, layer: DeepSpeedMoE) -> None:
        """One method does it all: phases change where its parts begin and end."""
        clock, inner = self.clock, layer.moe.deepspeed_moe

        def begins(*ignored: Any) -> None:
            clock.enter_forward(phases.PERMUTE)  # exchanges within count as dispatch

        def reaches_experts(_experts: Any, given: tuple) -> None:
            for tensor in _with_gradient(given) if clock.running else ():
                tensor.register_hook(lambda _: clock.enter_backward(phases.PERMUTE))

        def leaves_experts(*ignored: Any) -> None:
            clock.enter_forward(phases.COMBINE)

        self._wrap(layer.moe, "forward", phases.COMBINE)  # with which the way back begins
        self._wrap(inner.gate, "forward", phases.ROUTER)
        self._wrap(inner.experts, "forward", phases.UP_DOWN_GEMM)
        for handle in (
            inner.register_forward_pre_hook(begins),
            inner.experts.register_forward_pre_hook(reaches_experts),
            inner.experts.register_forward_hook(leaves_experts),
        ):
            self._attached.callback(handle.remove)

    def _wrap_within(self, owner: Any, name: str, phase: str) -> None:
        """What no module does: it has no backward of its own, and belongs to the pass it is in."""
        original, clock = getattr(owner, name), self.clock

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = clock.phase, clock.pass_
            clock.enter(phase)
            try:
                return original(*args, **kwargs)
            finally:
                clock.switch(*before)

        self._set(owner, name, timed)

    def _wrap(self, owner: Any, name: str, phase: str) -> None:
        original = getattr(owner, name)
        clock = self.clock

        def timed(*args: Any, **kwargs: Any) -> Any:
            before = clock.phase, clock.pass_
            clock.enter_forward(phase)
            try:
                output = original(*args, **kwargs)
            finally:
                clock.switch(*before)
            if clock.running and torch.is_grad_enabled():
                # A tensor that is passed on as it is keeps the phase that made it.
                given = {id(value) for value in (*args, *kwargs.values())}
                for tensor in _with_gradient(output):
                    if id(tensor) not in given:
                        tensor.register_hook(begins_backward)
            return output

        def begins_backward(_gradient: Tensor) -> None:
            clock.enter_backward(phase)

        self._set(owner, name, timed)

    def _wrap_later(self, module: Any, phase: str) -> None:
        """The weight gradients that a module makes when it is told to."""
        if not hasattr(module, "backward_dw"):
            return
        original, clock = module.backward_dw, self.clock

        def backward_dw(*args: Any, **kwargs: Any) -> Any:
            before = clock.phase, clock.pass_
            clock.enter_backward(phase)
            try:
                return original(*args, **kwargs)
            finally:
                clock.switch(*before)

        self._set(module, "backward_dw", backward_dw)

    def _wrap_backward_step(self) -> None:
        """Before the first marked node a backward is in the loss, on the last stage."""
        original, clock = schedules.backward_step, self.clock

        def backward_step(input_tensor: Any, output_tensor: Any, gradient: Any, config: Any) -> Any:
            before = clock.phase, clock.pass_
            last_stage = (gradient[0] if isinstance(gradient, list) else gradient) is None
            clock.enter_backward(phases.LOSS if last_stage else phases.LAYER_NORM)
            try:
                return original(input_tensor, output_tensor, gradient, config)
            finally:
                clock.switch(*before)

        self._set(schedules, "backward_step", backward_step)

    def _set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute until `detach`."""
        self._attached.enter_context(Replaced(owner, name, value))


def _end_of(model: Any) -> list[tuple[Any, str]]:
    """(owner, method) of what follows on the last layer."""
    if isinstance(model, HybridModel):  # whose forward has all of it
        return [
            (model.decoder.final_norm, "forward"),
            (model.output_layer, "forward"),
            (model, "compute_language_model_loss"),
            (hybrid_model, "process_mtp_loss"),
        ]
    norm = model.decoder.final_layernorm
    return [(model, "_postprocess"), *([(norm, "forward")] if norm is not None else [])]


def check_visible(config: Any) -> None:
    """Raise ValueError where Megatron does not call the modules of a layer."""
    if getattr(config, "cuda_graph_impl", "none") not in (None, "none"):
        raise ValueError(
            f"cuda_graph_impl = {config.cuda_graph_impl!r} is not allowed under the profiler: a "
            "replayed graph passes the modules by; set it to none to profile"
        )


def moe_layers(model: Sequence[torch.nn.Module]) -> list[MoELayer]:
    """The MoE layers of this rank's model chunks, in order."""
    return [m for chunk in model for m in chunk.modules() if isinstance(m, MoELayer)]


def _config(chunk: torch.nn.Module) -> Any:
    """The TransformerConfig that Megatron's schedules read."""
    from megatron.core.utils import get_model_config

    return get_model_config(chunk)


def _with_gradient(value: Any) -> Iterator[Tensor]:
    """The tensors in a module's output that autograd will run back through."""
    if isinstance(value, Tensor):
        if value.grad_fn is not None:
            yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _with_gradient(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for item in fields(value):
            yield from _with_gradient(getattr(value, item.name))
