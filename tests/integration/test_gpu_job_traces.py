"""Traces of GPU jobs against formulas written from the model, and against traces of CPU ranks.

A job: bf16, Transformer Engine's layers, RMSNorm, SwiGLU, rotary embedding. Bytes kept by a layer
follow Korthikanti et al. (arXiv 2205.05198, section 4.1), with fused attention, which keeps
statistics and no scores, norms fused into linears, and SwiGLU.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from megatron_mone.planning.tracing.trace import Trace

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
LAYERS, H, HEADS, F, VOCABULARY, S, B = 6, 64, 4, 128, 256, 32, 2
D = H // HEADS
TOKENS = S * B
BF16, FP32 = 2, 4
ANGLES = S * D * FP32  # of the rotary embedding, shared by all layers

MODEL = (
    *("--num-layers", LAYERS, "--hidden-size", H, "--num-attention-heads", HEADS),
    *("--ffn-hidden-size", F, "--seq-length", S, "--max-position-embeddings", S),
    *("--swiglu", "--normalization", "RMSNorm", "--disable-bias-linear"),
    *("--position-embedding-type", "rope", "--hidden-dropout", 0, "--attention-dropout", 0),
    *("--vocab-size", VOCABULARY, "--make-vocab-size-divisible-by", 1),
    *("--untie-embeddings-and-output-weights", "--tokenizer-type", "NullTokenizer", "--mock-data"),
    *("--micro-batch-size", B, "--global-batch-size", 8 * B, "--train-iters", 100, "--lr", 1e-3),
    *("--lr-warmup-iters", 10, "--bf16", "--use-distributed-optimizer"),
)
PP3 = ("--pipeline-model-parallel-size", 3)
TP2 = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
SELECTIVE = ("--recompute-granularity", "selective", "--recompute-modules")
FULL = ("--recompute-granularity", "full", "--recompute-method", "uniform",
        "--recompute-num-layers", 1)  # fmt: skip
Q_RANK, KV_RANK, NOPE, ROPE, VALUE = 48, 32, 16, 8, 24
MLA = (
    *("--multi-latent-attention", "--qk-layernorm", "--q-lora-rank", Q_RANK),
    *("--kv-lora-rank", KV_RANK, "--qk-head-dim", NOPE, "--qk-pos-emb-head-dim", ROPE),
    *("--v-head-dim", VALUE),
)
FP8 = ("--fp8-format", "e4m3", "--fp8-recipe", "blockwise")
LOCAL = (
    *("--transformer-impl", "local", "--distributed-backend", "gloo", "--no-rope-fusion"),
    *("--no-gradient-accumulation-fusion", "--no-masked-softmax-fusion"),
)
STOCK_EXPERTS = (
    *("--num-experts", 4, "--moe-router-topk", 2, "--moe-ffn-hidden-size", F, "--moe-grouped-gemm"),
    *("--moe-token-dispatcher-type", "alltoall"),
)
MONE = (*STOCK_EXPERTS, "--mone-neuron-ratio", 0.25)
PACKED = ("--dataloader-inter-document-masking", "--micro-batch-size", 1)
STATES, CHANNELS, GROUPS = 16, 8, 4
MAMBA = (
    *("--mamba-state-dim", STATES, "--mamba-head-dim", CHANNELS, "--mamba-num-groups", GROUPS),
    "--hybrid-layer-pattern",
)
OFFLOADED = ("--optimizer-cpu-offload", "--use-precision-aware-optimizer")
HANDED_OVER = (
    *("--fine-grained-activation-offloading", "--min-offloaded-tensor-size", 1),
    "--offload-modules",
)
TRITON = (*MONE, "--mone-backend", "triton")
# Layouts whose collectives Megatron's own layers on CPU ranks launch, too.
LAYOUTS = {
    "DP2": ((), 2, 1),
    "TP2": (TP2, 2, 1),
    "PP2": (("--pipeline-model-parallel-size", 2), 2, 1),
    "CP2": (("--context-parallel-size", 2), 2, 0),
    "hybrid TP2": ((*TP2, *MAMBA, "M*-"), 2, 1),
}
PATCHES = {
    "MoNE": ((*MONE, *SELECTIVE, "moe", "--mone-ng-loss-type", "bias"), 2, 0),
    "keep-all": ((*MONE, "--mone-neuron-ratio", 1), 2, 0),
    "ZeRO 2": ((*MONE, "--engine", "deepspeed", "--zero-stage", 2), 2, 0),
}
# name: (flags, world size, rank); rank 1 of 3 stages has layers alone
GPU = {
    "middle": (PP3, 3, 1),
    "middle TP2": ((*PP3, *TP2), 6, 2),
    "middle CP2": ((*PP3, "--context-parallel-size", 2), 6, 2),
    "middle core_attn": ((*PP3, *SELECTIVE, "core_attn"), 3, 1),
    "middle mlp": ((*PP3, *SELECTIVE, "mlp"), 3, 1),
    "middle full": ((*PP3, *FULL), 3, 1),
    "middle fp8": ((*PP3, *FP8), 3, 1),
    "middle fp8 weights": ((*PP3, *FP8, "--fp8-param-gather"), 3, 1),
    "middle Mamba": ((*PP3, *MAMBA, "*|MM|*"), 3, 1),
    "hybrid MoNE": ((*MONE, *MAMBA, "M*E"), 2, 0),
    "hybrid stock": ((*STOCK_EXPERTS, *MAMBA, "M*E"), 2, 0),
    "MLA": ((*PP3, *MLA), 3, 1),
    "MLA mla_up_proj": ((*PP3, *MLA, *SELECTIVE, "mla_up_proj"), 3, 1),
    "MLA layernorm": ((*PP3, *MLA, *SELECTIVE, "layernorm"), 3, 1),
    "moments": (
        ("--use-precision-aware-optimizer", "--exp-avg-dtype", "bf16",
         "--exp-avg-sq-dtype", "bf16"), 2, 0,
    ),
    "packed": ((*PP3, *PACKED), 3, 1),
    "packed MLA": ((*PP3, *MLA, *PACKED), 3, 1),
    "experts": ((*TRITON, *PP3), 3, 1),
    "experts offloaded": ((*TRITON, *PP3, *HANDED_OVER, "expert_fc1", "moe_act"), 3, 1),
    "input offloaded": ((*TRITON, *PP3, *HANDED_OVER, "expert_fc1"), 3, 1),
    "attention offloaded": ((*PP3, *HANDED_OVER, "core_attn"), 3, 1),
    "offloaded": (OFFLOADED, 2, 1),
    "half offloaded": ((*OFFLOADED, "--optimizer-offload-fraction", 0.5), 2, 1),
    "MTP stage last": (
        ("--mtp-num-layers", 1, "--pipeline-model-parallel-size", 4,
         "--pipeline-model-parallel-layout", "Ett|tttt|m|L", "--overlap-grad-reduce",
         "--overlap-param-gather"), 4, 3,
    ),
    "refused": (("--tensor-model-parallel-size", 3), 3, 0),
    "refused fusion": (
        ("--cross-entropy-loss-fusion", "--cross-entropy-fusion-impl", "te"), 1, 0,
    ),
    **LAYOUTS,
    **PATCHES,
    "flex": (
        (*MONE, "--moe-token-dispatcher-type", "flex", "--mone-backend", "triton",
         "--expert-model-parallel-size", 2), 2, 0,
    ),
    "NCCL EP": (
        (*MONE, "--moe-token-dispatcher-type", "flex", "--moe-flex-dispatcher-backend", "ncclep",
         "--moe-expert-rank-capacity-factor", 2.0, "--mone-backend", "triton",
         "--expert-model-parallel-size", 2), 2, 0,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """KIND-NAME.json of every case."""
    folder = tmp_path_factory.mktemp("gpu-traces")
    for kind, cases, more in (("gpu", GPU, ()), ("cpu", {**LAYOUTS, **PATCHES}, LOCAL)):
        written = {
            name: ([str(word) for word in (*MODEL, *more, *flags)], world_size, rank)
            for name, (flags, world_size, rank) in cases.items()
        }
        (folder / f"cases-{kind}.json").write_text(json.dumps(written))
        subprocess.run(
            [sys.executable, "-m", "tests.unit.planning.gpu_traces", str(folder), kind],
            check=True, capture_output=True, cwd=ROOT, timeout=300,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
    return folder


def of(folder, name, kind="gpu") -> Trace:
    failure = folder / f"{kind}-{name}.txt"
    assert not failure.exists(), failure.read_text()
    return Trace.read(folder / f"{kind}-{name}.json")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("gpu", "flex"),
        ("gpu", "NCCL EP"),
        *((kind, name) for kind in ("gpu", "cpu") for name in PATCHES),
    ],
)
def test_no_name_of_our_own_modules_is_patched(folder, kind, name):
    """Megatron and torch have stand-ins while a job is traced; our modules are handed theirs."""
    assert of(folder, name, kind).ops
    assert json.loads((folder / f"{kind}-{name}.patched").read_text()) == []


def layer_bytes():
    """Kept by a layer for one token: input, normalised input and 1 / deviation of both blocks; the
    copy of v out of the joint q, k and v, q and k rotated, the output and its statistics; the input
    and output of SwiGLU."""
    norms = 2 * (2 * H * BF16 + FP32)
    attention = (H + 2 * H + H) * BF16 + HEADS * FP32
    return norms + attention + (2 * F + F) * BF16


STAGE = LAYERS // 3 * TOKENS  # layers x tokens of a stage


def test_a_stage_keeps_the_formula(folder):
    assert of(folder, "middle").memory.activations == STAGE * layer_bytes() + ANGLES


def test_tensor_and_sequence_parallel_ranks_share_it(folder):
    assert of(folder, "middle TP2").memory.activations == STAGE * layer_bytes() // 2 + ANGLES


def test_context_parallel_ranks_share_it(folder):
    # Of k and v the copy that was sent is kept, in place of rotated k and of v.
    found = of(folder, "middle CP2").memory.activations
    assert found == STAGE * layer_bytes() // 2 + ANGLES // 2


def test_packed_documents_are_kept_as_one_sample_is(folder):
    memory = of(folder, "packed").memory
    assert memory.activations == STAGE // B * layer_bytes() + ANGLES
    assert of(folder, "packed").flops == of(folder, "middle").flops // B
    assert of(folder, "packed MLA").flops == of(folder, "MLA").flops // B


@pytest.mark.parametrize(
    ("name", "dropped", "added"),
    [
        # The output is the projection's input, and stays, as do v's q and k, of whose joint result
        # it is a part. The kind of mask becomes a tensor.
        ("middle core_attn", HEADS * FP32 - 2 * H * BF16, LAYERS // 3 * 4),
        ("middle mlp", H * BF16 + FP32 + 3 * F * BF16, 0),
        ("middle full", layer_bytes() - H * BF16, 0),
    ],
)
def test_recompute_drops_what_it_names(folder, name, dropped, added):
    trace, whole = of(folder, name), of(folder, "middle")
    assert trace.memory.activations == whole.memory.activations - STAGE * dropped + added
    assert trace.flops > whole.flops or name == "middle core_attn"
    again = {op.name for op in trace.ops if op.pass_ == "recompute"}
    expected = {"middle core_attn": "fused.attention", "middle mlp": "fused.swiglu",
                "middle full": "fused.rope"}  # fmt: skip
    assert expected[name] in again
    assert not any(op.pass_ == "recompute" for op in whole.ops)


def test_fp8_halves_what_only_products_keep(folder):
    def scales(width):
        return -(-width // 128) * FP32

    # Both normalised inputs and the input of fc2 in 1 byte; the attention's output is kept in 16
    # bits for itself, and is what the projection keeps.
    saved = 2 * H * (BF16 - 1) + F * (BF16 - 1) - 2 * scales(H) - scales(F)
    whole = of(folder, "middle").memory.activations
    trace = of(folder, "middle fp8")
    assert trace.memory.activations == whole - STAGE * saved
    products = [op for op in trace.ops if op.name.startswith("fused.linear")]
    assert {op.dtype for op in products} == {"float8_e4m3fn"}
    assert trace.flops == of(folder, "middle").flops


def test_weights_in_fp8(folder):
    matrices = LAYERS // 3 * (4 * H * H + 3 * H * F)
    norms = LAYERS // 3 * 2 * H
    blocks = (
        LAYERS
        // 3
        * sum(-(-n // 128) * -(-k // 128) for n, k in ((3 * H, H), (H, H), (2 * F, H), (H, F)))
    )
    copies = 2 * (matrices + blocks * FP32)
    memory = of(folder, "middle fp8").memory
    assert memory.weights == (matrices + norms) * BF16 + copies
    alone = of(folder, "middle fp8 weights").memory
    # Megatron pads its buffers to whole shards of 128 or 256 bytes.
    assert alone.weights == pytest.approx(norms * BF16 + copies, abs=1024)
    assert alone.gradients == pytest.approx((matrices + norms) * FP32, abs=1024)
    assert memory.activations == alone.activations


def test_mamba_layers(folder):
    """Kept: input, its norm and 1 / deviation; the projected input as the scan has it; the ungated
    output, what the norm behind it makes of the gated one, and that. Multiplied: projections, and
    a scan in chunks as long as the sequence, whose backward pass makes scores and states again."""
    width, heads = 2 * H, 2 * H // CHANNELS
    projected = 2 * width + 2 * GROUPS * STATES + heads
    token = 2 * H * BF16 + FP32 + projected * BF16 + 3 * width * BF16 + GROUPS * FP32
    decay_and_bias = 3 * heads * FP32
    trace = of(folder, "middle Mamba")
    assert trace.memory.activations == 2 * (TOKENS * token + decay_and_bias)
    linears = H * projected + width * H
    states, outputs, scores = width * STATES, S * width, S * GROUPS * STATES
    forward = 2 * states + outputs + scores
    backward = (states + scores) + 4 * states + 3 * outputs + 2 * scores
    assert trace.flops == 2 * 2 * TOKENS * (3 * linears + forward + backward)
    names = {op.name for op in of(folder, "hybrid MoNE").ops}
    assert {"fused.mamba_outputs", "fused.attention"} <= names
    assert of(folder, "hybrid MoNE").rows == {3: 2 * TOKENS}
    stock = [op.name for op in of(folder, "hybrid stock").ops]
    assert "fused.mamba_outputs" in stock
    assert stock.count("fused.grouped_gemm") == 2  # fc1 and fc2


def test_latent_attention(folder):
    """A layer's norm, both down and both up projections, and heads of two sizes."""
    query, key = HEADS * (NOPE + ROPE), HEADS * (NOPE + ROPE)
    value = HEADS * VALUE
    whole = of(folder, "MLA")
    up = Q_RANK * query + KV_RANK * HEADS * (NOPE + VALUE)
    down = H * Q_RANK + H * (KV_RANK + ROPE)
    linears = LAYERS // 3 * (up + down + value * H + 3 * H * F)
    scores = LAYERS // 3 * B * HEADS * S * S // 2 * 2
    forward = 2 * linears * TOKENS + scores * (NOPE + ROPE + VALUE)
    backward = 4 * linears * TOKENS + scores * (3 * (NOPE + ROPE) + 2 * VALUE)
    assert whole.flops == forward + backward
    dropped = of(folder, "MLA mla_up_proj").memory.activations - whole.memory.activations
    # q, k, v and what the norms of the up projections keep beside their inputs.
    norms = (Q_RANK + KV_RANK) * BF16 + 2 * FP32
    assert dropped == -STAGE * ((query + key + value) * BF16 + norms)
    # The norm before the down projections is a module of its own; its statistics go with it.
    less = of(folder, "MLA layernorm").memory.activations - whole.memory.activations
    assert less == -STAGE * (H * BF16 + FP32)


