"""Models, layouts and published runs as data: they are what they say, and Megatron accepts them.

Nothing here knows a prediction. A published run's flags are configs/cluster/gpu.yaml, then its own
model, layout and train, later ones winning; `base` in one of these names a file of configs/ to
start from. docs/PUBLISHED_RUNS.md says what the fields are.
"""

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_mone.model.run_config import CONFIG_ROOT, load_run, read_part, to_flags
from megatron_mone.planning.cost.hardware import cluster_names

PUBLISHED = sorted((Path(__file__).resolve().parents[1] / "published").glob("*.yaml"))
PLANS = sorted((CONFIG_ROOT / "plan").glob("*.yaml"))
MONE_MODELS = sorted(
    p
    for p in (CONFIG_ROOT / "model").glob("*-mone.yaml")
    if not p.stem.startswith(("demo", "prof"))
)
REQUIRED = {"kind", "source", "second_hand", "gpus", "cluster", "routing", "model", "layout",
            "train", "published"}  # fmt: skip
OPTIONAL = {"extra", "attention_flops", "assumed", "calibrates", "zipf", "peer"}
KINDS = {"step", "memory", "layer", "exposed"}
FIGURES = {"step_ms", "layer_ms", "tflops_per_gpu", "tokens_per_s_per_gpu", "mfu", "memory",
           "exposed_expert_comm"}  # fmt: skip
GIB = 2**30
BF16_WEIGHT_AND_FP32_GRADIENT = 6
FP32_WEIGHT_AND_MOMENTS = 12

# Parameters in all and per token, in billions, and how many of the two embedding tables the second
# figure counts. DeepSeek-V3 arXiv 2412.19437 (the MTP layer apart), DeepSeek-V2 arXiv 2405.04434,
# Qwen3 arXiv 2505.09388 and its model cards, OLMoE arXiv 2409.02060; the stand-ins' own aim.
SIZES = {
    "moe-671b-a37b": (671, 37, 1),
    "qwen3-235b-a22b": (235, 22, 2),
    "moe-236b-a21b": (236, 21, 1),
    "moe-30b-a3b": (30.5, 3.3, 2),
    "moe-7b-a1b": (6.9, 1.3, 2),
    "paper-2.8b": (2.8, None, 2),
    "paper-0.9b": (0.9, None, 2),
}


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


def measured_twice(path: Path) -> bool:
    """Whether a run is published both in operations and in time or tokens."""
    figures = set(read(path)["published"])
    return "tflops_per_gpu" in figures and bool({"step_ms", "tokens_per_s_per_gpu"} & figures)


def merged(row: dict[str, Any]) -> dict[str, Any]:
    """All Megatron arguments of a published run."""
    values = read(CONFIG_ROOT / "cluster" / "gpu.yaml")
    for part, folder in (("model", "model"), ("layout", "parallel"), ("train", "train")):
        own = dict(row[part])
        base = own.pop("base", None)
        values |= (read(CONFIG_ROOT / folder / f"{base}.yaml") if base else {}) | own
    return values


def moe_layers(model: dict[str, Any]) -> list[int]:
    """1 for each MoE layer of the decoder, 0 for each dense one."""
    from megatron.training.arguments import moe_freq_type

    pattern = moe_freq_type(model.get("moe_layer_freq", 1))
    if isinstance(pattern, list):
        return pattern
    return [int("num_experts" in model)] * model["num_layers"]


