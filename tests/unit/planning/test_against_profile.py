"""A plan against the profile of its job: sums hold, what explains most is named, others refused."""

import json
from pathlib import Path

import pytest

from megatron_mone.commands import compare as tool
from megatron_mone.common.phases import (
    COMBINE,
    COMMUNICATION,
    DISPATCH,
    EXPOSED_COMMUNICATION,
    OPTIMIZER,
)
from megatron_mone.planning.against_profile import (
    BUBBLE,
    COMPUTE,
    DATA_PARALLEL,
    EXPERT,
    OTHERS,
    UPDATE,
    PlanAgainstProfile,
    against_profile,
)
from megatron_mone.planning.plan_document import Plan
from megatron_mone.profiling.profile_document import Profile
from tests.unit.reporting.plan_example import as_plan, example_plan
from tests.unit.reporting.profile_example import MODEL, as_profile, example_profile

RANKS = 4


def documents(pp: int = 1) -> tuple[dict, dict]:
    """A plan and a profile of one job."""
    plan, profile = example_plan(gpus=RANKS, pp=pp, vpp=1), example_profile(RANKS)
    layout = profile["config"]["layout"] | {"pp": pp, "ep": 4, "dp": 4, "edp": 1}
    profile["config"]["layout"] = layout
    for run in profile["runs"]:
        run["model"]["params_dtype"] = "torch.float32"
    plan["tokens_per_step"] = profile["config"]["tokens_per_step"]
    for model in plan["models"]:
        model["layout"] |= layout | {"micro_batches": profile["config"]["micro_batches"]}
        width = MODEL["moe_ffn_hidden_size"]
        model["shape"] = {
            "num_layers": MODEL["num_layers"], "hidden_size": MODEL["hidden_size"],
            "seq_length": MODEL["seq_length"], "num_experts": MODEL["num_experts"],
            "moe_router_topk": MODEL["moe_router_topk"], "moe_ffn_hidden_size": width,
            "neurons_per_token": width // 4 if model["name"] == "mone" else width,
            "params_dtype": "float32",
        }  # fmt: skip
    return plan, profile


@pytest.fixture
def job() -> tuple[dict, dict]:
    return documents()


def compared(job, model=None, run=None, **options) -> PlanAgainstProfile:
    options = {"allow_different": False, **options}
    return against_profile(as_plan(job[0]), as_profile(job[1]), model, run, **options)


@pytest.mark.parametrize("name", ["mone", "moe"])
def test_parts_add_up_to_the_step_and_phases_to_compute(job, name):
    found = compared(job, name)
    parts = {one.name: one for one in found.parts}
    assert list(parts) == [COMPUTE, EXPERT, BUBBLE, DATA_PARALLEL, UPDATE, OTHERS]
    for side in ("planned", "measured"):
        step = getattr(found.step_ms, side)
        assert sum(getattr(one, side) for one in found.parts) == pytest.approx(step)
        inside = sum(getattr(one, side) for one in found.phases)
        assert inside == pytest.approx(getattr(parts[COMPUTE], side))
    assert not {one.name for one in found.phases} & {*COMMUNICATION, OPTIMIZER}
    for one in (*found.parts, *found.phases, *found.memory_gib):
        assert one.difference == pytest.approx(one.measured - one.planned)
    assert found.run == name


def test_operators_beside_an_exchange_count_with_it_on_both_sides(job):
    before = {one.name: one.planned for one in compared(job).parts}
    model = job[0]["models"][0]
    moved = 5.0
    model["phases_ms"][DISPATCH] = model["phases_ms"].get(DISPATCH, 0.0) + moved
    model["parts_ms"]["compute"] += moved
    model["step_ms"] += moved
    after = {one.name: one.planned for one in compared(job).parts}
    assert after[EXPERT] - before[EXPERT] == pytest.approx(moved)
    assert after[COMPUTE] == pytest.approx(before[COMPUTE])
    measured = {one.name: one.measured for one in compared(job).parts}
    phases = job[1]["runs"][0]["phases"]
    assert measured[EXPERT] == phases[DISPATCH] + phases[COMBINE]


@pytest.mark.parametrize("pp", [1, 2])
def test_stages_that_wait_in_the_gradients_norm_are_in_the_bubble(pp):
    job = documents(pp)
    before = {one.name: one.measured for one in compared(job).parts}
    run = job[1]["runs"][0]
    norm = {"operation": "all_reduce", "bytes": 4, "phase": "clipping", "calls": 1.0, "ms": 7.0}
    run["collectives"] = [norm | {"group": "mp"}, norm | {"group": "tp"}]
    run["phases"][EXPOSED_COMMUNICATION] = run["phases"].get(EXPOSED_COMMUNICATION, 0.0) + 14.0
    after = {one.name: one.measured for one in compared(job).parts}
    waited = 7.0 if pp > 1 else 0.0
    assert after[BUBBLE] - before[BUBBLE] == pytest.approx(waited)
    assert after[OTHERS] - before[OTHERS] == pytest.approx(14.0 - waited)


