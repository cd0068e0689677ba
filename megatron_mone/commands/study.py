"""`study`: a question about MoNE, answered by runs of the trainer."""

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from megatron_mone.common.exit_status import INTERRUPTED, STOPPED
from megatron_mone.common.program import Program

if TYPE_CHECKING:
    from megatron_mone.studies.document import StudyResults

program = Program()
main = program.main


@program.command("study")
def study(
    name: Annotated[str, Argument(metavar="NAME", help="of STUDIES.md: ratio, block, ...")],
    preset: Annotated[
        str, Option(metavar="NAME", help="size of its runs: tiny, cpu, 1gpu, cluster")
    ] = "cpu",
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
    site: Annotated[
        str | None, Option(metavar="FILE", help="of configs/launch, or a path (slurm)")
    ] = None,
    submit: Annotated[bool, Option("--submit", help="hand the runs to Slurm")] = False,
    data_path: Annotated[
        str | None, Option(metavar="PREFIX", help="of a preset on GPUs: the prepared data")
    ] = None,
    tokenizer_model: Annotated[Path | None, Option(metavar="FOLDER", help="of that data")] = None,
) -> int:
    """Train the cells of a study and write what they say, with 95% intervals over seeds.

        megatron-mone study ratio
        megatron-mone study block --preset tiny --out out/studies
        megatron-mone study ratio --preset cluster --data-path PREFIX_text_document \\
            --tokenizer-model FOLDER --site my-cluster.yaml [--submit]

    A preset on GPUs is planned and written out as Slurm sweeps, with what it will cost; --submit
    hands them to Slurm, also those of tiny and cpu; 1gpu is trained here where there is a GPU.
    Once all have finished the same command reads them. Runs that are there are not trained again,
    also those of another study; stopped, the same command goes on. Writes results.json and
    report.html in OUT/NAME-PRESET. Exit status: 0; 1 a run failed; 2 wrong input; 75 Slurm did not
    answer; 130 stopped.
    """
    from launch.runs.kept_runs import TrainingError
    from launch.slurm.commands import SlurmUnavailable
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.demo.command import TOKENIZER
    from megatron_mone.reporting.page.results import ResultError
    from megatron_mone.studies.catalogue import models_of, preset_of, study_of, with_text
    from megatron_mone.studies.command import PAGE, run_study
    from megatron_mone.studies.on_slurm.swept import Swept, swept_study

    chosen = study_of(name)
    size = preset_of(chosen, preset)
    models = models_of(chosen, model or [])
    size = with_text(size, chosen, text)
    chosen = replace(chosen, presets={**chosen.presets, preset: size})
    check_data_given(preset, size.gpus, data_path, tokenizer_model)
    if site and not size.gpus and not submit:
        raise ValueError(f"--site {site}: --preset {preset} is trained here: give --submit too")
    if models and submit:
        raise ValueError("--model is measured here: leave out --submit")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    data = out / "data" / "shakespeare"
    others = {cell.corpus for cell in chosen.grid(size)} - {""}
    corpora = {data.name: TOKENIZER, **dict.fromkeys(sorted(others), f"{data}.tokenizer")}
    if size.gpus:
        corpora = {}
    number = seeds or size.seeds
    again = f"megatron-mone study {name} --preset {preset} --seeds {number} --out {out}"
    again += "".join(f" --model {one}" for one in model or [])
    again += f" --text {text}" if text else ""
    if not all(_prepared(data.with_name(corpus), how) for corpus, how in corpora.items()):
        print("megatron-mone: error: the data could not be prepared", file=sys.stderr)
        return 1
    here = size.gpus == 1 and not submit and _has_gpu()
    if size.gpus == 1 and not submit and not here:
        print("no GPU here, so nothing is trained: --submit hands the runs to Slurm")
    words = [f"{data}_text_document", f"{data}.tokenizer"]
    if size.gpus:
        words = [str(data_path), str(tokenizer_model)]
        again += f" --data-path {words[0]} --tokenizer-model {words[1]}"
    again += f" --site {site}" if site else ""
    flags = ["--data-path", words[0], "--tokenizer-model", words[1]]
    how = Swept(site or "slurm", flags, _vocabulary(Path(words[1])), submit, here,
                again if here else f"{again} --submit")  # fmt: skip
    results: StudyResults | None
    try:
        with progress_bar() as bar:
            if size.gpus or submit:
                results = swept_study(chosen, preset, number, how, out, bar)
            else:
                results = run_study(chosen, preset, number, data, out, [again], bar, models=models)
    except (TrainingError, ResultError) as error:
        print(f"megatron-mone: error: {error}", file=sys.stderr)
        return 1
    except SlurmUnavailable as error:
        print(f"megatron-mone: error: {error}", file=sys.stderr)
        return STOPPED
    except KeyboardInterrupt:
        print(f"megatron-mone: stopped; the same command goes on: {again}", file=sys.stderr)
        return INTERRUPTED
    if results is not None:
        print(*chosen.findings(results), sep="\n")
        print(f"wrote {os.path.relpath(out / f'{name}-{preset}' / PAGE)}")
    return 0


def check_data_given(preset: str, gpus: int, data: str | None, tokenizer: Path | None) -> None:
    """Refuse a preset on GPUs without data of its own, and data for one on CPU cores.

    Raises:
        ValueError: one line.
    """
    if gpus and (data is None or tokenizer is None):
        missing = "--data-path" if data is None else "--tokenizer-model"
        raise ValueError(
            f"{missing} is missing: --preset {preset} reads data that you prepared: give "
            "--data-path PREFIX_text_document --tokenizer-model FOLDER"
        )
    if not gpus and (data is not None or tokenizer is not None):
        given = "--data-path" if data is not None else "--tokenizer-model"
        raise ValueError(f"{given}: --preset {preset} prepares its own data: leave it out")


def _prepared(prefix: Path, tokenizer: str) -> bool:
    """Whether the corpus that a prefix is named by could be prepared there."""
    from megatron_mone.common.child_processes import tied

    command = [sys.executable, "-m", "megatron_mone", "prepare", "--corpus", prefix.name,
               "--output-prefix", str(prefix), "--tokenizer", tokenizer]  # fmt: skip
    return subprocess.run(command, check=False, preexec_fn=tied()).returncode == 0


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _vocabulary(tokenizer: Path) -> int:
    """Of a tokenizer that is here; else what large models are planned with."""
    from megatron_mone.data.tokenizers import vocab_size_of
    from megatron_mone.studies.catalogue.large import VOCABULARY

    return vocab_size_of(tokenizer) if tokenizer.exists() else VOCABULARY
