"""overlap_moe_expert_parallel_comm runs a micro-batch's forward beside another's backward, from a
plan that the entry hands over: the same numbers as without, stock and MoNE."""

from pathlib import Path

import pytest
import torch

from megatron_mone.moe.masks.trace import mask_file
from tests.training_cases import MOCK, MONE, TINY, Case, recorded, run_cases

pytestmark = pytest.mark.slow

BASE = [*TINY, *MOCK, "--bf16", "--num-layers", "4", "--train-iters", "3"]
OVERLAP = "--overlap-moe-expert-parallel-comm"
EP = ["--expert-model-parallel-size", "2"]
VPP = [*EP, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
MODELS = {"stock": [], "MoNE": MONE}
LAYOUTS = {"EP 2": (2, EP), "PP 2, VPP 2, EP 2": (4, VPP)}


@pytest.fixture(scope="module", params=LAYOUTS)
def runs(request, tmp_path_factory) -> Path:
    ranks, layout = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp("overlap")
    cases = []
    for model, fields in MODELS.items():
        for name, overlap in ((model, []), (f"{model} overlapped", [OVERLAP])):
            masks = ["--mone-record-masks", f"{folder}/{name} masks"] if model == "MoNE" else []
            flags = (*BASE, *fields, *layout, *masks, *overlap)
            cases.append(Case(name, flags, tensors=True))
    run_cases(cases, ranks, folder)
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_overlap_changes_no_number(runs, model):
    """Losses, every metric of every step, the first gradients and the parameters after three."""
    plain, overlapped = (recorded(runs / name) for name in (model, f"{model} overlapped"))
    assert sorted(plain["lm loss"]) == [1, 2, 3]
    assert plain.keys() == overlapped.keys()
    for tag, steps in plain.items():
        if "time" not in tag and "tflops" not in tag:
            assert overlapped[tag] == steps, tag
    for file in ("gradients.pt", "parameters.pt"):
        whole = torch.load(runs / model / file)
        other = torch.load(runs / f"{model} overlapped" / file)
        assert len(whole) >= 10
        assert whole.keys() == other.keys()
        assert [name for name, value in whole.items() if not torch.equal(value, other[name])] == []


def test_overlap_records_the_same_masks(runs):
    for layer in (1, 2, 3, 4):
        files = [
            mask_file(runs / f"{name} masks", 1, layer) for name in ("MoNE", "MoNE overlapped")
        ]
        assert files[0].read_bytes() == files[1].read_bytes()
