"""The environment variables that training on GPUs wants, each with the reason.

They are written into the job's script with their reasons; a user's `environment` wins over them.
TORCH_NCCL_AVOID_RECORD_STREAMS is not among them: PyTorch 2.13 behaves so by itself and calls the
variable deprecated.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from launch.spec.launch_spec import Variable
from launch.spec.megatron_flags import whole_number

_SIZES = ("tensor_model_parallel_size", "context_parallel_size")
_SWITCHES = ("overlap_moe_expert_parallel_comm", "use_torch_fsdp2", "use_megatron_fsdp")


def job_variables(cpus_per_task: int | None) -> tuple[Variable, ...]:
    """What every program gets.

    Args:
        cpus_per_task: cores of a rank; None where Slurm decides.
    """
    return (
        Variable(
            "OMP_NUM_THREADS",
            str(cpus_per_task or 1),
            "as many as the rank has cores; by default every rank would take all of the node",
        ),
        Variable("PYTHONUNBUFFERED", "1", "a log shows what was printed, also when a rank dies"),
    )


def gpu_variables(values: Mapping[str, Any], arguments: Sequence[str]) -> tuple[Variable, ...]:
    """What NCCL, CUDA and Transformer Engine get when Megatron trains on GPUs.

    Args:
        values: Megatron arguments of the run file.
        arguments: Megatron flags after it, which win.
    """
    return (
        *_connections(values, arguments),
        Variable(
            "NCCL_NVLS_ENABLE",
            "0",
            "NVLink SHARP takes GPU memory for every process group, and expert parallelism has "
            "many",
        ),
        Variable(
            "NVTE_FWD_LAYERNORM_SM_MARGIN",
            "16",
            "Transformer Engine's norms leave multiprocessors to the collectives beside them",
        ),
        Variable("NVTE_BWD_LAYERNORM_SM_MARGIN", "16", "the same in the backward pass"),
        *_offloading(values, arguments),
    )


def _offloading(values: Mapping[str, Any], arguments: Sequence[str]) -> tuple[Variable, ...]:
    if not _is_on("fine_grained_activation_offloading", values, arguments):
        return ()
    why = "Megatron's activation offloading wants it: Transformer Engine would offload weights, too"
    return (Variable("NVTE_CPU_OFFLOAD_V1", "1", why),)


def _connections(values: Mapping[str, Any], arguments: Sequence[str]) -> tuple[Variable, ...]:
    """CUDA_DEVICE_MAX_CONNECTIONS as megatron/training/arguments.py (0.19) wants it."""
    name = "CUDA_DEVICE_MAX_CONNECTIONS"
    overlap, *fsdp = (_is_on(switch, values, arguments) for switch in _SWITCHES)
    if any(fsdp):
        return ()  # Megatron refuses 1; CUDA's own 8 serves
    if overlap:
        return (
            Variable(name, "32", "the overlapped all-to-all of the experts needs its own queues"),
        )
    if any((whole_number(size, values, arguments) or 1) > 1 for size in _SIZES):
        return (
            Variable(
                name,
                "1",
                "kernels start in program order, so that collectives of TP and CP overlap as "
                "Megatron lays them out; before Blackwell it refuses to start without",
            ),
        )
    return ()


def _is_on(name: str, values: Mapping[str, Any], arguments: Sequence[str]) -> bool:
    return bool(values.get(name)) or f"--{name.replace('_', '-')}" in arguments
