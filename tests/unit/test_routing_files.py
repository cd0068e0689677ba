"""Files of --moe-routing-trace-path that a run is to replay, and what is wrong with them."""

import json
from argparse import Namespace

import pytest
import torch

from megatron_mone.model import routing_files
from megatron_mone.model.routing_files import check_combination, check_files
from megatron_mone.moe.routing_tape import RoutesError, RoutingTape


def record(step, layer, chosen):
    return {"step": step, "block": "decoder", "layer": layer, "top_indices": chosen}


def write(folder, rank, records):
    path = folder / f"router_trace_rank{rank}.jsonl"
    path.write_text("".join(f"{json.dumps(one)}\n" for one in records))
    return path


def replay(path, micro_batches, monkeypatch):
    """A step's routes, read for a model of one router with k = 2 of 4 experts."""
    monkeypatch.setattr(
        "megatron.core.num_microbatches_calculator.get_num_microbatches", lambda: micro_batches
    )
    taken = []

    def train_step(*args, iteration):
        taken.append((iteration, [one.tolist() for one in router.router_replay.choices]))

    router = torch.nn.Linear(1, 1)
    router.router_replay, router.topk = None, 2
    router.config = Namespace(num_moe_experts=4)
    job = routing_files._Replay(path, train_step)
    job._routers = {("decoder", None, 0): router}
    return job, taken, router


def test_a_step_takes_its_own_routes(tmp_path, monkeypatch):
    records = [record(step, 0, [[step, 3], [mb, 2]]) for step in (0, 1, 2) for mb in (0, 1)]
    job, taken, router = replay(write(tmp_path, 0, records), 2, monkeypatch)
    job.step(iteration=1)  # a run that goes on after its first step
    assert taken == [(1, [[[1, 3], [0, 2]], [[1, 3], [1, 2]]])]
    assert router.router_replay is None
    with pytest.raises(RoutesError, match="no routes of step 5"):
        job.step(iteration=4)


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([record(0, 0, [[0, 1]])], "routes of 1 forwards, and this run makes 2"),
        ([record(0, 0, [[0, 4]])] * 2, "up to number 4"),
        ([record(0, 0, [[0]])] * 2, "to 1 experts"),
        ([record(0, 0, [0, 1])] * 2, "no table"),
        ([{"step": 0}], "line 1 is no record"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, monkeypatch, lines, says):
    job, taken, _ = replay(write(tmp_path, 0, lines), 2, monkeypatch)
    with pytest.raises(RoutesError, match=says) as error:
        job.step(iteration=0)
    assert "\n" not in str(error.value)
    assert taken == []


def test_routes_of_fewer_tokens_are_not_taken():
    tape = RoutingTape(records=False)
    tape.begin_step([torch.zeros(3, 2, dtype=torch.int64)])
    with pytest.raises(RoutesError, match="routes of 3 tokens for a micro-batch of 4"):
        tape.get_replay_topk(torch.zeros(4, 4), 2)


def test_a_folder_of_other_ranks(tmp_path):
    write(tmp_path, 0, [])
    check_files(Namespace(mone_replay_routing=str(tmp_path), world_size=1))
    with pytest.raises(ValueError, match="holds routes of 1 ranks, and this run has 2"):
        check_files(Namespace(mone_replay_routing=str(tmp_path), world_size=2))
    with pytest.raises(ValueError, match="holds routes of 0 ranks"):
        check_files(Namespace(mone_replay_routing=str(tmp_path / "no"), world_size=2))


@pytest.mark.parametrize(
    "change",
    [
        {"moe_router_load_balancing_type": ["sinkhorn"]},
        {"moe_router_fusion": True},
        {"moe_expert_capacity_factor": 1.0},
        {"num_experts": None},
    ],
)
def test_routers_that_choose_otherwise_are_refused(change):
    args = {
        "mone_replay_routing": "x", "num_experts": 4, "moe_router_fusion": False,
        "moe_router_load_balancing_type": "aux_loss", "moe_expert_capacity_factor": None,
    }  # fmt: skip
    check_combination(Namespace(**args))
    check_combination(Namespace(**{**args, **change, "mone_replay_routing": None}))
    with pytest.raises(ValueError, match=next(iter(change))):
        check_combination(Namespace(**{**args, **change}))
