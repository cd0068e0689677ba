"""Profile the training step of a MoNE model against baselines, in one job, on the same tokens.

    python tools/profile.py --config configs/demo-mone.yaml --ranks 2 --steps 20 --against moe
    srun python tools/profile.py --config ... --steps 20 --against moe,grouped_mm --out DIR

Started by torchrun or srun (WORLD_SIZE is set) it is one rank; else it starts --ranks of them here.
Further flags are Megatron's. Writes DIR/ranks, profile.json, report.html and plots
(docs/PROFILER.md). Exit status: 0; 2 after a wrong flag or file, said in one line.
"""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

if __package__ in (None, ""):  # run as a file: it must not stand before the library's `profile`
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.common.command_line import OneLineParser, fail
from megatron_mone.common.exit_status import INTERRUPTED
from megatron_mone.common.local_ranks import run_ranks, terminal
from megatron_mone.profiling.job_options import Options, add_options, read_options


def main() -> int:
    """Run the command line."""
    parser = OneLineParser(__doc__)
    parser.add_argument("--ranks", type=int, default=1, help="ranks to start on this machine (1)")
    add_options(parser)
    parsed, megatron_flags = parser.parse_known_args()
    end_with_starter()
    try:
        options = read_options(parsed)
        if parsed.ranks < 1:
            raise ValueError(f"--ranks {parsed.ranks} is not allowed: give at least 1")
        if "WORLD_SIZE" not in os.environ:
            return run_ranks([sys.executable, *sys.argv], parsed.ranks, options.out / "logs")
    except (ValueError, OSError) as error:
        return fail(error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    return _rank(options, megatron_flags)


def _rank(options: Options, megatron_flags: list[str]) -> int:
    import torch

    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    sys.argv[1:] = megatron_flags
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.model import failure
    from megatron_mone.profiling.job import Job, build_runs

    try:
        runs = build_runs(options)
        drawn = terminal() if os.environ.get("RANK", "0") == "0" else io.StringIO()
        with progress_bar(first="steps", stream=drawn) as bar:
            Job(runs, options, lambda done: bar(done, options.total_steps, "steps")).measure()
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


if __name__ == "__main__":
    raise SystemExit(main())
