"""Train MoNE and two dense MoE baselines side by side on two CPU ranks, and write a report.

    python -m tools.demo [--steps N] [--out out/demo]

Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from megatron_mone.common.child_processes import end_with_starter, tied
from megatron_mone.common.exit_status import INTERRUPTED
from megatron_mone.demo.training_run import (
    OnStep,
    RunSpec,
    TrainingError,
    ensure_run,
    finished,
    run_child,
)
from megatron_mone.reporting.demo.report import table_rows, write_report
from megatron_mone.reporting.page.results import ResultError, RunResult

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {"mone": "mone", "moe_total": "moe-total", "moe_active": "moe-active"}
WITHOUT_NG = "mone_without_ng"
WITHOUT_NG_SHARE = 0.4
"""How far the run without NG-LBL goes, as a share of the others' steps."""
TOKENIZER = "bpe:1024"
PYTHON = ".venv/bin/python"
"""Shown in commands; the demo runs them with its own interpreter."""
_SCALED = ("lr_warmup_iters", "eval_interval", "log_interval", "save_interval")
OnRunStep = Callable[[str, int, float], None]


def main() -> int:
    """Run the command line; 0, or 1 after an error on stderr."""
    options = build_parser().parse_args()
    end_with_starter()
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGHUP, _interrupt)
    try:
        return demo(options.out, options.steps)
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
    """Prepare the data, make the four runs, write the report and print its path."""
    console = Console()
    out.mkdir(parents=True, exist_ok=True)
    prefix = _shown(out) / "data" / "shakespeare"
    preparation = (PYTHON, "-m", "tools.prepare_data", "--corpus", "shakespeare",
                   "--output-prefix", str(prefix), "--tokenizer", TOKENIZER)  # fmt: skip
    command = [sys.executable, *preparation[1:]]
    if subprocess.run(command, cwd=ROOT, check=False, preexec_fn=tied()).returncode:
        raise TrainingError("the data could not be prepared")
    manifest = _manifest(prefix)
    specs = run_specs(out, prefix, steps, manifest)
    results = _train_all(specs, console)
    runs = [results[name] for name in CONFIGS]
    report = write_report(out, manifest.unigram_loss, runs, results[WITHOUT_NG], preparation)
    _print_table(console, runs)
    console.print(f"report: {_shown(report)}", soft_wrap=True)
    return 0


def run_specs(out: Path, prefix: Path, steps: int | None, manifest: Any) -> list[RunSpec]:
    """The three runs and the shorter one without NG-LBL.

    Args:
        out: the demo's folder.
        prefix: of the prepared data.
        steps: optimizer steps of each run; None for the configured number.
        manifest: of the data (`megatron_mone.data.manifest.Manifest`).
    """
    data = [manifest.bin.sha256, manifest.tokenizer.sha256]
    specs = []
    for name, config_name in [*CONFIGS.items(), (WITHOUT_NG, CONFIGS["mone"])]:
        path = Path("configs") / f"demo-{config_name}.yaml"
        config = _run_file(ROOT / path)
        flags = scaled_flags(config, steps)
        run_steps = steps or int(config["train_iters"])
        if name == WITHOUT_NG:
            short = short_steps(run_steps, int(flags.get("log_interval", config["log_interval"])))
            # The learning rate follows the long run's schedule: only then are equal steps equal.
            flags |= {"train_iters": short, "lr_decay_iters": run_steps, "mone_ng_loss_coeff": 0}
            run_steps = short
        folder = out / name
        command = _command(path, prefix, _shown(folder), flags)
        made_from = {"config": config, "flags": flags, "data": data}
        specs.append(RunSpec(name, folder, run_steps, made_from, command))
    return specs


