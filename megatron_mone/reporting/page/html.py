"""A page that needs nothing but itself: one HTML file, pictures inside, no scripts, no network."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

from megatron_mone.reporting.page.results import write_atomically

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 980px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .5rem; border-bottom: 1px solid #ddd; }
figure { margin: 1rem 0; break-inside: avoid; }
figure img { width: 100%; height: auto; }
figcaption { color: #555; font-size: .9rem; }
table { border-collapse: collapse; width: 100%; margin: 1rem 0; break-inside: avoid; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; white-space: nowrap; }
table.wide { font-size: .82rem; }
table.wide th, table.wide td { padding: .3rem .35rem; }
thead th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; }
pre { background: #f5f5f5; padding: .7rem; font-size: .8rem; white-space: pre-wrap;
      overflow-wrap: anywhere; break-inside: avoid; }
li { margin: .35rem 0; }
.warning { border-left: 4px solid #d55e00; background: #fdf1e7; padding: .5rem .8rem; }
h2 { break-after: avoid; }
@media print { body { max-width: none; margin: 0; font-size: 11pt; }
               table { font-size: 9pt; } }
"""


class Page:
    """A page built top to bottom; every text given is escaped."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._parts: list[str] = [f"<h1>{escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """A paragraph of text."""
        self._parts.append(f"<p>{escape(text)}</p>")

    def warning(self, text: str) -> None:
        """A paragraph that must not be overlooked."""
        self._parts.append(f'<p class="warning">{escape(text)}</p>')

    def bullets(self, texts: Sequence[str]) -> None:
        """A list, one text an item."""
        items = "".join(f"<li>{escape(text)}</li>\n" for text in texts)
        self._parts.append(f"<ul>\n{items}</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table; the first column is text, the others numbers (right-aligned).

        More than 7 columns are set smaller, to fit the page.
        """
        wide = ' class="wide"' if len(header) > 7 else ""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows
        )
        self._parts.append(
            f"<table{wide}>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}</tbody>\n</table>"
        )

    def figure(self, png: bytes, caption: str) -> None:
        """A picture, stored in the page; the caption is its alternative text too."""
        data = base64.b64encode(png).decode("ascii")
        self._parts.append(
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )

    def code(self, text: str) -> None:
        """A block of preformatted text."""
        self._parts.append(f"<pre>{escape(text)}</pre>")

    def write(self, path: Path) -> Path:
        """Write the file whole or not at all, in a folder made if it is not there; its path."""
        write_atomically(path, self.render().encode())
        return path

    def render(self) -> str:
        """The whole file."""
        body = "\n".join(self._parts)
        return (
            '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width">\n'
            f"<title>{escape(self._title)}</title>\n<style>{_STYLE}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )
