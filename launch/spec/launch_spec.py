"""LaunchSpec: what a job asks of a machine or a cluster. Its checks are in checks.py."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, fields


@dataclass(frozen=True)
class Variable:
    """An environment variable that the launcher sets, and why."""

    name: str
    value: str
    reason: str


@dataclass(frozen=True)
class Container:
    """Where the ranks run: an image, through pyxis (an option of srun) or apptainer (a program).

    The work folder and the run folder are mounted at their own paths; `mounts` are more, each
    `SOURCE:TARGET[:OPTIONS]` or one path for both.
    """

    kind: str
    image: str
    mounts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One element of a job array: its folder, and what its command has beyond the others'."""

    folder: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class LaunchSpec:
    """One job: a program on `nodes` x `tasks_per_node` ranks, and the terms it runs on.

    Sizes are whole numbers of 1 or more unless stated; None leaves the choice to Slurm.
    """

    name: str
    """Name of the job and of its run folder."""
    command: tuple[str, ...]
    """Program and arguments, the same for every rank."""
    workdir: str
    """Absolute path in which the program starts."""
    folder: str
    """Absolute path of the run folder: logs, attempts, checkpoints."""
    saves_checkpoints: bool = False
    """The program saves to `checkpoints/` of its folder in Megatron's layout."""
    variables: tuple[Variable, ...] = ()
    """What the program needs in its environment; `environment` wins over it."""
    cases: tuple[Case, ...] = ()
    """A job array with one element a case, in which the case's folder is the run folder."""

    nodes: int = 1
    gpus_per_node: int = 0
    """GPUs of a node, one rank each; 0: ranks without a GPU."""
    gpu_type: str | None = None
    """Type of these GPUs by Slurm's name, where a cluster has several or its filter wants one."""
    tasks_per_node: int | None = None
    """Ranks of a node; None: `gpus_per_node`, or 1."""
    cpus_per_task: int | None = None
    memory: str | None = None
    """Of a node: a number with K, M, G or T (M without a letter); "0": all of it."""
    time_limit: str | None = None
    """As Slurm writes it: MINUTES, MINUTES:SECONDS, HOURS:MINUTES:SECONDS, DAYS-HOURS[:...]; 0 or
    UNLIMITED: none."""
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool | str = False
    """No other job on the nodes; "user", "mcs" or "topo": none of another of these."""
    mail_user: str | None = None
    mail_type: str | None = None
    array: str | None = None
    """Task numbers of a job array, like 0-7%2; not with cases."""
    dependency: str | None = None
    """Like afterok:123; a job whose dependency can no longer come true is removed."""
    signal_lead_seconds: int = 0
    """USR1 to all ranks so long before the time limit; 0: no signal."""
    requeue: bool = False
    """Start again after a lost node, a failure, and a stop by that signal that got further."""
    max_requeues: int = 20
    """How often a job may start again after a stop by that signal."""
    max_failures: int = 3
    """Failed attempts in a row without a new saved step, after which the job gives up."""
    backoff_seconds: int = 60
    """Wait before the attempt after a first failure, doubled with each further one. Slurm holds a
    requeued job back two minutes by itself; the longer wait counts."""
    backoff_limit_seconds: int = 3600
    """The longest such wait."""
    hang_seconds: int = 0
    """End ranks that show no progress for so long, as a failure; 0: never. Longer than the
    longest step, save and start-up."""
    preflight: bool = False
    """Check every node before the ranks start, and leave bad ones out (launch/preflight)."""
    spare_nodes: int = 0
    """Nodes to ask for beyond `nodes`, taken in place of bad ones. 0 or more."""
    preflight_limits: Mapping[str, str] = field(default_factory=dict)
    """What a good node must reach: name -> value (launch/preflight/limits.py)."""
    container: Container | None = None
    virtual_environment: str | None = None
    """Folder of a Python virtual environment; its bin/ comes first in PATH. Not with container."""
    modules: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the ranks; a MASTER_ADDR or MASTER_PORT wins over the launcher's."""
    rendezvous_suffix: str | None = None
    """Put after the first node's name in MASTER_ADDR: its name in the network of the ranks."""
    hostfile: bool = False
    """Write the nodes of the ranks as DeepSpeed's `hostfile` into the run folder."""
    planner_cluster: str | None = None
    """Hardware of configs/cluster/hardware, or a YAML file: for the verdict on memory."""
    sbatch: Mapping[str, str] = field(default_factory=dict)
    """Any other option of sbatch: name without dashes -> value, "" for an option without one."""

    @property
    def ranks_per_node(self) -> int:
        """Tasks that srun starts on a node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def python(self) -> str:
        """The interpreter of the ranks: this one, unless the job brings another."""
        brings = self.container is not None or self.virtual_environment or self.modules
        return "python" if brings else sys.executable


RUN_FIELDS = (
    "name", "command", "workdir", "folder", "saves_checkpoints", "variables", "cases",
)  # fmt: skip
"""What a run brings; all other fields may stand in a file of configs/launch."""
SITE_FIELDS = tuple(f.name for f in fields(LaunchSpec) if f.name not in RUN_FIELDS)
