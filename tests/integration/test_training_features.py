"""Whole training runs on two CPU ranks: every feature that must keep working beside MoNE, stock
checkpoints in both directions, and Megatron's own script through `--spec`."""

import math
from pathlib import Path

import pytest

from megatron_mone.cpu_emulation import __main__ as emulation
from tests import forked_ranks
from tests.training_cases import MOCK, MONE, ROOT, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

EP2 = ["--expert-model-parallel-size", "2"]
BASE = [*TINY, *MONE, *MOCK, *EP2, "--train-iters", "2"]
FEATURES: dict[str, list[str]] = {
    "plain": [],
    "shared experts": ["--moe-shared-expert-intermediate-size", "32"],
    "grouped query attention": ["--group-query-attention", "--num-query-groups", "2"],
    "multi token prediction": ["--mtp-num-layers", "1", "--mtp-loss-scaling-factor", "0.1"],
    "dense first layer": ["--moe-layer-freq", "([0]+[1]*1)"],
    "one MoNE layer of two": ["--mone-layer-freq", "[0,1]"],
    "bf16": ["--bf16"],
    "full recompute": [
        *("--recompute-granularity", "full", "--recompute-method", "uniform"),
        *("--recompute-num-layers", "1"),
    ],
    "selective recompute": ["--recompute-granularity", "selective", "--recompute-modules", "moe"],
    "multi latent attention": [
        *("--multi-latent-attention", "--q-lora-rank", "16", "--kv-lora-rank", "16"),
        *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "8"),
    ],
    "softmax gate": ["--mone-activation", "softmax"],
    "threshold": ["--mone-selection", "threshold", "--mone-threshold", "0.5"],
    "groups": ["--mone-neuron-groups", "4"],
    "bias": ["--mone-ng-loss-type", "bias"],
    "entropy": ["--mone-ng-loss-type", "entropy"],
    "global batch": ["--mone-ng-loss-scope", "global_batch"],
    "per-token loss": ["--calculate-per-token-loss"],
}  # fmt: skip
KEEP_ALL = [
    *("--mone-neuron-ratio", "1.0", "--mone-ng-loss-coeff", "0", "--mone-backend", "reference")
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    cases = [Case(name, (*BASE, *flags)) for name, flags in FEATURES.items()]
    stock, mone = folder / "stock-checkpoint", folder / "mone-checkpoint"
    train = [*TINY, *MOCK, *EP2]
    three = ["--finetune", "--train-iters", "3"]
    cases += [
        Case("stock", (*train, "--train-iters", "2", "--save", f"{stock}",
                       "--save-interval", "2")),
        Case("stock again", (*train, *three, "--load", f"{stock}")),
        Case("stock in MoNE", (*train, *KEEP_ALL, *three, "--load", f"{stock}",
                               "--save", f"{mone}", "--save-interval", "3",
                               "--mone-plain-checkpoint")),
        Case("MoNE in stock", (*train, *three, "--load", f"{mone}")),
        Case("MoNE again", (*train, *KEEP_ALL, *three, "--load", f"{mone}")),
    ]  # fmt: skip
    run_cases(cases, 2, folder)
    return folder


@pytest.mark.parametrize("name", FEATURES)
def test_feature_trains(runs, name):
    losses = scalars(runs / name, "lm loss")
    assert sorted(losses) == [1, 2]
    assert all(math.isfinite(v) for v in losses.values())
    kept = scalars(runs / name, "mone/kept_ratio_layer_2")
    if name == "threshold":
        assert all(1 / 48 < v <= 0.25 for v in kept.values())
    else:
        assert all(v == pytest.approx(0.25) for v in kept.values())
    assert sorted(kept) == [1, 2]
    assert bool(scalars(runs / name, "mone/ng_loss")) == (name != "bias")


def test_recompute_changes_no_loss(runs):
    for tag in ("lm loss", "mone/ng_loss"):
        plain = scalars(runs / "plain", tag)
        assert scalars(runs / "full recompute", tag) == plain
        assert scalars(runs / "selective recompute", tag) == plain


def test_layer_frequency_names_the_layers(runs):
    def layers(name):
        return [k for k in (1, 2, 3) if scalars(runs / name, f"mone/kept_ratio_layer_{k}")]

    assert layers("plain") == [1, 2]
    assert layers("one MoNE layer of two") == layers("dense first layer") == [2]
    assert layers("multi token prediction") == [1, 2, 3]


def test_stock_checkpoints_go_both_ways(runs):
    """A stock checkpoint trains on in keep-all MoNE as in stock, and the result goes back."""
    assert scalars(runs / "stock in MoNE", "lm loss") == scalars(runs / "stock again", "lm loss")
    assert scalars(runs / "MoNE in stock", "lm loss") == scalars(runs / "MoNE again", "lm loss")
    assert scalars(runs / "MoNE again", "lm loss")[1] < scalars(runs / "stock again", "lm loss")[1]


def test_stock_script_takes_the_spec(runs, tmp_path, monkeypatch):
    """A stock script with --spec and MONE_CONFIG trains the model our entry point trains."""
    (tmp_path / "mone.yaml").write_text("mone_neuron_ratio: 0.25\nmone_ng_loss_coeff: 0.01\n")
    flags = [*TINY, *MOCK, *EP2, "--train-iters", "2"]
    words = [
        *(str(ROOT / "tests" / "integration" / "stock_pretrain_gpt.py"), *flags),
        *("--spec", "megatron_mone.layer_spec", "mone_layer_spec"),
        *("--tensorboard-dir", str(tmp_path / "tb")),
    ]
    monkeypatch.setenv("MONE_CONFIG", str(tmp_path / "mone.yaml"))
    log = tmp_path / "stock.log"
    job = forked_ranks.start(2, emulation.main, (words,), log)
    assert job.wait(timeout=600) == 0, log.read_text()[-3000:]
    for tag in ("lm loss", "mone/ng_loss"):
        assert scalars(tmp_path / "tb", tag) == scalars(runs / "plain", tag)
