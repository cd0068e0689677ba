"""Which CUDA graphs go over MoNE layers; what cannot be captured is one line."""

from argparse import Namespace

import pytest

from megatron_mone.config_checks import captured, captures_experts
from megatron_mone.model.checks.graphs import check_graphs

STATIC = {
    "mone_neuron_ratio": 0.25, "mone_backend": "triton",
    "moe_token_dispatcher_type": "alltoall", "moe_expert_capacity_factor": 1.5,
    "moe_pad_expert_input_to_capacity": True,
}  # fmt: skip
WHOLE = [
    {"cuda_graph_impl": "full_iteration"},
    {"cuda_graph_impl": "local"},
    {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn", "moe"]},
    {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": ["moe"]},
    {"enable_cuda_graph": True},
    {"external_cuda_graph": True, "cuda_graph_modules": "full"},
    {"cuda_graph_impl": "local", "cuda_graph_scope_deprecated": ["full_iteration"]},
]
PARTS = [
    {"cuda_graph_impl": "none"},
    {"cuda_graph_impl": "local", "cuda_graph_modules": ["attn"]},
    {"cuda_graph_impl": "local", "cuda_graph_modules": ["mamba", "mlp"]},
    {"cuda_graph_impl": "transformer_engine",
     "cuda_graph_modules": ["attn", "moe_router", "moe_preprocess"]},
]  # fmt: skip
WAITS = [
    ({"moe_expert_capacity_factor": None}, "the number of rows they get is known when"),
    ({"moe_pad_expert_input_to_capacity": False}, "the number of rows they get is known when"),
    ({"moe_token_dispatcher_type": "allgather"}, "moe_token_dispatcher_type = 'allgather' gives"),
    ({"moe_token_dispatcher_type": "flex"}, "the flex dispatcher has the host ask"),
    (
        {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep"},
        "the flex dispatcher has the host ask",
    ),
    (
        {
            "moe_token_dispatcher_type": "flex",
            "moe_flex_dispatcher_backend": "ncclep",
            "moe_expert_rank_capacity_factor": 1.5,
        },
        "the flex dispatcher has the host ask",
    ),
    ({"moe_router_padding_for_quantization": True}, "moe_router_padding_for_quantization pads"),
    ({"mone_backend": "reference"}, "mone_backend = 'reference' waits"),
    ({"mone_backend": "te"}, "mone_backend = 'te' waits"),
    ({"mone_selection": "threshold"}, "mone_selection = 'threshold' keeps as many"),
    ({"mone_ng_loss_type": "bias"}, "mone_ng_loss_type = 'bias' the host waits"),
    ({"mone_ng_loss_type": "normalized"}, "mone_ng_loss_type = 'normalized' asks for"),
    ({"mone_ng_loss_scope": "global_batch"}, "mone_ng_loss_scope = 'global_batch' adds up"),
    ({"tensor_model_parallel_size": 2}, "mone_neuron_groups = 1 has the 2 ranks"),
    ({"cuda_graph_warmup_steps": 0}, "their tables come to the device"),
    ({"recompute_granularity": "full"}, "a recomputed layer takes the neurons"),
    ({"recompute_granularity": "selective", "recompute_modules": ["moe"]}, "a recomputed layer"),
]


@pytest.fixture(scope="module")
def defaults():
    from megatron_mone.model.arguments import flag_parser

    return vars(flag_parser().parse_args([]))


@pytest.mark.parametrize("given", WHOLE, ids=str)
def test_experts_of_static_shape_may_be_captured(defaults, given):
    args = Namespace(**{**defaults, **STATIC, **given})
    assert captures_experts(args)
    check_graphs(args)


@pytest.mark.parametrize("given", PARTS, ids=str)
def test_other_modules_may_always_be(defaults, given):
    args = Namespace(**{**defaults, "mone_neuron_ratio": 0.25, **given})
    assert not captures_experts(args)
    check_graphs(args)


@pytest.mark.parametrize("graph", WHOLE[:4], ids=str)
@pytest.mark.parametrize(("given", "says"), WAITS, ids=lambda x: str(x)[:40])
def test_what_waits_is_refused(defaults, graph, given, says):
    args = Namespace(**{**defaults, **STATIC, **graph, **given})
    kind = captured(args)[0]
    with pytest.raises(ValueError, match=f"^cuda_graph_impl = '{kind}'.*{says}") as error:
        check_graphs(args)
    assert "\n" not in str(error.value)


def test_a_rank_capacity_is_a_static_shape(defaults):
    given = {"moe_token_dispatcher_type": "flex", "moe_flex_dispatcher_backend": "hybridep",
             "moe_expert_rank_capacity_factor": 1.5, "moe_pad_expert_input_to_capacity": False,
             "moe_expert_capacity_factor": None}  # fmt: skip
    check_graphs(Namespace(**{**defaults, **STATIC, **WHOLE[0], **given}))


@pytest.mark.parametrize(
    "field", ["delay_wgrad_compute", "overlap_dispatch_backward_with_experts_wgrad"]
)
def test_weight_gradients_are_made_inside(defaults, field):
    """Those that are put off, by a call after the backward pass that a whole iteration holds."""
    check_graphs(Namespace(**{**defaults, **STATIC, **WHOLE[0], field: True}))
    with pytest.raises(ValueError, match="the weight gradients that they put off are made by the"):
        check_graphs(Namespace(**{**defaults, **STATIC, **WHOLE[1], field: True}))


def test_losses_are_not_waited_for(defaults):
    full = {**defaults, **STATIC, **WHOLE[0], "check_for_spiky_loss": True}
    with pytest.raises(ValueError, match="check_for_spiky_loss waits"):
        check_graphs(Namespace(**full))
    check_graphs(Namespace(**{**full, **WHOLE[1]}))


@pytest.mark.parametrize("field", ["mone_record_masks", "mone_replay_masks"])
@pytest.mark.parametrize("given", [*WHOLE[:4], PARTS[-1]], ids=str)
def test_masks_go_with_no_graph_of_the_router(defaults, given, field):
    args = {**defaults, **STATIC, field: "masks"}
    with pytest.raises(ValueError, match="is not allowed with mone_record_masks or mone_replay"):
        check_graphs(Namespace(**{**args, **given}))
    check_graphs(Namespace(**{**args, **PARTS[1]}))
