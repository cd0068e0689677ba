"""Tracer: one server's answers are those of a process each, cached ones are equal, errors one line.

The theorem of virtual stages: chunks traced apart add up to the interleaved job traced whole.
"""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from megatron_mone.planning.tracing.trace import Trace
from megatron_mone.planning.tracing.trace_cache import TraceCache
from megatron_mone.planning.tracing.trace_server import Tracer
from megatron_mone.planning.tracing.trace_worker import CPU, GPU
from tests import forked_ranks
from tests.integration import traced_ranks
from tests.training_cases import MOCK, MONE
from tests.unit.planning.parsed_jobs import JOB

pytestmark = pytest.mark.slow

RANKS = 8
CHUNKS = 2
MTP = ("--mtp-num-layers", "1")
INTERLEAVED = (
    *JOB, *MTP, "--global-batch-size", "16",
    "--num-layers", "8", "--pipeline-model-parallel-size", "2",
    "--num-virtual-stages-per-pipeline-rank", str(CHUNKS), "--expert-model-parallel-size", "2",
    "--bf16", "--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather",
)  # fmt: skip
UNEVEN = (
    *JOB, "--num-layers", "6", "--pipeline-model-parallel-size", "2",
    "--num-virtual-stages-per-pipeline-rank", str(CHUNKS),
    "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split",
    "--moe-layer-freq", "([0]*2+[1]*4)", "--tensor-model-parallel-size", "2",
    "--sequence-parallel",
)  # fmt: skip
GPU_JOB = (
    *MOCK, "--num-layers", "4", "--hidden-size", "64", "--num-attention-heads", "4",
    "--num-experts", "16", "--moe-router-topk", "4", "--moe-router-num-groups", "4",
    "--moe-router-group-topk", "2", "--moe-ffn-hidden-size", "48", "--ffn-hidden-size", "128",
    "--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm", "--seq-length", "64",
    "--max-position-embeddings", "64", "--position-embedding-type", "rope", "--bf16",
    "--untie-embeddings-and-output-weights", "--micro-batch-size", "1",
    "--global-batch-size", "64", "--moe-token-dispatcher-type", "flex",
    "--moe-router-dtype", "fp32", "--moe-grouped-gemm", "--use-distributed-optimizer",
    "--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2",
    "--expert-model-parallel-size", "8", "--overlap-moe-expert-parallel-comm",
    "--delay-wgrad-compute", "--attention-dropout", "0", "--hidden-dropout", "0",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tracing")


@pytest.fixture(scope="module")
def tracer(folder):
    with Tracer(TraceCache(folder / "cache")) as tracer:
        tracer.describe(JOB, 1)  # the server is up
        yield tracer


def traced_whole(folder, flags, rank):
    """The trace of a rank with all of its chunks."""
    result = folder / "trace.json"
    job = {"flags": flags, "world_size": RANKS, "rank": rank, "rows": None}
    log = folder / "log"
    assert forked_ranks.start(1, traced_ranks.trace, (job, str(result)), log).wait(120) == 0, (
        log.read_text()
    )
    return Trace.read(result)


@pytest.mark.parametrize("flags", [INTERLEAVED, UNEVEN], ids=["even, MTP", "uneven, dense"])
def test_chunks_add_up_to_the_interleaved_job(tracer, folder, flags):
    job = tracer.trace(flags, RANKS)
    assert set(job.traces) == {(p, v) for p in range(2) for v in range(CHUNKS)}
    for p in range(2):
        whole = traced_whole(folder, flags, p * RANKS // 2)
        chunks = [job.traces[p, v] for v in range(CHUNKS)]
        assert {chunk.rank for chunk in chunks} == {whole.rank}
        assert {chunk.world_size for chunk in chunks} == {whole.world_size}
        for kind in ("weights", "gradients"):
            parts = [getattr(chunk.memory, kind) for chunk in chunks]
            assert sum(parts) == getattr(whole.memory, kind) > max(parts) > 0
        _same_optimizer(whole, chunks)
        each = whole.micro_batches
        kept = sum(chunk.memory.activations for chunk in chunks)
        assert whole.memory.activations == each * kept > 0
        assert whole.flops == each * sum(chunk.flops for chunk in chunks) > 0
        rows = {layer: rows for chunk in chunks for layer, rows in chunk.rows.items()}
        assert whole.rows == {layer: each * rows for layer, rows in rows.items()}
        _same_traffic(whole, chunks)


def _same_optimizer(whole, chunks):
    """State of the parameters; beside it each optimizer (dense, experts) has a scale of 4 bytes."""
    apart = any(one.group == "ep" for one in whole.collectives)  # experts have their own
    scales = [4 * (1 + (apart and bool(chunk.rows))) for chunk in chunks]
    state = sum(chunk.memory.optimizer for chunk in chunks) - sum(scales)
    assert whole.memory.optimizer - max(scales) == state > 0


def _same_traffic(whole, chunks):
    """Bytes and calls by group; a micro-batch's exchanges once for each micro-batch."""
    often = {"ep": whole.micro_batches, "tp-ep": whole.micro_batches}
    once = ("dp", "dp-cp", "edp", "embedding")
    compared = 0
    for name, (calls, size) in whole.traffic().items():
        group = name.split()[1]
        if group not in (*often, *once):  # the others also have what a whole step does once
            continue
        parts = [chunk.traffic().get(name, (0, 0)) for chunk in chunks]
        times = often.get(group, 1)
        calls_apart, size_apart = (times * sum(part) for part in zip(*parts, strict=True))
        assert size == size_apart > 0
        # A second chunk launches the bucket of an MTP block's embedding with its others.
        has_mtp = 9 in whole.rows and group == "dp-cp" and not name.startswith("all_reduce")
        assert calls == calls_apart - has_mtp
        compared += 1
    assert compared >= 2
    groups = {(one.group, one.ranks, one.stride) for one in whole.collectives}
    apart = {(one.group, one.ranks, one.stride) for chunk in chunks for one in chunk.collectives}
    # Of the messages some carry the name of the world's group.
    assert apart - {("world", RANKS, 1)} == groups - {("world", RANKS, 1)}


def test_equal_stages_are_traced_once_and_their_layers_numbered(tracer):
    flags = (*JOB, "--num-layers", "4", "--pipeline-model-parallel-size", "4")
    told = []
    job = tracer.trace(flags, 4, progress=lambda *done: told.append(done))
    assert job.traced == 3
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert [list(job.traces[p, 0].rows) for p in range(4)] == [[1], [2], [3], [4]]
    assert [job.traces[p, 0].rank for p in range(4)] == [0, 1, 2, 3]
    assert job.traces[1, 0].ops == job.traces[2, 0].ops != job.traces[0, 0].ops
    assert job.facts.pp == 4
    assert job.seconds > 0


def test_a_cached_answer_is_equal_and_starts_nothing(tracer, folder):
    flags = (*JOB, "--seed", "1")
    first = tracer.trace(flags, 1)
    with Tracer(TraceCache(folder / "cache")) as other:
        again = other.trace(flags, 1)
        assert (again.facts, again.traces) == (first.facts, first.traces)
        assert again.traced == 0
        assert not any(pool.started for pool in other._pools.values())


def test_what_no_trace_depends_on_asks_for_no_other(tracer):
    first = tracer.trace((*JOB, "--seed", "1"), 1)
    alike = tracer.trace((*JOB, "--seed", "2", "--train-iters", "9", "--lr", "1"), 1)
    assert alike.traces == first.traces
    assert alike.traced == 0
    assert tracer.trace((*JOB, "--clip-grad", "0"), 1).traces != first.traces


def test_a_damaged_cache_is_traced_again(tracer, folder, monkeypatch):
    monkeypatch.setattr(tracer, "_cache", TraceCache(folder / "own"))
    first = tracer.trace(JOB, 1)
    for file in (folder / "own").glob("*.json"):
        file.write_bytes(file.read_bytes()[:-100])
    again = tracer.trace(JOB, 1)
    assert again.traced == first.traced == 1
    assert again.traces == first.traces


def test_the_batch_is_not_in_the_key(tracer):
    flags = (*JOB, "--global-batch-size")
    small, large = (tracer.trace((*flags, size), 2) for size in ("4", "64"))
    assert large.traced == 0
    assert large.traces == small.traces
    assert (small.facts.micro_batches, large.facts.micro_batches) == (1, 16)


def test_rows_of_experts_are(tracer):
    balanced = tracer.trace(JOB, 1)
    skewed = tracer.trace(JOB, 1, rows_per_expert=[64, 32, 32, 0])
    assert skewed.traced == 1
    assert skewed.traces[0, 0].rows == balanced.traces[0, 0].rows
    with pytest.raises(ValueError, match="rows_per_expert") as failure:
        tracer.trace(JOB, 1, rows_per_expert=[64, 64, 64, 0])
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--num-layer", "3"), "num-layer"),
        (("--moe-router-topk", "9"), "moe_router_topk = 9 is not allowed"),
        (("--pipeline-model-parallel-size", "2", "--num-layers", "3"), "Megatron refuses"),
        (("--use-tp-pp-dp-mapping",), "use_tp_pp_dp_mapping = True cannot be planned"),
        (("--config", "nowhere.yaml"), "nowhere.yaml"),
    ],
)
def test_refused_jobs_are_one_line(tracer, flags, fault):
    with pytest.raises(ValueError, match=fault) as failure:
        tracer.describe((*JOB, *flags), 4)
    assert "\n" not in str(failure.value)


