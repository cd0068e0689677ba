"""Layout never changes meaning: a training run gives the same losses on one rank as on any layout.

Every model variant is trained on one rank and on layouts of 2 and 4 ranks. All start from one
checkpoint written by one rank (Megatron seeds experts by rank, so fresh weights differ between
layouts), train 10 steps of the same global batches in fp32, and must show the same language-model
loss, balance losses and gradient norm: relative error <= 1e-5. `-s` prints the measured errors.
"""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS = 10
TOLERANCE = 1e-5
TAGS = ("lm loss", "load_balancing_loss", "mone/ng_loss", "grad-norm")

EP2 = ("--expert-model-parallel-size", "2")
EP4 = ("--expert-model-parallel-size", "4")
PP2 = ("--pipeline-model-parallel-size", "2")
CP2 = ("--context-parallel-size", "2")
TP2 = ("--tensor-model-parallel-size", "2", "--sequence-parallel")  # ETP follows TP
ETP1 = ("--expert-tensor-parallel-size", "1")
VPP2 = ("--num-layers-per-virtual-pipeline-stage", "1")
ALLGATHER = ("--moe-token-dispatcher-type", "allgather")
FULL_RECOMPUTE = (
    *("--recompute-granularity", "full", "--recompute-method", "uniform"),
    *("--recompute-num-layers", "1"),
)
MOE_RECOMPUTE = ("--recompute-granularity", "selective", "--recompute-modules", "moe")

# The model, or what is summed into its loss: each variant has its own one-rank run.
VARIANTS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "four layers": ("--num-layers", "4"),
    "groups 2": ("--mone-neuron-groups", "2"),
    "shared experts": ("--moe-shared-expert-intermediate-size", "32"),
    "per-token loss": ("--calculate-per-token-loss",),
    "token dropping": ("--moe-expert-capacity-factor", "1.0"),
    "entropy loss": ("--mone-ng-loss-type", "entropy"),
    "normalized loss": ("--mone-ng-loss-type", "normalized"),
    "bias": ("--mone-ng-loss-type", "bias"),
    "global batch": ("--mone-ng-loss-scope", "global_batch"),
    "softmax gate": ("--mone-activation", "softmax"),
    "threshold": ("--mone-selection", "threshold", "--mone-threshold", "0.3"),
}


@dataclass(frozen=True)
class Layout:
    """How a variant is laid out over ranks."""

    ranks: int
    variant: str
    flags: tuple[str, ...]


LAYOUTS = {
    "DP2": Layout(2, "plain", ()),
    "DP2 distributed optimizer": Layout(2, "plain", ("--use-distributed-optimizer",)),
    "EP2": Layout(2, "plain", EP2),
    "EP2 allgather": Layout(2, "plain", (*EP2, *ALLGATHER)),
    "EP2 full recompute": Layout(2, "plain", (*EP2, *FULL_RECOMPUTE)),
    "EP2 selective recompute": Layout(2, "plain", (*EP2, *MOE_RECOMPUTE)),
    "PP2": Layout(2, "plain", PP2),
    "PP2 VPP2": Layout(2, "four layers", (*PP2, *VPP2)),
    "CP2": Layout(2, "plain", CP2),
    "TP2 ETP2": Layout(2, "plain", TP2),
    "TP2 ETP2 allgather": Layout(2, "plain", (*TP2, *ALLGATHER)),
    "TP2 ETP1": Layout(2, "plain", (*TP2, *ETP1)),
    "TP2 EP2": Layout(2, "plain", (*TP2, *ETP1, *EP2)),
    "TP2 ETP2, groups 2": Layout(2, "groups 2", TP2),
    "EP2, shared experts": Layout(2, "shared experts", EP2),
    "TP2 ETP2, shared experts": Layout(2, "shared experts", TP2),
    "EP2, per-token loss": Layout(2, "per-token loss", EP2),
    "CP2, per-token loss": Layout(2, "per-token loss", CP2),
    "EP2, token dropping": Layout(2, "token dropping", EP2),
    "TP2 ETP2, entropy loss": Layout(2, "entropy loss", TP2),
    "TP2 ETP1, entropy loss": Layout(2, "entropy loss", (*TP2, *ETP1)),
    "TP2 ETP2, normalized loss": Layout(2, "normalized loss", TP2),
    "TP2 ETP2, bias": Layout(2, "bias", TP2),
    "EP2, bias": Layout(2, "bias", EP2),
    "TP2 ETP1, global batch": Layout(2, "global batch", (*TP2, *ETP1)),
    "TP2 ETP2, softmax gate": Layout(2, "softmax gate", TP2),
    "TP2 ETP2, threshold": Layout(2, "threshold", TP2),
    "EP4": Layout(4, "plain", EP4),
    "ETP2 EP2": Layout(4, "plain", (*TP2, *EP2)),
    "ETP2 EP2 allgather": Layout(4, "plain", (*TP2, *EP2, *ALLGATHER)),
    "EP2 PP2": Layout(4, "plain", (*EP2, *PP2)),
    "CP2 EP2": Layout(4, "plain", (*CP2, *EP2)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")

    def resumed(name: str, variant: str, flags: tuple[str, ...]) -> Case:
        load = ("--load", f"{folder}/start {variant}", "--finetune", "--train-iters", str(STEPS))
        return Case(name, (*TINY, *MONE, *MOCK, *VARIANTS[variant], *flags, *load))

    one_rank = []
    for variant, flags in VARIANTS.items():
        save = ("--save", f"{folder}/start {variant}", "--save-interval", "1")
        start = (*TINY, *MONE, *MOCK, *flags, "--train-iters", "1", *save)
        one_rank += [
            Case(f"start run {variant}", start),
            resumed(f"one rank, {variant}", variant, ()),
        ]
    run_cases(one_rank, 1, folder)
    for ranks in (2, 4):
        cases = [resumed(n, x.variant, x.flags) for n, x in LAYOUTS.items() if x.ranks == ranks]
        run_cases(cases, ranks, folder)
    return folder


def worst_error(wanted: dict[int, float], got: dict[int, float]) -> float:
    """Largest relative difference over the steps, which must be the same ones."""
    assert sorted(wanted) == sorted(got)
    return max((abs(got[s] - wanted[s]) / abs(wanted[s]) for s in wanted), default=0.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_losses_as_one_rank(runs, name):
    variant = LAYOUTS[name].variant
    wanted = {tag: scalars(runs / f"one rank, {variant}", tag) for tag in TAGS}
    assert len(wanted["lm loss"]) == STEPS
    assert len(wanted["mone/ng_loss"]) == (0 if variant == "bias" else STEPS)
    errors = {tag: worst_error(wanted[tag], scalars(runs / name, tag)) for tag in TAGS}
    print(f"| {name} |" + "".join(f" {error:.1e} |" for error in errors.values()))
    assert max(errors.values()) <= TOLERANCE, errors


def test_variants_are_different_models(runs):
    """The comparison would be empty if the variants' flags, or training itself, did nothing."""
    last = {v: scalars(runs / f"one rank, {v}", "lm loss")[STEPS] for v in VARIANTS}
    # With equal micro-batches the loss per token is the loss per micro-batch.
    assert last.pop("per-token loss") == pytest.approx(last["plain"], rel=TOLERANCE)
    assert len(set(last.values())) == len(last), last
    first = scalars(runs / "one rank, plain", "lm loss")[1]
    assert last["plain"] < first
