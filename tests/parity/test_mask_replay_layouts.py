"""Masks know no layout: recorded on one rank, they replay on any, and any records the same file.

The recorded run keeps neurons by two groups; the replaying runs would choose over one group, so
that equal losses and equal masks can only come from the file.
"""

import pytest
import torch

from tests.parity.layouts import ALLGATHER, CP2, EP2, FULL_RECOMPUTE, PP2, TP2, TRAIN
from tests.training_cases import Case, run_cases, scalars

pytestmark = pytest.mark.slow

STEPS = 2
LAYOUTS = {
    "one rank": (1, ()),
    "EP2": (2, EP2),
    "EP2, allgather": (2, (*EP2, *ALLGATHER)),
    "EP2, full recompute": (2, (*EP2, *FULL_RECOMPUTE)),
    "TP2 ETP2": (2, TP2),
    "PP2": (2, PP2),
    "CP2": (2, CP2),
    "TP2 ETP2 EP2": (4, (*TP2, *EP2)),
    "TP2 ETP2 EP2, allgather": (4, (*TP2, *EP2, *ALLGATHER)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replay")
    steps = ("--mone-record-mask-steps", f"1-{STEPS}")
    load = ("--load", f"{folder}/start", "--finetune", "--train-iters", str(STEPS))

    def replay(name, flags, source):
        record = ("--mone-record-masks", f"{folder}/masks of {name}", *steps)
        return Case(name, (*TRAIN, *flags, *load, *record, "--mone-replay-masks", source))

    cases = {
        1: [
            Case(
                "start",
                (*TRAIN, "--train-iters", "1", "--save", f"{folder}/start", "--save-interval", "1"),
            ),
            Case(
                "recorded",
                (
                    *TRAIN,
                    *load,
                    "--mone-neuron-groups",
                    "2",
                    "--mone-change-choice",
                    *steps,
                    "--mone-record-masks",
                    f"{folder}/masks",
                ),
            ),
            Case("own choice", (*TRAIN, *load, *steps, "--mone-record-masks", f"{folder}/own")),
        ],
        2: [],
        4: [],
    }
    for name, (ranks, flags) in LAYOUTS.items():
        cases[ranks].append(replay(name, flags, f"{folder}/masks"))
    # and back: recorded on four ranks, replayed on one
    for ranks in (1, 2, 4):
        run_cases(cases[ranks], ranks, folder)
    run_cases([replay("back", (), f"{folder}/masks of TP2 ETP2 EP2")], 1, folder)
    return folder


def masks(folder):
    """{file: (manifest, keys, bits)}."""
    return {
        str(path.relative_to(folder)): torch.load(path, weights_only=True)
        for path in sorted(folder.glob("step-*/layer-*.pt"))
    }


@pytest.mark.parametrize("name", [*LAYOUTS, "back"])
def test_replays_the_recorded_run(runs, name):
    wanted, got = masks(runs / "masks"), masks(runs / f"masks of {name}")
    assert len(wanted) == 2 * STEPS
    assert sorted(wanted) == sorted(got)
    for file, content in wanted.items():
        assert content["manifest"] == got[file]["manifest"]
        for tensor in ("keys_P", "bits_PB"):
            assert torch.equal(content[tensor], got[file][tensor]), (file, tensor)
    for tag in ("lm loss", "mone/ng_loss", "grad-norm"):
        recorded, replayed = scalars(runs / "recorded", tag), scalars(runs / name, tag)
        assert replayed == pytest.approx(recorded, rel=1e-5), tag


def test_the_masks_matter(runs):
    """Left to itself the replaying model keeps other neurons, and has another balance loss."""
    own, recorded = (scalars(runs / name, "mone/ng_loss") for name in ("own choice", "recorded"))
    assert abs(own[1] - recorded[1]) > 1e-3 * own[1]
    for file, content in masks(runs / "masks").items():
        assert not torch.equal(content["bits_PB"], masks(runs / "own")[file]["bits_PB"])
