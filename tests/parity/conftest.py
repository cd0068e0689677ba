"""Prints the parity suite's table after the tests, and writes it beside the other results."""

from pathlib import Path

COLUMNS = ("loss", "metrics", "gradients", "parameters", "keep-all = stock")
ROWS: dict[str, dict[str, float]] = {}
OUTPUT = Path("out/parity.md")


def note(layout: str, column: str, error: float) -> None:
    """Enter a measured relative error into the table."""
    ROWS.setdefault(layout, {})[column] = error


def table() -> list[str]:
    """The table as Markdown lines."""
    lines = [
        "| layout | " + " | ".join(COLUMNS) + " |",
        "| --- |" + " --: |" * len(COLUMNS),
    ]
    for layout, errors in ROWS.items():
        cells = [_cell(errors.get(column)) for column in COLUMNS]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return lines


def _cell(error: float | None) -> str:
    if error is None:
        return ""
    return "equal" if error == 0 else f"{error:.1e}"


def pytest_terminal_summary(terminalreporter) -> None:
    if not ROWS:
        return
    terminalreporter.section("largest relative error against one rank")
    for line in table():
        terminalreporter.write_line(line)
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n".join(table()) + "\n", encoding="utf-8")
