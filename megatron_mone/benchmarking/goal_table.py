"""The goals (goals.py) beside what a grid measured: a table, and every figure above the ceiling."""

from megatron_mone.benchmarking.goals import CEILING, PARTS, WORDS, Goal, goals_of
from megatron_mone.benchmarking.summary import Point, class_of, fraction
from megatron_mone.kernels.race_results import PartTime, RaceResults

GOALS = ("goal", "at most", "measured", "met")


def goal_lines(results: RaceResults, found: list[Point]) -> list[str]:
    """Markdown of the section; one sentence where no goal is for this machine."""
    rows = goal_rows(results, found)
    if not rows:
        return [f"None for this class of machine ({class_of(results)})."]
    table = [list(GOALS), ["---", "--:", "---", "---"], *rows]
    lines = [f"Class of the machine: {class_of(results)}. Shares of the fastest dense peer's time:"]
    lines += ["", *(f"| {' | '.join(cells)} |" for cells in table), ""]
    return lines + [f"- {text}" for text in above_ceiling(found)]


def goal_rows(results: RaceResults, found: list[Point]) -> list[list[str]]:
    """A row for each goal of the machine's class."""
    goals = goals_of(class_of(results))
    if not goals:
        return []
    rows = [_row(goal, found) for goal in goals]
    rows += [
        _worst("any r and cell", [(p, phase) for p in found for phase in WORDS]),
        _worst("r = 1", [(p, phase) for p in found for phase in WORDS if p.ratio == 1]),
    ]
    return rows + [_parts(of, *goal, results.parts) for of, goal in PARTS.items()]


def above_ceiling(found: list[Point]) -> list[str]:
    """A line for each figure that is worse than the dense experts, or that there is none."""
    texts = [
        f"Above {CEILING:.2f}: {WORDS[phase]} {getattr(p, phase):.2f} at r = {fraction(p.ratio)}, "
        f"{p.config.label}."
        for p in found
        for phase in WORDS
        if p.above(phase) and round(getattr(p, phase), 2) > CEILING
    ]
    return texts or [f"No figure is above {CEILING:.2f}."]


def _row(goal: Goal, found: list[Point]) -> list[str]:
    mine = [p for p in found if goal.takes(p.config, p.ratio, goal.phase)]
    shown = [f"{getattr(p, goal.phase):.2f} ({_what(p)})" for p in mine]
    above = any(p.above(goal.phase) for p in mine)
    name = f"{WORDS[goal.phase]}, r = {fraction(goal.ratio)}, {goal.dtype}"
    if goal.blocks[1] > 1:
        least, most = goal.blocks
        name += f", blocks of {least}" + (" and more" if most > least else "")
    if goal.rows[0] == 1:
        name += f", up to {goal.rows[1]} rows"
    return [name, f"{goal.most:.2f}", ", ".join(shown) or "not in this grid", _met(mine, above)]


def _what(point: Point) -> str:
    block = point.config.neuron_block
    return point.config.routing + (f", B {block}" if block > 1 else "")


def _worst(name: str, figures: list[tuple[Point, str]]) -> list[str]:
    values = [getattr(point, phase) for point, phase in figures]
    above = sum(round(value, 2) > CEILING for value in values)
    text = f"{max(values):.2f} at most; {above} of {len(values)} above" if values else "none"
    return [name, f"{CEILING:.2f}", text, _met(values, above > 0)]


def _parts(of: str, name: str, most: float, parts: list[PartTime]) -> list[str]:
    """The parts of one whole: at several widths the largest, in one layer their sum."""
    mine = [part for part in parts if part.of == of]
    if len({part.part for part in mine}) > 1:
        value = sum(part.share for part in mine)
        text = f"{value:.1%}: " + ", ".join(f"{part.part} {part.share:.1%}" for part in mine)
    else:
        value = max((part.share for part in mine), default=0.0)
        text = ", ".join(f"F {part.config.neurons} {part.share:.1%}" for part in mine)
    shown, met = text or "not measured", _met(mine, round(value, 3) > most)
    return [f"{name}, of {of}", f"{most:.0%}", shown, met]


def _met(measured: object, above: bool) -> str:
    return "-" if not measured else "no" if above else "yes"
