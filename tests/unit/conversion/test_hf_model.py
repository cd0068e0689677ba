"""A MoNE model in transformers computes what Megatron does, and lives as a folder."""

import json
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.conversion.hf_model import modeling_mone
from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.hf_model.folder import AUTO_MAP, copy_code, has_own_code
from megatron_mone.conversion.hf_model.modeling_mone import MoNEForCausalLM, NeuronChoice
from megatron_mone.kernels.neuron_selection import NeuronSelector
from tests.conftest import mone_config

pytestmark = pytest.mark.usefixtures("one_thread")

VOCABULARY = 61
MEGATRON = dict(
    num_layers=2, hidden_size=32, num_attention_heads=4, num_moe_experts=8, moe_router_topk=2,
    moe_ffn_hidden_size=48, ffn_hidden_size=40, normalization="RMSNorm", layernorm_epsilon=1e-5,
    persist_layer_norm=False, moe_router_dtype="fp32", hidden_dropout=0.0, attention_dropout=0.0,
)  # fmt: skip
OURS = dict(
    vocab_size=VOCABULARY, hidden_size=32, intermediate_size=40, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=64, moe_intermediate_size=48, num_experts=8,
    num_experts_per_tok=2, mone_neurons_per_token=12,
)  # fmt: skip
LATENT = (
    dict(latent=True, kv_lora_rank=16, q_lora_rank=None, qk_head_dim=8, qk_pos_emb_head_dim=4,
         v_head_dim=12),
    dict(kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12),
)  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 32, "mscale": 1.0,
        "mscale_all_dim": 0.7, "beta_fast": 32.0, "beta_slow": 1.0}  # fmt: skip