def scaled_flags(config: dict[str, Any], steps: int | None) -> dict[str, int]:
    """Megatron arguments that turn a configured run into one of `steps` steps.

    Warm-up and intervals shrink in proportion and are at least 1.
    """
    configured = int(config["train_iters"])
    if steps is None or steps == configured:
        return {}
    share = min(1.0, steps / configured)
    flags = {name: max(1, round(int(config[name]) * share)) for name in _SCALED}
    # A few windows a run, so that the first, which holds the start-up, can be left out.
    flags["log_interval"] = max(1, min(int(config["log_interval"]), steps // 5))
    flags["eval_interval"] = max(flags["eval_interval"], math.ceil(steps / 6))
    return {"train_iters": steps, **flags}


def short_steps(steps: int, log_interval: int) -> int:
    """WITHOUT_NG_SHARE of `steps` in whole logging windows, at least one."""
    windows = max(1, round(WITHOUT_NG_SHARE * steps / log_interval))
    return min(steps, windows * log_interval)


def _command(config: Path, prefix: Path, folder: Path, flags: dict[str, int]) -> tuple[str, ...]:
    words = [PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
             "-m", "megatron_mone.pretrain", "--config", str(config),
             "--data-path", f"{prefix}_text_document", "--tokenizer-model", f"{prefix}.tokenizer",
             "--save", str(folder / "checkpoints"), "--load", str(folder / "checkpoints"),
             "--tensorboard-dir", str(folder / "tensorboard")]  # fmt: skip
    for name, value in flags.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return tuple(words)


def _train_all(specs: list[RunSpec], console: Console) -> dict[str, RunResult]:
    def train(spec: RunSpec, on_step: OnStep) -> None:
        words = [sys.executable, *spec.command[1:]]
        run_child(words, spec.folder / "log.txt", on_step, cwd=ROOT)

    results = {}
    with _progress(specs, console) as on_step:
        for spec in specs:
            done = finished(spec)
            if done is not None:
                console.print(f"{spec.name}: finished before, not trained again")
                on_step(spec.name, spec.steps, done.training_loss[-1][1])
            else:
                on_step(spec.name, 0, math.nan)

            def follow(step: int, loss: float, name: str = spec.name) -> None:
                on_step(name, step, loss)

            results[spec.name] = done or ensure_run(spec, train, follow)
    return results


@contextmanager
def _progress(specs: list[RunSpec], console: Console) -> Iterator[OnRunStep]:
    """A bar a run on a terminal, a line a log line elsewhere."""
    columns = (TextColumn("{task.description:<16}"), BarColumn(),
               TextColumn("{task.completed:>4.0f}/{task.total:.0f}"),
               TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn(),
               TextColumn("ETA"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = {
            spec.name: bars.add_task(spec.name, total=spec.steps, loss=math.nan, start=False)
            for spec in specs
        }
        totals = {spec.name: spec.steps for spec in specs}

        def on_step(name: str, step: int, loss: float) -> None:
            # The clock starts with the run, not with the demo.
            if bars.tasks[tasks[name]].start_time is None:
                bars.start_task(tasks[name])
            bars.update(tasks[name], completed=step, loss=loss)
            if not console.is_terminal and step == 0:
                print(f"{name}: starting", flush=True)
            elif not console.is_terminal:
                print(f"{name}: iteration {step}/{totals[name]}, loss {loss:.3f}", flush=True)

        yield on_step


def _print_table(console: Console, runs: list[RunResult]) -> None:
    header, rows = table_rows(runs)
    table = Table(*header, box=None, padding=(0, 1, 0, 0))
    for column in table.columns:
        column.no_wrap = True
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _manifest(prefix: Path) -> Any:
    from megatron_mone.data.manifest import load_manifest, manifest_path

    path = ROOT / manifest_path(prefix)
    manifest = load_manifest(path)
    if manifest is None:
        raise TrainingError(f"{path} is missing after the data was prepared")
    return manifest


def _run_file(path: Path) -> dict[str, Any]:
    """The merged arguments of one of the demo's run files (run_config.load_run imports PyTorch)."""
    run = yaml.safe_load(path.read_text(encoding="utf-8"))
    merged: dict[str, Any] = {}
    for part, name in run.items():
        text = (ROOT / "configs" / part / f"{name}.yaml").read_text(encoding="utf-8")
        merged |= yaml.safe_load(text)
    return merged


def _shown(path: Path) -> Path:
    """`path` from the repository, where children run; so no command names a machine's folders."""
    return Path(os.path.relpath(path.resolve(), ROOT))


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
