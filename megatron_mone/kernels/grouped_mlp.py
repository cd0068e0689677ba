"""The masked grouped expert MLP: one public op, checked here, run by a named backend.

Contract: rows are grouped by expert, `tokens_per_expert` counts them; neuron j of expert e is the
three H-vectors w_gate[e, j], w_up[e, j], w_down[e, j]; only masked neurons reach the output.
    a = x W_gate^T, g = sigma(a), mask = the S largest |g| of a row, or as given
    h = p * g * (x W_up^T) where mask, y = h W_down
Usable without Megatron. Shapes: N rows, E experts, F neurons of an expert, H hidden size, K entries
of the mask.
"""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_mone.kernels.activations import ACTIVATIONS
from megatron_mone.kernels.choice import Choose, Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.operands import check_choice, check_operands, host_counts
from megatron_mone.kernels.registry import Call, GroupedMLPOutput, choose_backend


def mone_grouped_mlp(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    neurons_per_token: int | None = None,
    activation: str = "silu",
    neuron_groups: int = 1,
    neuron_block: int = 1,
    neuron_mask: NeuronMask | None = None,
    backend: str = "auto",
) -> tuple[Tensor, NeuronMask]:
    """Run the routed rows through their experts, computing only the selected neurons.

    Which ones is chosen here, from the gates, or given: `neurons_per_token` or `neuron_mask`.

    Args:
        x_NH: [N, H] rows grouped by expert.
        probs_N: [N] router probabilities, any float dtype.
        tokens_per_expert: E counts that sum to N; or a tensor of them, [E] or by source [E, R], on
            x's device, which no host waits for in a backend that needs no number (N is then a
            bound).
        w_gate_EFH, w_up_EFH, w_down_EFH: [E, F, H] neuron-major weights in x's dtype.
        neurons_per_token: S, kept of the F neurons of each row.
        activation: silu, sigmoid, softmax, gelu, relu or squared_relu.
        neuron_groups: G equal contiguous groups, each keeps S / G.
        neuron_block: B adjacent neurons chosen together by their summed |g|; any B that divides
            F / G and S / G, 1 is the paper's choice.
        neuron_mask: N rows over F neurons.
        backend: a name of `registry.BACKENDS`, or "auto" for the fastest usable one.

    Returns:
        y_NH [N, H], and the mask of the neurons computed.

    Raises:
        ValueError: a shape, dtype, count or name that does not fit, before anything is computed.
    """
    if (neurons_per_token is None) == (neuron_mask is None):
        raise ValueError("give either neurons_per_token or neuron_mask: one says what is computed")
    choose: Choose
    if neuron_mask is not None:
        choose = neuron_mask
    else:
        assert neurons_per_token is not None
        choose = Selection(neurons_per_token, neuron_groups, neuron_block)
    output = grouped_mlp_with_gates(
        x_NH,
        probs_N,
        tokens_per_expert,
        w_gate_EFH,
        w_up_EFH,
        w_down_EFH,
        choose=choose,
        activation=activation,
        backend=backend,
    )
    return output.y_NH, output.mask


def grouped_mlp_with_gates(
    x_NH: Tensor,
    probs_N: Tensor,
    tokens_per_expert: Sequence[int] | Tensor,
    w_gate_EFH: Tensor,
    w_up_EFH: Tensor,
    w_down_EFH: Tensor,
    *,
    choose: Choose,
    activation: str = "silu",
    etp_group: ProcessGroup | None = None,
    all_gates: bool = False,
    backend: str = "auto",
) -> GroupedMLPOutput:
    """`mone_grouped_mlp` for a layer: any rule of choice, and the gates for a balance loss.

    Args:
        choose: a Selection, a mask, or gate activations [N, F] (detached) -> [N, F] bool.
        etp_group: ranks that hold the other neurons of the same experts, for softmax.
        all_gates: return gate_NF; only the reference has it.

    Raises:
        ValueError: a shape, dtype, count or name that does not fit, before anything is computed.
    """
    counts = tokens_per_expert
    if not isinstance(counts, Tensor):
        counts = [int(n) for n in counts]
    weights = (w_gate_EFH, w_up_EFH, w_down_EFH)
    check_operands(x_NH, probs_N, counts, weights)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation = {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    check_choice(choose, x_NH.shape[0], w_gate_EFH.shape[1])
    call = Call(x_NH.device.type, x_NH.dtype, activation, all_gates)
    chosen = choose_backend(backend, call.sized(x_NH.shape[0], w_gate_EFH, choose))
    if not chosen.backend.counts_on_device:
        counts = host_counts(counts, x_NH.shape[0])
    return chosen.backend.run(
        x_NH, probs_N, counts, *weights,
        choose=choose, activation=activation, etp_group=etp_group, all_gates=all_gates,
    )  # fmt: skip
