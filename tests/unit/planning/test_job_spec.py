"""Jobs as users state them: parts, short layouts, baselines, and the run file that comes out."""

from dataclasses import replace

import pytest
import yaml

from megatron_mone.model.run_config import load_run
from megatron_mone.planning.job import JobSpec, job_spec, parse_layout, run_job, short_layout
from megatron_mone.planning.planner import check_batch
from megatron_mone.profiling.baselines import run_specs

JOB = JobSpec(
    "tiny",
    model={"num_experts": 8, "moe_ffn_hidden_size": 96, "mone_neuron_ratio": 0.25},
    parallel={"expert_model_parallel_size": 2, "recompute_granularity": "full",
              "recompute_method": "uniform", "recompute_num_layers": 1},
    cluster={"overlap_grad_reduce": True},
    train={"micro_batch_size": 1, "global_batch_size": 8, "mone_replay_masks": "x"},
)  # fmt: skip


def test_a_short_layout_is_megatrons_arguments():
    assert parse_layout("tp=2, pp=8,vpp=4,ep=32,mbs=1,gbs=2048") == {
        "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 8,
        "num_virtual_stages_per_pipeline_rank": 4, "expert_model_parallel_size": 32,
        "micro_batch_size": 1, "global_batch_size": 2048,
    }  # fmt: skip
    assert parse_layout("vpp=1")["num_virtual_stages_per_pipeline_rank"] is None
    assert parse_layout("moe_shared_expert_overlap=true") == {"moe_shared_expert_overlap": True}


@pytest.mark.parametrize(
    ("text", "granularity", "modules"),
    [
        ("none", None, None),
        ("full", "full", None),
        ("layernorm+moe_act", "selective", ["layernorm", "moe_act"]),
    ],
)
def test_recompute_replaces_what_was_there(text, granularity, modules):
    values = JOB.with_layout(parse_layout(f"recompute={text}")).values()
    assert values.get("recompute_granularity") == granularity
    assert values.get("recompute_modules") == modules
    assert ("recompute_num_layers" in values) == (text == "full")


def test_a_change_goes_where_the_argument_stands():
    changed = JOB.with_layout(parse_layout("mbs=2,overlap_grad_reduce=false,tp=2"))
    assert changed.train["micro_batch_size"] == 2
    assert changed.cluster == {"overlap_grad_reduce": False}
    assert changed.parallel["tensor_model_parallel_size"] == 2
    assert changed.parallel["sequence_parallel"] is True  # experts under TP need it
    assert changed.parallel["expert_model_parallel_size"] == 2
    assert changed.parallel["moe_token_dispatcher_type"] == "alltoall"
    flex = JOB.with_layout({"moe_token_dispatcher_type": "flex"}).with_layout({"x": 1})
    assert flex.parallel["moe_token_dispatcher_type"] == "flex"


@pytest.mark.parametrize("layout", ["tp=2,ep=4", "tp=1,pp=4,vpp=2,ep=8,mbs=2,recompute=full",
                                    "tp=1,pp=1,etp=2,recompute=moe+mlp"])  # fmt: skip
def test_the_short_form_reads_back(layout):
    values = JobSpec("x", {}, {}, {}, {}).with_layout(parse_layout(layout)).values()
    assert parse_layout(short_layout(values)) | parse_layout(layout) == parse_layout(
        short_layout(values)
    ) | {name: value for name, value in parse_layout(layout).items()}
    assert short_layout(JobSpec("x", {}, {}, {}, {}).with_layout(
        parse_layout(short_layout(values))).values()) == short_layout(values)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("state=bf16-moments", {"exp_avg_dtype": "bf16", "grad_reduce_in_bf16": None}),
        ("state=bf16", {"main_grads_dtype": "bf16", "grad_reduce_in_bf16": True}),
        ("state=host", {"optimizer_cpu_offload": True, "exp_avg_dtype": None}),
        (
            "offload=core_attn+moe_act",
            {
                "fine_grained_activation_offloading": True,
                "offload_modules": ["core_attn", "moe_act"],
            },
        ),
        ("stages=Et*3|t*4L", {"pipeline_model_parallel_layout": "Et*3|t*4L"}),
    ],
)
def test_state_and_stages_in_short(text, arguments):
    read = parse_layout(f"tp=2,etp=1,{text}")
    assert read.items() >= arguments.items()
    values = JobSpec("x", {}, {}, {}, {}).with_layout(read).values()
    assert short_layout(values) == f"tp=2,pp=1,etp=1,{text}"


