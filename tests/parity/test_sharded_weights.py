"""Weights cut over data-parallel ranks, by torch's FSDP2 and by Megatron FSDP: the numbers of
replicated weights, and keep-all MoNE those of stock.

Losses of five steps say it: each is made by the parameters that the steps before it left, and
these lie in pieces that no common layout gathers.
"""

from argparse import Namespace

import pytest

from megatron_mone.cpu_emulation.fsdp import _Device
from megatron_mone.model.checks import machine
from tests.parity.conftest import note
from tests.parity.layouts import EP2, FULL_RECOMPUTE, KEEP_ALL, MOE_RECOMPUTE, STOCK, TP2, TRAIN
from tests.parity.test_training_layouts import TOLERANCE, worst_error
from tests.training_cases import Case, recorded, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS = 5
FSDP2 = ("--use-torch-fsdp2",)
MEGATRON = ("--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor")
STRATEGY = "--data-parallel-sharding-strategy"
TWO_INSTANCES = ("--num-distributed-optimizer-instances", "2", "--overlap-grad-reduce")
WHOLE = (*MEGATRON, STRATEGY, "optim_grads_params")
# Ranks, what both sides of the comparison have, and what shards.
SHARDED = {
    "FSDP2": (2, (), FSDP2),
    "FSDP2, full recompute": (2, FULL_RECOMPUTE, FSDP2),
    "FSDP2, kept after the forward pass": (
        2, (), (*FSDP2, "--torch-fsdp2-no-reshard-after-forward"),
    ),
    "Megatron FSDP, no_shard": (2, (), (*MEGATRON, STRATEGY, "no_shard")),
    "Megatron FSDP, optim": (2, (), (*MEGATRON, STRATEGY, "optim")),
    "Megatron FSDP, optim_grads": (2, (), (*MEGATRON, STRATEGY, "optim_grads")),
    "Megatron FSDP": (2, (), WHOLE),
    "Megatron FSDP, TP2": (2, TP2, WHOLE),
    "Megatron FSDP, selective recompute": (2, MOE_RECOMPUTE, WHOLE),
    "Megatron FSDP, EP2 of 4": (4, EP2, WHOLE),
    "Megatron FSDP in two instances": (4, (), (*WHOLE, *TWO_INSTANCES)),
}  # fmt: skip
AS_STOCK = ("FSDP2", "Megatron FSDP, optim", "Megatron FSDP", "Megatron FSDP, EP2 of 4")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    cases: dict[int, dict[str, Case]] = {2: {}, 4: {}}

    def add(ranks, name, *words):
        cases[ranks][name] = Case(name, (*words, "--train-iters", str(STEPS)))

    for name, (ranks, both, its) in SHARDED.items():
        add(ranks, f"{ranks} replicated {both}", *TRAIN, *both)
        add(ranks, name, *TRAIN, *both, *its)
        if name in AS_STOCK:
            add(ranks, f"{name}, stock", *STOCK, *both, *its)
            add(ranks, f"{name}, keep-all", *KEEP_ALL, *both, *its)
    for ranks, named in cases.items():
        run_cases(list(named.values()), ranks, folder)
    return folder


@pytest.mark.parametrize("name", SHARDED)
def test_shards_train_as_replicas(runs, name):
    ranks, both, _ = SHARDED[name]
    wanted, got = recorded(runs / f"{ranks} replicated {both}"), recorded(runs / name)
    assert len(wanted["lm loss"]) == STEPS
    metrics = [tag for tag in wanted if tag.startswith("mone/") and "tflops" not in tag]
    assert len(metrics) > 16
    errors = {
        "loss": max(worst_error(wanted[t], got[t]) for t in ("lm loss", "grad-norm")),
        "metrics": max(worst_error(wanted[t], got[t]) for t in metrics),
    }
    for column, error in errors.items():
        note(name, column, error)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", AS_STOCK)
def test_keep_all_is_stock(runs, name):
    wanted = scalars(runs / f"{name}, stock", "lm loss")
    assert len(wanted) == STEPS
    assert scalars(runs / f"{name}, keep-all", "lm loss") == wanted
    note(name, "keep-all = stock", 0.0)


def test_experts_on_one_rank_alone_are_refused():
    args = Namespace(
        use_megatron_fsdp=True, tensor_model_parallel_size=1, expert_tensor_parallel_size=None,
        pipeline_model_parallel_size=1, expert_model_parallel_size=2, world_size=2,
    )  # fmt: skip
    [line] = machine._experts_without_replicas(args)
    assert line.startswith("expert_model_parallel_size = 2 leaves every expert on one rank alone")
    args.world_size = 4
    assert list(machine._experts_without_replicas(args)) == []


def test_devices_are_named_by_text():
    assert str(_Device("cuda:cpu")) == str(_Device("cuda", 3)) == "cpu"
    assert str(_Device("meta")) == "meta"
    assert isinstance(_Device("cpu"), _Device)
