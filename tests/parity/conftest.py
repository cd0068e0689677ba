"""Prints the parity suite's tables after the tests, and writes them beside other results."""

from pathlib import Path

ONE_RANK = "largest relative error against one rank"
ENGINES_TABLE = "largest relative error of DeepSpeed's engine against Megatron's"
COLUMNS = {
    ONE_RANK: ("loss", "metrics", "gradients", "parameters", "keep-all = stock"),
    ENGINES_TABLE: ("loss", "gradient norm", "gradients", "parameters"),
}
ROWS: dict[str, dict[str, dict[str, float]]] = {title: {} for title in COLUMNS}
OUTPUT = {ONE_RANK: Path("out/parity.md"), ENGINES_TABLE: Path("out/engines.md")}


def note(layout: str, column: str, error: float, title: str = ONE_RANK) -> None:
    """Enter a measured relative error into a table."""
    ROWS[title].setdefault(layout, {})[column] = error


def table(title: str) -> list[str]:
    """A table as Markdown lines."""
    columns = COLUMNS[title]
    lines = [f"| layout | {' | '.join(columns)} |", "| --- |" + " --: |" * len(columns)]
    for layout, errors in ROWS[title].items():
        cells = [_cell(errors.get(column)) for column in columns]
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return lines


def _cell(error: float | None) -> str:
    if error is None:
        return ""
    return "equal" if error == 0 else f"{error:.1e}"


def pytest_terminal_summary(terminalreporter) -> None:
    for title, rows in ROWS.items():
        if not rows:
            continue
        terminalreporter.section(title)
        for line in table(title):
            terminalreporter.write_line(line)
        OUTPUT[title].parent.mkdir(parents=True, exist_ok=True)
        OUTPUT[title].write_text("\n".join(table(title)) + "\n", encoding="utf-8")