@pytest.mark.parametrize(
    ("gpus", "layout", "line"),
    [
        (100, "tp=1,gbs=2048", "100 replicas of micro-batches of 1, which do not divide "
         "global_batch_size = 2048: give gbs=2000 in --layout, or --gpus 64"),
        (64, "tp=2,pp=4,mbs=3,gbs=32", "8 replicas of micro-batches of 3"),
        (60, "tp=8,gbs=64", "--gpus 60 is no multiple of tp x cp x pp = 8 x 1 x 1 = 8: give 56"),
        (64, "tp=2,pp=4,gbs=64", None),
    ],
)  # fmt: skip
def test_replicas_share_whole_micro_batches(gpus, layout, line):
    job = JobSpec("x", {}, {}, {}, {"micro_batch_size": 1}).with_layout(parse_layout(layout))
    if line is None:
        return check_batch(job, gpus)
    with pytest.raises(ValueError, match="--gpus") as refused:
        check_batch(job, gpus)
    assert line in str(refused.value)


@pytest.mark.parametrize(
    ("layout", "fault"),
    [
        ("state=bf17", "is none of fp32, bf16-moments, bf16"),
        ("tp", "write NAME=VALUE"),
        ("tp=", "write NAME=VALUE"),
        ("tp=0", "tp = '0' must be a whole number"),
        ("tp=two", "tp = 'two' must be a whole number"),
        ("tp=2,t-p=1", "'t-p' is no argument"),
        ("a=[", "cannot be read"),
    ],
)
def test_a_wrong_layout_is_one_line(layout, fault):
    with pytest.raises(ValueError, match="layout") as failure:
        parse_layout(layout)
    assert fault in str(failure.value)
    assert "\n" not in str(failure.value)


def test_the_dense_baseline_has_no_mone_field_left():
    dense = JOB.against(run_specs(["moe"])[1])
    assert [name for name in dense.values() if name.startswith("mone_")] == []
    assert dense.name == "moe"
    assert JOB.model["mone_neuron_ratio"] == 0.25


def test_the_active_baseline_is_cut_to_what_mone_activates():
    cut = JOB.against(run_specs(["moe-active"])[1])
    assert cut.model["moe_ffn_hidden_size"] == 48  # (1 + 2/4) / 3 of 96
    blocks = JOB.against(run_specs(["wide:mone_neuron_ratio=0.5"])[1])
    assert blocks.values()["mone_neuron_ratio"] == 0.5


def test_a_model_without_neurons_cannot_be_cut():
    with pytest.raises(ValueError, match="moe-active needs a MoNE model"):
        JobSpec("x", {"moe_ffn_hidden_size": 96}, {}, {}, {}).against(run_specs(["moe-active"])[1])


def test_the_run_file_is_the_job(tmp_path):
    path = tmp_path / "new" / "plan.run.yaml"
    job = replace(JOB, train={**JOB.train, "eval_interval": 7})
    job.write(path)
    assert load_run(path) == job.values()
    assert run_job(path).parts() == job.parts()
    assert list(yaml.safe_load(path.read_text())) == ["model", "parallel", "cluster", "train"]


def test_named_parts_and_wrong_names():
    job = job_spec("moe-30b-a3b-mone", "tp=1,pp=4,ep=8")
    assert job.values()["num_experts"] == 128
    assert job.values()["pipeline_model_parallel_size"] == 4
    with pytest.raises(ValueError, match="moe-30b-a3b"):
        job_spec("moe-30b-a3")
    with pytest.raises(ValueError, match="configs/parallel"):
        job_spec("moe-30b-a3b", "no-such-layout")


def with_train(**train):
    return JobSpec("far", {"num_layers": 2}, {}, {}, train)


def test_a_job_is_planned_without_what_lies_on_the_cluster(tmp_path):
    far = with_train(data_path=["/data/a"], save="/ckpt", load="/ckpt", vocab_size=50_000,
                     tokenizer_type="Llama2Tokenizer", tokenizer_model="/data/tok")  # fmt: skip
    assert far.planned_values() == {
        "num_layers": 2, "vocab_size": 50_000, "mock_data": True, "tokenizer_type": "NullTokenizer",
    }  # fmt: skip
    assert far.values()["data_path"] == ["/data/a"]  # the run file keeps it
    here = with_train(tokenizer_type="HuggingFaceTokenizer", tokenizer_model=str(tmp_path))
    assert here.planned_values()["tokenizer_model"] == str(tmp_path)


def test_a_vocabulary_of_unknown_size_is_refused():
    with pytest.raises(
        ValueError, match=r"tokenizer_model = '/data/tok' is not here: .*vocab_size"
    ):
        with_train(tokenizer_type="Llama2Tokenizer", tokenizer_model="/data/tok").planned_values()


@pytest.mark.parametrize(
    ("train", "interval"),
    [({"train_iters": 70}, 70), ({}, 10**9), ({"train_iters": 70, "eval_interval": 7}, 7)],
)
def test_a_run_file_has_an_eval_interval(tmp_path, train, interval):
    """Megatron's training divides by it."""
    JobSpec("x", {}, {}, {}, train).write(tmp_path / "x.run.yaml")
    assert run_job(tmp_path / "x.run.yaml").train == {**train, "eval_interval": interval}