def test_a_run_file_is_read_each_time(tracer, tmp_path):
    run = tmp_path / "run.yaml"
    found = []
    for layers in (2, 4):
        at = JOB.index("--num-layers")
        run.write_text(f"model: {{num_layers: {layers}}}\n")
        rest = (*JOB[:at], *JOB[at + 2 :])
        found.append(tracer.describe((f"--config={run}", *rest), 1))
    assert [job.facts.num_layers for job in found] == [2, 4]
    assert "--config" not in found[0].stage_flags
    assert found[0].stage_flags == tracer.describe(JOB, 1).stage_flags


SCHEDULE = ("--overlap-moe-expert-parallel-comm", "--delay-wgrad-compute")
GRAPHS = ("--cuda-graph-impl", "transformer_engine", "--cuda-graph-modules", "attn", "moe_router")
BESIDE_DISPATCH = "--overlap-dispatch-backward-with-experts-wgrad"


def test_a_gpu_job(folder):
    with Tracer(TraceCache(folder / "cache")) as gpu_tracer:
        job = gpu_tracer.trace(GPU_JOB, 32)
        assert gpu_tracer._pools[GPU].started
        assert not gpu_tracer._pools[CPU].started
        server = gpu_tracer._pools[GPU]._server._process.pid
        delayed = gpu_tracer.trace((*GPU_JOB, *MONE), 32)
        plain = [flag for flag in GPU_JOB if flag not in SCHEDULE]
        beside = gpu_tracer.describe((*plain, *MONE, BESIDE_DISPATCH), 32)
        graphed = gpu_tracer.describe((*plain, *MONE, *GRAPHS), 32)
        # a schedule's order is in no trace, nor is who launches its kernels
        assert graphed.stage_flags == beside.stage_flags
        assert beside.stage_flags == gpu_tracer.describe((*GPU_JOB, *MONE), 32).stage_flags
    assert {trace.backend for trace in delayed.traces.values()} == {"triton"}
    assert delayed.facts.overlap_expert_parallel
    assert delayed.facts.delay_wgrad
    assert graphed.facts.graphs_per_layer == 2
    assert set(graphed.facts.graphed) == {"attention", "layer norm", "router"}
    assert beside.facts.graphs_per_layer == 0
    assert beside.facts.overlap_dispatch_backward
    assert not delayed.facts.overlap_dispatch_backward
    assert not Path(f"/proc/{server}").exists()
    facts = job.facts
    assert facts.dispatcher == "flex:deepep"
    assert (facts.overlap_expert_parallel, facts.delay_wgrad) == (True, True)
    assert (facts.router_groups, facts.router_group_topk) == (4, 2)
    assert (facts.dp, facts.edp, facts.micro_batches) == (16, 2, 4)
    names = {op.name.partition(".")[0] for op in job.traces[1, 0].ops}
    assert "fused" in names


