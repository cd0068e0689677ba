"""What a plan's page needs beside text, tables and pictures: folded lists, files beside it."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from matplotlib.figure import Figure

from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.plots import save
from megatron_mone.reporting.profile.tables import Table

PAGE = "report.html"
PLOTS = "plots"


class PlanPage(Page):
    """A page whose plots lie beside it, too; every text given is escaped.

    Args:
        title: of the page.
        folder: of the page.
    """

    def __init__(self, title: str, folder: Path) -> None:
        super().__init__(title)
        self._folder = folder

    def plot(self, stem: str, figure: Figure | None, caption: str) -> None:
        """A picture, written as plots/STEM.png and STEM.svg, too; None leaves it out."""
        if figure is not None:
            self.figure(save(figure, self._folder / PLOTS / stem), caption)

    def vector_plot(self, stem: str, figure: Figure, caption: str) -> None:
        """As `plot`, but a vector picture in the page, which stays sharp when it is enlarged."""
        path = self._folder / PLOTS / stem
        save(figure, path)
        data = base64.b64encode(path.with_suffix(".svg").read_bytes()).decode("ascii")
        self._parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def titled_table(self, title: str, table: Table) -> None:
        """A section of one table; without rows it is left out."""
        if table[1]:
            self.heading(title)
            self.table(*table)

    def folded(self, summary: str, texts: Sequence[str]) -> None:
        """A list that a reader unfolds."""
        items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
        self._parts.append(
            '<details style="overflow-wrap: anywhere">'
            f"<summary>{escape(summary)}</summary>\n<ul>\n{items}</ul></details>"
        )

    def link_to_trace(self, name: str) -> None:
        """A paragraph with a link to the trace, a file in the page's folder."""
        link = f'<a href="{escape(quote(name))}">{escape(name)}</a>'
        self._parts.append(f"<p>The same to zoom into: open {link} in ui.perfetto.dev.</p>")
