"""Norms of q and k over all heads: the formula, on one rank and on ranks that each have some heads,
fewer groups of keys than ranks too; what they do not go with; the layers that have them."""

import pytest
import torch

from megatron_mone.model.qk_norm import AllHeadsNorm
from tests import forked_ranks
from tests.conftest import mone_config
from tests.unit.core import qk_norm_cases
from tests.unit.core.qk_norm_cases import GROUPS, QUERIES, SIZE

HEADS = {"q": QUERIES, "k": GROUPS}
EPS = 1e-2


def by_torch(x, weight, gradient):
    """Output and gradients of x and weight, x's heads as one."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = torch.nn.functional.rms_norm(x.flatten(2), (weight.numel(),), weight, EPS).view_as(x)
    y.backward(gradient)
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_compute_the_norm_of_all_heads(tmp_path, ranks):
    """The output, the gradient of x summed over ranks of the same head, and the weight's, which
    Megatron sums over ranks."""
    torch.manual_seed(5)
    whole = {}
    for kind, heads in HEADS.items():
        x = torch.randn(3, 2, heads, SIZE)
        gradient, weight = torch.randn_like(x), torch.randn(heads * SIZE)
        torch.save((x, weight, gradient), tmp_path / f"{kind}.pt")
        share = max(1, ranks // heads)
        whole[kind] = by_torch(x, weight, gradient * sum(range(1, share + 1)) / share)
    log = tmp_path / "log"
    job = forked_ranks.start(ranks, qk_norm_cases.norm_parts, (str(tmp_path),), log)
    assert job.wait(120) == 0, log.read_text(errors="replace")[-3000:]
    for kind, (output, of_x, of_weight) in whole.items():
        got_x, got_weight = torch.zeros_like(of_x), torch.zeros_like(of_weight)
        for rank in range(ranks):
            first, y, x_grad, weight_grad = torch.load(tmp_path / f"{kind}-{rank}.pt")
            torch.testing.assert_close(y, output[:, :, first : first + y.shape[2]])
            got_x[:, :, first : first + y.shape[2]] += x_grad
            got_weight += weight_grad
        torch.testing.assert_close(got_x, of_x)
        torch.testing.assert_close(got_weight, of_weight)


@pytest.mark.usefixtures("one_rank")
def test_in_bfloat16_it_is_olmoes():
    from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm

    config = mone_config(num_attention_heads=QUERIES)
    ours = AllHeadsNorm("q", config=config, hidden_size=SIZE, eps=EPS).bfloat16()
    theirs = OlmoeRMSNorm(QUERIES * SIZE, EPS).bfloat16()
    theirs.weight.data.normal_()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, QUERIES, SIZE, dtype=torch.bfloat16)
    assert torch.equal(ours(x).flatten(2), theirs(x.flatten(2)))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (dict(qk_layernorm=False), "qk_layernorm = False is not allowed: it must be True with "),
        (dict(qk_l2_norm=True), "qk_l2_norm = True is not allowed: it must be False with "),
        (dict(normalization="LayerNorm"), "normalization = 'LayerNorm' is not allowed: it must be"),
        (dict(layernorm_zero_centered_gamma=True), "layernorm_zero_centered_gamma = True"),
        (dict(latent=True), "multi_latent_attention = True is not allowed: it must be False with "),
    ],
)
def test_what_it_does_not_go_with_is_one_line(changes, said):
    fields = dict(mone_qk_norm_all_heads=True, qk_layernorm=True, normalization="RMSNorm")
    with pytest.raises(ValueError, match=said) as caught:
        mone_config(**{**fields, **changes})
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("one_rank")
def test_every_layer_has_them_dense_and_predicting_ones_too():
    from megatron_mone.model.layer_spec import MoNEGPTModelConfig, mone_layer_spec, mtp_block_spec

    config = mone_config(
        num_layers=2, moe_layer_freq=[0, 1], mtp_num_layers=1, qk_layernorm=True,
        normalization="RMSNorm", mone_qk_norm_all_heads=True, persist_layer_norm=False,
    )  # fmt: skip
    block = mone_layer_spec(config)
    whole = MoNEGPTModelConfig(transformer=config, vocab_size=64)
    mtp = mtp_block_spec(whole, block).layer_specs[0].submodules.mtp_model_layer
    for layer in (*block.layer_specs, mtp):
        attention = layer.submodules.self_attention.submodules
        assert attention.q_layernorm.func is attention.k_layernorm.func is AllHeadsNorm
        assert (*attention.q_layernorm.args, *attention.k_layernorm.args) == ("q", "k")