# name: (fields of Megatron's config, arguments of its GPTModel, fields of ours)
CASES: dict[str, tuple[dict, dict, dict]] = {
    "plain": ({}, {}, {}),
    "blocks": (dict(mone_neuron_block=3), {}, dict(mone_neuron_block=3)),
    "groups": (dict(mone_neuron_groups=4), {}, dict(mone_neuron_groups=4)),
    "threshold": (dict(mone_selection="threshold", mone_threshold=0.3),
                  {}, dict(mone_selection="threshold", mone_threshold=0.3)),
    "softmax-gate": (dict(mone_activation="softmax"), {}, dict(mone_activation="softmax")),
    "relu-gate, some layers choose": (dict(mone_activation="relu", mone_layer_freq=[0, 1]), {},
                                      dict(mone_activation="relu", mone_layers=[1])),
    "squared-relu-gate": (dict(mone_activation="squared_relu"), {},
                          dict(mone_activation="squared_relu")),
    "selection-bias": (dict(mone_ng_loss_type="bias"), {}, dict(mone_selection_bias=True)),
    "shared-expert": (dict(moe_shared_expert_intermediate_size=20), {},
                      dict(shared_expert_intermediate_size=20)),
    "gated-shared-expert": (
        dict(moe_shared_expert_intermediate_size=20, moe_shared_expert_gate=True), {},
        dict(shared_expert_intermediate_size=20, shared_expert_gate=True)),
    "dense-first-layer": (dict(moe_layer_freq=[0, 1]), {},
                          dict(mlp_layer_types=["dense", "sparse"])),
    "attention": (dict(num_query_groups=2, add_qkv_bias=True, qk_layernorm=True, kv_channels=16),
                  {}, dict(num_key_value_heads=2, attention_bias=True, qk_norm=True, head_dim=16)),
    "norms over all heads": (
        dict(num_query_groups=2, qk_layernorm=True, mone_qk_norm_all_heads=True), {},
        dict(num_key_value_heads=2, qk_norm=True, qk_norm_all_heads=True)),
    "rope": (dict(kv_channels=16), dict(rotary_base=500, rotary_percent=0.5),
             dict(head_dim=16, rope_parameters={"rope_theta": 500, "partial_rotary_factor": 0.5})),
    "llama3": ({}, dict(rope_scaling=True, rope_scaling_factor=4.0, rotary_base=10**7),
               dict(rope_parameters={
                   "rope_type": "llama3", "rope_theta": 10**7, "factor": 4.0,
                   "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                   "original_max_position_embeddings": 8192})),
    "softmax-before": (dict(moe_router_pre_softmax=True, moe_router_topk_scaling_factor=2.5), {},
                       dict(router_pre_softmax=True, routed_scaling_factor=2.5)),
    "sigmoid-router": (
        dict(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True,
             moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk=4,
             moe_router_topk_scaling_factor=1.5), {},
        dict(router_score_function="sigmoid", router_expert_bias=True, n_group=4, topk_group=2,
             num_experts_per_tok=4, routed_scaling_factor=1.5)),
    "tied": ({}, dict(share_embeddings_and_output_weights=True), dict(tie_word_embeddings=True)),
    "latent": ({**LATENT[0], "rope_type": "rope"}, {}, LATENT[1]),
    "latent, compressed queries, yarn": (
        {**LATENT[0], "q_lora_rank": 20, "qk_layernorm": True, "rope_type": "yarn",
         "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 32, "mscale": 1.0,
         "mscale_all_dim": 0.7}, {},
        {**LATENT[1], "q_lora_rank": 20, "qk_norm": True, "rope_parameters": YARN}),
}  # fmt: skip


def megatron_model(fields, arguments):
    """A GPTModel whose numbers are large enough that every part matters."""
    from megatron.core.models.gpt import GPTModel

    from megatron_mone.model.layer_spec import mone_layer_spec

    kept = dict(mone_neuron_ratio=None, mone_neurons_per_token=12)
    config = mone_config(**{**MEGATRON, **kept, **fields})
    model = GPTModel(
        config, mone_layer_spec(config), vocab_size=VOCABULARY, max_sequence_length=64,
        position_embedding_type="rope",
        **{"share_embeddings_and_output_weights": False, **arguments},
    ).eval()  # fmt: skip
    for tensor in filter(torch.is_floating_point, (*model.parameters(), *model.buffers())):
        norm = tensor.dim() == 1 and bool((tensor == 1).all())
        tensor.data.normal_(float(norm), 0.25)
    return model


ATTENTION = {
    "linear_proj": "o_proj", "q_layernorm": "q_norm", "k_layernorm": "k_norm",
    "linear_q_proj": "q_proj", "linear_kv_down_proj": "kv_a_proj_with_mqa",
    "kv_layernorm": "kv_a_layernorm", "linear_kv_up_proj": "kv_b_proj",
    "linear_q_down_proj": "q_a_proj", "linear_q_up_proj": "q_b_proj",
}  # fmt: skip
MLP = {
    "router.weight": "gate.weight", "router.expert_bias": "gate.e_score_correction_bias",
    "experts.neuron_bias": "experts.neuron_bias",
    "shared_experts.gate_weight": "shared_expert_gate.weight",
}  # fmt: skip
REST = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight", "output_layer.weight": "lm_head.weight",
}  # fmt: skip


def converted(model, config):
    """Our state of a Megatron model's."""
    found = {}
    for name, value in model.state_dict().items():
        if value is None or name.endswith("_extra_state"):
            continue
        if name in REST:
            found[REST[name]] = value
            continue
        _, _, layer, part, rest = name.split(".", 4)
        here = f"model.layers.{layer}."
        if part == "input_layernorm":
            found[f"{here}input_layernorm.weight"] = value
        elif part == "pre_mlp_layernorm":
            found[f"{here}post_attention_layernorm.weight"] = value
        elif part == "self_attention":
            module, kind = rest.split(".")
            if module == "linear_qkv":
                for letter, piece in zip("qkv", split_qkv(value, config), strict=True):
                    found[f"{here}self_attn.{letter}_proj.{kind}"] = piece
            else:
                latent = config.kv_lora_rank and module == "q_layernorm"
                there = "q_a_layernorm" if latent else ATTENTION[module]
                found[f"{here}self_attn.{there}.{kind}"] = value
        elif rest == "experts.linear_fc1":
            found[f"{here}mlp.experts.gate_up_proj"] = value.flatten(1, 2)
        elif rest == "experts.linear_fc2":
            found[f"{here}mlp.experts.down_proj"] = value.mT
        elif "local_experts" in rest:  # of a stock layer: all at once, in the order of experts
            there = "gate_up_proj" if "linear_fc1" in rest else "down_proj"
            whole = found.get(f"{here}mlp.experts.{there}", value[:0].new_empty(0, *value.shape))
            found[f"{here}mlp.experts.{there}"] = torch.cat((whole, value[None]))
        elif rest.endswith("linear_fc1.weight"):
            for half, piece in zip(("gate", "up"), value.chunk(2), strict=True):
                there = rest.replace("linear_fc1", f"{half}_proj")
                found[f"{here}mlp.{there}"] = piece
        elif rest.endswith("linear_fc2.weight"):
            found[f"{here}mlp.{rest.replace('linear_fc2', 'down_proj')}"] = value
        elif "local_tokens" not in rest:
            found[f"{here}mlp.{MLP[rest]}"] = value
    return found


def split_qkv(value, config):
    """q, k and v, which Megatron holds by group of heads."""
    groups, size = config.num_key_value_heads, config.head_dim
    shared = config.num_attention_heads // groups
    parts = value.unflatten(0, (groups, -1)).split([shared * size, size, size], dim=1)
    return [part.flatten(0, 1) for part in parts]


def our_model(**fields):
    """A model of ours with numbers that matter."""
    model = MoNEForCausalLM(MoNEConfig(**{**OURS, **fields})).eval()
    for name, tensor in model.state_dict().items():
        tensor.normal_(float("norm" in name), 0.25)
    return model


def tokens(rows=2, length=11):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.manual_seed(4))


@pytest.fixture
def plain(monkeypatch):
    """Without megatron-mone's kernels."""
    monkeypatch.setattr(modeling_mone, "native", None)


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("case", CASES)
def test_logits_are_megatrons(case):
    """Within 1e-4 in float32, by either path: logits here are around 5."""
    fields, arguments, ours = CASES[case]
    torch.manual_seed(3)
    theirs = megatron_model(fields, arguments)
    model = MoNEForCausalLM(MoNEConfig(**{**OURS, **ours})).eval()
    state = converted(theirs, model.config)
    missing, unexpected = model.load_state_dict(state, strict=False)
    tied = model.config.tie_word_embeddings
    assert (missing, unexpected) == (["lm_head.weight"] if tied else [], [])
    ids = tokens()
    with torch.no_grad():
        wanted = theirs(ids, torch.arange(ids.shape[1])[None], None)
        assert wanted.abs().mean() > 0.5
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_mone, "native", None)
        torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)


