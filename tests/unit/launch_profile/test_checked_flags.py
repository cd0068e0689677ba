"""Flags of a job as Megatron itself takes or refuses them, before anything is submitted."""

import struct
from pathlib import Path

import numpy as np
import pytest

from launch.spec.checked_flags import check_data, check_flags, knows_vocabulary, stated_job
from megatron_mone.model.run_config import load_run
from megatron_mone.planning.tracing.trace_server import Tracer

ROOT = Path(__file__).resolve().parents[3]
DEMO = load_run(ROOT / "configs/demo-mone.yaml")
LARGE = load_run(ROOT / "configs/plan/moe-30b-a3b-mone-128.yaml")


def check(tracer: Tracer, *words: str, values=DEMO, ranks=2, gpus=False):
    return check_flags(tracer, stated_job("run", values, words), ranks, gpus)


@pytest.mark.parametrize(
    ("words", "dp"),
    [
        (["--mock-data"], 2),
        (["--mock-data", "--global-batch-size", "32", "--attention-backend", "flash"], 2),
        # What lies on the cluster is not looked for.
        (["--data-path", "0.5", "/nowhere/a", "0.5", "/nowhere/b"], 2),
        (["--mock-data", "--tokenizer-model", "/nowhere/tokenizer"], 2),
        (["--mock-data", "--save", "/nowhere/else", "--load", "/nowhere/else"], 2),
        (["--mock-data", "--mone-replay-masks", "/nowhere/masks"], 2),
        (["--mock-data", "--tensor-model-parallel-size", "2", "--sequence-parallel",
          "--expert-model-parallel-size", "1"], 1),
    ],
)  # fmt: skip
def test_what_the_ranks_would_take_is_taken(tracer, words, dp):
    description = check(tracer, *words)
    assert description is not None
    assert description.facts.dp == dp
    assert not Path("/nowhere").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "data_path is not set"),
        (["--mock-data", "--nmu-layers", "3"], "--nmu-layers 3 (did you mean '--num-layers'?)"),
        (["--mock-data", "--num-layers", "many"], "--num-layers: invalid int value: 'many'"),
        (["--mock-data", "--attention-backend", "flesh"], "'flesh' is none of its values"),
        (["--mock-data", "--mone-neuron-ratio", "3"], "mone_neuron_ratio = 3.0"),
        (["--mock-data", "--tensor-model-parallel-size", "3"], "total_model_size=3"),
        (["--mock-data", "--moe-router-topk", "9"], "moe_router_topk = 9"),
        (["--mock-data", "--transformer-impl", "transformer_engine"], "needs GPUs"),
        # Here Megatron itself ends with a TypeError.
        (["--mock-data", "--attention-backend", "local"], "attention_backend = local goes with a"),
    ],
)
def test_what_they_would_refuse_is_one_line(tracer, words, said):
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        check(tracer, *words)
    assert said in str(caught.value)


DEEPSPEED = ["--mock-data", "--engine", "deepspeed"]


@pytest.mark.parametrize("words", [
    DEEPSPEED,
    [*DEEPSPEED, "--zero-stage", "3", "--expert-model-parallel-size", "1"],
])  # fmt: skip
def test_deepspeed_s_engine_is_taken(tracer, words):
    """The planner may know it or not."""
    check(tracer, *words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*DEEPSPEED, "--zero-stage", "3"], "expert_model_parallel_size = 2 does not go with"),
        ([*DEEPSPEED, "--fp16"], "fp16 = True does not go with engine = deepspeed"),
        (["--mock-data", "--zero-stage", "2"], "zero_stage = 2 would have no effect"),
        ([*DEEPSPEED, "--zero-stage", "4"], "--zero-stage: invalid choice: 4"),
        ([*DEEPSPEED, "--zero-stage", "1", "--deepspeed-config",
          '{"zero_optimization": {"stage": 2}}'],
         "zero_optimization.stage = 2, and zero_stage = 1"),
        # By DeepSpeed itself.
        ([*DEEPSPEED, "--deepspeed-config", '{"zero_optimization": {"reduce_bucket_size": -1}}'],
         "zero_optimization.reduce_bucket_size = -1: Input should be greater than"),
    ],
)  # fmt: skip
def test_what_deepspeed_s_engine_does_not_train_is_one_line(tracer, tmp_path, words, said):
    if words[-1].startswith("{"):
        (tmp_path / "ds.json").write_text(words[-1])
        words = [*words[:-1], str(tmp_path / "ds.json")]
    with pytest.raises(ValueError, match=r"^[^\n]+$") as caught:
        check(tracer, *words)
    assert said in str(caught.value)


