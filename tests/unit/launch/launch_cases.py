"""The jobs of the snapshot tests. `python -m tests.unit.launch.launch_cases` writes them anew."""

from pathlib import Path
from typing import Any

from launch.slurm.script import sbatch_script
from launch.spec.checks import checked
from launch.spec.environment import gpu_variables, job_variables
from launch.spec.launch_spec import Case, Container, LaunchSpec

SNAPSHOTS = Path(__file__).parent / "snapshots"
HOME = "/home/ada/megatron-mone"


def job(**fields: Any) -> LaunchSpec:
    """A checked job with the fields that every job needs."""
    needed: dict[str, Any] = {
        "name": "run",
        "command": ("true",),
        "workdir": HOME,
        "folder": f"{HOME}/runs/run",
    }
    return checked(LaunchSpec(**{**needed, **fields}))


def training(name: str, *arguments: str, **fields: Any) -> LaunchSpec:
    """A checked training job."""
    folder = f"{HOME}/runs/{name}"
    command = ("python", "-m", "megatron_mone.pretrain", "--config", f"{HOME}/configs/{name}.yaml")
    return job(
        name=name,
        folder=folder,
        command=(*command, *arguments),
        saves_checkpoints=True,
        **fields,
    )


def _saved(name: str) -> tuple[str, ...]:
    checkpoints = f"{HOME}/runs/{name}/checkpoints"
    return ("--save", checkpoints, "--load", checkpoints)


def _cpu_2_nodes() -> LaunchSpec:
    return training(
        "demo-mone",
        *_saved("demo-mone"),
        nodes=2,
        cpus_per_task=4,
        memory="16G",
        time_limit="00:30:00",
        virtual_environment=f"{HOME}/.venv",
        variables=job_variables(4),
        environment={"GLOO_SOCKET_IFNAME": "eth0"},
    )


def _pyxis_16_nodes() -> LaunchSpec:
    name = "moe-30b-a3b-mone-128"
    return training(
        name,
        *_saved(name),
        nodes=16,
        gpus_per_node=8,
        cpus_per_task=12,
        memory="0",
        time_limit="1-00:00:00",
        signal_lead_seconds=600,
        requeue=True,
        hang_seconds=1800,
        preflight=True,
        spare_nodes=1,
        preflight_limits={"run_disk_gib": "500", "pair_gb_per_s": "150"},
        exclusive=True,
        account="physics",
        partition="gpu",
        qos="large",
        constraint="h100&ib",
        reservation="maintenance test",
        mail_user="ada@example.org",
        mail_type="END,FAIL",
        container=Container("pyxis", "nvcr.io#nvidia/pytorch:25.10-py3", ("/data:/data:ro",)),
        variables=(*job_variables(12), *gpu_variables({"tensor_model_parallel_size": 2}, ())),
        sbatch={"comment": "first light", "contiguous": ""},
    )


def _apptainer_modules() -> LaunchSpec:
    return training(
        "paper-0.9b",
        *_saved("paper-0.9b"),
        gpus_per_node=4,
        cpus_per_task=8,
        time_limit="08:00:00",
        signal_lead_seconds=300,
        modules=("apptainer/1.3", "cuda"),
        container=Container("apptainer", "/images/pytorch 25.sif", ("/scratch",)),
        dependency="afterok:1234",
        variables=(
            *job_variables(8),
            *gpu_variables({"overlap_moe_expert_parallel_comm": True}, ()),
        ),
    )


def _array_sweep() -> LaunchSpec:
    cases = []
    for number, ratio in enumerate(("0.5", "0.25", "0.125")):
        name = f"sweep/cases/{number:03d}-mone_neuron_ratio={ratio}"
        arguments = (*_saved(name), "--mone-neuron-ratio", ratio)
        cases.append(Case(f"{HOME}/runs/{name}", arguments))
    return training(
        "sweep",
        gpus_per_node=1,
        time_limit="02:00:00",
        signal_lead_seconds=120,
        requeue=True,
        cases=tuple(cases),
        variables=job_variables(None),
    )


def _nodes_128() -> LaunchSpec:
    name = "moe-671b-a37b-1024"
    return training(
        name,
        *_saved(name),
        nodes=128,
        gpus_per_node=8,
        cpus_per_task=12,
        time_limit="2-00:00:00",
        signal_lead_seconds=900,
        requeue=True,
        exclusive=True,
        virtual_environment=f"{HOME}/.venv",
        variables=(*job_variables(12), *gpu_variables({"context_parallel_size": 2}, ())),
    )


SPECS = {
    "cpu-2-nodes": _cpu_2_nodes,
    "pyxis-16-nodes": _pyxis_16_nodes,
    "apptainer-modules": _apptainer_modules,
    "array-sweep": _array_sweep,
    "gpu-128-nodes": _nodes_128,
}

if __name__ == "__main__":
    SNAPSHOTS.mkdir(exist_ok=True)
    for snapshot, spec in SPECS.items():
        (SNAPSHOTS / f"{snapshot}.sbatch").write_text(sbatch_script(spec()), encoding="utf-8")
