"""Plan a run file in the hands of either engine, over sizes of expert parallelism: a table.

    python -m megatron_mone.commands.plan_zero configs/plan/moe-30b-a3b-mone-128.yaml 128

Minutes on two cores; traces are kept. Nothing runs on a GPU.
"""

import sys
from pathlib import Path

from megatron_mone.common.progress import progress_bar
from megatron_mone.planning.cost.efficiency import efficiency_of
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.job import run_job
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.planning.zero_table import CLUSTER, zero_table

if __name__ == "__main__":
    try:
        path, gpus = sys.argv[1:]
        cluster = load_cluster(CLUSTER)
        with Tracer() as tracer, progress_bar() as say:
            planner = Planner(tracer, cluster, efficiency_of(cluster.name))
            print(zero_table(planner, run_job(Path(path)), int(gpus), say))
    except ValueError as error:
        sys.exit(f"megatron-mone: error: {error}")
