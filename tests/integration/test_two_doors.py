"""One model behind two doors: our entry point, and a stock script with --spec and MONE_CONFIG."""

import dataclasses
import json
from argparse import Namespace

import pytest

from megatron_mone.config import OUR_SPEC, MoNEFields, check_doors
from megatron_mone.cpu_emulation import __main__ as emulation
from tests import forked_ranks
from tests.integration.test_training_features import FEATURES
from tests.training_cases import MOCK, MONE, ROOT, TINY, Case, recorded, run_cases

SCRIPT = ROOT / "tests" / "integration" / "stock_pretrain_gpt.py"
MTP = FEATURES["multi token prediction"]
EP2 = ["--expert-model-parallel-size", "2"]
FEATURE_FLAGS = {
    "prediction of two more tokens": [*EP2, *MTP, "--mtp-num-layers", "2"],
    "one prediction layer, used twice": [*MTP, "--mtp-num-layers", "2", "--mtp-use-repeated-layer"],
    "stages, the last without a decoder layer": [
        *("--pipeline-model-parallel-size", "2", "--pipeline-model-parallel-layout", "Ett|mL"),
        *MTP,
    ],
    "latent attention": [*EP2, *MTP, *FEATURES["multi latent attention"], "--log-interval", "2"],
}  # fmt: skip
# Megatron keeps what it logs of multi-token prediction over the runs of one process.
COMPARED = ("mone/", "lm loss", "load_balancing", "grad-norm")


@pytest.fixture(scope="module")
def doors(tmp_path_factory):
    """Two folders of runs: by our entry and by the stock script."""
    folder = tmp_path_factory.mktemp("doors")
    train = [*TINY, *MOCK, "--train-iters", "2"]
    ours = [Case(name, (*train, *MONE, *flags)) for name, flags in FEATURE_FLAGS.items()]
    run_cases(ours, 2, folder / "ours")
    fields = folder / "mone.yaml"
    fields.write_text("mone_neuron_ratio: 0.25\nmone_ng_loss_coeff: 1e-2\n")
    todo, log = folder / "todo.json", folder / "stock.log"
    todo.write_text(json.dumps([
        [name, [str(SCRIPT), *train, *flags, "--spec", *OUR_SPEC,
                "--tensorboard-dir", f"{folder}/stock/{name}"]]
        for name, flags in FEATURE_FLAGS.items()
    ]))  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MONE_CONFIG", str(fields))
        for name, arguments in json.loads(todo.read_text()):
            job = forked_ranks.start(2, emulation.main, (arguments,), log)
            assert job.wait(timeout=600) == 0, f"{name}: {log.read_text()[-3000:]}"
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", FEATURE_FLAGS)
def test_both_doors_build_and_log_one_model(doors, name):
    ours, stock = (recorded(doors / door / name) for door in ("ours", "stock"))
    layers = [tag for tag in ours if tag.startswith("mone/kept_ratio_layer_")]
    assert len(layers) == (4 if "two more" in name else 3)
    tags = [tag for tag in ours if tag.startswith(COMPARED) and "tflops" not in tag]
    assert len(tags) > 20
    assert {tag: ours[tag] for tag in tags} == {tag: stock.get(tag) for tag in tags}
    assert "mone/executed_tflops_per_rank" in stock


def fields(**given):
    defaults = {f.name: f.default for f in dataclasses.fields(MoNEFields)}
    return Namespace(**{"spec": None, **defaults, **given})


def test_fields_that_nobody_would_read_are_refused(monkeypatch):
    monkeypatch.delenv("MONE_CONFIG", raising=False)
    check_doors(fields())
    check_doors(fields(mone_neuron_ratio=0.25, mone_ng_loss_coeff=0.1))
    check_doors(fields(mone_neuron_ratio=0.25, spec=OUR_SPEC))
    for given, part in [
        (dict(mone_ng_loss_coeff=0.1), "mone_ng_loss_coeff = 0.1 has no effect: neither"),
        (dict(mone_replay_masks="masks"), "mone_replay_masks = 'masks' has no effect"),
        (dict(mone_layer_freq=[0, 1]), r"mone_layer_freq = \[0, 1\] has no effect"),
        (dict(mone_neuron_ratio=0.25, spec=["my.specs", "spec"]), "spec = 'my.specs spec' builds"),
    ]:
        with pytest.raises(ValueError, match=part):
            check_doors(fields(**given))
    monkeypatch.setenv("MONE_CONFIG", "mone.yaml")
    check_doors(fields(spec=OUR_SPEC))
    for given in ({}, dict(mone_neuron_ratio=0.25), dict(mone_neuron_ratio=0.25, spec=OUR_SPEC)):
        with pytest.raises(ValueError, match="is not read here, where mone_"):
            check_doors(fields(**given))
