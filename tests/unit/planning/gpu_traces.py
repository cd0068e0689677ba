"""Traces of several jobs by one process that imports Megatron once and forks for each.

    python -m tests.unit.planning.gpu_traces FOLDER gpu|cpu

FOLDER/cases-KIND.json is {name: [flags, world size, rank]}; each case leaves KIND-NAME.json, its
trace, or KIND-NAME.txt, why it has none.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path

from megatron_mone.planning.tracing import build, gpu_job


def main(folder: Path, kind: str) -> None:
    """All cases of a kind, one after another."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_RANK="0")
    gpu_job.prepare(kind == "gpu")
    for module in ("training.training", "training.initialize", "core.models.gpt.gpt_model"):
        importlib.import_module(f"megatron.{module}")
    for name, (flags, world_size, rank) in json.loads(
        (folder / f"cases-{kind}.json").read_text()
    ).items():
        child = os.fork()
        if not child:
            _trace(folder / f"{kind}-{name}", flags, world_size, rank)
        os.waitpid(child, 0)


def _trace(to: Path, flags: list[str], world_size: int, rank: int) -> None:
    try:
        args, config = gpu_job.parse_gpu_job(flags, world_size, rank)
        build._trace(args, config, None).write(to.with_suffix(".json"))
    except ValueError as error:
        to.with_suffix(".txt").write_text(str(error))
    except BaseException:
        to.with_suffix(".txt").write_text(traceback.format_exc())
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
