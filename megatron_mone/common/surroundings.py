"""Variables by which a run tells its ranks who they are: those of a surrounding run are not ours.

torchrun, MPI and Slurm's srun put them into the environment of each rank, and whatever a rank
starts inherits them: with TORCHELASTIC_USE_AGENT_STORE of a run around it, for one, rank 0 waits
for a store that it should have opened itself. Touches nothing.
"""

import re
from collections.abc import Mapping

_OF_A_RANK = re.compile(
    r"(LOCAL_|GROUP_|ROLE_|NODE_)?RANK|(LOCAL_|GROUP_|ROLE_)?WORLD_SIZE|ROLE_NAME"
    r"|MASTER_(ADDR|PORT)|(TORCHELASTIC|PET)_.+"
    r"|PMI[X2]?_.+|HYDRA_.+|HYDI_.+|PALS_.+|ALPS_APP_.+|MPI_LOCALN?RANK(ID|S)|MV2_COMM_WORLD_.+"
    # OMPI_MCA_ are mostly a user's settings of Open MPI; these its launcher makes.
    r"|OMPI_(?!MCA_).+|OMPI_MCA_(ess|orte|prte|pmix|initial_wdir).*|PRTE_.+|ORTE_.+"
    r"|SLURM_(PROCID|LOCALID|NODEID|GTIDS|NTASKS|NPROCS|TASK.*|STEP.*|SRUN_.*|LAUNCH_.*|CPU_BIND.*)"
    r"|MEGATRON_MONE_(ATTEMPT|PROGRESS|STARTER|TERMINAL_FD)"
)


def without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """An environment in which nobody is a rank of a run.

    Args:
        environment: name -> value, as of os.environ.
    """
    return {name: value for name, value in environment.items() if not _OF_A_RANK.fullmatch(name)}
