"""A checkpoint goes on with the rows of its embedding in every layout, MoNE or stock.

Megatron pads the vocabulary by a multiple that holds TP: 257 words make 384 rows on one rank and
512 at TP 2, and all rows take part in the softmax.
"""

from pathlib import Path

import pytest

from tests import forked_ranks
from tests.parity.layouts import TP2
from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

SAVED, STEPS = 2, 4
BASE = (*TINY, *MOCK[:3], "--vocab-size", "257", "--adam-eps", "1e-3", "--global-batch-size", "4")
MODELS = {"MoNE": (*BASE, *MONE), "stock": BASE}
LAYOUTS = {"one rank": (1, ()), "TP2": (2, TP2)}
PAIRS = [("one rank", "TP2"), ("TP2", "one rank")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")

    def case(name, model, layout, *flags):
        return Case(f"{model}: {name}", (*MODELS[model], *LAYOUTS[layout][1], *flags))

    whole = ("--train-iters", str(STEPS), "--save-interval", str(SAVED))
    begin = {
        ranks: [
            case(name, model, name, *whole, "--save", f"{folder}/{model} in {name}")
            for model in MODELS
            for name, (size, _) in LAYOUTS.items()
            if size == ranks
        ]
        for ranks in (1, 2)
    }
    go_on = {
        LAYOUTS[b][0]: [
            case(f"{a} to {b}", model, b, "--load", f"{folder}/{model} in {a}",
                 "--ckpt-step", str(SAVED), "--train-iters", str(STEPS))
            for model in MODELS
        ]
        for a, b in PAIRS
    }  # fmt: skip
    for cases in (begin, go_on):
        for ranks, of_rank_count in cases.items():
            run_cases(of_rank_count, ranks, folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(("saved_by", "loaded_by"), PAIRS)
def test_loss_goes_on_as_in_the_layout_it_came_from(runs, model, saved_by, loaded_by):
    for tag in ("lm loss", "grad-norm"):
        whole = scalars(runs / f"{model}: {saved_by}", tag)
        got = scalars(runs / f"{model}: {saved_by} to {loaded_by}", tag)
        wanted = {step: whole[step] for step in range(SAVED + 1, STEPS + 1)}
        assert got == pytest.approx(wanted, rel=1e-5), tag


def write_planned_rows(flags, path):
    from megatron_mone.planning.tracing.gpu_job import parse_gpu_job

    args, model = parse_gpu_job(flags, world_size=2, rank=0)
    assert args.padded_vocab_size == model.vocab_size
    assert not model.should_pad_vocab
    Path(path).write_text(str(model.vocab_size))


@pytest.mark.parametrize("saved_by", [None, "one rank"])
def test_the_planner_plans_the_rows_that_the_run_would_have(runs, tmp_path, saved_by):
    load = ("--load", f"{runs}/MoNE in {saved_by}") if saved_by else ()
    flags = (*MODELS["MoNE"], *TP2, *load, "--train-iters", "9")
    log, path = tmp_path / "log", tmp_path / "rows"
    job = forked_ranks.start(1, write_planned_rows, (flags, str(path)), log)
    assert job.wait(timeout=300) == 0, log.read_text()
    assert path.read_text() == ("384" if saved_by else "512")


def test_fresh_models_of_the_two_layouts_have_other_rows(runs):
    """Else nothing was tested: with random logits the loss is near the log of the rows."""
    one, two = (scalars(runs / f"MoNE: {name}", "lm loss")[1] for name in LAYOUTS)
    assert two - one == pytest.approx(0.288, abs=0.1)  # log(512 / 384)
