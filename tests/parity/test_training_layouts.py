"""Layout never changes meaning: a training run gives the same numbers on one rank as on any layout.

Every model variant is trained on one rank and on layouts of 2, 4 and 8 ranks. All start from one
checkpoint written by one rank (Megatron seeds experts by rank, so fresh weights differ between
layouts) and train 3 steps of the same global batches in fp32. Compared, with a relative error of at
most 1e-5 of the tensor's largest entry: losses, balance losses, gradient norm and every metric of
all steps; every parameter's gradient in step 1 and every parameter after step 3, gathered whole.
A MoNE model that keeps every neuron must equal stock Megatron in the same layout to the bit:
losses, gradients and parameters.
"""

from pathlib import Path

import pytest
import torch

from tests.parity.conftest import note
from tests.parity.layouts import (
    KEEP_ALL,
    KEEP_ALL_LAYOUTS,
    LAYOUTS,
    OPTIMIZERS,
    PLAIN,
    STOCK,
    TRAIN,
    VARIANTS,
    Layout,
)
from tests.training_cases import Case, recorded, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS = 3
TOLERANCE = 1e-5
LOSSES = ("lm loss", "load_balancing_loss", "mone/ng_loss", "grad-norm")
TIMED = ("mone/executed_tflops_per_rank", "mone/active_tflops_per_rank")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")

    def resumed(name: str, variant: str, base: tuple[str, ...], *flags: str) -> Case:
        load = ("--load", f"{folder}/start {variant}", "--finetune", "--train-iters", str(STEPS))
        return Case(name, (*base, *VARIANTS[variant], *flags, *load), tensors=True)

    cases: dict[int, list[Case]] = {1: [], 2: [], 4: [], 8: []}
    for variant, flags in VARIANTS.items():
        save = ("--save", f"{folder}/start {variant}", "--save-interval", "1", PLAIN)
        start = (*TRAIN, *flags, "--train-iters", "1", *save)
        cases[1].append(Case(f"start run {variant}", start))
        cases[1].append(resumed(f"one rank, {variant}", variant, TRAIN))
    # All runs of a layout one after another: they share their process groups.
    layouts = {**LAYOUTS, **KEEP_ALL_LAYOUTS}
    for name, layout in sorted(layouts.items(), key=lambda item: sorted(item[1].flags)):
        if name in LAYOUTS:
            cases[layout.ranks].append(resumed(name, layout.variant, TRAIN, *layout.flags))
        if name in KEEP_ALL_LAYOUTS:
            for kind, base in (("keep-all", KEEP_ALL), ("stock", STOCK)):
                flags = (*layout.flags, *two_micro_batches(layout))
                case = resumed(f"{name}, {kind}", layout.variant, base, *flags)
                cases[layout.ranks].append(case)
    for ranks, of_rank_count in cases.items():
        run_cases(of_rank_count, ranks, folder)
    return folder


def two_micro_batches(layout: Layout) -> tuple[str, ...]:
    """Flags by which a rank without data parallelism sums the gradients of two micro-batches, not
    of four; a pipeline keeps four, so that it is filled."""
    size = layout.ranks
    for flag in ("--tensor-model-parallel-size", "--context-parallel-size"):
        if flag in layout.flags:
            size //= int(layout.flags[layout.flags.index(flag) + 1])
    return ("--global-batch-size", "4") if size == 1 else ()


def worst_error(wanted: dict[int, list[float]], got: dict[int, list[float]]) -> float:
    """Largest difference over the steps, relative to the step's largest value."""
    assert sorted(wanted) == sorted(got)
    errors = [0.0]
    for step, values in wanted.items():
        a, b = torch.tensor(values).double(), torch.tensor(got[step]).double()
        assert a.shape == b.shape, (step, a.shape, b.shape)
        errors.append(_relative(a, b))
    return max(errors)


def worst_tensor_error(wanted: Path, got: Path) -> float:
    """Largest difference in a tensor relative to its largest entry, over all tensors."""
    one, other = torch.load(wanted, weights_only=True), torch.load(got, weights_only=True)
    assert sorted(one) == sorted(other)
    assert all(one[key].abs().max() > 0 for key in one if not key.endswith("expert_bias"))
    return max(_relative(one[key].double(), other[key].double()) for key in one)


def _relative(wanted: torch.Tensor, got: torch.Tensor) -> float:
    difference = (wanted - got).abs().max().item()
    return difference / wanted.abs().max().item() if difference else 0.0


@pytest.mark.parametrize("name", LAYOUTS)
def test_same_numbers_as_one_rank(runs, name):
    variant = LAYOUTS[name].variant
    one, here = runs / f"one rank, {variant}", runs / name
    wanted, got = recorded(one), recorded(here)
    assert len(wanted["lm loss"]) == STEPS
    assert len(wanted.get("mone/ng_loss", {})) == (0 if variant == "bias" else STEPS)
    metrics = [tag for tag in wanted if tag.startswith("mone/") and tag not in TIMED]
    assert len(metrics) > 16
    errors = {
        "loss": max(worst_error(wanted.get(t, {}), got.get(t, {})) for t in LOSSES),
        "metrics": max(worst_error(wanted[t], got[t]) for t in metrics),
        "gradients": worst_tensor_error(one / "gradients.pt", here / "gradients.pt"),
        "parameters": worst_tensor_error(one / "parameters.pt", here / "parameters.pt"),
    }
    for column, error in errors.items():
        note(name, column, error)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("name", KEEP_ALL_LAYOUTS)
def test_keep_all_is_stock_megatron_in_the_same_layout(runs, name):
    stock, ours = runs / f"{name}, stock", runs / f"{name}, keep-all"
    wanted, got = recorded(stock), recorded(ours)
    tags = ("lm loss", "load_balancing_loss")
    error = max(
        *(worst_error(wanted[tag], got[tag]) for tag in tags),
        *(worst_tensor_error(stock / f, ours / f) for f in ("gradients.pt", "parameters.pt")),
    )
    note(name, "keep-all = stock", error)
    assert error == 0.0


def test_variants_are_different_models(runs):
    """The comparison would be empty if the variants' flags, or training itself, did nothing."""
    last = {v: scalars(runs / f"one rank, {v}", "lm loss")[STEPS] for v in VARIANTS}
    # With equal micro-batches the loss per token is the loss per micro-batch; what a capacity pads
    # has no part in the loss, and a backend none in the model.
    assert last.pop("per-token loss") == pytest.approx(last["plain"], rel=TOLERANCE)
    assert last.pop("reference backend") == pytest.approx(last["plain"], rel=TOLERANCE)
    assert last.pop("padding to capacity") == pytest.approx(last["token dropping"], rel=TOLERANCE)
    assert len(set(last.values())) == len(last), last
    first = scalars(runs / "one rank, plain", "lm loss")[1]
    assert last["plain"] < first


def test_optimizers_are_different_optimizers(runs):
    """And not Adam for the experts, as whatever is no matrix gets."""
    key = "decoder.layers.mlp.experts.experts.linear_fc1.weight"
    adam = torch.load(runs / "EP2, keep-all" / "parameters.pt", weights_only=True)[key]
    for name in OPTIMIZERS:
        if name.startswith("EP2"):
            other = torch.load(runs / f"{name}, keep-all" / "parameters.pt", weights_only=True)[key]
            assert _relative(adam, other) > 1e-3, name