DTYPES = [torch.float32, torch.bfloat16]
THREE = st.lists(st.integers(1, 6), min_size=3, max_size=3)


@st.composite
def choices(draw):
    groups, block, size = draw(st.sampled_from([1, 2, 4])), draw(st.integers(1, 5)), 6
    few, kept, most = (groups * block * n for n in sorted(draw(THREE)))
    threshold = draw(st.sampled_from([None, 0.2, 0.9]))
    bounds = dict(
        mone_selection="threshold", mone_threshold=threshold, mone_min_neurons_per_token=few,
        mone_max_neurons_per_token=draw(st.sampled_from([most, None])),
    )  # fmt: skip
    return dict(
        moe_intermediate_size=groups * block * size, mone_neurons_per_token=kept,
        mone_neuron_groups=groups, mone_neuron_block=block, **(bounds if threshold else {}),
    ), draw(st.integers(0, 2**20)), draw(st.sampled_from(DTYPES))  # fmt: skip


@settings(max_examples=100)
@given(choices(), st.booleans())
def test_the_choice_of_neurons_is_that_of_training(case, biased):
    """To the bit: ties of few distinct values and of bfloat16, NaN, infinity, rows of zeros, and
    blocks of the same values in other orders, whose sums differ by rounding alone."""
    fields, seed, dtype = case
    config = MoNEConfig(**{**OURS, **fields})
    low, high = config.selection_bounds
    theirs = NeuronSelector(
        config.mone_selection, low, high, config.mone_threshold, config.mone_neuron_groups,
        config.mone_neuron_block,
    )  # fmt: skip
    torch.manual_seed(seed)
    gate_NF = torch.randn(9, config.moe_intermediate_size).to(dtype)
    gate_NF[1:4] = gate_NF[1:4].sign()
    gate_NF[4] = 0
    gate_NF[5, ::3], gate_NF[6, 1::4] = torch.nan, -torch.inf
    block = config.mone_neuron_block
    blocks = [gate_NF[7, :block][torch.randperm(block)] for _ in gate_NF[7, ::block]]
    gate_NF[7] = torch.cat(blocks)
    bias_NF = torch.randn_like(gate_NF, dtype=torch.float32) if biased else None
    assert torch.equal(NeuronChoice(config, False)(gate_NF, bias_NF), theirs(gate_NF, bias_NF))


