"""Checkpoints of Megatron FSDP with MoNE: a run goes on from one as if it had never stopped, on its
own ranks to the bit, on others within rounding; stock Megatron stops at it."""

import re
from pathlib import Path
from typing import Any

import pytest

from megatron_mone.checkpoint.choice import check_stored_choice, saved_choice
from megatron_mone.checkpoint.safe_metadata import read_metadata
from megatron_mone.config import OUR_SPEC
from megatron_mone.cpu_emulation import __main__ as emulation
from tests import forked_ranks, training_cases
from tests.integration.test_stock_reader import SCRIPT
from tests.parity.layouts import EP2, TP2, TRAIN
from tests.parity.test_sharded_weights import MEGATRON, STOCK, STRATEGY, TWO_INSTANCES, WHOLE
from tests.training_cases import MOCK, MONE, TINY, Case, run_cases, scalars

pytestmark = pytest.mark.slow

SAVED, STEPS = 2, 4
TAGS = ("lm loss", "mone/ng_loss", "grad-norm")
BIAS = ("--mone-ng-loss-type", "bias")
SHARED = ("--moe-shared-expert-intermediate-size", "32", "--moe-layer-freq", "[0,1]")
# Ranks and words; where one goes on with another's checkpoint they are the same model.
RUNS = {
    "DP2": (2, (*TRAIN, *WHOLE)),
    "EP2 of 4": (4, (*TRAIN, *WHOLE, *EP2)),
    "two instances": (4, (*TRAIN, *WHOLE, *TWO_INSTANCES)),
    "bf16": (2, (*TRAIN, *WHOLE, "--bf16")),
    "TP2": (2, (*TRAIN, *WHOLE, *TP2)),
    "bf16, TP2, bias": (4, (*TRAIN, *WHOLE, *TP2, *BIAS, "--bf16")),
    "optim, shared experts": (2, (*TRAIN, *MEGATRON, STRATEGY, "optim", *SHARED)),
    "optim_grads": (2, (*TRAIN, *MEGATRON, STRATEGY, "optim_grads")),
    "stock": (2, (*STOCK, *WHOLE, "--bf16")),
}
RESHARDED = [("DP2", "EP2 of 4"), ("EP2 of 4", "DP2"), ("EP2 of 4", "two instances"),
             ("optim_grads", "TP2"), ("TP2", "DP2")]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded-checkpoints")

    def case(name: str, words: tuple[str, ...], *more: str) -> Case:
        return Case(name, (*words, "--train-iters", str(STEPS), *more))

    def load(name: str) -> tuple[str, ...]:
        return ("--load", f"{folder}/{name} saved", "--ckpt-step", str(SAVED))

    saving: dict[int, list[Case]] = {2: [], 4: []}
    loading: dict[int, list[Case]] = {2: [], 4: []}
    for name, (ranks, words) in RUNS.items():
        save = ("--save", f"{folder}/{name} saved", "--save-interval", str(SAVED))
        saving[ranks].append(case(name, words, *save))
        saving[ranks].append(case(f"{name} to {name}", words, *load(name)))
    for a, b in RESHARDED:
        loading[RUNS[b][0]].append(case(f"{a} to {b}", RUNS[b][1], *load(a)))
    for cases in (saving, loading):
        for ranks in cases:
            run_cases(cases[ranks], ranks, folder, saving_once)
    return folder


def saving_once(todo: str, folder: str) -> None:
    """Cases that do not save at their end, which nothing goes on from."""
    from megatron.training import training

    save = training.save_checkpoint_and_time

    def saved(iteration: int, *given: Any, **named: Any) -> None:
        if iteration == SAVED:
            save(iteration, *given, **named)

    training.save_checkpoint_and_time = saved
    training_cases._main(todo, folder)


@pytest.mark.parametrize("name", RUNS)
def test_goes_on_as_if_never_stopped(runs, name):
    for tag in TAGS if BIAS[0] not in RUNS[name][1] and name != "stock" else TAGS[::2]:
        whole, got = scalars(runs / name, tag), scalars(runs / f"{name} to {name}", tag)
        assert sorted(got) == list(range(SAVED + 1, STEPS + 1))
        assert got == {step: whole[step] for step in got}, tag


@pytest.mark.parametrize(("saved", "loaded"), RESHARDED)
def test_goes_on_in_another_layout(runs, saved, loaded):
    for tag in TAGS:
        whole, got = scalars(runs / saved, tag), scalars(runs / f"{saved} to {loaded}", tag)
        assert sorted(got) == list(range(SAVED + 1, STEPS + 1))
        assert got == pytest.approx({step: whole[step] for step in got}, rel=1e-5), tag


