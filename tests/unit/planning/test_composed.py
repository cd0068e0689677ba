"""Composed traces against whole ones, and what can be composed at all."""

import pytest

from megatron_mone.planning.composed import Composer, StageContents, stage_contents
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.job import JobSpec, job_spec, parse_layout
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.tracing.trace_cache import TraceCache

GPUS = 32
MODEL = {
    "num_layers": 8, "hidden_size": 256, "ffn_hidden_size": 512, "num_attention_heads": 8,
    "num_experts": 8, "moe_ffn_hidden_size": 128, "moe_router_topk": 2, "swiglu": True,
    "moe_layer_freq": "([0]*1+[1]*7)", "mone_neuron_ratio": 0.25, "mone_ng_loss_coeff": 0.01,
    "moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0.01,
    "add_bias_linear": False, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "attention_dropout": 0.0, "hidden_dropout": 0.0, "max_position_embeddings": 4096,
    "untie_embeddings_and_output_weights": True, "vocab_size": 1000,
}  # fmt: skip


@pytest.mark.parametrize(
    ("key", "contents"),
    [
        ("embedding, moe*12", StageContents({"moe": 12}, True, False)),
        (
            "embedding, dense*1, moe*3, norm, head",
            StageContents({"dense": 1, "moe": 3}, True, True),
        ),
        ("moe*2, dense*1, moe*2", StageContents({"moe": 4, "dense": 1}, False, False)),
        ("moe*1, norm, mtp*1, head", StageContents({"moe": 1}, False, True)),
        ("no layer, norm, head", StageContents({}, False, True)),
        ("moe*1, mtp*1", None),
        ("moe*4, from layer 5", None),
    ],
)
def test_a_stage_is_read_from_its_key(key, contents):
    assert stage_contents(key) == contents


@pytest.fixture(scope="module")
def planner(shared_tracer, tmp_path_factory):
    tracer = shared_tracer(TraceCache(tmp_path_factory.mktemp("traces")))
    return Planner(tracer, load_cluster("h100-ndr"))


def tiny_job(layout):
    plain = job_spec("moe-30b-a3b-mone")
    train = {**plain.train, "global_batch_size": 64, "vocab_size": None, "seq_length": 512}
    job = JobSpec("tiny", MODEL, {}, plain.cluster, {k: v for k, v in train.items() if v})
    return job.with_layout(parse_layout(layout))


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout",
    [
        *("tp=1,pp=1,ep=4", "tp=1,pp=2,vpp=2,ep=4", "tp=1,pp=8,ep=2,recompute=layernorm+moe_act"),
        "tp=1,pp=2,ep=4,state=host,offload=core_attn+attn_proj,min_offloaded_tensor_size=1",
    ],
)
def test_a_composed_plan_is_the_whole_one(planner, layout):
    job = tiny_job(layout)
    composed = Composer(planner).plan(job, GPUS).prediction
    whole = planner.plan(job, GPUS).prediction
    for one, other in zip(composed.memory_P, whole.memory_P, strict=True):
        assert one.weights == other.weights
        assert one.gradients == other.gradients
        assert one.activations == pytest.approx(other.activations, rel=1e-3)
        # Of state on the host the device has a number for each optimizer of a chain.
        assert one.optimizer == pytest.approx(other.optimizer, rel=1e-2, abs=16)
        assert one.peak == pytest.approx(other.peak, rel=1e-2)
        assert one.host == pytest.approx(other.host, rel=1e-2)
    assert composed.seconds == pytest.approx(whole.seconds, rel=1e-2)
    for name, seconds in whole.parts.items():
        assert composed.parts[name] == pytest.approx(seconds, abs=1e-2 * whole.seconds), name