SHAPES = {
    "topk": {},
    "blocks of groups": dict(mone_neuron_groups=2, mone_neuron_block=3),
    "threshold": dict(mone_selection="threshold", mone_threshold=0.4),
    "bias": dict(mone_selection_bias=True, mone_activation="gelu"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_native_kernels_compute_what_torch_does(shape, monkeypatch):
    """Where no gradient is asked for; and no weight is seen to change."""
    model, ids = our_model(**SHAPES[shape]), tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    calls, run = [], modeling_mone.native.grouped_mlp_with_gates
    monkeypatch.setattr(
        modeling_mone.native, "grouped_mlp_with_gates",
        lambda *args, **named: calls.append(named["backend"]) or run(*args, **named),
    )  # fmt: skip
    with torch.no_grad():
        found = model(ids).logits
        assert calls == ["cpu", "cpu"]
        monkeypatch.setattr(modeling_mone, "native", None)
        torch.testing.assert_close(found, model(ids).logits, rtol=0, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_a_model_that_ran_on_native_kernels_is_saved_and_trained(tmp_path):
    """Their layout of weights is in nobody's way, inference mode or not."""
    model, ids = our_model(), tokens()
    with torch.inference_mode():
        wanted = model(ids).logits.clone()
    experts = model.model.layers[0].mlp.experts
    assert experts.down_proj.stride(1) == 1
    model.save_pretrained(tmp_path)
    again = MoNEForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, wanted, rtol=0, atol=1e-4)
    model(ids, labels=ids).loss.backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.isfinite(model(ids).logits).all()
    again(ids, labels=ids).loss.backward()
    torch.testing.assert_close(
        experts.down_proj.grad, again.model.layers[0].mlp.experts.down_proj.grad
    )


def test_it_trains_and_unchosen_neurons_get_no_gradient():
    """With gradients torch computes it all; recomputed layers give the same."""
    model, ids = our_model(mone_neurons_per_token=1, num_experts=1, num_experts_per_tok=1), tokens()
    model(ids[:1, :2], labels=ids[:1, :2]).loss.backward()
    experts = model.model.layers[0].mlp.experts
    neurons = experts.down_proj.grad[0].abs().sum(dim=0) > 0
    assert 1 <= neurons.sum() <= 2  # two tokens keep a neuron each
    whole = experts.gate_up_proj.grad.clone()
    model.zero_grad()
    model.train()
    model.gradient_checkpointing_enable()
    model(ids[:1, :2], labels=ids[:1, :2]).loss.backward()
    torch.testing.assert_close(experts.gate_up_proj.grad, whole)


def test_transformers_own_implementations_of_experts_choose_too(plain):
    model, ids = our_model(), tokens()
    with torch.no_grad():
        wanted = model(ids).logits
        for name in ("grouped_mm", "batched_mm"):
            model.set_experts_implementation(name)
            torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="'grouped_mm' is not allowed with mone_selection_bias"):
        our_model(mone_selection_bias=True).set_experts_implementation("grouped_mm")


@pytest.mark.parametrize(
    "fields", [dict(num_key_value_heads=2), LATENT[1]], ids=["shared", "latent"]
)
def test_a_cache_changes_no_token(fields):
    """Nor does padding on the left, nor attention written out."""
    model, ids = our_model(**fields), tokens(1, 7)
    options = dict(do_sample=False, max_new_tokens=8, pad_token_id=0)
    wanted = model.generate(ids, use_cache=False, **options)
    assert wanted.shape == (1, 15)
    assert torch.equal(model.generate(ids, use_cache=True, **options), wanted)
    padded = torch.cat((torch.zeros(1, 3, dtype=torch.long), ids), dim=1)
    found = model.generate(padded, attention_mask=(torch.arange(10) >= 3).long()[None], **options)
    assert torch.equal(found[:, 3:], wanted)
    model.set_attn_implementation("eager")
    assert torch.equal(model.generate(ids, **options), wanted)


def test_router_logits_states_and_attentions_are_recorded():
    model, ids = our_model(attn_implementation="eager"), tokens()
    output = model(
        ids, output_hidden_states=True, output_attentions=True, output_router_logits=True
    )
    assert [one.shape for one in output.router_logits] == [(22, 8)] * 2
    assert [one.shape for one in output.attentions] == [(2, 4, 11, 11)] * 2
    assert len(output.hidden_states) == 3


def test_a_folder_runs_with_neither_this_package_nor_a_cache(tmp_path):
    """config.json, weights and two files: another process loads them as remote code."""
    model, ids = our_model(mone_selection_bias=True, mone_neuron_block=2), tokens()
    model.config.auto_map = AUTO_MAP
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    copy_code(folder)
    assert has_own_code(folder)
    with torch.no_grad():
        torch.save((ids, model(ids).logits), tmp_path / "wanted.pt")
    code = """
import sys
sys.modules["megatron_mone"] = None
import torch
from transformers import AutoModelForCausalLM
ids, wanted = torch.load("wanted.pt")
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True)
assert model.dtype == torch.float32
with torch.no_grad():
    torch.testing.assert_close(model(ids).logits, wanted, rtol=0, atol=1e-4)
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True, dtype="bfloat16")
assert model.lm_head.weight.dtype == torch.bfloat16
assert model.model.layers[1].mlp.experts.neuron_bias.dtype == torch.float32
print(type(model).__module__)
"""
    settings = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.model.")
    (folder / "modeling_mone.py").write_text("raise SystemExit")
    assert not has_own_code(folder)


def test_bfloat16_is_near_float32(tmp_path):
    """Finite, and of the same mind about most tokens; numbers as large as a trained model's."""
    model, ids = our_model(mone_selection_bias=True), tokens(4, 16)
    model.save_pretrained(tmp_path)
    half = MoNEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.lm_head.weight.dtype == torch.bfloat16
    assert half.model.layers[0].mlp.experts.neuron_bias.dtype == torch.float32
    with torch.no_grad():
        wanted, found = model(ids).logits, half(ids).logits.float()
    assert torch.isfinite(found).all()
    assert (wanted - found).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (dict(hidden_act="gelu"), "hidden_act = 'gelu' is not allowed: it must be 'silu', or"),
        (dict(sliding_window=128), "sliding_window = 128 "),
        (dict(num_experts=0), "num_experts = 0 "),
        (dict(hidden_size=32.0), "hidden_size = 32.0 is not allowed: it must be a whole number"),
        (dict(hidden_size="32"), "hidden_size = '32' "),
        (dict(num_key_value_heads=3), "num_key_value_heads = 3 "),
        (dict(qk_norm_all_heads=True), "qk_norm_all_heads = True is not allowed: it must be false"),
        (dict(qk_norm=1), "qk_norm = 1 is not allowed: it must be true or false"),
        (dict(rms_norm_eps=0), "rms_norm_eps = 0 "),
        (dict(rope_parameters={"rope_type": "dynamic"}), "rope_parameters.rope_type = 'dynamic' "),
        (dict(rope_parameters={"rope_type": "llama3"}), "rope_parameters.factor = None "),
        (dict(kv_lora_rank=8), "qk_nope_head_dim = None is not allowed: it must be given with"),
        (dict(q_lora_rank=8), "q_lora_rank = 8 "),
        (dict(mlp_layer_types=["sparse"]), "mlp_layer_types = ['sparse'] "),
        (dict(mone_layers=[2]), "mone_layers = [2] "),
        (dict(num_experts_per_tok=9), "num_experts_per_tok = 9 "),
        (dict(router_score_function="sqrt"), "router_score_function = 'sqrt' is not allowed: it "),
        (dict(router_expert_bias=True), "router_expert_bias = True "),
        (dict(n_group=3, topk_group=1), "n_group = 3 "),
        (dict(n_group=8, topk_group=1), "topk_group = 1 "),
        (dict(shared_expert_gate=True), "shared_expert_gate = True "),
        (dict(mone_neuron_ratio=0.25), "mone_neuron_ratio = 0.25 is not allowed: it must be left"),
        (dict(mone_neurons_per_token=49), "mone_neurons_per_token = 49 "),
        (dict(mone_activation="tanh"), "mone_activation = 'tanh' "),
        (dict(mone_neuron_block=5), "mone_neuron_block = 5 "),
        (dict(mone_neuron_groups=8), "the kept neurons = 12 "),
        (dict(mone_min_neurons_per_token=1), "mone_min_neurons_per_token = 1 "),
        (dict(mone_selection="threshold", mone_min_neurons_per_token=24),
         "mone_min_neurons_per_token = 24 "),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_computed_is_refused_in_a_line(fields, said):
    with pytest.raises(ValueError) as error:
        MoNEConfig(**{**OURS, **fields})
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_a_config_says_all_of_itself():
    """What is written is what was meant, whatever the defaults are."""
    config = MoNEConfig(**{**OURS, **LATENT[1], "rope_parameters": YARN, "q_lora_rank": 20})
    again = MoNEConfig(**json.loads(config.to_json_string()))
    assert again.to_dict() == config.to_dict()
