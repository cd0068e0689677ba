"""The table of engines: a row a cell, and of what is refused a reason with all of its places."""

from types import SimpleNamespace

from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.zero_table import ENGINES, EXPERT_PARALLEL, zero_table
from tests.unit.planning.made_jobs import CLUSTER, EXACT, TRACES, facts

JOB = JobSpec(
    "paper", {"num_experts": 8}, {"expert_model_parallel_size": 8},
    {"use_distributed_optimizer": True, "overlap_grad_reduce": True}, {},
)  # fmt: skip
REASON = "ZeRO 3 does not go with EP"


def planner(asked):
    """Plans what it is asked for as TRACES, and refuses ZeRO 3 with expert parallelism."""

    def plan(job, gpus):
        values = job.values()
        asked.append(values)
        if values.get("zero_stage") == 3 and values["expert_model_parallel_size"] > 1:
            raise ValueError(REASON)
        return SimpleNamespace(prediction=predict(TRACES, facts(), CLUSTER, EXACT))

    return SimpleNamespace(plan=plan)


def test_every_engine_and_size_is_a_row_or_a_reason():
    asked = []
    lines = zero_table(planner(asked), JOB, 16, lambda *told: None).splitlines()
    rows = [line for line in lines if line.startswith("| ")][2:]
    assert len(rows) == len(ENGINES) * len(EXPERT_PARALLEL) - len(EXPERT_PARALLEL) + 1
    assert len({row.count("|") for row in lines if row.startswith("|")}) == 1
    (reason,) = (line for line in lines if line.startswith("- "))
    assert reason.endswith(f": {REASON}")
    assert reason.count("ZeRO 3, EP") == len(EXPERT_PARALLEL) - 1


def test_deepspeeds_cells_have_nothing_of_megatrons_engine():
    asked = []
    zero_table(planner(asked), JOB, 16, lambda *told: None)
    of_deepspeed = [values for values in asked if values.get("engine") == "deepspeed"]
    assert len(of_deepspeed) == 4 * len(EXPERT_PARALLEL)
    for values in of_deepspeed:
        assert not {"use_distributed_optimizer", "overlap_grad_reduce"} & values.keys()
    plain = [values for values in asked if "engine" not in values]
    assert [v.get("use_distributed_optimizer") for v in plain].count(True) == len(EXPERT_PARALLEL)
