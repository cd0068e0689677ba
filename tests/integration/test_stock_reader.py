"""Stock Megatron stops at a MoNE checkpoint instead of reading it as a model that keeps all.

`tests/integration/stock_pretrain_gpt.py` is a script that knows nothing of ours; its load is the
one that Megatron's own script, lm-eval's Megatron backend and Megatron-Bridge use, under each
--dist-ckpt-strictness that does not ask for mismatches to be overlooked.
"""

from pathlib import Path

import pytest

from megatron_mone.checkpoint.choice import check_stored_choice, saved_choice
from megatron_mone.config import OUR_SPEC
from megatron_mone.cpu_emulation import __main__ as emulation
from tests import forked_ranks
from tests.parity.layouts import EP2
from tests.training_cases import MOCK, MONE, ROOT, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

SCRIPT = ROOT / "tests" / "integration" / "stock_pretrain_gpt.py"
SAVED, STEPS = 2, 4
TRAIN = (*TINY, *MOCK, "--train-iters", str(STEPS), "--use-distributed-optimizer",
         "--dist-ckpt-optim-fully-reshardable")  # fmt: skip
KINDS = {
    "quarter": MONE,
    "plain": [*MONE, "--mone-plain-checkpoint"],
    "mixed": [*MONE, "--mone-layer-freq", "[0,1]", "--mone-ng-loss-type", "bias"],
    "stock": [],
}
GO_ON = [(name, name) for name in KINDS] + [("plain", "quarter"), ("stock", "quarter")]
OTHER = (*MONE, "--mone-neuron-ratio", "0.5", "--mone-change-choice")
"""Words of a run, and whose checkpoint it goes on with under another choice."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock-reader")

    def save(name: str) -> tuple[str, ...]:
        return ("--save", f"{folder}/{name} saved", "--save-interval", str(SAVED))

    def load(name: str) -> tuple[str, ...]:
        return ("--load", f"{folder}/{name} saved", "--ckpt-step", str(SAVED))

    cases = [Case(name, (*TRAIN, *EP2, *flags, *save(name))) for name, flags in KINDS.items()]
    cases += [Case(f"{a} to {b}", (*TRAIN, *EP2, *KINDS[b], *load(a))) for a, b in GO_ON]
    legacy = (*TINY, *MOCK, "--train-iters", str(STEPS), "--ckpt-format", "torch", *MONE)
    plain = ("--mone-plain-checkpoint",)
    cases += [Case("legacy", (*legacy, *save("legacy"))),
              Case("legacy to legacy", (*legacy, *load("legacy"))),
              Case("legacy plain", (*legacy, *plain, *save("legacy plain")))]  # fmt: skip
    cases += [Case(f"{name} to half", (*TRAIN, *EP2, *OTHER, *load(name)))
              for name in ("quarter", "mixed")]  # fmt: skip
    run_cases(cases, 2, folder)
    return folder


@pytest.mark.parametrize(("saved", "loaded"), GO_ON)
def test_goes_on_from_either_form(runs, saved, loaded):
    """Weights and optimizer state, to the bit where the model is the same."""
    got = scalars(runs / f"{saved} to {loaded}", "lm loss")
    assert sorted(got) == list(range(SAVED + 1, STEPS + 1))
    if saved != "stock" or loaded == "stock":
        assert got == {step: scalars(runs / loaded, "lm loss")[step] for step in got}


@pytest.mark.parametrize("saved", ["quarter", "mixed"])
def test_goes_on_under_another_choice_where_told_to(runs, saved):
    """Whichever layers chose before."""
    got, before = (scalars(runs / n, "lm loss") for n in (f"{saved} to half", saved))
    assert sorted(got) == list(range(SAVED + 1, STEPS + 1))
    for step, loss in got.items():
        assert loss == pytest.approx(before[step], rel=0.02)
        assert loss != before[step]


def test_the_older_format_goes_on(runs):
    got = scalars(runs / "legacy to legacy", "lm loss")
    assert got == {step: scalars(runs / "legacy", "lm loss")[step] for step in got}
    assert sorted(got) == list(range(SAVED + 1, STEPS + 1))


def test_stock_megatron_stops_at_the_older_format(runs, tmp_path):
    """Whose load is tried again where names are missing: only a wrong size stops that."""
    older = ("--ckpt-format", "torch")
    for name, stops in (("legacy", True), ("legacy plain", False)):
        status = stock_load(runs, name, tmp_path / "log", *older)
        said = (tmp_path / "log").read_text()
        assert (status != 0) == stops, said[-2000:]
        assert ("size mismatch for decoder.layers.0.mlp.experts.local_experts.0" in said) == stops


def test_what_is_held(runs):
    from megatron_mone.checkpoint.safe_metadata import read_metadata

    keys = {n: set(read_metadata(folder_of(runs, n)).state_dict_metadata) for n in KINDS}
    assert keys["plain"] == keys["stock"]
    weights = {key for key in keys["stock"] if "experts.linear_fc" in key}
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in weights)
    assert not weights & keys["quarter"]
    assert keys["stock"] - weights < keys["quarter"]
    choices = {n: saved_choice(folder_of(runs, n)) for n in KINDS}
    assert choices["plain"] is choices["stock"] is None
    assert (
        choices["quarter"] | {"mone_ng_loss_type": "bias", "mone_layer_freq": [0, 1]}
        == (choices["mixed"])
    )


def folder_of(runs: Path, name: str) -> Path:
    return runs / f"{name} saved" / f"iter_{SAVED:07d}"


def stock_load(runs: Path, name: str, log: Path, *flags: str) -> int:
    """The script's exit status; it goes on for a step with another's weights."""
    words = [str(SCRIPT), *TINY, *MOCK, "--train-iters", "1", "--finetune"]
    words += ["--load", f"{runs}/{name} saved", "--exit-on-missing-checkpoint", *flags]
    return forked_ranks.start(1, emulation.main, (words,), log).wait(timeout=300)


@pytest.mark.parametrize("strictness", [None, "raise_unexpected", "raise_all"])
@pytest.mark.parametrize("name", ["quarter", "mixed"])
def test_stock_megatron_stops(runs, tmp_path, name, strictness):
    """By default too, at the first key of the experts that it does not find."""
    flags = [] if strictness is None else ["--dist-ckpt-strictness", strictness]
    assert stock_load(runs, name, tmp_path / "log", *flags) != 0
    said = (tmp_path / "log").read_text()
    assert "experts.experts.linear_fc" in said, said[-2000:]
    assert ("from model not in state dict" if strictness is None else "Unexpected keys") in said
    assert "iteration        1/" not in said


def test_stock_megatron_reads_the_plain_form(runs, tmp_path):
    assert stock_load(runs, "plain", tmp_path / "log") == 0, (tmp_path / "log").read_text()[-2000:]


@pytest.mark.parametrize("ratio", ["0.25", "0.5"])
def test_stock_script_with_our_spec(runs, tmp_path, monkeypatch, ratio):
    """Reads it, where it has the same choice."""
    fields = tmp_path / "mone.yaml"
    fields.write_text(f"mone_neuron_ratio: {ratio}\n")
    monkeypatch.setenv("MONE_CONFIG", str(fields))
    status = stock_load(runs, "quarter", tmp_path / "log", "--spec", *OUR_SPEC)
    said = (tmp_path / "log").read_text()
    assert (status == 0) == (ratio == "0.25"), said[-2000:]
    assert ("mone_neurons_per_token = 12, this run has" in said) == (ratio != "0.25")


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([*MONE, "--mone-neuron-ratio", "0.5"], "trained with mone_neurons_per_token = 12, this "),
        ([*MONE, "--mone-layer-freq", "2"], r"mone_layer_freq = \[1, 1\], this run has"),
        ([], r"this run has no mone_\* field and would keep every one"),
    ],
)
def test_ours_stops_before_a_model_is_built(runs, flags, line):
    """One line; of a plain checkpoint nothing is known."""
    from megatron_mone.model.arguments import parse_given

    args = parse_given([*TINY, *MOCK, "--train-iters", "1", *flags])
    with pytest.raises(ValueError, match=line):
        check_stored_choice(folder_of(runs, "quarter"), args)
    check_stored_choice(folder_of(runs, "plain"), args)