def attention_parameters(model: dict[str, Any]) -> int:
    hidden, heads = model["hidden_size"], model["num_attention_heads"]
    if model.get("multi_latent_attention"):
        key = model["qk_head_dim"] + model["qk_pos_emb_head_dim"]
        query = model["q_lora_rank"] * (hidden + heads * key)
        latent = hidden * (model["kv_lora_rank"] + model["qk_pos_emb_head_dim"])
        values = model["kv_lora_rank"] * heads * (model["qk_head_dim"] + model["v_head_dim"])
        return query + latent + values + heads * model["v_head_dim"] * hidden
    width = heads * model.get("kv_channels", hidden // heads)
    groups = model.get("num_query_groups", heads)
    return hidden * (2 * width + 2 * width * groups // heads)


def expert_parameters(model: dict[str, Any]) -> int:
    return 3 * model["hidden_size"] * model["moe_ffn_hidden_size"]


def shared_parameters(model: dict[str, Any]) -> int:
    return 3 * model["hidden_size"] * model.get("moe_shared_expert_intermediate_size", 0)


def parameters(model: dict[str, Any], experts: int, tables: int) -> int:
    """Weights of the model with `experts` routed experts a layer and `tables` embedding tables."""
    hidden = model["hidden_size"]
    total = tables * model["vocab_size"] * hidden
    for is_moe in moe_layers(model):
        total += attention_parameters(model)
        if is_moe:
            total += experts * expert_parameters(model) + shared_parameters(model)
            total += hidden * model["num_experts"]
        else:
            total += 3 * hidden * model["ffn_hidden_size"]
    return total


def step_flops_per_token(values: dict[str, Any], attention: str) -> float:
    """Forward and backward of one token: 6 a weight that it meets, and its scores and values."""
    hidden, length = values["hidden_size"], values["seq_length"]
    weights = parameters(values, values["moe_router_topk"], tables=1)
    layers = values["num_layers"]
    if values.get("mtp_num_layers"):
        # One more MoE layer, the projection of its two inputs, and the output layer again.
        one = parameters(values | {"num_layers": 1, "moe_layer_freq": "[1]"},
                         values["moe_router_topk"], tables=1)  # fmt: skip
        weights += one + 2 * hidden * hidden
        layers += 1
    channels = 2 * values.get("kv_channels", 0)
    if values.get("multi_latent_attention"):
        channels = values["qk_head_dim"] + values["qk_pos_emb_head_dim"] + values["v_head_dim"]
    seen = length if attention == "full" else length / 2
    return 6 * (weights + layers * seen * values["num_attention_heads"] * channels)


def close(got: float, published: float) -> bool:
    """Within 1%, or what was printed after rounding or cutting off its digits."""
    unit = 10 ** -len(str(published).partition(".")[2])
    return abs(got - published) <= 0.01 * published or -unit / 2 <= got - published < unit


@pytest.mark.parametrize("name", SIZES)
def test_models_have_the_published_number_of_parameters(name):
    model = read(CONFIG_ROOT / "model" / f"{name}.yaml")
    total, active, tables = SIZES[name]
    assert close(parameters(model, model["num_experts"], 2) / 1e9, total)
    if active is not None:
        assert close(parameters(model, model["moe_router_topk"], tables) / 1e9, active)


def test_every_model_that_plans_is_sized():
    assert {p.stem.removesuffix("-mone") for p in MONE_MODELS} == set(SIZES)


@pytest.mark.parametrize("path", MONE_MODELS, ids=lambda p: p.stem)
def test_a_model_and_its_dense_form_differ_in_mone_fields_only(path):
    mone = read_part(path, "model", path.stem)
    dense = read(path.with_name(path.name.replace("-mone", "")))
    assert {k: v for k, v in mone.items() if not k.startswith("mone_")} == dense
    assert mone["mone_neuron_ratio"] == 0.25


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_published_run_is_whole(path):
    row = read(path)
    assert set(row) - OPTIONAL == REQUIRED
    assert row["kind"] in KINDS
    assert row["routing"] in ("balanced", "skewed")
    assert row["cluster"] in cluster_names()
    assert row["source"].startswith("https://")
    assert isinstance(row["second_hand"], bool)
    assert row.get("extra") in (None, True)
    assert row.get("calibrates") in (None, True)
    assert ("zipf" in row) == (row["routing"] == "skewed")
    assert not (row.get("extra") and row.get("calibrates"))
    if "peer" in row:
        assert {"name", "step_ms", "peak_allocated"} == set(row["peer"])
    assert row["published"]
    assert set(row["published"]) <= FIGURES
    assert row["published"].get("memory", {"unit": "GiB"})["unit"] in ("GiB", "GB")
    assert all(isinstance(line, str) for line in row.get("assumed", []))
    if {"tflops_per_gpu", "mfu"} & set(row["published"]):
        assert row["attention_flops"] in ("causal", "full")


@pytest.mark.parametrize("path", filter(measured_twice, PUBLISHED), ids=lambda p: p.stem)
def test_published_figures_of_one_run_agree(path):
    """Throughput in operations over throughput in tokens is the model's operations a token."""
    row = read(path)
    figures, values = row["published"], merged(row)
    tokens = values["global_batch_size"] * values["seq_length"] / row["gpus"]
    rate = figures.get("tokens_per_s_per_gpu", tokens / figures.get("step_ms", 1) * 1e3)
    implied = figures["tflops_per_gpu"] * 1e12 / rate
    assert implied == pytest.approx(step_flops_per_token(values, row["attention_flops"]), rel=0.02)


def test_published_memory_is_that_of_the_named_rank():
    """Four MoE layers a chunk and four chunks: GiB of weights, optimizer and dropped outputs."""
    row = read(PUBLISHED[0].with_name("deepseek-v3-256-memory.yaml"))
    memory, values = row["published"]["memory"], merged(row)
    ranks, stages = values["expert_model_parallel_size"], values["pipeline_model_parallel_size"]
    layers = 16
    experts = layers * values["num_experts"] // ranks * expert_parameters(values)
    others = layers * (attention_parameters(values) + shared_parameters(values))
    held = BF16_WEIGHT_AND_FP32_GRADIENT * (experts + others) / GIB
    assert held == pytest.approx(memory["weights_and_gradients"], rel=0.005)
    replicas = row["gpus"] // stages
    state = FP32_WEIGHT_AND_MOMENTS * (experts + others / replicas) / GIB
    assert state == pytest.approx(memory["optimizer"], rel=0.005)
    # 1F1B interleaved: (P - rank - 1) * 2 + (V - 1) * P chunks before the first backward, and one.
    chunks = (stages - memory["pipeline_rank"] - 1) * 2 + 3 * stages + 1
    outputs = values["moe_router_topk"] * values["seq_length"] * values["hidden_size"] * 2
    saved = chunks * 4 * outputs / GIB
    assert saved == pytest.approx(memory["saved_by_probabilities_before_fc2"], rel=0.005)
    rows = ("weights_and_gradients", "optimizer", "activations")
    assert sum(memory[name] for name in rows) == pytest.approx(memory["total"], abs=0.05)


@pytest.fixture
def megatron_on_gpus(one_rank, monkeypatch):
    """Megatron's own argument checks, as on a machine with Transformer Engine and DeepEP."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import transformer_config
    from megatron.core.transformer.moe import moe_utils
    from megatron.training import arguments

    from megatron_mone.model import config_builder, layer_spec
    from megatron_mone.model.arguments import reading

    for module in (arguments, transformer_config):
        monkeypatch.setattr(module, "is_te_min_version", lambda *_, **__: True)
    for module in (rope_utils, moe_utils):
        for name in [n for n in vars(module) if n.startswith("fused_")]:
            monkeypatch.setattr(module, name, getattr(module, name) or object())
    monkeypatch.setattr(layer_spec, "check_packages", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    def accept(flags: list[str], world_size: int) -> argparse.Namespace:
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        args = arguments.parse_args(reading(flags))
        arguments.validate_args(args)
        args.padded_vocab_size = args.vocab_size
        config_builder.build_model_config(args)
        return args

    return accept


def flags_of(values: dict[str, Any], path: Path) -> list[str]:
    from megatron_mone.model.arguments import flag_parser

    return to_flags(values, flag_parser(), path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda p: p.stem)
def test_megatron_accepts_published_run(path, megatron_on_gpus):
    row = read(path)
    args = megatron_on_gpus(flags_of(merged(row), path), row["gpus"])
    assert args.transformer_impl == "transformer_engine"
    assert args.world_size == row["gpus"]


@pytest.mark.parametrize("path", PLANS, ids=lambda p: p.stem)
def test_megatron_accepts_plan(path, megatron_on_gpus):
    model, _, gpus = path.stem.rpartition("-")
    assert read(path)["model"] == model.removesuffix("-mone")
    assert int(gpus) >= 128
    args = megatron_on_gpus(flags_of(load_run(path), path), int(gpus))
    assert (args.mone_neuron_ratio is not None) == model.endswith("-mone")
    assert args.bf16


def test_every_model_has_a_plan_in_both_forms():
    planned = {path.stem.rpartition("-")[0] for path in PLANS}
    assert planned == {p.stem for p in MONE_MODELS} | set(SIZES)


def test_a_flag_that_megatron_does_not_know_is_named(megatron_on_gpus):
    values = merged(read(PUBLISHED[0])) | {"moe_grouped_gem": True}
    with pytest.raises(ValueError, match=r"'moe_grouped_gem' .*moe_grouped_gemm"):
        flags_of(values, PUBLISHED[0])
