"""`plan`: a job before there are devices."""

import logging
import signal
from typing import NoReturn

from megatron_mone.common.program import Program
from megatron_mone.planning.question import Asked, read_question

DOES_NOT_FIT = 4
program = Program()
main = program.main


@program.command("plan")
def plan(asked: Asked) -> int:
    """Plan a job before there are devices: does it fit, how long is a step, what does MoNE change.

        megatron-mone plan --model moe-30b-a3b-mone --gpus 128 --layout tp=1,ep=8,pp=4 \\
            --cluster h100-ndr --against moe --json out/plan/plan.json
        megatron-mone plan --config moe-671b-a37b-mone-1024 --gpus 1024
        megatron-mone plan --model Qwen3-30B-A3B/config.json --gpus 64 --search
        megatron-mone plan --compare A.run.yaml B.run.yaml --gpus 64
        megatron-mone plan --model moe-30b-a3b-mone --gpus 128 --search --limit 200
        megatron-mone plan --calibrate out/profile/profile.json --cluster cpu-avx2 \\
            --json out/plan/efficiency.json

    Megatron's own model is built without weights, its operations, collectives and bytes recorded
    (docs/PLANNER.md), then costed on the cluster. Writes the JSON, and beside it report.html,
    plots, timeline.json.gz for ui.perfetto.dev, and NAME.run.yaml, which the entry point and the
    launcher take. Exit status: 0; 2 after a wrong input, said in one line; 4 if the layout does
    not fit.
    """
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGHUP, _stop)
    try:
        return 0 if _fits(asked) else DOES_NOT_FIT
    except RuntimeError as error:
        raise ValueError(str(error)) from error


def _stop(number: int, frame: object) -> NoReturn:
    """End with a shell's status for the signal, so that files and processes are put away."""
    raise SystemExit(128 + number)


def _fits(asked: Asked) -> bool:
    """Do what was asked; whether the layout, or any layout of a search, fits."""
    if asked.calibrate is not None:
        from megatron_mone.commands.calibrate import calibrate_command

        calibrate_command(asked.calibrate, asked.cluster, asked.json)
        return True
    question = read_question(asked)
    from megatron_mone.common.files import atomic_write
    from megatron_mone.common.progress import progress_bar
    from megatron_mone.planning.answer import answer_comparison, answer_plan, answer_search
    from megatron_mone.planning.plan_document import Comparison
    from megatron_mone.planning.planner import Planner
    from megatron_mone.planning.tracing import trace_server
    from megatron_mone.reporting.plan.report import write_plan_files

    with trace_server.Tracer() as tracer, progress_bar() as say:
        planner = Planner(
            tracer, question.cluster, question.efficiency, question.skew, question.document_tokens
        )
        if question.second is not None:
            answer = answer_comparison(planner, question, question.second, say)
        elif asked.search:
            answer = answer_search(planner, question, asked.limit, asked.best, say)
        else:
            answer = answer_plan(planner, question, asked.sweep, say)
    folder = asked.json.parent
    folder.mkdir(parents=True, exist_ok=True)
    answer.document.write(asked.json)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)  # it tells of fonts
    if not isinstance(answer.document, Comparison):
        write_plan_files(answer.document, folder)
    if question.model_file:
        path = folder / f"{question.job.name}.model.yaml"
        atomic_write(path, question.model_file.encode())
    for name, job in answer.runs.items():
        job.write(folder / f"{name}.run.yaml")
    print(answer.text)
    page = "" if isinstance(answer.document, Comparison) else f" and {folder / 'report.html'}"
    print(f"wrote {asked.json}{page}")
    if answer.refusal:
        raise ValueError(answer.refusal)
    return answer.fits
