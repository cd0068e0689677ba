"""Every trained row of the feature table trains, and its numbers are right (tests/features/row.py
says what is compared)."""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.features.row import LAYOUTS, Example
from tests.features.table import EXAMPLES
from tests.parity.layouts import EP2, KEEP_ALL, PLAIN, STOCK, TRAIN
from tests.parity.test_training_layouts import TOLERANCE, worst_error, worst_tensor_error
from tests.training_cases import Case, recorded, run_cases

pytestmark = pytest.mark.slow

STEPS = 3
TENSORS = ("gradients.pt", "parameters.pt")
TIMED = re.compile("tflops|time|throughput|memory|acceptance")
SUMMED = re.compile("grad-norm|params-norm")
ONE = "one rank"
REPLAY = "--mone-replay-routing {folder}/routed+routes"
ROUTED = {
    "routed": "",
    "replayed": REPLAY,
    "replayed, recomputed": f"{REPLAY} --recompute-granularity selective --recompute-modules moe",
    "replayed, another model": f"{REPLAY} --seed 5",
}
PLAIN_RUN = "plain"


@dataclass(frozen=True)
class Run:
    """A training run: a kind of model, flags in words, a layout."""

    kind: str
    flags: str
    layout: str

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{_number(self.flags)} {self.kind}, {self.layout}"


BASES = {"MoNE": TRAIN, "keep-all": KEEP_ALL, "stock": STOCK}


@cache
def _numbers() -> dict[str, int]:
    return {}


def _number(flags: str) -> int:
    """Of a set of flags, for folders have no room for words."""
    return _numbers().setdefault(flags, len(_numbers()))


def whole(example: Example) -> str:
    """All flags of an example."""
    return f"{example.beside} {example.flags}".strip()


def model_flags(example: Example) -> str:
    """What decides the weights that its runs start from."""
    return whole(example) if example.same is None else example.beside


def pairs(example: Example) -> list[tuple[Run, Run, float]]:
    """(what is wanted, what is looked at, the largest relative error) of an example."""
    flags, found = whole(example), []
    for layout in example.layouts:
        got = Run("MoNE", flags, layout)
        if example.same is not None:
            found.append((Run("MoNE", example.beside, layout), got, example.same))
        else:
            found.append((Run("MoNE", flags, ONE), got, TOLERANCE))
    if example.stock:
        stock, ours = (Run(kind, flags, example.stock) for kind in ("stock", "keep-all"))
        found.append((stock, ours, 0.0))
    return found


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    todo = {
        run: model_flags(example)
        for example in EXAMPLES.values()
        for wanted, got, _ in pairs(example)
        for run in (wanted, got)
    }
    starts = {model: folder / f"start {_number(model)}" for model in todo.values()}
    cases: dict[int, list[Case]] = {ranks: [] for ranks, _ in LAYOUTS.values()}
    for model, start in starts.items():
        save = ("--save", f"{start}", "--save-interval", "1", "--train-iters", "1", PLAIN)
        cases[1].append(Case(f"start run {_number(model)}", (*TRAIN, *model.split(), *save)))
    for run in sorted(todo, key=lambda run: run.layout):
        ranks, flags = LAYOUTS[run.layout]
        load = ("--load", f"{starts[todo[run]]}", "--finetune", "--train-iters", f"{STEPS}")
        words = (*BASES[run.kind], *flags, *run.flags.split(), *load)
        cases[ranks].append(Case(run.name, words, tensors=True))
    load = ("--load", f"{folder}/start {_number('')}", "--finetune", "--train-iters", f"{STEPS}")
    cases[2].append(Case(PLAIN_RUN, (*KEEP_ALL, *EP2, *load)))
    for name, flags in ROUTED.items():
        words = flags.format(folder=folder).split()
        traced = ("--moe-routing-trace-path", f"{folder}/{name}+routes", "--train-iters", "2")
        cases[2].append(Case(name, (*TRAIN, *EP2, *traced, *words)))
    for ranks, of_ranks in cases.items():
        if of_ranks:
            run_cases(of_ranks, ranks, folder)
    return folder


@pytest.mark.parametrize("name", EXAMPLES)
def test_numbers_are_right(runs, name):
    for wanted, got, tolerance in pairs(EXAMPLES[name]):
        errors = differences(runs / wanted.name, runs / got.name, wanted.kind == "stock")
        worst = max(errors, key=lambda tag: errors[tag])
        assert errors[worst] <= tolerance, (wanted, got, worst, errors[worst])


def differences(one: Path, other: Path, stock: bool) -> dict[str, float]:
    """Largest relative difference of everything that both runs wrote, by tag and file.

    With stock Megatron on the one side the norm is left out: it is summed over other tensors.
    """
    wanted, got = recorded(one), recorded(other)
    assert len(got["lm loss"]) == STEPS
    assert stock or set(wanted) <= set(got)
    tags = {
        tag
        for tag in set(wanted) & set(got)
        if not (TIMED.search(tag) or (stock and SUMMED.match(tag)))
        and all(len(values) == 1 for values in wanted[tag].values())  # and no histogram
    }
    errors = {tag: worst_error(wanted[tag], got[tag]) for tag in tags}
    return errors | {file: worst_tensor_error(one / file, other / file) for file in TENSORS}


def routes(runs: Path, name: str, rank: int) -> list[dict]:
    path = runs / f"{name}+routes" / f"router_trace_rank{rank}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_routes_are_written(runs):
    for rank in range(2):
        found = routes(runs, "routed", rank)
        micro_batches = [(one["step"], one["layer"]) for one in found]
        assert sorted(set(micro_batches)) == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert len(found) == 2 * len(set(micro_batches))
        assert all(len(one["top_indices"]) == one["num_tokens"] == 64 for one in found)


def test_written_routes_are_replayed(runs):
    """By another model too; a recomputed forward takes those of its first pass."""
    wanted = [routes(runs, "routed", rank) for rank in range(2)]
    assert [routes(runs, "replayed, another model", rank) for rank in range(2)] == wanted
    losses = {name: recorded(runs / name)["lm loss"] for name in ROUTED}
    assert losses["replayed"] == losses["replayed, recomputed"] == losses["routed"]
    assert losses["replayed, another model"] != losses["routed"]


def test_what_is_to_change_numbers_does(runs):
    """The comparisons would be empty if the flags did nothing."""
    last: dict[str, float] = {}
    for name, example in EXAMPLES.items():
        if example.same is None and example.stock == "EP2":
            run = runs / Run("keep-all", whole(example), "EP2").name
            last[name] = recorded(run)["lm loss"][STEPS][0]
    last["plain"] = recorded(runs / PLAIN_RUN)["lm loss"][STEPS][0]
    assert len(last) > 30
    names: dict[float, list[str]] = {}
    for name, loss in last.items():
        names.setdefault(loss, []).append(name)
    assert {loss: alike for loss, alike in names.items() if len(alike) > 1} == {}
