"""overlap_moe_expert_parallel_comm runs a micro-batch's forward beside another's backward, from a
plan that the entry hands over; delay_wgrad_compute and overlap_dispatch_backward_with_experts_wgrad
make weight gradients later: the same numbers as without, to the bit, stock and MoNE."""

from functools import cache
from pathlib import Path

import pytest
import torch

from megatron_mone.moe.masks.trace import mask_file
from megatron_mone.profiling.rank_record import read_record
from tests.training_cases import MOCK, MONE, TINY, Case, recorded, run_cases

pytestmark = pytest.mark.slow

BASE = [*TINY, *MOCK, "--bf16", "--num-layers", "4", "--train-iters", "3"]
OVERLAP = ["--overlap-moe-expert-parallel-comm"]
DELAY = [*OVERLAP, "--delay-wgrad-compute"]
EARLY = ["--ep-overlap-early-attn-memory-release", "--high-priority-a2a-comm-stream"]
BESIDE_DISPATCH = ["--overlap-dispatch-backward-with-experts-wgrad"]
EP = ["--expert-model-parallel-size", "2"]
VPP = [*EP, "--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "1"]
# Beside the experts: what else has gradients of its own, or waits for theirs.
MORE = [
    *MONE, "--moe-shared-expert-intermediate-size", "32",
    "--use-distributed-optimizer", "--overlap-grad-reduce", "--mone-ng-loss-scope", "global_batch",
    "--recompute-granularity", "selective", "--recompute-modules", "shared_experts",
]  # fmt: skip
RECOMPUTED = [
    *MONE, "--moe-shared-expert-intermediate-size", "32", "--moe-shared-expert-overlap",
    "--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers",
    "1",
]  # fmt: skip
# Model -> its flags, and its schedules.
MODELS = {
    "stock": ([], {"delayed": DELAY, "beside dispatch": BESIDE_DISPATCH}),
    "MoNE": (MONE, {"overlapped": OVERLAP, "delayed": DELAY, "beside dispatch": BESIDE_DISPATCH}),
    "MoNE in the reference": (
        [*MONE, "--mone-backend", "reference"],
        {"delayed": DELAY, "beside dispatch": BESIDE_DISPATCH},
    ),
    "MoNE and more": (MORE, {"delayed": [*DELAY, *EARLY], "beside dispatch": BESIDE_DISPATCH}),
    "MoNE recomputed": (RECOMPUTED, {"beside dispatch": BESIDE_DISPATCH}),
}
MTP = ["--mtp-num-layers", "1"]
WITH_MTP = {"stock with MTP": MTP, "MoNE with MTP": [*MONE, *MTP]}
# Layout -> ranks, flags, models.
LAYOUTS = {
    "EP 2": (2, EP, [*MODELS]),
    "PP 2, VPP 2, EP 2": (4, VPP, ["MoNE", "MoNE and more"]),
}
RUNS = [
    (layout, model, schedule)
    for layout, (_, _, models) in LAYOUTS.items()
    for model in models
    for schedule in MODELS[model][1]
]


@pytest.fixture(scope="module")
def runs_in(tmp_path_factory):
    """Layout -> folder of its runs, made when it is first asked for."""
    return cache(lambda layout: trained(tmp_path_factory.mktemp("overlap"), *LAYOUTS[layout]))


def trained(folder: Path, ranks: int, layout: list[str], models: list[str]) -> Path:
    of_models = {model: MODELS[model] for model in models}
    of_models |= {model: (flags, {"delayed": DELAY}) for model, flags in WITH_MTP.items()}
    cases = []
    for model, (fields, schedules) in of_models.items():
        for name, flags in ((model, []), *((f"{model} {s}", f) for s, f in schedules.items())):
            watched = []
            if model == "MoNE":
                watched += ["--mone-record-masks", f"{folder}/{name} masks"]
                watched += ["--mone-profile-steps", "2:2"]
                watched += ["--mone-profile-dir", f"{folder}/{name} profile"]
            cases.append(Case(name, (*BASE, *fields, *layout, *watched, *flags), tensors=True))
    run_cases(cases, ranks, folder)
    return folder


@pytest.mark.parametrize(("layout", "model", "schedule"), RUNS)
def test_a_schedule_changes_no_number(runs_in, layout, model, schedule):
    """Losses, every metric of every step, the first gradients and the parameters after three."""
    runs = runs_in(layout)
    plain, other = (recorded(runs / name) for name in (model, f"{model} {schedule}"))
    assert sorted(plain["lm loss"]) == [1, 2, 3]
    assert plain.keys() == other.keys()
    for tag, steps in plain.items():
        if "time" not in tag and "tflops" not in tag:
            assert other[tag] == steps, tag
    for file in ("gradients.pt", "parameters.pt"):
        assert differing(runs, file, model, f"{model} {schedule}") == {}


def differing(runs, file, first, second) -> dict[str, float]:
    """{tensor: largest difference over its largest entry} of those that are not the same bits."""
    whole, again = (torch.load(runs / name / file) for name in (first, second))
    assert len(whole) >= 10
    assert whole.keys() == again.keys()
    return {
        name: float((again[name] - value).abs().max() / value.abs().max())
        for name, value in whole.items()
        if not torch.equal(value, again[name])
    }


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", WITH_MTP)
def test_multi_token_prediction_is_in_the_schedule(runs_in, layout, model):
    """The same bits but for the embedding, where one rank has both its uses: Megatron's schedule
    adds their gradients up one after the other in float32, autograd in bf16 before."""
    runs = runs_in(layout)
    plain, other = (recorded(runs / name) for name in (model, f"{model} delayed"))
    for tag in ("lm loss", "mtp_1 loss"):
        assert plain[tag][1] == other[tag][1]
    found = differing(runs, "gradients.pt", model, f"{model} delayed")
    assert set(found) <= {"embedding.word_embeddings.weight"}
    assert all(error < 2**-7 for error in found.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_records_the_same_masks(runs_in, layout):
    runs = runs_in(layout)
    for layer in (1, 2, 3, 4):
        files = [
            mask_file(runs / f"{name} masks", 1, layer)
            for name in ("MoNE", "MoNE overlapped", "MoNE delayed")
        ]
        assert files[0].read_bytes() == files[1].read_bytes() == files[2].read_bytes()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("schedule", MODELS["MoNE"][1])
def test_a_profile_reads_the_same_work(runs_in, layout, schedule):
    """Phases and passes, rows, and what is sent over every group, of each rank."""
    runs = runs_in(layout)
    plain, other = (profiled(runs / f"{name} profile") for name in ("MoNE", f"MoNE {schedule}"))
    assert len(plain) == len(other) > 1
    for first, then in zip(plain, other, strict=True):
        assert {p: set(ran) for p, ran in then.phases.items()} == {
            p: set(ran) for p, ran in first.phases.items()
        }
        assert then.rows == first.rows
        assert sent(then) == sent(first)
        total = sum(ms for passes in then.phases.values() for (ms,) in passes.values())
        assert total == pytest.approx(then.step_ms[0], abs=0.01)


def profiled(folder: Path):
    """The run of each rank's record."""
    return [read_record(path).runs[0] for path in sorted(folder.glob("ranks/*.json"))]


def sent(run):
    return {kind: (traffic.calls, traffic.bytes) for kind, traffic in run.communication.items()}
