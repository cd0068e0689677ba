"""What Megatron derives from the layout is said where it is, and only there."""

from argparse import Namespace

import pytest

from megatron_mone.model.checks.layout_notices import OTHERWISE, layout_notices


def notices(*command, **changes):
    args = Namespace(
        tensor_model_parallel_size=1, context_parallel_size=1, data_parallel_size=2,
        expert_tensor_parallel_size=1, global_batch_size=8, dataloader_type="single",
        moe_expert_capacity_factor=None, moe_router_load_balancing_type="aux_loss",
        eod_mask_loss=False, calculate_per_token_loss=False, optimizer="adam",
        muon_tp_mode="blockwise",
    )  # fmt: skip
    vars(args).update(changes)
    lines = layout_notices(args, command)
    assert all(OTHERWISE in line and "\n" not in line for line in lines)
    return " ".join(lines)


TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
GIVEN = ("--global-batch-size", "8")


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"dataloader_type": "cyclic"}, "each of the data parallel = 2 shares"),
        ({"moe_expert_capacity_factor": 1.0, **TP2}, "at tensor x context parallel = 2"),
        ({"moe_expert_capacity_factor": 1.0, **CP2}, "at tensor x context parallel = 2"),
        ({"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"], **TP2}, "'sinkhorn'"),
        ({"eod_mask_loss": True, **CP2}, "context parallel = 2 ranks"),
        ({"optimizer": "muon", **TP2}, "tensor parallel = 2 ranks"),
        ({"optimizer": "muon", "expert_tensor_parallel_size": 2}, "tensor parallel = 2 ranks"),
        ({"optimizer": "soap", **TP2}, "tensor parallel = 2 ranks"),
    ],
)
def test_each_is_said(changes, wanted):
    assert wanted in notices(*GIVEN, **changes)


def test_a_batch_of_the_layout_is_said():
    assert "pass --global-batch-size 8" in notices()
    assert not notices(*GIVEN)
    assert not notices("--global-batch-size=8")
    assert not notices("--step-batch-size-schedule", "0:8")


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_type": "cyclic", "data_parallel_size": 1},
        {"moe_expert_capacity_factor": 1.0},
        {"moe_router_load_balancing_type": "sinkhorn"},
        {"eod_mask_loss": True, **TP2},
        {"eod_mask_loss": True, "calculate_per_token_loss": True, **CP2},
        {"optimizer": "muon"},
        {"optimizer": "muon", "muon_tp_mode": "duplicated", **TP2},
        {"optimizer": "lion", **TP2},
    ],
)
def test_what_is_the_same_in_every_layout_is_not(changes):
    assert not notices(*GIVEN, **changes)
