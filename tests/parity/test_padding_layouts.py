"""Tokens under a padding mask are left out of the neurons' balance in every layout alike: a run
gives the same numbers on one rank as on two, from one checkpoint of one rank."""

import pytest

from tests import training_cases
from tests.parity import padded_ranks
from tests.parity.layouts import ALLGATHER, CP2, EP2, ETP1, FULL_RECOMPUTE, TP2, TRAIN
from tests.parity.test_training_layouts import TOLERANCE, worst_error, worst_tensor_error
from tests.training_cases import Case, recorded

pytestmark = pytest.mark.slow

STEPS = 2
# Megatron's own balance loss per token weighs each rank by its own tokens: not alike in layouts.
NO_AUX_LOSS = ("--moe-aux-loss-coeff", "0")
VARIANTS = {
    "plain": (),
    "bias": ("--mone-ng-loss-type", "bias", "--mone-ng-bias-update-rate", "0.01"),
    "global batch": ("--mone-ng-loss-scope", "global_batch"),
    "per-token loss": ("--calculate-per-token-loss", *NO_AUX_LOSS),
    "per-token loss, global batch": (
        *("--calculate-per-token-loss", *NO_AUX_LOSS),
        *("--mone-ng-loss-scope", "global_batch"),
    ),
}
LAYOUTS = {
    "EP2": ("plain", EP2),
    "EP2, allgather": ("plain", (*EP2, *ALLGATHER)),
    "TP2 ETP2": ("plain", TP2),
    "TP2 ETP1 EP2": ("plain", (*TP2, *ETP1, *EP2)),
    "CP2 EP2": ("plain", (*CP2, *EP2)),
    "EP2, full recompute": ("plain", (*EP2, *FULL_RECOMPUTE)),
    "EP2, bias": ("bias", EP2),
    "EP2, global batch": ("global batch", EP2),
    "CP2, per-token loss": ("per-token loss", CP2),
    "TP2 ETP1, per-token loss": ("per-token loss", (*TP2, *ETP1)),
    "EP2, per-token loss, global batch": ("per-token loss, global batch", EP2),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("padding")

    def start(variant):
        save = ("--save", f"{folder}/start {variant}", "--save-interval", "1")
        flags = (*TRAIN, *VARIANTS[variant], "--train-iters", "1", *save)
        return Case(f"start run {variant}", flags)

    def case(name, variant, *flags):
        load = ("--load", f"{folder}/start {variant}", "--finetune", "--train-iters", str(STEPS))
        return Case(name, (*TRAIN, *load, *VARIANTS[variant], *flags), tensors=True)

    starts = [start(variant) for variant in VARIANTS]
    training_cases.run_cases([*starts, case("no padding", "plain")], 1, folder)
    one = [case(f"one rank, {variant}", variant) for variant in VARIANTS]
    two = [case(name, variant, *flags) for name, (variant, flags) in LAYOUTS.items()]
    for ranks, cases in ((1, one), (2, sorted(two, key=lambda c: sorted(c.flags)))):
        training_cases.run_cases(cases, ranks, folder, run=padded_ranks.main)
    return folder


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_numbers_as_one_rank(runs, name):
    variant, _ = LAYOUTS[name]
    one, here = runs / f"one rank, {variant}", runs / name
    wanted, got = recorded(one), recorded(here)
    tags = [t for t in wanted if t.startswith(("mone/", "lm loss")) and "tflops" not in t]
    assert len(tags) > 10
    errors = {tag: worst_error(wanted[tag], got[tag]) for tag in tags}
    errors["gradients"] = worst_tensor_error(one / "gradients.pt", here / "gradients.pt")
    assert max(errors.values()) <= TOLERANCE, errors


def test_the_mask_matters(runs):
    """A run without it has other balance losses, and counts more rows."""
    with_mask, without = (recorded(runs / name) for name in ("one rank, plain", "no padding"))
    a, b = (r["mone/routed_rows_layer_1"][1][0] for r in (with_mask, without))
    assert 0.5 * b < a < b
    assert with_mask["mone/ng_loss"][1] != without["mone/ng_loss"][1]
