"""The whole table, and the page made of it.

.venv/bin/python -m tests.features.table      # writes docs/FEATURES.md
"""

from fnmatch import fnmatchcase
from pathlib import Path

from megatron_mone.common.files import atomic_write
from tests.features import device, memory, model, moe, parallel, precision
from tests.features.recipes import RECIPES
from tests.features.row import Example, Row

PAGE = Path(__file__).parents[2] / "docs" / "FEATURES.md"
TABLE: dict[str, tuple[Row, ...]] = {
    "Routers and experts": moe.ROWS,
    "Parallelism": parallel.ROWS,
    "Memory and schedules": memory.ROWS,
    "Formats and optimizers": precision.ROWS,
    "The rest of the model": model.ROWS,
    "Devices": device.ROWS,
}
"""Section -> rows."""
ROWS = tuple(row for rows in TABLE.values() for row in rows)
EXAMPLES: dict[str, Example] = {
    f"{row.names[0]} {i}" if i else row.names[0]: example
    for row in ROWS
    for i, example in enumerate(row.examples)
} | RECIPES
"""Name of a case -> example."""
GROUPS = (
    *("transformer configuration", "moe", "mla", "distributed init", "mixed precision"),
    *("Transformer-Engine", "experimental", "experimental_attention_variant"),
    "heterogeneous architecture",
)
"""Groups of Megatron's parser whose every argument has a row."""
ELSEWHERE = (
    "moe_* muon_* optimizer optimizer_* recompute_* *cuda_graph* gradient_accumulation_fusion "
    "bias_swiglu_fusion *_cpu_offload* pin_cpu_*"
)
"""Of other groups: patterns of the arguments that have one as well."""


def rows_of(name: str) -> list[Row]:
    """The rows that name an argument of Megatron's; there is to be one."""
    return [row for row in ROWS if any(fnmatchcase(name, pattern) for pattern in row.names)]


HEAD = """\
# Megatron's features with MoNE on

Every argument of Megatron-Core 0.19's model, mixture-of-experts, parallelism and number-format
groups is in one row; a test fails where a new version brings one that is in none, and the rows are
what the tests run (`tests/features`). Nothing here has run on a GPU.

- **trained and equal**: trained on CPU ranks, three steps from one checkpoint; losses, metrics,
  every gradient and every parameter are compared. What is to change no number changes none, or
  its last bits; the rest is in each of its layouts what it is on one rank, within 1e-5; and MoNE
  that keeps every neuron is stock Megatron with the same flags, to the bit.
- **taken, not run on a GPU**: no check refuses it and the planner traces it where an example is
  given, but it needs a GPU or a package that CPU ranks have not.
- **refused**: one line before a model is built, on the cluster's front end as well.
- **no part of MoNE**: its experts, dispatchers and losses do not read it.

What no GPT training reads at all (inference, vision, reinforcement learning) is refused by
`megatron_mone/model/checks/flags.py`, with or without MoNE.

`.venv/bin/python -m tests.features.table` writes this page.
"""


RECIPES_HEAD = """\
Published models at toy width, compared in the same ways: against one rank, and keep-all against
stock. Where another layout's rounding becomes a whole step (Muon), against stock alone.
"""


def page() -> str:
    """docs/FEATURES.md."""
    lines = [HEAD]
    for section, rows in TABLE.items():
        lines += [f"## {section}", "", "| arguments | state | what it is with MoNE |"]
        lines += ["| --- | --- | --- |", *map(_line, rows), ""]
    lines += ["## Recipes", "", RECIPES_HEAD, "| in the style of | trained | layouts |"]
    lines += ["| --- | --- | --- |"]
    for name, one in RECIPES.items():
        lines.append(f"| {name} | `{one.flags}` | {'; '.join(one.layouts) or 'one'} |")
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    names = " ".join(f"`{name}`" for name in row.names)
    shown = [f"`{one.flags}`" for one in row.examples]
    shown += [f"`{flags}`" for flags, _ in row.asked] + [f"`{place}`" for place in row.shown]
    more = f" ({'; '.join(shown)})" if shown else ""
    return f"| {names} | {row.state} | {(row.says + more).replace('|', chr(92) + '|')} |"


if __name__ == "__main__":
    atomic_write(PAGE, page().encode())
