"""What the checks before a model say of flags: `python -m tests.features.said` reads a JSON list of
flags in words from its input and writes the list of lines, empty where they are taken.

As `launch submit` and the planner ask them, of a job on 4 GPUs elsewhere. Each is asked in a
process of its own, forked from one that has imported Megatron.
"""

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from megatron_mone.planning.tracing.trace_worker import preloaded
from tests.parity.layouts import TRAIN

OF_CPU_RANKS = "--no-gradient-accumulation-fusion"
ON_GPUS = ("--transformer-impl", "transformer_engine", "--distributed-backend", "nccl")


def line_of(words: str) -> str:
    """What is said of MoNE with the flags."""
    from megatron_mone.planning.tracing.gpu_job import check_traceable, parse_gpu_job

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1", LOCAL_RANK="0")
    base = [word for word in TRAIN if word != OF_CPU_RANKS]
    try:
        args, _ = parse_gpu_job([*base, *ON_GPUS, *words.split()], 4, 0)
    except ValueError as error:
        return str(error)
    try:
        check_traceable(args)
    except ValueError as error:
        return f"planner: {error}"
    return ""


def main() -> None:
    """Answer all, one after another."""
    said = []
    with preloaded(gpu=True), TemporaryDirectory() as folder:
        for words in json.load(sys.stdin):
            answer = Path(folder, "answer")
            answer.unlink(missing_ok=True)
            child = os.fork()
            if not child:
                answer.write_text(line_of(words))
                os._exit(0)
            os.waitpid(child, 0)
            said.append(answer.read_text() if answer.exists() else "an exception")
    print(json.dumps(said))


if __name__ == "__main__":
    main()
