"""--moe-use-upcycling is `megatron-mone convert upcycle` and a run from what it writes: the same
losses and weights to the bit, of whole copies and of slices, in every layout what it is on one
rank; and a run that is started again goes on from what it has saved."""

import json
from pathlib import Path

import pytest
import torch

from tests.training_cases import Case, _main, run_cases, scalars
from tests.unit.conversion.test_convert import TINY, VOCABULARY

pytestmark = pytest.mark.slow

EXPERTS, TOPK = 4, 2
TRAIN = (
    *("--micro-batch-size", "2", "--global-batch-size", "8", "--seq-length", "32", "--lr", "1e-3"),
    *(
        "--min-lr",
        "1e-4",
        "--lr-decay-iters",
        "20",
        "--seed",
        "1",
        "--num-workers",
        "0",
        "--train-iters",
        "3",
    ),
    *("--eval-interval", "1000", "--eval-iters", "0", "--log-interval", "1"),
    *("--tensorboard-log-interval", "1", "--ckpt-format", "torch_dist", "--mock-data"),
    *("--tokenizer-type", "NullTokenizer", "--vocab-size", str(VOCABULARY - 1)),
    *("--distributed-backend", "gloo", "--transformer-impl", "local", "--no-rope-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion", "--no-persist-layer-norm"),
    *("--no-masked-softmax-fusion", "--no-bias-dropout-fusion", "--mone-ng-loss-coeff", "0.01"),
)
KINDS = {"copies": 1, "slices": 2}
LAYOUTS = {
    "TP2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "EP2, read in parallel": ("--expert-model-parallel-size", "2", "--ckpt-fully-parallel-load"),
    "PP2": ("--pipeline-model-parallel-size", "2"),
}


def convert_and_train(todo: str, folder: str) -> None:
    """On one rank: the checkpoints, then the cases."""
    import os

    from megatron_mone.conversion import to_experts
    from megatron_mone.conversion.importing import import_model

    def quiet(*_at: object) -> None:
        pass

    here = Path(folder)
    import_model(here / "dense", here / "imported", quiet)
    for name, granularity in KINDS.items():
        to_experts.upcycle(here / "dense", here / f"made {name}", quiet, experts=EXPERTS,
                           topk=TOPK, granularity=granularity, mone="quarter")  # fmt: skip
    os.environ.setdefault("LOCAL_RANK", "0")
    _main(todo, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("upcycling")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    model.to(torch.bfloat16).save_pretrained(folder / "dense")  # a router is rounded with it

    def case(name: str, kind: str, *flags: str) -> Case:
        config = folder / f"{kind}.yaml"
        config.write_text(json.dumps({"model": str(folder / f"made {kind}" / "model.yaml")}))
        return Case(name, ("--config", str(config), *TRAIN, *flags), tensors=True)

    def upcycling(name: str, kind: str, *flags: str) -> Case:
        save = ("--save", str(folder / f"saved {name}"), "--save-interval", "3")
        granularity = ("--moe-upcycling-granularity", str(KINDS[kind]))
        load = ("--load", str(folder / "imported"), "--moe-use-upcycling")
        return case(name, kind, *load, *granularity, *save, *flags)

    one = [
        case(f"made {kind}, run", kind, "--load", str(folder / f"made {kind}"), "--finetune")
        for kind in KINDS
    ]
    one += [upcycling(kind, kind) for kind in KINDS]
    again = upcycling("slices", "slices", "--train-iters", "4")
    one.append(Case("again", again.flags))
    run_cases(one, 1, folder, convert_and_train)
    two = [upcycling(name, "slices", *flags) for name, flags in LAYOUTS.items()]
    run_cases(two, 2, folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_convert_upcycle_and_a_run_from_it(runs, kind):
    for tag in ("lm loss", "grad-norm"):
        losses = scalars(runs / kind, tag)
        assert len(losses) == 3
        assert losses == scalars(runs / f"made {kind}, run", tag)
    for file in ("gradients.pt", "parameters.pt"):
        wanted = torch.load(runs / f"made {kind}, run" / file)
        found = torch.load(runs / kind / file)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("name", LAYOUTS)
def test_it_is_the_same_in_every_layout(runs, name):
    wanted, found = (scalars(runs / which, "lm loss") for which in ("slices", name))
    assert len(found) == 3
    assert max(abs(found[step] - wanted[step]) for step in wanted) < 1e-5
    wanted, found = (torch.load(runs / which / "gradients.pt") for which in ("slices", name))
    for key, value in wanted.items():
        assert (found[key] - value).norm() <= 1e-5 * value.norm().clamp_min(1e-6), key


def test_started_again_it_goes_on(runs):
    assert list(scalars(runs / "again", "lm loss")) == [4]
    shape = json.loads((runs / "saved slices" / "mone_model.json").read_text())["shape"]
    assert (shape["num_experts"], shape["moe_ffn_hidden_size"]) == (EXPERTS, 24)
