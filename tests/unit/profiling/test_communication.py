"""What a collective sends, and to which phase its time goes."""

import pytest
import torch
import torch.distributed as dist

from megatron_mone.common import phases
from megatron_mone.profiling.clock import HostStamps, PhaseClock
from megatron_mone.profiling.communication import phase_of, sent_bytes, watch_communication


@pytest.mark.parametrize(
    ("operation", "sent"),
    [
        ("all_reduce", 2 * 75),  # ring: a reduce-scatter and an all-gather
        ("reduce_scatter", 75),
        ("all_gather", 300),  # the input is one rank's part
        ("all_to_all", 75),
        ("send", 100),
        ("recv", 0),
        ("barrier", 0),
    ],
)
def test_bytes_sent_by_one_of_four_ranks(operation, sent):
    assert sent_bytes(operation, 100, 4) == sent


def test_collectives_count_where_a_rank_waits():
    assert phase_of(phases.ATTENTION, "tp") == phases.EXPOSED_COMMUNICATION
    assert phase_of(phases.PERMUTE, "tp-ep") == phases.DISPATCH
    assert phase_of(phases.COMBINE, "ep") == phases.COMBINE
    assert phase_of(phases.ROUTER, "ep") == phases.DISPATCH  # DeepSpeed's capacity
    assert phase_of(phases.ROUTER, "tp-cp") == phases.EXPOSED_COMMUNICATION
    assert phase_of(phases.PARAMETER_GATHER, "dp-cp") == phases.PARAMETER_GATHER
    assert phase_of(phases.GRAD_REDUCE, "dp-cp") == phases.GRAD_REDUCE
    assert phase_of(phases.ATTENTION, "pp") == phases.PIPELINE_BUBBLE


def test_every_method_of_this_torch_is_put_back(one_rank):
    before = dict(vars(dist.ProcessGroup)), dist.Work.wait
    end = watch_communication(PhaseClock(HostStamps()))
    assert vars(dist.ProcessGroup)["allreduce"] is not before[0]["allreduce"]
    end()
    assert (dict(vars(dist.ProcessGroup)), dist.Work.wait) == before


def test_a_group_of_one_rank_does_not_communicate(one_rank):
    clock = PhaseClock(HostStamps())
    end = watch_communication(clock)
    clock.begin()
    dist.all_reduce(torch.ones(4))
    clock.end()
    end()
    assert clock.take()[0].communication == {}
