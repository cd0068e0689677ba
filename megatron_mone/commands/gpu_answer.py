"""`gpu-answer`: one script for the first GPU at hand."""

import os
import signal
from pathlib import Path
from typing import Annotated

from typer import Option

from megatron_mone.common.exit_status import INTERRUPTED
from megatron_mone.common.program import Program

WRONG = 1
"""A section failed, a kernel disagrees, or a check did not pass."""
program = Program()
main = program.main


@program.command("gpu-answer")
def gpu_answer(
    out: Annotated[Path, Option(help="folder for answer.json and report.md")] = Path(
        "out/gpu-answer"
    ),
    seconds: Annotated[float, Option(help="of the whole; sections are capped by shares")] = 570.0,
    toy: Annotated[
        bool, Option("--toy", help="tiny shapes in Triton's interpreter, on the CPU")
    ] = False,
    carry: Annotated[
        Path | None, Option(help="copy what a bare machine needs to this new folder, and end")
    ] = None,
) -> int:
    """Check and time every kernel on the GPU here, in under 10 minutes.

        megatron-mone gpu-answer --out out/gpu-answer
        megatron-mone gpu-answer --carry out/carried    # then there: python tools/gpu_answer.py
        python -m megatron_mone.kernels --table-from out/gpu-answer/answer.json
        megatron-mone plan --calibrate out/gpu-answer/answer.json --cluster h100-ndr \\
            --json out/plan/efficiency.json

    Kernels against float64, their times, layers against dense ones, host waits, graph capture,
    decode, gaps. Needs torch, triton, numpy and a GPU; no megatron-core, no network. What was found
    is on disk when it is cut. Not run on a GPU yet. Exit status: 0; 1 where a section failed, a
    kernel disagrees or a check did not pass; 2 after a wrong input; 130 when stopped.
    """
    if not 0 < seconds < 1e6:
        raise ValueError(f"--seconds {seconds:g} is not allowed: it must be above 0")
    if carry is not None:
        from megatron_mone.benchmarking.gpu_answer.carry import carry as copy

        print(f"{carry}: {copy(carry) / 2**20:.0f} MiB; there: python tools/gpu_answer.py")
        return 0
    if toy:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    from megatron_mone.benchmarking.gpu_answer import conduct
    from megatron_mone.benchmarking.gpu_answer.plan import FULL, TOY

    if reason := conduct.why_no_device():
        raise ValueError(f"{reason}; --toy runs the interpreter")
    interpreter = os.environ.get("TRITON_INTERPRET") == "1"
    plan = TOY if interpreter else FULL
    conductor = conduct.Conductor(out, plan, seconds, interpreter=interpreter)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    print(f"writing {out / conduct.ANSWER} and {out / conduct.REPORT}", flush=True)
    try:
        answer = conductor.run(lambda line: print(line, flush=True))
    except KeyboardInterrupt:
        print(f"stopped: {out / conduct.REPORT} has what was found")
        return INTERRUPTED
    failed = any(one.state == "failed" for one in answer.sections)
    wrong = any(
        not (row.agrees and row.same_bits) for one in answer.sections for row in one.agreements
    )
    refused = any(row.passed is False for one in answer.sections for row in one.checks)
    return WRONG if failed or wrong or refused else 0