def test_what_is_held(runs):
    """Each expert by itself, whatever ranks saved it: one of four, of 48 neurons and a hidden size
    of 32, with its moments; no stock key has a stock expert's size."""
    held = [read_metadata(folder_of(runs, n)).state_dict_metadata for n in ("DP2", "EP2 of 4")]
    stops = [
        {k for k in one if re.search(r"experts\.(local_experts|linear_fc\d\.weight\d)", k)}
        for one in held
    ]
    assert [len(one) for one in stops] == [2 * 2, 2 * 2 * 2]  # layers, names, EP ranks
    assert all(entries[key].size.numel() == 0 for entries, one in zip(held, stops, strict=True)
               for key in one)  # fmt: skip
    assert held[0].keys() - stops[0] == held[1].keys() - stops[1]
    ours = {k: v for k, v in held[0].items() if "mone_linear_fc" in k and "step" not in k}
    sizes = {key: tuple(entry.size) for key, entry in ours.items() if hasattr(entry, "size")}
    assert set(sizes.values()) == {(48, 32)}
    assert len(sizes) == 2 * 4 * 3 * 3  # layers, experts, matrices, weight and two moments
    choices = [saved_choice(folder_of(runs, name)) for name in ("DP2", "EP2 of 4", "stock")]
    assert choices[0] == choices[1]
    assert choices[0]["mone_neurons_per_token"] == 12
    assert choices[2] is None


def folder_of(runs: Path, name: str) -> Path:
    return runs / f"{name} saved" / f"iter_{SAVED:07d}"


def script_load(runs: Path, name: str, log: Path, *flags: str) -> int:
    """Exit status of a script that knows nothing of ours and goes on with another's weights, in
    bf16: Megatron 0.19 reads no gated weights in fp32."""
    words = [str(SCRIPT), *TINY, *MOCK, *WHOLE, "--bf16", "--train-iters", str(STEPS)]
    words += ["--load", f"{runs}/{name} saved", "--ckpt-step", str(SAVED), *flags]
    return forked_ranks.start(1, emulation.main, (words,), log).wait(timeout=300)


@pytest.mark.parametrize("flags", [(), ("--no-strict-fsdp-dtensor-load",)])
def test_stock_megatron_stops(runs, tmp_path, flags):
    """Where its load passes over what is not there, too: it stops at a size."""
    assert script_load(runs, "bf16", tmp_path / "log", *flags) != 0
    said = (tmp_path / "log").read_text()
    stop = r"Size mismatch .*linear_fc1\.weight_w" if flags else r"Missing key .*linear_fc2\.weight"
    assert re.search(stop, said), said[-2000:]
    assert "iteration        3/" not in said


def test_stock_megatron_reads_its_own(runs, tmp_path):
    assert script_load(runs, "stock", tmp_path / "log") == 0, (tmp_path / "log").read_text()[-2000:]


@pytest.mark.parametrize(
    ("ratio", "saved", "says"),
    [
        ("0.25", "bf16", None),
        ("0.5", "bf16", "mone_neurons_per_token = 12, this run has"),
        ("0.25", "stock", "holds no experts that choose neurons"),
    ],
)
def test_stock_script_with_our_spec(runs, tmp_path, monkeypatch, ratio, saved, says):
    """Reads it, where it has the same choice."""
    fields = tmp_path / "mone.yaml"
    fields.write_text(f"mone_neuron_ratio: {ratio}\n")
    monkeypatch.setenv("MONE_CONFIG", str(fields))
    status = script_load(runs, saved, tmp_path / "log", "--spec", *OUR_SPEC)
    said = (tmp_path / "log").read_text()
    assert (status == 0) == (says is None), said[-2000:]
    assert says is None or says in said


@pytest.mark.parametrize(
    ("saved", "flags", "line"),
    [
        ("DP2", [*MONE, "--mone-neuron-ratio", "0.5"], "trained with mone_neurons_per_token = 12"),
        ("DP2", [], r"this run has no mone_\* field and would keep every one"),
        ("stock", MONE, "holds no experts that choose neurons, and in fsdp_dtensor"),
    ],
)
def test_ours_stops_before_a_model_is_built(runs, saved, flags, line):
    from megatron_mone.model.arguments import parse_given

    args = parse_given([*TINY, *MOCK, *WHOLE, "--train-iters", "1", *flags])
    with pytest.raises(ValueError, match=line):
        check_stored_choice(folder_of(runs, saved), args)