def test_operations_are_six_a_parameter_and_token(folder):
    """6 N D (arXiv 2001.08361) with N without the embedding, and attention's products, whose
    backward pass multiplies the scores again."""
    trace = of(folder, "DP2")
    parameters = LAYERS * (4 * H * H + 3 * H * F) + VOCABULARY * H
    attention = LAYERS * (2 + 5) * 2 * B * HEADS * D * S * S // 2
    assert trace.flops == 6 * parameters * TOKENS + attention


def test_moments_of_16_bits(folder):
    default, aware = of(folder, "DP2").memory, of(folder, "moments").memory
    parameters = LAYERS * (4 * H * H + 3 * H * F + 2 * H) + 2 * VOCABULARY * H + H
    shard = parameters / 2
    # fp32 master weights and two fp32 moments; the lower halves of fp32, and two of bf16
    assert default.optimizer == pytest.approx(12 * shard, rel=0.01)
    assert aware.optimizer == pytest.approx(6 * shard, rel=0.01)
    assert default.weights == pytest.approx(2 * parameters, rel=0.01)
    assert default.gradients == pytest.approx(4 * parameters, rel=0.01)


@pytest.mark.parametrize("name", ["experts offloaded", "input offloaded", "attention offloaded"])
def test_activations_on_the_host(folder, name):
    """Of two layers the last one's stay, whose backward pass begins at once."""
    rows = 2 * TOKENS  # of two experts a token
    experts_input = rows * H * BF16
    # gate and up of a quarter of the neurons, a bit of every neuron, the probability
    kept = rows * (2 * F // 4 * BF16 + F // 8 + BF16)
    # q, k, v and the output, which the projection keeps; statistics
    attention = TOKENS * (4 * H * BF16 + HEADS * FP32)
    sizes = {"experts offloaded": experts_input + kept, "input offloaded": experts_input,
             "attention offloaded": attention}  # fmt: skip
    trace = of(folder, name)
    whole = of(folder, "middle" if name.startswith("att") else "experts")
    crossed = Counter()
    for one in trace.ops:
        crossed[one.name, one.pass_] += one.count * one.bytes_read
    assert crossed["link.to_host", "forward"] == crossed["link.to_device", "backward"]
    assert crossed["link.to_host", "forward"] == sizes[name]
    if name != "attention offloaded":  # what its projection keeps is freed, too
        assert whole.memory.activations - trace.memory.activations == sizes[name]
    assert trace.flops == whole.flops
    assert trace.memory.backward_peak <= whole.memory.backward_peak


@pytest.mark.parametrize(("name", "share"), [("offloaded", 1.0), ("half offloaded", 0.5)])
def test_an_optimizer_on_the_host(folder, name, share):
    """fp32 masters, two moments and a copy of the gradients are there, of whole parameters; the
    gradients cross, and parameters come back in 16 bits."""
    trace = of(folder, name)
    memory, default = trace.memory, of(folder, "DP2").memory
    shard = default.optimizer // 12
    there = memory.host_optimizer // 16
    assert share * shard <= there <= (share + 0.2) * shard
    assert memory.host_optimizer == 16 * there
    assert memory.optimizer - 4 == 12 * (shard - there)  # 4: of the loss scale
    assert (memory.weights, memory.gradients) == (default.weights, default.gradients)
    moved = Counter()
    for one in trace.ops:
        moved[one.name] += one.count * one.bytes_read
    crossed = moved["link.to_host"], moved["link.to_device"], moved["host.adam"]
    assert crossed == (FP32 * there, BF16 * there, 4 * FP32 * there)
    assert moved["fused.adam"] == (shard - there) * 4 * FP32


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_are_those_of_cpu_ranks(folder, name):
    """Same kinds, bytes and calls; but of context parallelism, which CPU ranks do otherwise."""
    gpu, cpu = of(folder, name), of(folder, name, "cpu")

    def outside(trace):
        return {key: found for key, found in trace.traffic().items() if not key.endswith(" cp")}

    assert outside(gpu) == outside(cpu)
    assert len(outside(gpu)) > 3
    assert gpu.memory.weights == cpu.memory.weights
    assert gpu.memory.gradients == cpu.memory.gradients
    assert gpu.memory.activations < cpu.memory.activations  # which keep scores


def test_what_travels_the_ring(folder):
    sent = of(folder, "CP2").traffic()["send cp"]
    kv = TOKENS // 2 * 2 * H * BF16
    assert sent == (3 * LAYERS, 3 * LAYERS * kv)  # forward k and v; backward them, then gradients


def test_every_kernel_of_a_dense_layer_is_one_op(folder):
    names = {op.name for op in of(folder, "middle").ops if op.phase in ("attention", "dense MLP")}
    assert {name for name in names if name.startswith("aten")} <= {
        "aten.add",  # of gradients of the residual
        "aten.add_",  # of norm gradients to the gradient buffer
        "aten.cat",  # dq, dk, dv
        "aten.clone",  # v
    }
    assert "fused.attention" in names


def test_behind_the_stage_of_an_mtp_layer_both_depths_arrive(folder):
    trace = of(folder, "MTP stage last")
    heads = [op for op in trace.ops if op.name == "fused.linear"]
    assert sum(op.count for op in heads) == 2  # of the model's and of the next depth's token
    state = B * S * H * BF16
    sent = [one.bytes for one in trace.collectives if one.kind == "send" and one.bytes > 100]
    assert sent == [2 * state]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("refused", "must be a multiple of tensor"), ("refused fusion", "disabled due to stability")],
)
def test_megatron_refuses_in_one_line(folder, name, sentence):
    found = (folder / f"gpu-{name}.txt").read_text()
    assert sentence in found
    assert "\n" not in found
