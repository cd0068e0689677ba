"""What the planner assembles of a job is what ranks of that job hold and send.

Traces of single micro-batches through single chunks become, by the schedule and the number of
micro-batches, the memory and the collectives of a whole step. Here whole steps of several
micro-batches run on real CPU ranks over gloo, with MoNE and with stock experts, interleaved too.
"""

import json
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.prediction import Prediction, predict
from megatron_mone.planning.cost.rank_memory import RankMemory
from megatron_mone.planning.plan_parts import model_document
from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import TracedJob, Tracer
from megatron_mone.profiling.communication import sent_bytes
from tests import forked_ranks
from tests.integration import plan_ranks
from tests.parity.layouts import CP2, DISTRIBUTED_OPTIMIZER, EP2, EP4, ETP1, ETP2, PP2, TP2, VPP2
from tests.training_cases import MOCK, MONE, TINY

pytestmark = pytest.mark.slow

Layouts = dict[str, tuple[int, tuple[str, ...]]]
"""{name: (ranks, flags)}; what the name does not say is 1, or data parallel."""
Traffic = dict[str, tuple[int, int]]
"""{"kind group": (calls of a step, bytes that a rank sends in them)}."""

STOCK = (*TINY, *MOCK, "--train-iters", "2")
NATIVE = (*STOCK, *MONE, "--mone-backend", "cpu")
PP4 = ("--pipeline-model-parallel-size", "4")
OVERLAP = ("--overlap-grad-reduce", "--overlap-param-gather")
SHARED = (*DISTRIBUTED_OPTIMIZER, *OVERLAP, "--bf16")
PACKED = ("--micro-batch-size", "1", "--dataloader-inter-document-masking")
HYBRID = (
    *("--mamba-state-dim", "16", "--mamba-head-dim", "8", "--mamba-num-groups", "4"),
    "--hybrid-layer-pattern",
)
# A first step gathers no parameters where that overlaps with forward passes, and agrees on more.
PROFILED = ("--mone-profile-steps", "2:2")


def layers(count: int) -> tuple[str, str]:
    """So many decoder layers."""
    return "--num-layers", str(count)


def samples(count: int) -> tuple[str, str]:
    """So many samples a step, two in a micro-batch."""
    return "--global-batch-size", str(count)


