"""Published runs read from their files, and figures of predictions beside published ones."""

from dataclasses import replace

import pytest
import yaml

from megatron_mone.common.phases import PERMUTE, ROUTER, UP_DOWN_GEMM
from megatron_mone.planning.cost.prediction import predict
from megatron_mone.planning.cost.routing_skew import ZIPF, Skew
from megatron_mone.planning.fitting import published
from megatron_mone.planning.fitting.published import (
    EXPOSED,
    LAYER,
    MEMORY,
    STEP,
    Comparison,
    PublishedRun,
    compare,
    grouped,
    published_step_ms,
    read_published,
    table,
)
from megatron_mone.planning.job import JobSpec
from megatron_mone.planning.planner import Planned
from megatron_mone.planning.tracing.trace_server import TracedJob
from tests.training_cases import ROOT
from tests.unit.planning.made_jobs import CLUSTER, EXACT, FACTS, STAGE, TRACES, move, trace

FILES = sorted((ROOT / "tests" / "published").glob("*.yaml"))
HEADS, CHANNELS, LAYERS, SAMPLES, TOKENS = 4, 16, 3, 32, 128
ATTENTION = {
    "num_attention_heads": HEADS, "kv_channels": CHANNELS, "num_layers": LAYERS,
    "global_batch_size": SAMPLES, "seq_length": TOKENS,
}  # fmt: skip
GIB = 2**30


def run_of(kind=STEP, figures=None, **changes):
    """A published run of the paper job: 32 samples of 128 tokens on 16 devices."""
    run = PublishedRun(
        name="paper", kind=kind, gpus=16, cluster="paper", routing="balanced", extra=False,
        job=JobSpec("paper", ATTENTION, {}, {}, {}), figures=figures or {"step_ms": 1.0},
        full_attention=False, calibrates=False, skew=Skew(),
    )  # fmt: skip
    return replace(run, **changes)


def planned(traces=None):
    """The plan of the paper job."""
    traces = traces or TRACES
    prediction = predict(traces, FACTS, CLUSTER, EXACT)
    job = JobSpec("paper", ATTENTION, {}, {}, {})
    return Planned(job, TracedJob(FACTS, traces, 0.0, 0), {}, prediction, 1.0)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_file_is_read_as_it_says(path):
    run, written = read_published(path), yaml.safe_load(path.read_text())
    assert run.name == run.job.name == path.stem
    assert (run.kind, run.gpus, run.cluster) == tuple(
        written[name] for name in ("kind", "gpus", "cluster")
    )
    assert run.figures == written["published"]
    assert (run.routing == "skewed") == (run.skew.kind == ZIPF)
    values = run.job.values()
    assert values["transformer_impl"] == "transformer_engine"  # of the cluster's flags
    own = {**written["model"], **written["layout"], **written["train"]}
    # A null takes an argument of the base away.
    assert all(values.get(name) == value for name, value in own.items() if name != "base")
    assert not any(value is None for value in values.values())


def test_a_base_is_what_its_file_says_and_then_the_run(tmp_path):
    row = {
        "kind": "step", "gpus": 8, "cluster": "h100-ndr", "routing": "skewed", "zipf": 0.7,
        "calibrates": True, "attention_flops": "full", "model": {"base": "moe-30b-a3b"},
        "layout": {}, "train": {"base": "plan-4k", "seq_length": 64, "lr_warmup_iters": None},
        "published": {"step_ms": 5.0},
    }  # fmt: skip
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(row))
    run = read_published(tmp_path / "mine.yaml")
    model = yaml.safe_load((ROOT / "configs" / "model" / "moe-30b-a3b.yaml").read_text())
    values = run.job.values()
    assert {name: values[name] for name in model} == model
    assert values["seq_length"] == 64
    assert "lr_warmup_iters" not in values
    assert run.skew == Skew(ZIPF, 0.7)
    assert (run.calibrates, run.full_attention, run.extra) == (True, True, False)


@pytest.mark.parametrize(
    ("change", "said"), [({"gpus": 0}, "gpus = 0"), ({"kind": 3}, "kind = 3"), ({}, "cluster")]
)
def test_a_wrong_file_is_one_line(tmp_path, change, said):
    row = {"kind": "step", "gpus": 8, "routing": "balanced", "model": {}, "layout": {}, "train": {},
           "published": {}, **change}  # fmt: skip
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(row))
    with pytest.raises(ValueError, match=said) as failure:
        read_published(tmp_path / "wrong.yaml")
    assert "wrong.yaml" in str(failure.value)
    assert "\n" not in str(failure.value)


def test_a_published_time_is_itself():
    assert published_step_ms(run_of(figures={"step_ms": 843.0}), planned()) == 843.0


def test_tokens_a_second_are_a_time():
    """One device's share of a step: 32 x 128 / 16 tokens."""
    found = published_step_ms(run_of(figures={"tokens_per_s_per_gpu": 1024.0}), planned())
    assert found == pytest.approx(250.0)


def test_operations_a_second_are_a_time():
    """4e15 operations a step on 16 devices."""
    rate = run_of(figures={"tflops_per_gpu": 50.0})
    assert published_step_ms(rate, planned()) == pytest.approx(1e3 * 4e15 / (16 * 50e12))
    share = run_of(figures={"mfu": 0.25})  # of 1e12 operations a second in bf16
    assert published_step_ms(share, planned()) == pytest.approx(1e3 * 4e15 / (16 * 0.25e12))


