"""Results of studies that are made up."""

from collections.abc import Mapping, Sequence

from megatron_mone.studies.document import Measure, Point, StudyCell, StudyResults, StudyRun
from megatron_mone.studies.runs import values_shown
from megatron_mone.studies.study import Study


def made_up(
    study: Study, losses: Mapping[str, Mapping[int, float]],
    flops: Mapping[str, float] | None = None, measures: Sequence[Measure] = (),
) -> StudyResults:  # fmt: skip
    """Results of a study in which cells end at given losses.

    Args:
        study: whose cells.
        losses: cell -> seed -> nats a token after the last step.
        flops: cell -> active operations of a step; 1e9 where there is none.
        measures: of its runs.
    """
    preset = study.presets["cpu"]
    cells = [
        StudyCell(
            name=cell.name, meaning=cell.meaning, values=values_shown(cell), corpus=cell.corpus,
            runs=[
                StudyRun(
                    seed=seed, run=f"{cell.name}{seed}", steps=preset.values["train_iters"],
                    tokens_per_step=2048, active_flops_per_step=(flops or {}).get(cell.name, 1e9),
                    executed_flops_per_step=2e9, chooses=True, dead_share=0.25,
                    validation=[Point(step=240, loss=loss)],
                )
                for seed, loss in losses[cell.name].items()
            ],
        )
        for cell in study.grid(preset) if cell.name in losses
    ]  # fmt: skip
    return StudyResults(
        study=study.name, preset="cpu", reference=study.reference, commands=["study"],
        machine="2 cores", seconds=1, cells=cells, measures=list(measures),
    )  # fmt: skip
