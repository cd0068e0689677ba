"""Collectives among copies of one rank do what they would among ranks that hold the same.

Run by test_loopback.py in a process of its own: the groups of other tests would be in the way.
"""

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_mone.planning.tracing.loopback import Loopback

WORLD, RANK = 6, 4


@pytest.fixture
def seen():
    """What was observed, as (kind, bytes, ranks); the loopback is on meanwhile."""
    assert not dist.is_initialized()
    observed = []
    loopback = Loopback(lambda kind, size, group: observed.append((kind, size, group.size())))
    new_group, allreduce = dist.new_group, dist.ProcessGroup.allreduce
    loopback.start()
    dist.init_process_group("fake", rank=RANK, world_size=WORLD, store=FakeStore())
    try:
        yield observed
    finally:
        dist.destroy_process_group()
        loopback.stop()
    assert dist.new_group is new_group
    assert dist.ProcessGroup.allreduce is allreduce


@pytest.fixture
def trio(seen):
    """This rank is the second of three."""
    return dist.new_group([2, 4, 5])


def test_groups_of_others_are_not_made(seen):
    assert dist.new_group([0, 1]) is dist.GroupMember.NON_GROUP_MEMBER
    group = dist.new_group([1, 4], group_desc="PAIR")
    assert (group.size(), group.rank(), group.group_desc) == (2, 1, "PAIR")


def test_a_sum_counts_every_copy_and_a_maximum_one(seen, trio):
    value = torch.tensor([1, 2])
    dist.all_reduce(value, group=trio)
    assert value.tolist() == [3, 6]
    dist.all_reduce(value, op=dist.ReduceOp.MAX, group=trio)
    assert value.tolist() == [3, 6]
    assert seen == [("all_reduce", 16, 3)] * 2


def test_all_gather_repeats_the_input(seen, trio):
    value = torch.tensor([[1, 2]])
    whole = torch.zeros(3, 2, dtype=torch.int64)
    dist.all_gather_into_tensor(whole, value, group=trio)
    assert whole.tolist() == [[1, 2]] * 3
    parts = [torch.zeros_like(value) for _ in range(3)]
    dist.all_gather(parts, value, group=trio)
    assert [part.tolist() for part in parts] == [[[1, 2]]] * 3
    assert seen == [("all_gather", 16, 3)] * 2


def test_reduce_scatter_sums_this_ranks_part(seen, trio):
    part = torch.zeros(2, dtype=torch.int64)
    dist.reduce_scatter_tensor(part, torch.arange(6), group=trio)
    assert part.tolist() == [6, 9]  # 3 x [2, 3]
    dist.reduce_scatter(part, list(torch.arange(6).view(3, 2)), group=trio)
    assert part.tolist() == [6, 9]
    assert seen == [("reduce_scatter", 48, 3)] * 2


def test_all_to_all_brings_what_copies_send_here(seen, trio):
    """Each sends its second chunk, of two rows, to the second rank."""
    value = torch.arange(6)
    found = torch.zeros(6, dtype=torch.int64)
    dist.all_to_all_single(found, value, group=trio)
    assert found.tolist() == [2, 3, 2, 3, 2, 3]
    dist.all_to_all_single(found, value, [2, 2, 2], [1, 2, 3], group=trio)
    assert found.tolist() == [1, 2, 1, 2, 1, 2]
    assert [kind for kind, _, _ in seen] == ["all_to_all"] * 2


def test_objects_are_this_ranks(seen, trio):
    found = [None] * 3
    dist.all_gather_object(found, {"rank": RANK}, group=trio)
    assert found == [{"rank": RANK}] * 3


def test_tensors_without_values_are_only_seen(seen, trio):
    value = torch.empty(4, 8, device="meta")
    whole = torch.empty(12, 8, device="meta")
    dist.all_gather_into_tensor(whole, value, group=trio)
    dist.all_reduce(value, group=trio)
    dist.all_to_all_single(whole, whole, group=trio)
    dist.batch_isend_irecv([dist.P2POp(dist.isend, value, 5, trio)])[0].wait()
    size = value.nbytes
    assert seen == [
        ("all_gather", size, 3), ("all_reduce", size, 3), ("all_to_all", 3 * size, 3),
        ("send", size, 3),
    ]  # fmt: skip


def test_unknown_values_are_never_read_as_known(seen, trio):
    found = torch.zeros(12, dtype=torch.int64)
    value = torch.empty(4, dtype=torch.int64, device="meta")
    with pytest.raises(RuntimeError, match="not known"):
        dist.all_gather_into_tensor(found, value, group=trio)


def test_groups_of_one_are_not_observed(seen):
    alone = dist.new_group([RANK])
    value = torch.tensor([5])
    dist.all_reduce(value, group=alone)
    assert value.tolist() == [5]
    assert seen == []


def test_coalesced_collectives_are_each_seen(seen, trio):
    values = [torch.arange(6), torch.arange(3)]
    parts = [torch.zeros(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)]
    with dist._coalescing_manager(trio, async_ops=True) as manager:
        for part, value in zip(parts, values, strict=True):
            dist.reduce_scatter_tensor(part, value, group=trio, async_op=True)
    manager.wait()
    assert [part.tolist() for part in parts] == [[6, 9], [3]]
    assert sum(size for _, size, _ in seen) == 72
