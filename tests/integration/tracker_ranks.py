"""Ranks that find the trackers' stand-ins where the packages would be."""

from pathlib import Path

from tests import stand_ins, training_cases


def main(todo: str, folder: str) -> None:
    """As `training_cases._main`; the files of W&B's runs are in folder/wandb."""
    import os

    stand_ins.use()
    os.environ["WANDB_STAND_IN"] = str(Path(folder) / "wandb")
    training_cases._main(todo, folder)
