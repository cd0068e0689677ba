"""A checkpoint saved in one layout goes on in any other as if the run had never stopped.

Model, distributed optimizer (fully reshardable) and scheduler; all runs start from one checkpoint
written by one rank.
"""

import pytest

from tests.parity.layouts import CP2, EP2, ETP1, PP2, TP2
from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

SAVED, STEPS = 2, 5
TAGS = ("lm loss", "mone/ng_loss", "load_balancing_loss", "grad-norm", "learning-rate")
LAYOUTS = {
    "one rank": (1, ()),
    "TP2 ETP2": (2, TP2),
    "TP2 ETP1 EP2 CP2": (4, (*TP2, *ETP1, *EP2, *CP2)),
    "EP2 PP2": (4, (*EP2, *PP2)),
}
PAIRS = [(a, b) for a in LAYOUTS for b in LAYOUTS if a != b]
STOCK = (*TINY, *MOCK, "--adam-eps", "1e-3", "--use-distributed-optimizer",
         "--dist-ckpt-optim-fully-reshardable")  # fmt: skip
TRAIN = (*STOCK, *MONE)
KEEP_ALL = (*STOCK, "--mone-neuron-ratio", "1", "--mone-ng-loss-coeff", "0")


def until(step):
    """Flags that stop a run at `step` before its schedules end, as a kill would."""
    return ("--train-iters", str(STEPS), "--exit-interval", str(step))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reshard")

    def case(name, layout, load, *flags, model=TRAIN):
        return Case(name, (*model, *LAYOUTS[layout][1], "--load", f"{folder}/{load}", *flags))

    def saves(step, name):
        return (*until(step), "--save", f"{folder}/{name}", "--save-interval", str(step))

    start = Case("start", (*TRAIN, "--train-iters", "1", "--save", f"{folder}/begin",
                           "--save-interval", "1", "--mone-plain-checkpoint"))  # fmt: skip
    all_steps = ("--finetune", "--train-iters", str(STEPS))
    whole = case("whole", "one rank", "begin", *all_steps)
    stock = case("stock", "one rank", "begin", *all_steps, model=STOCK)
    run_cases([start, whole, stock], 1, folder)
    for ranks in (1, 2, 4):
        saving = [
            case(f"saved by {name}", name, "begin", "--finetune", *saves(SAVED, f"by {name}"))
            for name, (size, _) in LAYOUTS.items()
            if size == ranks
        ]
        # stock Megatron in TP 2, on with MoNE in EP 2 x PP 2, on with stock on one rank
        if ranks == 2:
            first = (*saves(SAVED, "stock"), "--finetune")
            saving.append(case("stock in TP2", "TP2 ETP2", "begin", *first, model=STOCK))
        if ranks == 4:
            then = (*saves(SAVED + 1, "keep-all"), "--mone-plain-checkpoint")
            saving.append(case("keep-all in EP2", "EP2 PP2", "stock", *then, model=KEEP_ALL))
        run_cases(saving, ranks, folder)
    for ranks in (1, 2, 4):
        loading = [
            case(f"{a} to {b}", b, f"by {a}", "--train-iters", str(STEPS))
            for a, b in PAIRS
            if LAYOUTS[b][0] == ranks
        ]
        if ranks == 1:
            last = ("--train-iters", str(STEPS))
            loading.append(case("stock again", "one rank", "keep-all", *last, model=STOCK))
        run_cases(loading, ranks, folder)
    return folder


@pytest.mark.parametrize(("saved_by", "loaded_by"), PAIRS)
def test_goes_on_as_if_never_stopped(runs, saved_by, loaded_by):
    for tag in TAGS:
        whole = scalars(runs / "whole", tag)
        got = scalars(runs / f"{saved_by} to {loaded_by}", tag)
        assert sorted(whole) == list(range(1, STEPS + 1))
        wanted = {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
        assert got == pytest.approx(wanted, rel=1e-5), tag


def test_stock_to_mone_and_back_resharded(runs):
    """Two steps of stock Megatron, one of a MoNE model that keeps all, two of stock again."""
    whole = scalars(runs / "stock", "lm loss")
    pieced = {}
    for name in ("stock in TP2", "keep-all in EP2", "stock again"):
        pieced |= scalars(runs / name, "lm loss")
    assert sorted(pieced) == list(range(1, STEPS + 1))
    assert pieced == pytest.approx(whole, rel=1e-5)
