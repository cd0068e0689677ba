"""Which numbers of nodes a profile takes, and with what global batch."""

import pytest

from launch.spec.profile_sizes import Size, Sizes

LAYOUT = {
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "micro_batch_size": 1,
    "global_batch_size": 64,
}


def sizes(nodes=16, ranks_per_node=8, strong=False, words=(), **values):
    return Sizes(values, words, nodes, ranks_per_node, strong)


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (12, [1, 2, 4, 8, 12]), (16, [1, 2, 4, 8, 16])],
)
def test_without_numbers_they_are_powers_of_two_and_the_nodes(nodes, expected):
    found, left_out = sizes(nodes, micro_batch_size=1).of(None)
    assert [size.nodes for size in found] == expected
    assert left_out == []


def test_weak_scaling_keeps_the_micro_batches_of_a_rank():
    found, _ = sizes(**LAYOUT).of("1,4,16")
    for size in found:
        replicas = size.nodes * 8 // (2 * 4)
        assert size.batch / (replicas * 1) == 64 / (16 * 8 / (2 * 4))
    assert [size.batch for size in found] == [4, 16, 64]


def test_strong_scaling_keeps_the_batch_and_leaves_out_what_it_does_not_fill():
    found, left_out = sizes(strong=True, **{**LAYOUT, "global_batch_size": 24}).of("1,8,16")
    assert [(size.nodes, size.batch) for size in found] == [(1, 24), (8, 24)]
    (line,) = left_out
    assert line.startswith("16 nodes: global_batch_size = 24 is no multiple of")
    assert line.endswith("1 x 16")


def test_a_flag_wins_over_the_run_file():
    found, _ = sizes(words=["--global-batch-size=128", "--micro-batch-size", "2"], **LAYOUT).of("1")
    assert found == [Size(1, 8)]


def test_without_a_batch_megatron_chooses():
    found, _ = sizes(micro_batch_size=1).of("1,2")
    assert [size.flags for size in found] == [(), ()]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"pipeline_model_parallel_size": 16}, "1 node: 8 ranks are no multiple of tensor x"),
        ({"expert_model_parallel_size": 16}, "1 node: 8 ranks are no multiple of expert x"),
        (
            {"expert_model_parallel_size": 8, "tensor_model_parallel_size": 2},
            "expert tensor x pipeline parallel size = 16",
        ),
    ],
)
def test_too_few_ranks_for_the_layout_are_left_out(values, said):
    found, left_out = sizes(micro_batch_size=1, **values).of("1,2")
    assert [size.nodes for size in found] == [2]
    assert said in left_out[0]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"values": {"tensor_model_parallel_size": 3}}, "nodes = 16 has 128 ranks"),
        ({"values": {"global_batch_size": 100}}, "global_batch_size = 100 is no multiple of"),
        ({"values": {"global_batch_size": "many"}}, "global_batch_size = 'many' must be a whole"),
        ({"strong": True, "values": {"global_batch_size": None}}, "--strong keeps"),
        ({"nodes_asked": "1,x"}, "--profile-nodes '1,x'"),
        ({"nodes_asked": "0"}, "--profile-nodes '0'"),
        ({"nodes_asked": ""}, "--profile-nodes ''"),
    ],
)
def test_a_mistake_is_one_line(given, said):
    values = {**LAYOUT, **given.get("values", {})}
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        sizes(strong=given.get("strong", False), **values).of(given.get("nodes_asked"))
    assert said in str(caught.value)


def test_a_run_shorter_than_its_profile_is_refused():
    short = sizes(train_iters=20, micro_batch_size=1)
    short.check_steps(20)
    with pytest.raises(ValueError, match="train_iters = 20 is fewer than the 21 steps"):
        short.check_steps(21)
