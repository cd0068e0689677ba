"""`eval`: benchmarks of a checkpoint, and two of them compared."""

import math
import os
import sys
from pathlib import Path
from typing import Annotated, Any, TextIO

from typer import Context, Option

from megatron_mone.common.files import write_json
from megatron_mone.common.local_ranks import run_ranks
from megatron_mone.common.program import PASSES_UNKNOWN, WORDS, Program

program = Program()
main = program.main
OUT = Path("out/eval")
COMPARISON = "megatron-mone/evaluation-comparison/1"


@program.command("eval", context_settings=PASSES_UNKNOWN)
def evaluate(
    context: Context,
    tasks: Annotated[
        str | None, Option(metavar="NAME,...", help="tasks of lm-eval; suites: paper, quick")
    ] = None,
    config: Annotated[Path | None, Option(help="run file that the model was trained with")] = None,
    load: Annotated[
        Path | None, Option(help="folder of its checkpoints (the run's --save)")
    ] = None,
    model: Annotated[
        Path | None, Option(help="a Hugging Face folder in place of a checkpoint")
    ] = None,
    include_path: Annotated[Path | None, Option(help="folder of further YAML tasks")] = None,
    limit: Annotated[int | None, Option(help="samples of each task (all)")] = None,
    batch_size: Annotated[int, Option(help="rows of a forward pass on a rank")] = 8,
    ranks: Annotated[int | None, Option(help="ranks to start here (what the layout needs)")] = None,
    out: Annotated[
        Path | None,
        Option(
            help="folder of the results (RUN/eval/... of a run's, else out/eval); of compare, a "
            "JSON file"
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="run code that the --model folder holds")
    ] = False,
) -> int:
    """Evaluate a checkpoint in any layout, or a Hugging Face folder, with lm-evaluation-harness.

        megatron-mone eval --load out/run --tasks quick
        megatron-mone eval --config demo-mone --load out/run --tasks arc_easy,sciq --limit 100
        torchrun --nproc-per-node 8 -m megatron_mone eval --load out/run --tasks paper \\
            --expert-model-parallel-size 8
        megatron-mone eval --model FOLDER --tasks quick --out out/eval-hf
        megatron-mone eval compare out/eval-a out/eval-b [--out out/difference.json]

    Without --config the model is what the checkpoint says; further flags are Megatron's, such as
    the layout. Writes OUT/results.json and the samples beside it; those of a run's own checkpoint
    into the run's folder, where its page shows them (docs/EVALUATION.md). Exit status: 0; 2 wrong
    input, said in one line.
    """
    if context.args[:1] == ["compare"]:
        return _compare(context.args[1:], out)
    from megatron_mone.evaluation.suites import check_installed, task_names

    for flag, value in (("--limit", limit), ("--ranks", ranks), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value} is not allowed: give at least 1")
    if tasks is None:
        raise ValueError("--tasks is missing: name tasks, or a suite: paper, quick")
    named = task_names([tasks])
    check_installed()
    if model is not None:
        for flag, other in (("--config", config), ("--load", load), ("--ranks", ranks)):
            if other is not None:
                raise ValueError(f"{flag} {other} is of a checkpoint: leave it out with --model")
        if context.args:
            raise ValueError(f"{context.args[0]} is of a checkpoint: leave it out with --model")
        found = out or OUT
        return _hugging_face(
            model, named, include_path, limit, batch_size, found, trust_remote_code
        )
    words = [*context.args, *(["--trust-remote-code"] if trust_remote_code else [])]
    words = [*([] if config is None else ["--config", str(config)]), *words]
    words += [] if load is None else ["--load", str(load)]
    run, out = _place(words, tasks, limit, out)
    if "WORLD_SIZE" not in os.environ:
        one = [sys.executable, "-m", "megatron_mone", "eval", *context.meta[WORDS]]
        one += ["--out", str(out)]
        return run_ranks(one, ranks or ranks_needed(config, words), out / "logs")
    return _rank(words, named, include_path, limit, batch_size, out, run)


