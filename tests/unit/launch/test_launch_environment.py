"""Variables of training, by what Megatron's own argument checks ask for."""

import pytest

from launch.spec.environment import gpu_variables, job_variables

NAME = "CUDA_DEVICE_MAX_CONNECTIONS"


def _connections(values, *arguments):
    return {v.name: v.value for v in gpu_variables(values, arguments)}.get(NAME)


@pytest.mark.parametrize(
    ("values", "arguments", "expected"),
    [
        ({}, (), None),
        ({"tensor_model_parallel_size": 1, "context_parallel_size": 1}, (), None),
        ({"tensor_model_parallel_size": 2}, (), "1"),
        ({"context_parallel_size": 4}, (), "1"),
        ({"overlap_moe_expert_parallel_comm": True}, (), "32"),
        ({"tensor_model_parallel_size": 2, "overlap_moe_expert_parallel_comm": True}, (), "32"),
        ({"tensor_model_parallel_size": 2, "use_megatron_fsdp": True}, (), None),
        # Flags on the command line win over the run file.
        ({"tensor_model_parallel_size": 2}, ("--tensor-model-parallel-size", "1"), None),
        ({}, ("--context-parallel-size=2",), "1"),
        ({}, ("--overlap-moe-expert-parallel-comm",), "32"),
        ({"tensor_model_parallel_size": 2}, ("--use-torch-fsdp2",), None),
    ],
)
def test_connections_follow_the_parallelism(values, arguments, expected):
    assert _connections(values, *arguments) == expected


def test_the_last_of_two_flags_counts():
    flag = "--tensor-model-parallel-size"
    assert _connections({}, flag, "2", flag, "1") is None


def test_a_size_that_is_no_number_is_named():
    with pytest.raises(ValueError, match="tensor_model_parallel_size = 'two'"):
        _connections({"tensor_model_parallel_size": "two"})


def test_threads_are_the_cores_of_a_rank():
    assert {v.name: v.value for v in job_variables(12)}["OMP_NUM_THREADS"] == "12"
    assert {v.name: v.value for v in job_variables(None)}["OMP_NUM_THREADS"] == "1"


def test_every_variable_has_a_reason_of_one_line():
    every = (*job_variables(2), *gpu_variables({"tensor_model_parallel_size": 2}, ()))
    assert len({variable.name for variable in every}) == len(every)
    for variable in every:
        assert variable.reason
        assert "\n" not in variable.reason


def test_offloading_keeps_transformer_engine_from_moving_weights():
    def of(values, *arguments):
        return {v.name: v.value for v in gpu_variables(values, arguments)}

    name = "fine_grained_activation_offloading"
    assert of({name: True})["NVTE_CPU_OFFLOAD_V1"] == "1"
    assert of({}, "--fine-grained-activation-offloading")["NVTE_CPU_OFFLOAD_V1"] == "1"
    assert "NVTE_CPU_OFFLOAD_V1" not in of({name: False})
