"""A profile for TensorBoard: a folder a run, so that runs lie over each other in one chart.

    FOLDER/mone/events.out.tfevents...      profile/step_ms, profile/phase_ms/attention, ...
    FOLDER/plots/events.out.tfevents...     the report's pictures

Replaces the event files of an earlier call in those folders, and touches nothing else in them.
"""

import re
from pathlib import Path
from typing import Any

from matplotlib import image

from megatron_mone.profiling.profile_document import Profile, ProfiledRun
from megatron_mone.reporting.profile.report import PLOTS


def write_tensorboard(profile: Profile, folder: Path) -> None:
    """Write scalars of every run and the report's pictures as event files.

    Scalars: one value a step for the step and each phase (ms), under the step's iteration number;
    the peak memory (bytes) under the last one. Pictures: those of plots/ beside `folder`.

    Args:
        profile: drawn.
        folder: the profile's tensorboard/.
    """
    for number, run in enumerate(profile.runs):
        with _writer(folder / _folder_name(number, run, profile)) as writer:
            _write_run(writer, run)
    pictures = sorted((folder.parent / PLOTS).glob("*.png"))
    if pictures:
        with _writer(folder / PLOTS) as writer:
            for path in pictures:
                # [height, width, 3] from 0 to 1; without the alpha that a PNG may carry
                pixels = image.imread(path)[..., :3]
                writer.add_image(f"profile/{path.stem}", pixels, dataformats="HWC")


def _writer(folder: Path) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    for old in folder.glob("events.out.tfevents.*"):
        old.unlink()
    return SummaryWriter(str(folder))


def _folder_name(number: int, run: ProfiledRun, profile: Profile) -> str:
    """The run's name where it is a harmless file name that no other run or the plots have."""
    name = re.sub(r"[^A-Za-z0-9_-]", "_", run.name)[:60]
    names = [re.sub(r"[^A-Za-z0-9_-]", "_", other.name)[:60] for other in profile.runs]
    return name if names.count(name) == 1 and name != PLOTS else f"{name}-{number}"


def _write_run(writer: Any, run: ProfiledRun) -> None:
    samples = run.samples
    for i, step in enumerate(samples.steps.tolist()):
        writer.add_scalar("profile/step_ms", samples.step_ms[i], step)
        for phase, values in samples.phases.items():
            # a slash would open another group of charts
            writer.add_scalar(f"profile/phase_ms/{phase.replace('/', '-')}", values[i], step)
    if run.memory is not None:
        peak = run.memory.peak_bytes
        writer.add_scalar("profile/peak_memory_bytes", peak, int(samples.steps[-1]))
