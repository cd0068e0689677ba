"""results: one table of a run or a sweep's cases, printed, and kept beside as JSON, CSV and HTML.

    runs/NAME/results.json, results.csv, results.html, plots/

How a case ended is read from its attempts, its numbers from its TensorBoard folder, its benchmarks
from its folder eval/, what is under way from Slurm where it answers. May touch: those files, Slurm
through slurm/state.py.
"""

from collections.abc import Sequence
from pathlib import Path

from launch.runs.run_manifest import MANIFEST, attempts, gather
from launch.runs.sweep_cases import FAILED, SINGLE, case_states, read_cases, runs_here
from launch.spec.training_job import CHECKPOINTS, tensorboard_folder
from megatron_mone.common.files import atomic_write
from megatron_mone.common.local_ranks import error_line
from megatron_mone.reporting.page.scores import read_evaluations
from megatron_mone.reporting.sweep.table import Row, csv_bytes, measure, results_of, text_lines

RESULTS = "results"


def result_rows(folder: Path) -> tuple[list[Row], list[str]]:
    """A row for each case of a sweep, one for a run that is none; and a line on why each failed,
    or an evaluation of it cannot be read.

    Raises:
        ValueError: the folder's records cannot be read, or it holds no training run.
    """
    manifest = gather(folder)
    if "values" not in manifest.config:
        raise ValueError(f"{folder.name} is no training run (--config): it has no results to show")
    cases = read_cases(folder) or (SINGLE,)
    states = case_states(folder, cases, manifest.starts, here=runs_here(folder), sure=False)
    evaluated = [read_evaluations(folder / case.folder) for case in cases]
    rows = [
        Row(
            Path(folder, case.folder).name,
            case.values,
            str(state),
            measure(tensorboard_folder(folder, case, manifest.config)),
            documents,
        )
        for case, state, (documents, _) in zip(cases, states, evaluated, strict=True)
    ]
    why = [
        f"{row.case}: {said}"
        for row, case, state in zip(rows, cases, states, strict=True)
        if state.state == FAILED and (said := _last_error(folder / case.folder))
    ]
    return rows, [*why, *(line for _, unread in evaluated for line in unread)]


def write_results(folder: Path, rows: Sequence[Row]) -> Path:
    """Write the files of a table; returns the page's path.

    Raises:
        OSError: a file cannot be written.
    """
    # matplotlib takes a second to load.
    from megatron_mone.reporting.sweep.page import sweep_page

    page = sweep_page(folder.name, rows, folder / "plots")
    atomic_write(folder / f"{RESULTS}.csv", csv_bytes(rows))
    results_of(folder.name, rows).write(folder / f"{RESULTS}.json")
    atomic_write(folder / f"{RESULTS}.html", page.encode())
    return folder / f"{RESULTS}.html"


def show_results(folder: Path) -> None:
    """Print the table of a run and keep it.

    Raises:
        ValueError: as `result_rows`.
        OSError: a file cannot be written.
    """
    rows, why = result_rows(folder)
    print("\n".join([*text_lines(rows), *why, str(write_results(folder, rows))]), flush=True)


def run_of(checkpoint: Path) -> tuple[Path, Path] | None:
    """The folder of the run that a checkpoint is of, and that of its case: the run's own where it
    is no sweep. None where it is no run's of `launch`.

    Args:
        checkpoint: folder of an iteration.
    """
    if checkpoint.parent.name != CHECKPOINTS:
        return None
    case = checkpoint.parent.parent.absolute()
    run = case.parents[1] if case.parent.name == "cases" else case
    return (run, case) if (run / MANIFEST).is_file() else None


def draw_again(folder: Path) -> Path | None:
    """Draw a run's page anew; its path, or None where nobody has asked for one yet.

    Raises:
        ValueError: as `result_rows`.
        OSError: a file cannot be written.
    """
    if not (folder / f"{RESULTS}.html").is_file():
        return None
    return write_results(folder, result_rows(folder)[0])


def _last_error(case: Path) -> str:
    """The line in which a rank of the last attempt said why it failed; empty where none did."""
    tried = attempts(case)
    if not tried:
        return ""
    return error_line(sorted((case / "logs" / tried[-1]["attempt"]).glob("rank-*.log")))
