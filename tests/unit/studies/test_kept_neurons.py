"""Keeping a share of the neurons of models with random weights, dense and of experts."""

import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.hf_model.modeling_mone import MoNEForCausalLM
from megatron_mone.studies.measuring.kept_neurons import (
    GatedPart,
    Keep,
    Rows,
    chosen_by_itself,
    gated_parts,
    watched,
)
from megatron_mone.studies.measuring.sparsity_names import (
    CRITERIA,
    GATE,
    PRODUCT,
    R_SPARSE,
    RANDOM,
    WINA,
)

SIZES = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip


def model_of(kind: str):
    torch.manual_seed(1)
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**SIZES, intermediate_size=24))
    elif kind == "phi3":  # gate and up in one
        model = Phi3ForCausalLM(Phi3Config(**SIZES, intermediate_size=24, pad_token_id=0))
    elif kind == "olmoe":
        model = OlmoeForCausalLM(
            OlmoeConfig(**SIZES, intermediate_size=24, num_experts=4, num_experts_per_tok=2)
        )
    else:
        ratio = {"mone": 0.25, "mone, dense": 1.0}[kind]
        model = MoNEForCausalLM(
            MoNEConfig(
                **SIZES, intermediate_size=24, moe_intermediate_size=24, num_experts=4,
                num_experts_per_tok=2, mone_neuron_ratio=ratio,
                mlp_layer_types=["sparse", "sparse"], mone_layers=[0, 1] if ratio < 1 else [],
            )
        )  # fmt: skip
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.3)
    return model.eval()


TOKENS = torch.arange(24).view(2, 12) % 32
ALL = ("llama", "phi3", "olmoe", "mone, dense")


@torch.no_grad()
def logits(model, parts=(), watch=None):
    with watched(parts, watch):
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_every_neuron_is_the_model_as_it_is_to_the_bit(kind, criterion):
    model = model_of(kind)
    parts = gated_parts(model)
    assert [part.layer for part in parts] == [0, 1]
    before = logits(model)
    assert torch.equal(logits(model, parts, Keep(criterion, 1.0)), before)
    half = logits(model, parts, Keep(criterion, 0.5))
    assert not torch.allclose(half, before, atol=1e-4)
    assert torch.equal(logits(model), before)  # nothing stays


def test_a_mone_model_at_its_own_share_is_as_it_is():
    model = model_of("mone")
    parts = gated_parts(model)
    assert [chosen_by_itself(part) for part in parts] == [0.25, 0.25]
    own = logits(model, parts, Keep(GATE, 0.25))
    torch.testing.assert_close(own, logits(model), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model, parts, Keep(GATE, 1.0)), own, atol=1e-4)


def rows_of(part: GatedPart, count: int = 5) -> Rows:
    draw = torch.Generator().manual_seed(3)
    experts = part.down_EHF.shape[0]
    gate_NF, up_NF = (torch.randn(count, part.neurons, generator=draw) for _ in range(2))
    expert_N = torch.arange(count) % experts
    return Rows(part, expert_N.sort().values, gate_NF, up_NF, gate_NF * up_NF)


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
@pytest.mark.parametrize("criterion", [GATE, PRODUCT, WINA])
def test_criteria_are_their_formulas(kind, criterion):
    """A neuron at a time, by hand."""
    part = gated_parts(model_of(kind))[0]
    rows = rows_of(part)
    found = Keep(criterion, 0.25)(rows)
    for n, expert in enumerate(rows.expert_N.tolist()):
        scores = []
        for f in range(part.neurons):
            gate, up = rows.gate_NF[n, f].item(), rows.up_NF[n, f].item()
            column = sum(weight.item() ** 2 for weight in part.down_EHF[expert, :, f]) ** 0.5
            scores.append({GATE: abs(gate), PRODUCT: abs(gate * up), WINA: abs(gate * up) * column}
                          [criterion])  # fmt: skip
        best = sorted(range(part.neurons), key=lambda f: -scores[f])[: part.neurons // 4]
        assert {*found[n].nonzero().flatten().tolist()} == {*best}
        assert torch.equal(found[n, best], rows.h_NF[n, best])


def test_random_neurons_are_others_for_every_row_and_seed():
    part = gated_parts(model_of("llama"))[0]
    rows = rows_of(part, 64)
    one, same, other = (Keep(RANDOM, 0.5, seed)(rows) != 0 for seed in (1, 1, 2))
    assert (one.sum(1) == part.neurons // 2).all()
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert not torch.equal(one, Keep(GATE, 0.5)(rows) != 0)
    assert (one.float().mean(0) - 0.5).abs().max() < 0.3  # no neuron is favoured


@pytest.mark.parametrize("kind", ["llama", "olmoe"])
def test_r_sparse_sends_the_rest_through_leading_singular_components(kind):
    part = gated_parts(model_of(kind))[1]
    rows = rows_of(part)
    found = Keep(R_SPARSE, 0.5)(rows)
    _, hidden, neurons = part.down_EHF.shape
    rank = int(0.25 * hidden * neurons / (hidden + neurons))
    assert rank >= 1
    for n, expert in enumerate(rows.expert_N.tolist()):
        down = part.down_EHF[expert].double()
        left, values, right = torch.linalg.svd(down, full_matrices=False)
        low = left[:, :rank] * values[:rank] @ right[:rank]
        h = rows.h_NF[n].double()
        kept = torch.zeros(neurons, dtype=torch.bool)
        kept[(h.abs() * down.norm(dim=0)).topk(neurons // 4).indices] = True
        wanted = down @ h.where(kept, 0) + low @ h.where(~kept, 0)
        torch.testing.assert_close(down @ found[n].double(), wanted, rtol=1e-4, atol=1e-4)


def test_an_experts_neurons_are_chosen_of_the_tokens_routed_to_it():
    """Rows come with their expert: what each computes is what its own weights make of a token."""
    model = model_of("olmoe")
    part = gated_parts(model)[0]
    seen = []

    def see(rows):
        seen.append(rows)
        return rows.h_NF

    inputs = []
    hook = part.module.register_forward_pre_hook(lambda module, args: inputs.append(args))
    logits(model, [part], see)
    hook.remove()
    (rows,), ((hidden, index, _),) = seen, inputs
    assert (
        rows.expert_N.bincount(minlength=4).tolist()
        == index.flatten().bincount(minlength=4).tolist()
    )
    order = index.flatten().sort(stable=True).indices
    gate_up = part.module.gate_up_proj.detach()[index.flatten()[order]]
    a_NF = torch.einsum("nfh,nh->nf", gate_up, hidden[order // 2])[:, :24]
    wanted = torch.nn.functional.silu(a_NF)
    for expert in range(4):  # rows of one expert stand in any order
        here, there = (one[rows.expert_N == expert].sort(dim=0).values
                       for one in (rows.gate_NF, wanted))  # fmt: skip
        torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


def test_what_has_no_plain_gate_is_refused_in_a_line(monkeypatch):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2)).eval()
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel has no gated FFN .*c_fc.*with a gate"):
        gated_parts(model)
    model = model_of("llama")
    monkeypatch.setattr(model.model.layers[0].mlp, "act_fn", torch.nn.ReLU())
    assert gated_parts(model)  # another activation is a gate too
    mlp = model.model.layers[1].mlp

    def doubled(x):
        return mlp.down_proj(2 * mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x))

    monkeypatch.setattr(mlp, "forward", doubled)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp \(LlamaMLP\) computes something else"):
        gated_parts(model)
