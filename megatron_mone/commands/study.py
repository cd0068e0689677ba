"""`study`: a question about MoNE, answered by runs of the trainer."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from megatron_mone.common.exit_status import INTERRUPTED
from megatron_mone.common.program import Program

program = Program()
main = program.main


@program.command("study")
def study(
    name: Annotated[str, Argument(metavar="NAME", help="of STUDIES.md: ratio, block, ...")],
    preset: Annotated[str, Option(metavar="NAME", help="size of its runs: tiny, cpu")] = "cpu",
    seeds: Annotated[
        int | None, Option(metavar="N", min=1, help="of each cell (the preset's)")
    ] = None,
    out: Annotated[Path, Option(metavar="FOLDER", help="of all studies")] = Path("out/studies"),
    model: Annotated[
        list[str] | None,
        Option(metavar="[NAME=]FOLDER", help="measured too; may be given more than once"),
    ] = None,
    text: Annotated[
        Path | None, Option(metavar="FILE", help="to measure on, where a study measures a text")
    ] = None,
) -> int:
    """Train the cells of a study and write what they say, with 95% intervals over seeds.

        megatron-mone study ratio
        megatron-mone study block --preset tiny --out out/studies

    Runs that are there are not trained again, also those of another study; stopped, the same
    command goes on. Writes OUT/NAME-PRESET/results.json and report.html. Exit status: 0; 1 a run
    failed; 2 wrong input; 130 stopped.
    """
    from launch.runs.kept_runs import TrainingError
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.demo.command import TOKENIZER
    from megatron_mone.reporting.page.results import ResultError
    from megatron_mone.studies.catalogue import models_of, preset_of, study_of, with_text
    from megatron_mone.studies.command import PAGE, run_study

    chosen = study_of(name)
    size = preset_of(chosen, preset)
    models = models_of(chosen, model or [])
    size = with_text(size, chosen, text)
    chosen = replace(chosen, presets={**chosen.presets, preset: size})
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data = out / "data" / "shakespeare"
    others = {cell.corpus for cell in chosen.grid(size)} - {""}
    corpora = {data.name: TOKENIZER, **dict.fromkeys(sorted(others), f"{data}.tokenizer")}
    number = seeds or size.seeds
    again = f"megatron-mone study {name} --preset {preset} --seeds {number} --out {out}"
    again += "".join(f" --model {one}" for one in model or [])
    again += f" --text {text}" if text else ""
    if not all(_prepared(data.with_name(corpus), how) for corpus, how in corpora.items()):
        print("megatron-mone: error: the data could not be prepared", file=sys.stderr)
        return 1
    try:
        with progress_bar() as bar:
            results = run_study(chosen, preset, number, data, out, [again], bar, models=models)
    except (TrainingError, ResultError) as error:
        print(f"megatron-mone: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"megatron-mone: stopped; the same command goes on: {again}", file=sys.stderr)
        return INTERRUPTED
    print(*chosen.findings(results), sep="\n")
    print(f"wrote {os.path.relpath(out / f'{name}-{preset}' / PAGE)}")
    return 0


def _prepared(prefix: Path, tokenizer: str) -> bool:
    """Whether the corpus that a prefix is named by could be prepared there."""
    from megatron_mone.common.child_processes import tied

    command = [sys.executable, "-m", "megatron_mone", "prepare", "--corpus", prefix.name,
               "--output-prefix", str(prefix), "--tokenizer", tokenizer]  # fmt: skip
    return subprocess.run(command, check=False, preexec_fn=tied()).returncode == 0