@pytest.mark.parametrize("figure", [{"tflops_per_gpu": 50.0}, {"mfu": 0.25}])
def test_the_whole_square_of_attention_counts_where_it_was_counted(figure):
    """Q K and scores V, 2 S S / 2 multiply-adds' operations each a head's channel, thrice with the
    backward pass: what causality masks."""
    half = 3 * 2 * (2 * TOKENS * TOKENS / 2) * HEADS * CHANNELS * LAYERS * SAMPLES
    causal = published_step_ms(run_of(figures=figure), planned())
    full = published_step_ms(run_of(figures=figure, full_attention=True), planned())
    assert full / causal == pytest.approx(1 + half / 4e15, rel=1e-12)
    assert full > causal
    for exact in ({"step_ms": 9.0}, {"tokens_per_s_per_gpu": 9.0}):
        assert published_step_ms(run_of(figures=exact, full_attention=True), planned()) == (
            published_step_ms(run_of(figures=exact), planned())
        )


def test_a_step_and_its_peak_are_compared():
    plan = planned()
    memory = {"unit": "GiB", "peak_allocated": 0.05}
    step, peak = compare(run_of(figures={"step_ms": 200.0, "memory": memory}), plan)
    assert (step.figure, step.published) == ("step ms", 200.0)
    # 5 times 33 ms, 14 ms of replicas, 3 ms of optimizer.
    assert step.predicted == pytest.approx(182.0)
    assert step.error == pytest.approx(-0.09)
    assert peak.figure == "peak GiB"
    # Of stage 0: 10 + 20 + 15 MB, 5 MB of each of two micro-batches, 4 MB more while one runs.
    assert peak.predicted == pytest.approx(59e6 / GIB)
    of_bytes = {"step_ms": 200.0, "memory": {"unit": "GB", "peak_allocated": 0.05}}
    assert list(compare(run_of(figures=of_bytes), plan))[1].predicted == pytest.approx(0.059)


def test_memory_by_kind_is_of_the_rank_that_was_published():
    memory = {"unit": "GB", "pipeline_rank": 1, "weights_and_gradients": 0.03, "optimizer": 0.01,
              "activations": 0.02, "saved_by_probabilities_before_fc2": 0.015}  # fmt: skip
    found = {c.figure: c for c in compare(run_of(MEMORY, {"memory": memory}), planned())}
    assert {name: (one.predicted, one.published) for name, one in found.items()} == {
        "weights and gradients": (pytest.approx(0.030), 0.03),
        "optimizer": (pytest.approx(0.015), 0.01),
        "activations": (pytest.approx(0.005), pytest.approx(0.005)),  # one micro-batch in flight
    }
    first = {"memory": {**memory, "pipeline_rank": 0}}
    assert list(compare(run_of(MEMORY, first), planned()))[2].predicted == pytest.approx(0.010)


def test_a_layer_is_what_its_experts_and_their_routing_take():
    stage = trace(*STAGE.ops, *(move(ms, phase=phase) for ms, phase in
                                ((1, ROUTER), (2, PERMUTE), (4, UP_DOWN_GEMM))))  # fmt: skip
    [one] = compare(run_of(LAYER, {"layer_ms": 14.0}), planned({(0, 0): stage, (1, 0): stage}))
    assert one.figure == "layer ms"
    assert one.predicted == pytest.approx(FACTS.micro_batches * 7)  # attention left out
    assert one.error == pytest.approx(1.0)


def test_an_exposed_share_is_held_against_the_middle():
    [one] = compare(run_of(EXPOSED, {"exposed_expert_comm": {"from": 0.04, "to": 0.08}}), planned())
    assert one.published == pytest.approx(0.06)
    assert one.predicted == pytest.approx(4 * 3 / 182)  # 1 and 2 ms of 4 micro-batches


def comparison(figure="step ms", predicted=1.0, **changes):
    return Comparison(run_of(**changes), figure, predicted, 1.0)


def test_groups_keep_apart_what_proves_nothing():
    rows = {
        published.SHARES: comparison("exposed expert share", kind=EXPOSED),
        published.BYTES: comparison("optimizer", kind=MEMORY, calibrates=True),
        published.FURTHER: comparison(extra=True),
        published.HELD_OUT: comparison(),
        published.CALIBRATION: comparison(calibrates=True),
    }
    groups = grouped(rows.values())
    order = [published.CALIBRATION, published.HELD_OUT, published.FURTHER, published.BYTES,
             published.SHARES]  # fmt: skip
    assert [title for title in groups if title in order] == order
    assert groups == {title: [rows[title]] for title in order}
    skewed = grouped([comparison(routing="skewed"), comparison()])
    assert len(skewed) == 2  # apart from balanced runs


def test_a_table_says_how_far_off_a_group_is():
    rows = [comparison(predicted=1.1), comparison(predicted=0.8), comparison(predicted=1.0)]
    head, *lines = table("a group", rows).splitlines()
    assert head == "a group: 3 figures, mean |error| 10.0%, worst -20.0%"
    assert [line.split()[-1] for line in lines] == ["+10.0%", "-20.0%", "+0.0%"]
    document = published.document({"a group": rows[:1]})
    assert document["a group"] == [
        {"run": "paper", "figure": "step ms", "predicted": 1.1, "published": 1.0,
         "error": pytest.approx(0.1)}
    ]  # fmt: skip
