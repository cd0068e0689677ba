"""The plot of what a text's loss becomes when fewer neurons are kept."""

from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from megatron_mone.reporting.page.plots import SETTINGS, save

_COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7")


def draw(document: dict[str, Any], stem: Path) -> None:
    """Write STEM.png and STEM.svg: by how much the loss grows where one layer keeps fewer.

    Args:
        document: of evaluation.ratio_losses.
        stem: of the files.
    """
    losses, whole = document["losses"], document["losses"]["as it is"]
    with plt.rc_context(SETTINGS):
        figure, axes = plt.subplots(figsize=(7, 3.6))
        for number, ratio in enumerate(document["ratios"]):
            grows = [losses[f"{ratio} in layer {layer}"] - whole for layer in document["layers"]]
            everywhere = losses[f"{ratio} in all layers"] - whole
            axes.plot(
                document["layers"], grows, marker="o", markersize=3,
                color=_COLOURS[number % len(_COLOURS)],
                label=f"r = {ratio}; in all layers {everywhere:+.3f}",
            )  # fmt: skip
        axes.axhline(0, color="#999999", linewidth=0.8)
        axes.set_xlabel("the one layer that keeps a share r of its neurons")
        axes.set_ylabel("loss, nats a token more")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False)
        figure.tight_layout()
        save(figure, stem)
