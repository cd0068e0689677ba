"""Megatron's HybridModel beside its GPTModel: layers of experts become MoNE in both.

A pattern of attention and experts alone is the GPT model with the same weights, to the bit. With
Mamba and dense layers among them one rank and every layout give the same numbers, and a model that
keeps every neuron is stock Megatron's.
"""

import json

import pytest

from tests.parity.conftest import note
from tests.parity.layouts import CP2, EP2, FULL_RECOMPUTE, KEEP_ALL, PLAIN, PP2, STOCK, TP2, TRAIN
from tests.parity.test_training_layouts import LOSSES, TOLERANCE, worst_error, worst_tensor_error
from tests.training_cases import Case, recorded, run_cases, scalars

pytestmark = pytest.mark.slow

PATTERN = "M*EME-"
MAMBA = ("--mamba-state-dim", "16", "--mamba-head-dim", "16", "--mamba-num-groups", "2")
LAYOUTS = {
    "EP2": EP2,
    "TP2": TP2,
    "CP2": CP2,
    "PP2, experts on one stage": (*PP2, "--hybrid-layer-pattern", "M*|EME-"),
    "PP2 VPP2": (*PP2, "--hybrid-layer-pattern", "M|*E|M|E-"),
    "EP2, full recompute": (*EP2, *FULL_RECOMPUTE),
}
PREDICTING = ("--hybrid-layer-pattern", "M*E-/*E/*E", "--mtp-loss-scaling-factor", "0.3")
WITH_PREDICTION = {
    "MTP, EP2": EP2,
    "MTP, TP2": TP2,
    "MTP, PP2": (*PP2, "--hybrid-layer-pattern", "M*|E-/*E/*E"),
    "MTP, full recompute": (*EP2, *FULL_RECOMPUTE),
}
ADAM = TRAIN[-2:]  # its eps
BY_FREQUENCY = ("--mone-layer-freq", "[0,0,1,0,0,0]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("hybrid")
    (folder / "mone.yaml").write_text(
        json.dumps({"mone_neuron_ratio": 0.25, "mone_ng_loss_coeff": 0.01})
    )

    def pattern(text):
        return ("--hybrid-layer-pattern", text)

    def save(name):
        return ("--train-iters", "1", "--save", f"{folder}/{name}", "--save-interval", "1")

    def load(name):
        # A GPT's optimizer state would be loaded into a hybrid model, --finetune or not.
        kept = ("--finetune", "--no-load-optim", "--no-load-rng", "--train-iters", "3")
        return ("--load", f"{folder}/{name}", *kept)

    def hybrid(name, base, *flags):
        words = (*base, *MAMBA, *pattern(PATTERN), *flags, *load("hybrid start"))
        return Case(name, words, tensors=True)

    one = [
        Case("gpt start run", (*TRAIN, *save("gpt start"))),
        Case("gpt", (*TRAIN, *load("gpt start"))),
        Case("gpt as hybrid", (*TRAIN, *pattern("*E*E"), *load("gpt start"))),
        Case("hybrid start run", (*TRAIN, *MAMBA, *pattern(PATTERN), *save("hybrid start"), PLAIN)),
        hybrid("one rank", TRAIN),
        hybrid("by frequency", TRAIN, *BY_FREQUENCY),
    ]

    def predicting(name, base, *flags):
        words = (*base, *MAMBA, *PREDICTING, *flags, *load("MTP start"))
        return Case(name, words, tensors=True)

    one += [
        Case("MTP start run", (*TRAIN, *MAMBA, *PREDICTING, *save("MTP start"), PLAIN)),
        predicting("MTP, one rank", TRAIN),
    ]
    two = [hybrid(name, TRAIN, *flags) for name, flags in LAYOUTS.items()]
    two += [predicting(name, TRAIN, *flags) for name, flags in WITH_PREDICTION.items()]
    two += [predicting("MTP, keep-all", KEEP_ALL, *EP2), predicting("MTP, stock", STOCK, *EP2)]
    two += [hybrid("keep-all", KEEP_ALL, *EP2), hybrid("stock", STOCK, *EP2)]
    run_cases(one, 1, folder)
    run_cases(two, 2, folder)
    spec = ("--spec", "megatron_mone.layer_spec", "mone_hybrid_spec")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONE_CONFIG", str(folder / "mone.yaml"))
        run_cases([hybrid("by spec", (*STOCK, "--clip-grad", "1"), *ADAM, *spec)], 1, folder)
    return folder


def test_attention_and_experts_alone_are_the_gpt_model(runs):
    for tag in LOSSES:
        assert len(scalars(runs / "gpt", tag)) == 3
        assert scalars(runs / "gpt as hybrid", tag) == scalars(runs / "gpt", tag)


@pytest.mark.parametrize("name", [*LAYOUTS, *WITH_PREDICTION])
def test_a_hybrid_model_is_the_same_in_every_layout(runs, name):
    one = runs / ("MTP, one rank" if name in WITH_PREDICTION else "one rank")
    wanted, got = recorded(one), recorded(runs / name)
    errors = {
        "loss": max(worst_error(wanted[tag], got[tag]) for tag in LOSSES),
        "metrics": max(
            worst_error(wanted[tag], got[tag])
            for tag in wanted
            if tag.startswith("mone/") and "tflops" not in tag
        ),
        "gradients": worst_tensor_error(one / "gradients.pt", runs / name / "gradients.pt"),
        "parameters": worst_tensor_error(one / "parameters.pt", runs / name / "parameters.pt"),
    }
    for column, error in errors.items():
        note(f"hybrid, {name}", column, error)
    assert max(errors.values()) <= TOLERANCE, errors


@pytest.mark.parametrize("model", ["", "MTP, "])
def test_keep_all_is_the_stock_hybrid_model(runs, model):
    stock, ours = runs / f"{model}stock", runs / f"{model}keep-all"
    wanted, got = recorded(stock), recorded(ours)
    for tag in ("lm loss", "load_balancing_loss", *(["mtp_1 loss", "mtp_2 loss"] if model else [])):
        assert len(wanted[tag]) == 3
        if model and tag == "load_balancing_loss":
            # Stock Megatron adds up predicted layers under numbers of their own, not the pattern's:
            # the sum of the layers' terms has another order.
            assert got[tag] == {
                step: pytest.approx(wanted[tag][step], rel=2**-23) for step in got[tag]
            }
        else:
            assert got[tag] == wanted[tag]
    for file in ("gradients.pt", "parameters.pt"):
        assert worst_tensor_error(stock / file, ours / file) == 0.0
    note(f"hybrid, {model}EP2", "keep-all = stock", 0.0)


def test_the_spec_builds_the_model_of_the_flags(runs):
    for tag in LOSSES:
        assert scalars(runs / "by spec", tag) == scalars(runs / "one rank", tag)


def test_layers_are_numbered_by_the_whole_pattern(runs):
    def layers(name):
        return [k for k in range(1, 7) if scalars(runs / name, f"mone/kept_ratio_layer_{k}")]

    assert layers("one rank") == layers("PP2 VPP2") == [3, 5]
    assert layers("by frequency") == [3]
    behind = recorded(runs / "MTP, one rank")
    assert [k for k in range(1, 9) if f"mone/kept_ratio_layer_{k}" in behind] == [3, 5, 6]
    losses = [scalars(runs / name, "lm loss")[3] for name in ("one rank", "by frequency")]
    assert losses[0] != losses[1]