def test_an_unknown_key_of_the_run_file_is_refused(tracer):
    with pytest.raises(ValueError, match=r"unknown key 'num_layer' .*'num_layers'"):
        check(tracer, values={**DEMO, "num_layer": 3, "mock_data": True})


def test_a_gpu_job_is_checked_without_gpus(tracer):
    description = check(tracer, values=LARGE, ranks=128, gpus=True)
    assert description is not None
    assert (description.facts.dp, description.facts.ep) == (128, 8)
    with pytest.raises(ValueError, match="data_parallel_size"):
        check(tracer, values=LARGE, ranks=12, gpus=True)


@pytest.mark.parametrize("words", [["--use-torch-fsdp2", "--ckpt-format", "torch_dcp"]])
def test_what_the_planner_alone_does_not_take_passes(tracer, words):
    stock = {name: value for name, value in LARGE.items() if not name.startswith("mone_")}
    assert check(tracer, *words, values=stock, ranks=128, gpus=True) is None
    assert check(tracer, *words, values=LARGE, ranks=128, gpus=True) is None


def test_a_flag_wins_over_the_run_file_in_its_own_kind():
    words = ["--lr", "1e-3", "--disable-bias-linear", "--no-masked-softmax-fusion", "--bf16"]
    words += ["--moe-layer-freq", "[0, 1]", "--recompute-modules", "mlp", "core_attn"]
    values = stated_job("run", {"lr": 1.0, "bf16": False, "seed": 3}, words).values()
    assert values == {
        "seed": 3, "lr": 1e-3, "add_bias_linear": False, "masked_softmax_fusion": False,
        "bf16": True, "moe_layer_freq": "[0, 1]", "recompute_modules": ["mlp", "core_attn"],
    }  # fmt: skip


def test_a_vocabulary_is_known_by_its_size_or_its_files(tmp_path):
    assert not knows_vocabulary(stated_job("run", DEMO, ()))
    assert knows_vocabulary(stated_job("run", DEMO, ["--vocab-size", "100"]))
    assert knows_vocabulary(stated_job("run", DEMO, ["--tokenizer-model", str(tmp_path)]))
    assert not knows_vocabulary(stated_job("run", DEMO, ["--tokenizer-model", "/nowhere"]))


def test_data_that_are_here_are_checked_and_the_others_named(tmp_path):
    here, there = str(tmp_path / "here"), "/nowhere/there"
    _write_dataset(Path(here), tokens=[5, 6, 7, 8])
    job = stated_job("run", DEMO, ["--vocab-size", "9", "--tokenizer-model", "/nowhere/t"])
    assert check_data(job, [here, there]) == [there]
    small = stated_job("run", DEMO, ["--vocab-size", "8"])
    with pytest.raises(ValueError, match="token id 8, the vocabulary is 8"):
        check_data(small, [here])
    Path(f"{here}.bin").write_bytes(b"1234")
    with pytest.raises(ValueError, match="has 4 bytes"):
        check_data(job, [here])


def test_a_split_that_leaves_validation_nothing_is_refused(tmp_path):
    """Before the job is submitted, where the data is here: the ranks would count for ever."""
    _write_dataset(tmp_path / "here", tokens=[5, 6, 7, 8])
    words = ["--vocab-size", "9", "--data-path", str(tmp_path / "here")]
    with pytest.raises(ValueError, match=r"1 document, .* '950,50,0' leaves none for validation"):
        check_data(stated_job("run", DEMO, words), [str(tmp_path / "here")])
    assert check_data(stated_job("run", DEMO, [*words, "--eval-iters", "0"]), []) == []


def _write_dataset(prefix: Path, tokens: list[int]) -> None:
    """One document of 16-bit tokens, as megatron.core.datasets.indexed_dataset lays it out."""
    Path(f"{prefix}.bin").write_bytes(np.array(tokens, np.uint16).tobytes())
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, 1, 2)
    arrays = (np.array([len(tokens)], np.int32), np.array([0]), np.array([0, 1]))
    Path(f"{prefix}.idx").write_bytes(header + b"".join(a.tobytes() for a in arrays))


def test_half_a_dataset_is_not_one_that_is_elsewhere(tmp_path):
    Path(f"{tmp_path}/half.bin").touch()
    with pytest.raises(ValueError, match=r"half\.idx: no such file"):
        check_data(stated_job("run", DEMO, ()), [f"{tmp_path}/half"])


def test_two_sources_of_data_are_refused(tracer):
    words = ["--data-args-path", "/nowhere/list", "--train-data-path", "/nowhere/a"]
    with pytest.raises(ValueError, match="data_args_path and train_data_path are both given"):
        check(tracer, *words)
