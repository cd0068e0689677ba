"""Plan the studies' runs on GPUs that are not planned yet, and make the table in docs/STUDIES.md.

    python -m megatron_mone.commands.plan_studies [ratio-cluster ...]

Minutes a study and size on two cores; each cell is kept as it is planned.
"""

import sys

from megatron_mone.common.progress import progress_bar
from megatron_mone.studies.on_slurm.planned import plan_missing

if __name__ == "__main__":
    try:
        with progress_bar() as bar:
            plan_missing(sys.argv[1:], bar)
    except ValueError as error:
        sys.exit(f"megatron-mone: error: {error}")
