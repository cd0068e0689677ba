"""`profile`: the training step of a MoNE model against baselines, in one job."""

import io
import os
import sys
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from megatron_mone.common.local_ranks import run_ranks, terminal
from megatron_mone.common.places import program_words
from megatron_mone.common.program import PASSES_UNKNOWN, WORDS, Program
from megatron_mone.profiling.job_options import Asked, Options, read_options

program = Program()
main = program.main


@program.command("profile", context_settings=PASSES_UNKNOWN)
def profile(
    context: Context,
    asked: Asked,
    ranks: Annotated[int, Option(help="ranks to start on this machine")] = 1,
) -> int:
    """Profile the training step of a MoNE model against baselines, in one job, on the same tokens.

        megatron-mone profile --config demo-mone --ranks 2 --steps 20 --against moe
        srun megatron-mone profile --config ... --steps 20 --against moe,grouped_mm --out DIR

    Started by torchrun or srun (WORLD_SIZE is set) it is one rank; else it starts --ranks of them
    here. Further flags are Megatron's. Writes DIR/ranks, profile.json, report.html and plots
    (docs/PROFILER.md). Exit status: 0; 2 after a wrong flag or file, said in one line.
    """
    options = read_options(asked)
    if ranks < 1:
        raise ValueError(f"--ranks {ranks} is not allowed: give at least 1")
    if "WORLD_SIZE" not in os.environ:
        one = [sys.executable, *program_words("profile"), *context.meta[WORDS]]
        return run_ranks(one, ranks, options.out / "logs")
    return _rank(options, context.args)


def _rank(options: Options, megatron_flags: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.model import failure
    from megatron_mone.model.arguments import written_out
    from megatron_mone.profiling.job import Job, build_runs

    try:
        words = written_out(megatron_flags)
        runs = build_runs(options, words)
        drawn = terminal() if os.environ.get("RANK", "0") == "0" else io.StringIO()
        with progress_bar(first="steps", stream=drawn) as bar:
            job = Job(runs, options, words, lambda done: bar(done, options.total_steps, "steps"))
            job.measure()
    except ValueError as error:
        failure.fail(str(error))
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        _report(options.out)
    torch.distributed.destroy_process_group()
    return 0


def _report(out: Path) -> None:
    """Merge what lies in the folder, and draw it."""
    from megatron_mone.profiling.merge import merge
    from megatron_mone.reporting.profile.report import write_report
    from megatron_mone.reporting.profile.tensorboard import write_tensorboard

    profile = merge(out)
    write_report(profile, out)
    write_tensorboard(profile, out / "tensorboard")
    print(f"wrote {out / 'profile.json'} and {out / 'report.html'}", file=terminal(), flush=True)
