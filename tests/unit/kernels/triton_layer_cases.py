"""A whole MoNE layer on the Triton kernels in the interpreter, against the reference backend.

Cases of triton_interpreter_cases.py, which runs them; one rank.
"""

from functools import cache

import torch

from tests.unit.kernels.triton_case_tools import case, close

SEQUENCE, BATCH = 2, 2


@cache
def one_rank() -> None:
    """This process as the only rank of a Megatron job on the CPU."""
    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)


def layer_of(backend: str, changes: dict, padded: bool):
    """Output, gradients, load counters and recorded losses of two micro-batches and a step."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    from megatron_mone.moe.metrics import install_tracker
    from tests.unit.moe.builders import build_layer

    one_rank()
    install_tracker().clear()
    torch.manual_seed(3)
    layer = build_layer(mone_backend=backend, params_dtype=torch.float32, **changes)
    torch.manual_seed(4)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    if layer.experts.ng_weights is not None:
        layer.experts.ng_weights.copy_(torch.rand_like(layer.experts.ng_weights))
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(3.0))
    mask = torch.rand(BATCH, SEQUENCE) < 0.3 if padded else None
    found = []
    for _ in range(2):
        hidden = torch.randn(SEQUENCE, BATCH, 16, requires_grad=True)
        output, _ = layer(hidden, padding_mask=mask)
        output.backward(torch.randn_like(output))
        found += [output.detach(), hidden.grad]
    found += [p.grad for p in layer.parameters() if p.grad is not None]
    found += [layer.neuron_balancer.load.step_counts_EF, layer.neuron_balancer.load.step_rows_E]
    entry = install_tracker()._metrics.get("ng_loss")
    if entry is not None:
        found.append(entry.values.clone())
    layer.neuron_balancer.end_step()
    if layer.experts.ng_weights is not None:
        found.append(layer.experts.ng_weights)
    return found


@case("selected", "micro_batch", False)
@case("selected", "micro_batch", True)
@case("raw", "micro_batch", True)
@case("entropy", "global_batch", False)
@case("selected", "global_batch", True)
def whole_layer(loss_type: str, scope: str, padded: bool) -> None:
    changes = {
        "mone_ng_loss_type": loss_type,
        "mone_ng_loss_scope": scope,
        "mone_ng_loss_coeff": 0.5,
    }
    ours, right = (layer_of(name, changes, padded) for name in ("triton", "reference"))
    assert len(ours) == len(right)
    for got, want in zip(ours, right, strict=True):
        close(got, want, torch.float32)


@case()
def a_loss_per_token_with_padding() -> None:
    changes = {"calculate_per_token_loss": True, "mone_ng_loss_coeff": 0.5}
    for got, want in zip(
        *(layer_of(name, changes, True) for name in ("triton", "reference")), strict=True
    ):
        close(got, want, torch.float32)


@case()
def recompute_keeps_its_mask() -> None:
    """A layer recomputed whole: the same gradients, from the bits that the first pass left."""
    changes = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
    plain, again = layer_of("triton", {}, False), layer_of("triton", changes, False)
    for got, want in zip(again, plain, strict=True):
        close(got, want, torch.float32)


@case()
def weight_gradients_come_later_when_they_are_put_off() -> None:
    """Of two micro-batches: none before `backward_dw`, then the same bits."""
    from tests.unit.moe.builders import build_experts

    one_rank()
    torch.manual_seed(5)
    x, p = torch.randn(2, 7, 16), torch.rand(2, 7)
    gradients = []
    for later in (False, True):
        torch.manual_seed(6)
        experts = build_experts(2, mone_backend="triton", params_dtype=torch.float32)
        for parameter in experts.parameters():
            torch.nn.init.normal_(parameter)
        experts.config.delay_wgrad_compute = later
        for rows, probs in zip(x, p, strict=True):
            rows.requires_grad_()
            experts(rows, torch.tensor([3, 4]), probs).y_NH.square().sum().backward()
        assert all((weight.grad is None) is later for weight in experts.parameters())
        experts.backward_dw()
        gradients.append([weight.grad for weight in experts.parameters()])
        experts.backward_dw()  # nothing is left
    for now, then in zip(*gradients, strict=True):
        assert torch.equal(now, then)
