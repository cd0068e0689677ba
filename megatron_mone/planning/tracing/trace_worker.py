"""The process that imports torch and Megatron once and forks a child for every request.

Started by worker_pool.py as `python -m megatron_mone.planning.tracing.trace_worker SOCKET KIND`:
of a socket of whole messages, where {"id", "kind", "job", "result", "log", "seconds"} come and
{"id", "status"} go, and of jobs, GPU or CPU, which decides what Megatron finds when it is imported.
Megatron keeps its state in globals; a child has them as they are after import. It writes its answer
to the file `result` and all that it prints to `log`, and ends with status 0, or with USER_ERROR
and one line at the end of the log. May touch: itself, whole; those files.
"""

import gc
import importlib
import json
import os
import selectors
import signal
import socket
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.child_processes import end_with
from megatron_mone.common.exit_status import USER_ERROR
from megatron_mone.common.files import write_json
from megatron_mone.common.patch import install
from megatron_mone.planning.tracing.gpu_job import parse_gpu_job, prepare

LONGEST_MESSAGE = 1 << 20
DESCRIBE, TRACE = "describe", "trace"
GPU, CPU = "gpu", "cpu"


def main(descriptor: str, kind: str) -> None:
    """Import, say that all is ready, and serve until the other side closes the socket."""
    with socket.socket(fileno=int(descriptor)) as connection:
        with preloaded(kind == GPU):
            connection.send(json.dumps({"ready": True}).encode())
            _serve(connection)


@contextmanager
def preloaded(gpu: bool) -> Iterator[None]:
    """What a child would import and build, within."""
    prepare(gpu)
    for module in (
        *("megatron.training.training", "megatron.core.num_microbatches_calculator"),
        *("megatron.training.initialize", "megatron.core.tokenizers.text"),
        *("megatron_mone.pretrain", "megatron_mone.model.checks", "megatron_mone.model.layer_spec"),
        *("megatron_mone.planning.tracing.job_facts", "megatron_mone.planning.tracing.stages"),
        *(
            "megatron_mone.planning.tracing.loopback",
            "megatron_mone.planning.tracing.stand_ins.values",
        ),
        *("megatron_mone.planning.tracing.recorder", "megatron_mone.profiling.live_run"),
        *("megatron_mone.profiling.instrument", "megatron_mone.model.gpt_training"),
    ):
        importlib.import_module(module)
    from megatron_mone.model import arguments

    install(arguments.PATCHES)
    with arguments.one_parser():
        gc.collect()
        gc.freeze()  # nothing here is garbage: a child's collections need not look at it, nor copy
        yield


def _serve(connection: socket.socket) -> None:
    running: dict[int, tuple[int, int]] = {}  # descriptor of a child: (its process, the request)
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        while True:
            for ready, _ in selector.select():
                if ready.fileobj is connection:
                    message = connection.recv(LONGEST_MESSAGE)
                    if not message:
                        for process, _ in running.values():
                            os.kill(process, signal.SIGKILL)
                        return
                    request = json.loads(message)
                    process = _fork(request)
                    descriptor = os.pidfd_open(process)
                    running[descriptor] = process, request["id"]
                    selector.register(descriptor, selectors.EVENT_READ)
                else:
                    selector.unregister(ready.fd)
                    process, identity = running.pop(ready.fd)
                    os.close(ready.fd)
                    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                    connection.send(json.dumps({"id": identity, "status": status}).encode())


def _fork(request: dict[str, Any]) -> int:
    server = os.getpid()
    process = os.fork()
    if process:
        return process
    status: Any = 1
    try:
        end_with(server)
        signal.setitimer(signal.ITIMER_REAL, request["seconds"])  # ends the process
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        answer = {DESCRIBE: _describe, TRACE: _trace}[request["kind"]]
        answer(request["job"], Path(request["result"]))
        status = 0
    except ValueError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        status = USER_ERROR
    except SystemExit as ended:
        status = ended.code or 0
    except BaseException:
        traceback.print_exc()
    _end(status)


def _end(status: Any) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else 1)


def _describe(job: dict[str, Any], result: Path) -> None:
    """Write facts, stages and the flags to trace them with."""
    from megatron_mone.model.arguments import flag_parser, written_out
    from megatron_mone.planning.tracing.job_facts import job_facts
    from megatron_mone.planning.tracing.stages import stage_flags, virtual_stages

    words = written_out(job["flags"])
    args, model_config = parse_gpu_job(words, job["world_size"], rank=0)
    stages = virtual_stages(args, model_config.transformer)
    described = {
        "facts": asdict(job_facts(args, model_config)),
        "stages": [
            {"stage": p, "chunk": v, "key": stage.key, "first_layer": stage.first_layer}
            for (p, v), stage in stages.items()
        ],
        "stage_flags": stage_flags(words, flag_parser(), stages),
    }
    write_json(result, described)


def _trace(job: dict[str, Any], result: Path) -> None:
    from megatron_mone.planning.tracing.build import trace_step

    trace_step(job).write(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
