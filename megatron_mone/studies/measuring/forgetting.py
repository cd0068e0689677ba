"""What a fine-tuned run gains of its own text and loses of the one that its base was trained on,
checkpoint by checkpoint."""

from pathlib import Path

from megatron_mone.studies.measuring.held_out import held_out
from megatron_mone.studies.tasks import Found

OLD, NEW = "loss of the first text, nats a token", "loss of the new text, nats a token"
_BATCH = 16  # windows of a forward pass


def losses(base: str, tuned: str, windows: int) -> list[Found]:
    """Losses of what both runs held out, by step of fine-tuning; step 0 is the base's last weights.

    Args:
        base: folder of the base's checkpoints.
        tuned: folder of the fine-tuned run's.
        windows: of each text.

    Raises:
        ValueError: a run has no checkpoint, or no such text.
    """
    from megatron_mone.evaluation.forward import Forward
    from megatron_mone.evaluation.ratio_losses import loss_of, opened

    before, after = _checkpoints(base)[-1], _checkpoints(tuned)
    texts = {OLD: held_out(before, windows), NEW: held_out(after[-1], windows)}
    steps = [0, *(int(folder.name.removeprefix("iter_")) for folder in after)]
    found: dict[str, list[float]] = {of: [] for of in texts}
    for folder in (before, *after):
        with opened(folder) as loaded:
            forward = Forward(loaded)
            for of, rows_RS in texts.items():
                found[of].append(loss_of(forward, rows_RS, _BATCH))
    return [(of, steps, values) for of, values in found.items()]


def _checkpoints(folder: str) -> list[Path]:
    found = sorted(Path(folder).glob("iter_*"))
    if not found:
        raise ValueError(f"{folder} has no checkpoint: delete {Path(folder).parent} to train again")
    return found
