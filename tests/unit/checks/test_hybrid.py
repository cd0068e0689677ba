"""Hybrid models are refused in one line where their pattern, packages or a command do not fit."""

from argparse import Namespace

import pytest

from megatron_mone.config_checks import hybrid_moe_layers
from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.checks import hybrid
from megatron_mone.model.hybrid_spec import check_hybrid


@pytest.fixture
def args():
    given = flag_parser().parse_args(["--num-experts", "4", "--mone-neuron-ratio", "0.25"])
    given.hybrid_layer_pattern = "M*E"
    return given


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_experts": None}, "hybrid_layer_pattern = 'M[*]E' has layers of experts"),
        ({"hybrid_layer_pattern": "M*-"}, "num_experts = 4 would have no effect"),
        ({"overlap_moe_expert_parallel_comm": True}, "overlap_moe_expert_parallel_comm = True"),
    ],
)
def test_pattern(args, changed, says):
    hybrid.check_pattern(args)
    vars(args).update(changed)
    with pytest.raises(ValueError, match=f"^{says}"):
        hybrid.check_pattern(args)


def test_kinds_of_layers_that_cpu_ranks_have_not(args):
    assert list(hybrid.hybrid_faults(args)) == []
    args.hybrid_layer_pattern = "GE"
    assert [line.split(",")[0] for line in hybrid.hybrid_faults(args)] == [
        "hybrid_layer_pattern = 'GE': G"
    ]


@pytest.mark.parametrize(
    ("name", "value"),
    [("use_mamba_mem_eff_path", False), ("mamba_training_ssm_states_dtype", "fp32")],
)
def test_kernels_that_cpu_ranks_have_not(args, name, value):
    setattr(args, name, value)
    assert [line.split(" = ")[0] for line in hybrid.hybrid_faults(args)] == [name]


def test_what_gpus_need(args, monkeypatch):
    monkeypatch.setattr(hybrid.torch.cuda, "is_available", lambda: True)
    args.transformer_impl = "local"
    layers, kernels = hybrid.hybrid_faults(args)
    assert "--transformer-impl transformer_engine" in layers
    assert kernels.endswith("pip install mamba-ssm")


def test_commands_of_gpt_models_say_so(args):
    with pytest.raises(ValueError, match="are trained, not converted"):
        hybrid.check_gpt(args, "converted")
    args.hybrid_layer_pattern = None
    hybrid.check_gpt(args, "converted")


def test_layers_of_experts():
    assert hybrid_moe_layers("M*E|ME-/*E/*E") == [0, 0, 1, 0, 1, 0]


@pytest.mark.parametrize(
    "changed",
    [
        {"mone_qk_norm_all_heads": True},
        {"mone_residual_multiplier": 0.5},
        {"mtp_use_repeated_layer": True},
    ],
)
def test_what_mone_has_in_gpt_models_alone(changed):
    fits = {"mone_qk_norm_all_heads": False, "mone_residual_multiplier": 1,
            "mtp_use_repeated_layer": False}  # fmt: skip
    check_hybrid(Namespace(**fits), "*E")
    with pytest.raises(ValueError, match=f"^{next(iter(changed))} = "):
        check_hybrid(Namespace(**{**fits, **changed}), "*E")
    with pytest.raises(ValueError, match=r"behind / = 'EE' .* give it one E"):
        check_hybrid(Namespace(**fits), "EE")