def test_the_ledgers_kinds_stand_beside_the_plans(job):
    found = {one.name: one for one in compared(job).memory_gib}
    memory, planned = job[1]["runs"][0]["memory"], job[0]["models"][0]["memory_gib"]
    assert found["peak"].measured == memory["peak_bytes"] / 2**30
    for name, kinds in (("weights", ["weights"]), ("transient", ["temporaries", "communication"])):
        held = sum(memory["by_kind"].get(kind, 0) for kind in kinds)
        assert found[name].measured == held / 2**30
        assert found[name].planned == planned[name]
    unseen = sum(planned[name] for name in ("buffers", "context", "fragmentation"))
    assert found["peak"].planned == pytest.approx(planned["peak"] - unseen)
    job[1]["runs"][0]["memory"] = None
    assert compared(job).memory_gib == []


def test_what_explains_most_is_named_first(job):
    model = job[0]["models"][0]
    model["phases_ms"]["attention"] += 1e5
    model["parts_ms"]["compute"] += 1e5
    model["step_ms"] += 1e5
    first = compared(job).explained[0]
    assert first.startswith("attention: ")
    assert "less than planned" in first


# place in the plan -> (another value, the line)
OTHERS_JOBS = {
    ("models", 0, "shape", "hidden_size"): (96, "model.hidden_size is 96 in the plan and"),
    ("models", 0, "shape", "neurons_per_token"): (1, "model.neurons_per_token is 1 in the plan"),
    ("models", 0, "shape", "params_dtype"): ("float64", "model.params_dtype is 'float64' in the"),
    ("models", 0, "layout", "tp"): (2, "layout.tp is 2 in the plan and 1 in the profile"),
    ("models", 0, "layout", "micro_batches"): (9, "micro_batches is 9 in the plan and 2 in the"),
    ("tokens_per_step",): (64, "tokens_per_step is 64 in the plan and"),
    ("gpus",): (8, "ranks is 8 in the plan and 4 in the profile"),
}


@pytest.mark.parametrize("place", OTHERS_JOBS, ids=str)
def test_another_job_is_refused_by_the_field(job, place):
    value, said = OTHERS_JOBS[place]
    inside = job[0]
    for step in place[:-1]:
        inside = inside[step]
    inside[place[-1]] = value
    with pytest.raises(ValueError, match="of another job") as error:
        compared(job)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert [one.field for one in compared(job, allow_different=True).differs] == [
        said.partition(" ")[0]
    ]


def test_names_are_the_plans_and_the_profiles(job):
    assert compared(job, "moe", "grouped_mm").run == "grouped_mm"
    with pytest.raises(ValueError, match="the plan has no 'all'; it has mone, moe"):
        compared(job, "all")
    with pytest.raises(ValueError, match="the profile has no 'all'; it has mone, moe"):
        compared(job, "mone", "all")
    del job[0]["models"][0]["shape"]
    with pytest.raises(ValueError, match="plan again with this version"):
        compared(job)


@pytest.fixture
def files(job, tmp_path) -> tuple[Path, Path]:
    """Both in a folder of its own."""
    plan, profile = tmp_path / "plan", tmp_path / "profile"
    for folder, one, name in ((plan, job[0], "plan"), (profile, job[1], "profile")):
        folder.mkdir()
        (folder / f"{name}.json").write_text(json.dumps(one))
    return plan, profile


def test_the_command_tells_a_plan_by_what_the_file_says(files, capsys, tmp_path):
    plan, profile = files
    out = tmp_path / "out" / "difference.json"
    for first in (plan, plan / "plan.json", f"{plan}:mone"):
        assert tool.main([str(first), str(profile), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "planned: mone   measured: mone, real routing" in printed
    found = PlanAgainstProfile.read(out, "")
    assert f"\nexplains: {found.explained[0]}\n" in printed
    error = abs(found.step_ms.error)
    assert tool.main([str(plan), str(profile), "--threshold", str(2 * error)]) == 0
    assert tool.main([str(plan), str(profile), "--threshold", str(error / 2)]) == tool.REGRESSION
    assert "the planned step is off by" in capsys.readouterr().out
    assert Plan.SCHEMA != Profile.SCHEMA


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("{profile}", "{plan}"), "is a plan: give the plan first and then the profile of its job"),
        (("{plan}", "{plan}"), "is a plan: give the plan first and then the profile of its job"),
        (("{plan}:all", "{profile}"), "the plan has no 'all'"),
        (("{plan}:mone", "{profile}", "--run", "mone"), "--run names the run of both"),
        (("{plan}", "no"), "no: cannot be read"),
    ],
)
def test_a_mistake_is_one_line(files, capsys, words, said):
    plan, profile = files
    status = tool.main([word.format(plan=plan, profile=profile) for word in words])
    assert status == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