def _place(
    words: list[str], tasks: str, limit: int | None, out: Path | None
) -> tuple[Path | None, Path]:
    """The folder of the run whose checkpoint it is, and that of the results."""
    from launch.runs.sweep_results import run_of
    from megatron_mone.evaluation.arguments import checkpoint_of
    from megatron_mone.evaluation.results import place_in_run

    checkpoint = checkpoint_of(words)
    found = run_of(checkpoint)
    if found is None:
        return None, out or OUT
    run, case = found
    return run, out or place_in_run(case, checkpoint.name, tasks, limit)


def ranks_needed(config: Path | None, words: list[str]) -> int:
    """Ranks of one model in the layout that is asked for."""
    from launch.spec.megatron_flags import whole_number
    from megatron_mone.model.run_config import load_run

    values = {} if config is None else load_run(config)

    def size(name: str) -> int | None:
        return whole_number(f"{name}_parallel_size", values, words)

    tensor = size("tensor_model") or 1
    experts = (size("expert_model") or 1) * (size("expert_tensor") or tensor)
    return (size("pipeline_model") or 1) * math.lcm(tensor, experts)


def _rank(
    words: list[str], tasks: list[str], include: Path | None, limit: int | None, batch: int,
    out: Path, run_folder: Path | None,
) -> int:  # fmt: skip
    """One rank of an evaluation."""
    import io

    from megatron_mone.common.local_ranks import terminal
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.evaluation import run
    from megatron_mone.model import failure

    failure.begin()
    drawn = terminal() if os.environ.get("RANK", "0") == "0" else io.StringIO()
    args: Any = None
    try:
        with progress_bar(first="loading", stream=drawn) as bar:
            document = run.evaluate_checkpoint(words, tasks, include, limit, batch, out, bar)
    except ValueError as error:
        failure.fail(str(error))
    except Exception as error:
        failure.end_with_line(error, args, words)
    if document is not None:
        _say(document, out)
        if run_folder is not None:
            _show(run_folder)
    return 0


def _hugging_face(
    model: Path, tasks: list[str], include: Path | None, limit: int | None, batch: int, out: Path,
    trusted: bool,
) -> int:  # fmt: skip
    from megatron_mone.evaluation import run

    _say(run.evaluate_folder(model, tasks, include, limit, batch, out, trusted), out)
    return 0


def _say(document: dict[str, Any], out: Path) -> None:
    from megatron_mone.evaluation.results import FILE, table

    print(f"{table(document)}\nwrote {out / FILE}", file=_stream(), flush=True)


def _show(run: Path) -> None:
    """The scores in the run's page, where it has one; else how to get it."""
    from launch.runs.sweep_results import draw_again

    try:
        page = draw_again(run)
        said = f"wrote {page}" if page else f"{_results_command(run)} draws a page with them"
    except (OSError, ValueError) as error:  # the results are written all the same
        said = f"the page of {run.name} is as it was: {error}"
    print(said, file=_stream(), flush=True)


def _results_command(run: Path) -> str:
    where = os.path.relpath(run.parent)
    return f"megatron-mone results {run.name}" + ("" if where == "runs" else f" --runs {where}")


def _stream() -> TextIO:
    from megatron_mone.common.local_ranks import TERMINAL, terminal

    return terminal() if TERMINAL in os.environ else sys.stdout


def _compare(files: list[str], out: Path | None) -> int:
    from megatron_mone.evaluation.compare import compare, table

    if len(files) != 2:
        raise ValueError(f"eval compare takes two results, {len(files)} are given: A.json B.json")
    found = compare(Path(files[0]), Path(files[1]))
    print(table(found))
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        document = {"schema": COMPARISON, "a": files[0], "b": files[1], "tasks": found}
        write_json(out, document)
        print(f"wrote {out}")
    return 0
