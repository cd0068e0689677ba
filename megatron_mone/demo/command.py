"""Train MoNE and two dense MoE baselines side by side on two CPU ranks, score them, and write a
report.

    python -m tools.demo [--steps N] [--out out/demo]

Interrupted, the same command goes on where it was.
"""

import argparse
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from launch.runs.kept_runs import PYTHON, KeptRun, TrainingError, ensure_run, finished, train_here
from megatron_mone.common.child_processes import end_with_starter, tied
from megatron_mone.common.exit_status import INTERRUPTED
from megatron_mone.common.places import ROOT
from megatron_mone.common.progress import NOTE, progress_bar
from megatron_mone.data.manifest import load_manifest, manifest_path
from megatron_mone.demo.runs import CONFIGS, WITHOUT_NG, demo_runs
from megatron_mone.demo.scores import score
from megatron_mone.reporting.demo.report import table_rows, write_report
from megatron_mone.reporting.page.results import ResultError, RunResult

TOKENIZER = "bpe:1024"


def main() -> int:
    """Run the command line; 0, or 1 after an error on stderr."""
    options = build_parser().parse_args()
    end_with_starter()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.default_int_handler)
    # Paths from the repository, where ranks run: so no command names a machine's folders.
    out = Path(os.path.relpath(options.out.resolve(), ROOT))
    os.chdir(ROOT)
    try:
        return demo(out, options.steps)
    except (TrainingError, ResultError, ValueError, OSError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted; run the same command again to go on", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=_positive, help="training steps (configs/train/demo.yaml)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder (out/demo)")
    return parser


def demo(out: Path, steps: int | None) -> int:
    """Prepare the data, make the four runs, score three, write the report and print its path.

    Args:
        out: the demo's folder, from the repository, which is the work folder.
        steps: optimizer steps of each run; None for the configured number.
    """
    out.mkdir(parents=True, exist_ok=True)
    prefix = out / "data" / "shakespeare"
    preparation = (PYTHON, "-m", "tools.prepare_data", "--corpus", "shakespeare",
                   "--output-prefix", str(prefix), "--tokenizer", TOKENIZER)  # fmt: skip
    command = [sys.executable, *preparation[1:]]
    if subprocess.run(command, check=False, preexec_fn=tied()).returncode:
        raise TrainingError("the data could not be prepared")
    manifest = load_manifest(manifest_path(prefix))
    if manifest is None:
        raise TrainingError(f"{manifest_path(prefix)} is missing after the data was prepared")
    jobs = demo_runs(out, prefix, steps)
    results = _train_all(jobs)
    print("scoring the three last checkpoints", flush=True)
    scores = score([job for job in jobs if job.name in CONFIGS])
    runs = [results[name] for name in CONFIGS]
    report = write_report(
        out, manifest.unigram_loss, runs, results[WITHOUT_NG], preparation, scores
    )
    _print_table(runs)
    print(f"report: {report}")
    return 0


def _train_all(runs: list[KeptRun]) -> dict[str, RunResult]:
    """Each run's result by its name: a bar a run on a terminal, a line a log line elsewhere."""
    results = {}
    columns = ("{task.description:<16}", "bar", "count", NOTE, "elapsed", "ETA", "left")
    with progress_bar(*columns, first=None, stream=sys.stdout) as bars:

        def show(run: KeptRun, step: int | None, loss: float) -> None:
            bars(step, run.steps, run.name, bar=run.name, note=f"loss {loss:.3f}")
            if step is not None and not bars.drawn:
                said = f"iteration {step}/{run.steps}, loss {loss:.3f}" if step else "starting"
                print(f"{run.name}: {said}", flush=True)

        for run in runs:
            show(run, None, math.nan)
        for run in runs:
            done = finished(run)
            if done is not None:
                print(f"{run.name}: finished before, not trained again")
                show(run, run.steps, done.training_loss[-1][1])
            else:
                show(run, 0, math.nan)
            follow = partial(show, run)
            results[run.name] = done or ensure_run(run, train_here, follow)
    return results


def _print_table(runs: list[RunResult]) -> None:
    header, rows = table_rows(runs)
    table = Table(*header, box=None, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value