def test_a_time_limit_is_one_line(tracer, monkeypatch):
    monkeypatch.setattr(tracer._pools[CPU], "_limit", 0.01)
    with pytest.raises(RuntimeError, match=r"took longer than 0\.01 seconds") as failure:
        tracer.describe((*JOB, "--seed", "1000"), 1)
    assert "\n" not in str(failure.value)


def _kill(find):
    """Kill the process that `find` answers, as soon as it answers one."""

    def work():
        while (process := find()) is None:
            time.sleep(0.01)
        os.kill(process, signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _child_of(process):
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(children[0]) if children else None


def test_killed_processes_are_one_line_and_the_next_request_works(tracer):
    server = tracer._pools[CPU]._server._process.pid
    thread = _kill(lambda: _child_of(server))
    with pytest.raises(RuntimeError, match="description of the job was killed by SIGKILL") as child:
        tracer.describe((*JOB, "--seed", "2000"), 1)
    thread.join()
    assert "\n" not in str(child.value)
    thread = _kill(lambda: server)
    with pytest.raises(RuntimeError, match="tracing server ended with status -9") as failure:
        tracer.describe((*JOB, "--seed", "2001"), 1)
    thread.join()
    assert "\n" not in str(failure.value)
    assert tracer.describe((*JOB, "--seed", "2002"), 1).facts.world_size == 1