LAYOUTS: Layouts = {
    "EP2 PP2": (4, (*NATIVE, *EP2, *PP2, *samples(16), *SHARED)),
    "PP2 VPP2": (4, (*NATIVE, *PP2, *VPP2, *layers(4), *samples(16))),
    "ETP2 EP2": (4, (*NATIVE, *ETP2, *EP2, *samples(16), *DISTRIBUTED_OPTIMIZER)),
    "stock EP2 PP2 VPP2": (
        4, (*STOCK, *EP2, *PP2, *VPP2, *layers(4), *samples(24), *DISTRIBUTED_OPTIMIZER),
    ),
    "hybrid EP2 PP2 VPP2": (4, (*NATIVE, *EP2, *PP2, *HYBRID, "M*E|E|M-E|E", *samples(16))),
    "hybrid TP2 CP2": (4, (*NATIVE, *TP2, *ETP1, *CP2, *HYBRID, "M*E", *samples(8))),
    "stock EP4": (4, (*STOCK, *EP4, *samples(16))),
    "stock TP2 ETP2 EP2": (4, (*STOCK, *TP2, *EP2, *samples(8))),
    "stock CP2 PP2": (4, (*STOCK, *CP2, *PP2, *samples(8))),
    "stock PP4": (4, (*STOCK, *PP4, *layers(4), *samples(12), *DISTRIBUTED_OPTIMIZER)),
    "TP2 EP2 PP2 VPP2": (
        8, (*NATIVE, *TP2, *ETP1, *EP2, *PP2, *VPP2, *layers(4), *samples(16), *SHARED),
    ),
    "CP2 EP4 PP2": (8, (*NATIVE, *CP2, *EP4, *PP2, *samples(16), *DISTRIBUTED_OPTIMIZER)),
    "packed PP2": (2, (*NATIVE, *PP2, *samples(8), *PACKED)),
    "stock EP2 PP4 VPP2": (8, (*STOCK, *EP2, *PP4, *VPP2, *layers(8), *samples(16), *SHARED)),
}  # fmt: skip
PLACES = [
    (name, stage)
    for name, (_, flags) in LAYOUTS.items()
    for stage in range(4 if "PP4" in name else 2 if "PP2" in name else 1)
]
EXACT = ("weights", "gradients", "optimizer")
# Groups over which a rank reduces once a step, whatever its chunks, and each chunk's trace too.
AGREED = ("mp", "world", "tp-ep-pp", "intra_distributed_optimizer_instance_group", "tp")


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, planned and run.

    Attributes:
        job: as it was traced.
        memory: planned.
        held: bytes by kind on the stage's first rank.
        planned, run: collectives of a step.
    """

    job: TracedJob
    memory: RankMemory
    held: dict[str, int]
    planned: Traffic
    run: Traffic

    def error(self, kind: str) -> float:
        """planned / held - 1 of a kind of memory."""
        return (getattr(self.memory, kind) - _scalars(self.job, kind)) / self.held[kind] - 1


@pytest.fixture(scope="module")
def found(shared_tracer, tmp_path_factory) -> dict[tuple[str, int], Stage]:
    """Of every layout and stage."""
    folder = tmp_path_factory.mktemp("planned")
    return planned_and_run(LAYOUTS, shared_tracer(TraceCache(folder / "cache")), folder)


def planned_and_run(layouts: Layouts, tracer: Tracer, folder: Path) -> dict[tuple[str, int], Stage]:
    """Plan layouts and run them; of every layout and stage."""
    for ranks in sorted({ranks for ranks, _ in layouts.values()}):
        _run({name: one for name, (count, one) in layouts.items() if count == ranks}, ranks, folder)
    cluster = load_cluster("cpu-avx2")
    stages = {}
    for name, (ranks, flags) in layouts.items():
        job = tracer.trace(flags, ranks)
        prediction = predict(job.traces, job.facts, cluster, Efficiency())
        for stage, memory in enumerate(prediction.memory_P):
            rank = stage * ranks // job.facts.pp
            held = json.loads((folder / name / f"most-{rank}.json").read_text())
            planned = _traffic_planned(job, prediction, stage)
            run = _traffic_run(folder / name, rank, job)
            stages[name, stage] = Stage(job, memory, held, planned, run)
    return stages


def _run(layouts: dict[str, tuple[str, ...]], ranks: int, folder: Path) -> None:
    for name in layouts:
        (folder / name).mkdir()
    todo, log = folder / f"cases-{ranks}.json", folder / f"log-{ranks}"
    todo.write_text(json.dumps([[name, [*one, *PROFILED], False] for name, one in layouts.items()]))
    job = forked_ranks.start(ranks, plan_ranks.run, (str(todo), str(folder)), log)
    try:
        status = job.wait(timeout=900)
    except subprocess.TimeoutExpired:
        job.kill()
        raise
    assert status == 0, log.read_text(errors="replace")[-6000:]


def _scalars(job: TracedJob, kind: str) -> int:
    """Bytes that every further chunk's trace counts again of an optimizer: Megatron's
    MixedPrecisionOptimizer and FP32Optimizer hold a scale of 4 bytes, the former another 4 where
    parameters are not of bf16. Experts have an optimizer of their own under expert parallelism."""
    facts = job.facts
    each = 8 if facts.distributed_optimizer and facts.params_dtype == "float32" else 4
    return each * (1 + (facts.ep > 1)) * (facts.vp - 1) if kind == "optimizer" else 0


def _traffic_planned(job: TracedJob, prediction: Prediction, stage: int) -> Traffic:
    """Of the stage, by the rows that a plan has for the stage that ends last."""
    ours = [c for v in range(job.facts.vp) for c in job.traces[stage, v].collectives]
    names = dict.fromkeys(job.traces, "not looked at")
    document = model_document("planned", replace(prediction, collectives=ours), names).plain()
    rows = (
        (row["kind"], row["group"], row["calls"],
         row["calls"] * round(sent_bytes(row["kind"], row["bytes"], row["ranks"])))
        for row in document["collectives"]
    )  # fmt: skip
    return _comparable(rows, job)


def _traffic_run(folder: Path, rank: int, job: TracedJob) -> Traffic:
    """Of a real rank, by its communication counters."""
    [path] = (folder / "profile" / "ranks").glob(f"*{rank}.json")
    counters = json.loads(path.read_text())["runs"][0]["communication"]
    rows = ((*key.split(), one["calls"][0], one["bytes"][0]) for key, one in counters.items())
    return _comparable(rows, job)


def _comparable(rows: Iterator[tuple[str, str, int, int]], job: TracedJob) -> Traffic:
    """Sums of rows, of interleaved stages without all-reduces over AGREED: norms, flags, losses and
    gradients of norms, a few bytes. Between two such stages Megatron sends one way over the group
    of all ranks (p2p_communication.py, `_p2p_ops`): messages count as the pipeline's.
    """
    found: Traffic = {}
    interleaved = job.facts.vp > 1
    for kind, group, more_calls, more_bytes in rows:
        between = kind in ("send", "recv")
        if interleaved and kind == "all_reduce" and group in AGREED:
            continue
        key = f"{kind} {'pp' if between else group}"
        calls, size = found.get(key, (0, 0))
        found[key] = calls + more_calls, size + more_bytes
    return found


def table(found: dict[tuple[str, int], Stage]) -> str:
    """Every layout and stage: bytes held, the error of each kind, and collectives compared."""
    lines = [
        f"{'layout':22}{'ranks':>6}{'M':>3}{'stage':>6}{'held bytes':>12}"
        + "".join(f"{kind:>13}" for kind in (*EXACT, "activations"))
        + "  collectives equal"
    ]
    for (name, stage), one in found.items():
        facts = one.job.facts
        equal = sum(one.run.get(key) == value for key, value in one.planned.items())
        errors = "".join(f"{one.error(kind):+13.3%}" for kind in (*EXACT, "activations"))
        lines.append(
            f"{name:22}{facts.world_size:6}{facts.micro_batches:3}{stage:6}"
            f"{sum(one.held.values()):12}{errors}  "
            f"{equal} of {len({*one.planned, *one.run})}"
        )
    return "\n".join(lines)


def test_the_layouts_are_many_and_of_both_kinds(found):
    assert set(found) == set(PLACES), table(found)
    jobs = {name: one.job.facts for (name, _), one in found.items()}
    assert len(jobs) >= 8
    assert max(facts.world_size for facts in jobs.values()) == 8
    stock = [facts.neurons_per_token == facts.moe_ffn_hidden_size for facts in jobs.values()]
    assert min(stock.count(True), stock.count(False)) >= 4
    for size in ("tp", "cp", "pp", "vp", "ep", "etp", "dp"):
        assert any(getattr(facts, size) > 1 for facts in jobs.values()), size
    assert all(facts.micro_batches > 1 for facts in jobs.values())


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_what_is_kept_from_step_to_step_is_exact(found, name, stage, kind):
    assert found[name, stage].error(kind) == 0, table(found)


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_activations_in_flight_are_within_two_percent(found, name, stage):
    one = found[name, stage]
    assert abs(one.error("activations")) < 0.02, table(found)
    # Not of one micro-batch: the first stage has as many in flight as the schedule says.
    of_one = sum(t.memory.activations for (p, _), t in one.job.traces.items() if p == stage)
    if stage == 0 and one.job.facts.pp > 1:
        assert one.held["activations"] > 1.2 * of_one


@pytest.mark.parametrize(("name", "stage"), PLACES)
def test_collectives_of_a_step_are_exact(found, name, stage):
    one = found[name, stage]
    assert one.planned == one.run, table(found)
    facts = one.job.facts
    if facts.ep > 1:
        layers_here = sum(len(t.rows) for (p, _), t in one.job.traces.items() if p == stage)
        # Tokens and their probabilities there, outputs back; the same backward.
        assert one.run["all_to_all ep"][0] >= 4 * layers_here * facts.micro_batches > 0
