"""Traces of several jobs by one process that imports Megatron once and forks for each.

    python -m tests.unit.planning.gpu_traces FOLDER gpu|cpu

FOLDER/cases-KIND.json is {name: [flags, world size, rank]}; each case leaves KIND-NAME.json, its
trace, or KIND-NAME.txt, why it has none; and KIND-NAME.patched, the names of our own modules that
stood for something else while it was parsed and traced.
"""

import json
import os
import sys
import traceback
from pathlib import Path

from megatron_mone.planning.tracing import build, gpu_job, trace_worker

OURS = "megatron_mone"


def main(folder: Path, kind: str) -> None:
    """All cases of a kind, one after another."""
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_RANK="0")
    with trace_worker.preloaded(kind == "gpu"):
        cases = json.loads((folder / f"cases-{kind}.json").read_text())
        for name, (flags, world_size, rank) in cases.items():
            child = os.fork()
            if not child:
                _trace(folder / f"{kind}-{name}", flags, world_size, rank)
            os.waitpid(child, 0)


def names_of_ours():
    """{MODULE.OWNER.NAME: what it stands for} of functions and classes outside planning/."""
    found = {}
    for name, module in sorted(sys.modules.items()):
        if name.startswith(OURS) and not name.startswith(f"{OURS}.planning"):
            classes = [c for c in vars(module).values() if isinstance(c, type)]
            for owner in (module, *(c for c in classes if c.__module__ == name)):
                for own, value in vars(owner).items():
                    if callable(value) or isinstance(value, classmethod | property):
                        found[f"{name}.{owner.__name__}.{own}"] = value
    return found


def _noting_patches(function, before, found):
    def noting(*args):
        found.update(
            name for name, value in names_of_ours().items() if before.get(name, value) is not value
        )
        return function(*args)

    return noting


def _trace(to: Path, flags: list[str], world_size: int, rank: int) -> None:
    patched, before = set(), names_of_ours()
    for module, name in ((gpu_job, "check_traceable"), (build, "_step")):
        setattr(module, name, _noting_patches(getattr(module, name), before, patched))
    try:
        args, config = gpu_job.parse_gpu_job(flags, world_size, rank)
        build._trace(args, config, None).write(to.with_suffix(".json"))
    except ValueError as error:
        to.with_suffix(".txt").write_text(str(error))
    except BaseException:
        to.with_suffix(".txt").write_text(traceback.format_exc())
    to.with_suffix(".patched").write_text(json.dumps(sorted(patched)))
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
