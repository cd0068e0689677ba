"""Pipeline stages of any make: written out as a layout, uneven, or counting embedding and loss.

One rank and every split give the same numbers, keep-all MoNE those of stock.
"""

from argparse import Namespace

import pytest

from megatron_mone.model.checks import layout
from tests.parity.conftest import note
from tests.parity.layouts import KEEP_ALL, PLAIN, PP2, STOCK, TRAIN
from tests.parity.test_training_layouts import LOSSES, TOLERANCE, worst_error, worst_tensor_error
from tests.training_cases import Case, recorded, run_cases, scalars

pytestmark = pytest.mark.slow

FOUR, THREE = ("--num-layers", "4"), ("--num-layers", "3")
MTP = (*FOUR, "--mtp-num-layers", "1")
LAYOUT = "--pipeline-model-parallel-layout"
EMBEDDING = "--account-for-embedding-in-pipeline-split"
LOSS = "--account-for-loss-in-pipeline-split"
SPLITS = {
    "PP2, layout of 3 and 1 layers": (FOUR, (LAYOUT, "Et*3|tL")),
    "PP2 VPP2, layout of 0, 3, 1 and 0": (FOUR, (LAYOUT, "E|t*3|t|L")),
    "PP2 VPP2, layout with MTP": (MTP, (LAYOUT, "Ett|t|t|mL")),
    "PP2, first stage of 1 layer": (FOUR, ("--decoder-first-pipeline-num-layers", "1")),
    "PP2, last stage of 1 layer": (FOUR, ("--decoder-last-pipeline-num-layers", "1")),
    "PP2, embedding as a layer": (THREE, (EMBEDDING,)),
    "PP2, loss as a layer": (THREE, (LOSS,)),
    "PP2, both as layers": (FOUR, (EMBEDDING, LOSS)),
}
AS_STOCK = "PP2 VPP2, layout of 0, 3, 1 and 0"


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")

    def case(name, base, model, *flags):
        load = ("--load", f"{folder}/start {model[1:]}", "--finetune", "--train-iters", "3")
        return Case(name, (*base, *model, *flags, *load), tensors=True)

    one = []
    for model in dict.fromkeys(model for model, _ in SPLITS.values()):
        save = ("--train-iters", "1", "--save", f"{folder}/start {model[1:]}", "--save-interval")
        start = (*TRAIN, *model, *save, "1", PLAIN)
        one += [Case(f"start run {model[1:]}", start), case(f"one rank {model[1:]}", TRAIN, model)]
    run_cases(one, 1, folder)
    two = [case(name, TRAIN, model, *PP2, *flags) for name, (model, flags) in SPLITS.items()]
    model, flags = SPLITS[AS_STOCK]
    for name, base in (("stock", STOCK), ("keep-all", KEEP_ALL)):
        two.append(case(name, base, model, *PP2, *flags))
    run_cases(two, 2, folder)
    return folder


@pytest.mark.parametrize("name", SPLITS)
def test_same_numbers_as_one_rank(runs, name):
    one = runs / f"one rank {SPLITS[name][0][1:]}"
    wanted, got = recorded(one), recorded(runs / name)
    assert len(wanted["lm loss"]) == 3
    metrics = [tag for tag in wanted if tag.startswith("mone/") and "tflops" not in tag]
    errors = {
        "loss": max(worst_error(wanted[tag], got[tag]) for tag in LOSSES),
        "metrics": max(worst_error(wanted[tag], got[tag]) for tag in metrics),
    }
    for column in ("gradients", "parameters"):
        errors[column] = worst_tensor_error(one / f"{column}.pt", runs / name / f"{column}.pt")
    for column, error in errors.items():
        note(name, column, error)
    assert max(errors.values()) <= TOLERANCE, errors


def test_keep_all_is_stock(runs):
    assert len(scalars(runs / "stock", "lm loss")) == 3
    assert scalars(runs / "keep-all", "lm loss") == scalars(runs / "stock", "lm loss")
    for file in ("gradients.pt", "parameters.pt"):
        assert worst_tensor_error(runs / "stock" / file, runs / "keep-all" / file) == 0.0
    note(AS_STOCK, "keep-all = stock", 0.0)


def test_prediction_beside_the_embedding_is_refused():
    """Where Megatron waits for ever: two copies of the embedding on one rank."""
    args = Namespace(
        pipeline_model_parallel_layout="Ettt|t|m|L", pipeline_model_parallel_size=2,
        hybrid_layer_pattern=None,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"pipeline_model_parallel_layout = 'Ettt.* puts m"):
        layout._check_stages(args)
    args.pipeline_model_parallel_layout = "Ett|t|t|mL"
    layout._check_stages(args)
