"""Optimizers that Megatron would stop at late, or train otherwise than asked, are one line."""

import pytest
import torch

from megatron_mone.model.checks import optimizer
from megatron_mone.model.checks.optimizer import check_optimizer, check_optimizer_package

MONE = "--mone-neuron-ratio 0.25"
SHARDED = "--use-distributed-optimizer"


@pytest.mark.parametrize(
    "flags",
    [
        "--optimizer adam --fp16",
        f"--optimizer adam {SHARDED}",
        f"--optimizer muon --bf16 {SHARDED} --save s --load s",
        "--optimizer dist_muon --bf16",
        "--optimizer lion --save s --adam-beta1 0.95",
        "--optimizer muon --muon-scalar-optimizer lion --lion-beta1 0.8",
        "--optimizer soap --save s --load s --no-save-optim --no-load-optim",
        "--optimizer soap --load s --finetune",
        "--optimizer soap --ckpt-format torch --save s --load s",
        "--exp-avg-dtype fp8 --use-megatron-fsdp",
        f"{MONE} --exp-avg-dtype bf16",
    ],
)
def test_what_trains_passes(parser, flags):
    args = parser.parse_args(flags.split())
    check_optimizer(args)
    check_optimizer_package(args)


@pytest.mark.parametrize(
    ("flags", "wanted"),
    [
        ("--optimizer muon --fp16", "'muon' does not go with fp16 = True: .* give --bf16"),
        ("--optimizer adaptive_muon", "'adaptive_muon' does not go with emerging-optimizers"),
        (f"--optimizer muon {SHARDED}", "'muon' does not go with --use-distributed-optimizer: "),
        (f"--optimizer lion {SHARDED}", "'lion' does not go with --use-distributed-optimizer: "),
        ("--optimizer dist_muon", "'dist_muon' does not go with its layer-wise sharding: "),
        ("--optimizer muon --use-precision-aware-optimizer", "use_precision_aware_optimizer"),
        ("--optimizer muon --optimizer-cpu-offload", "optimizer_cpu_offload = True"),
        (
            "--optimizer-cpu-offload --exp-avg-sq-dtype bf16",
            "exp_avg_sq_dtype = 'bf16' .* no effect",
        ),
        ("--optimizer-cpu-offload --use-torch-optimizer-for-cpu-offload", "would have no effect"),
        ("--optimizer-cpu-offload --no-pin-cpu-params", "pin_cpu_params = False would have no eff"),
        ("--optimizer muon --num-distributed-optimizer-instances 2", "instances = 2"),
        ("--optimizer muon --muon-num-ns-steps 0", "muon_num_ns_steps = 0 must be 1 or more"),
        ("--optimizer soap --save s", "its state cannot be saved .* pass --no-save-optim"),
        ("--optimizer soap --load s", "its state cannot be loaded .* pass --no-load-optim"),
        ("--optimizer lion --lion-beta1 0.8", "lion_beta1 = 0.8 is not read .*adam_beta1 = 0.9: "),
        ("--optimizer lion --lion-beta2 0.8", "lion_beta2 = 0.8 is not read .* --adam-beta2"),
        (f"{MONE} --exp-avg-dtype fp8", "exp_avg_dtype = 'fp8' is not allowed with MoNE"),
        (f"{MONE} --exp-avg-sq-dtype fp16", "exp_avg_sq_dtype = 'fp16' is not allowed with MoNE"),
    ],
)
def test_what_does_not_is_one_line(parser, flags, wanted):
    with pytest.raises(ValueError, match=wanted) as error:
        check_optimizer(parser.parse_args(flags.split()))
    assert "\n" not in str(error.value)


def test_the_package_and_its_coefficients_are_asked_for(parser, monkeypatch):
    args = parser.parse_args(["--optimizer", "muon", "--muon-coefficient-type", "foo"])
    with pytest.raises(ValueError, match=r"muon_coefficient_type = 'foo' is not one of .*quintic"):
        check_optimizer_package(args)
    monkeypatch.setattr(optimizer, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'muon' needs the package emerging-optimizers: pip"):
        check_optimizer_package(args)
    check_optimizer_package(parser.parse_args([]))


def test_megatrons_class_still_does_not_fit_the_package():
    """The refusal of adaptive_muon goes when this fails."""
    pytest.importorskip("emerging_optimizers")
    from megatron.core.optimizer.emerging_optimizers import TensorParallelAdaptiveMuon

    built = TensorParallelAdaptiveMuon([torch.nn.Parameter(torch.zeros(2, 2))])
    assert not hasattr(built, "scale_mode")
