"""MoNE experts and their balance loss against an independent float64 computation, and against
stock Megatron where every neuron is kept."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.activations import squared_relu

from megatron_mone.kernels import GroupedMLPOutput
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.moe.balance_loss import BlockStatistics, gate_shares, row_weights
from megatron_mone.moe.gate_shares import kept_counts
from tests.unit.moe.builders import build_experts, build_layer

pytestmark = pytest.mark.usefixtures("one_rank")

ACTIVATIONS = ["silu", "sigmoid", "softmax", "gelu", "relu", "squared_relu"]
LOSSES = ["raw", "selected", "normalized", "entropy"]


def plain_sigma(name, a):
    """The gate activation written out, for one row."""
    if name == "softmax":
        e = torch.exp(a - a.max())
        return e / e.sum()
    if name == "gelu":
        return a * 0.5 * (1 + torch.erf(a / math.sqrt(2)))
    return {
        "silu": a / (1 + torch.exp(-a)),
        "sigmoid": 1 / (1 + torch.exp(-a)),
        "relu": torch.clamp(a, min=0),
        "squared_relu": torch.where(a > 0, a * a, 0),
    }[name]


def plain_choice(g, config):
    """Kept neurons of one row by sorting, for either rule and any number of groups and blocks."""
    groups, block = config.mone_neuron_groups, config.mone_neuron_block
    sums = g.abs().view(-1, block).sum(dim=1).tolist()
    size = len(sums) // groups
    kept = config.mone_neurons_per_token // groups // block
    chosen = []
    for start in range(0, len(sums), size):
        values = sums[start : start + size]
        order = sorted(range(size), key=lambda j, v=values: (-v[j], j))
        if config.mone_selection == "topk":
            part = order[:kept]
        else:
            passing = [j for j in order[:kept] if values[j] >= config.mone_threshold * max(values)]
            part = sorted({*passing, order[0]})
        chosen += [(start + j) * block + i for j in part for i in range(block)]
    return sorted(chosen)


def plain_forward(config, x, p, experts_of_rows, gate, up, down):
    """y, kept neurons and gates, row by row, as docs/MODEL.md writes them."""
    ys, kept, gates = [], [], []
    for n, e in enumerate(experts_of_rows):
        g = plain_sigma(config.mone_activation, gate[e] @ x[n])
        u = up[e] @ x[n]
        chosen = plain_choice(g.detach(), config)
        ys.append(sum(p[n] * g[j] * u[j] * down[e, j] for j in chosen))
        kept.append(chosen)
        gates.append(g)
    return torch.stack(ys), kept, gates


def plain_loss(loss_type, experts_of_rows, kept, gates, num_experts, width):
    """1/E * sum over experts of sum_j f_j P_j (entropy: 1 - H(P) / ln F)."""
    total = torch.zeros((), dtype=torch.float64)
    for e in range(num_experts):
        rows = [n for n, owner in enumerate(experts_of_rows) if owner == e]
        if not rows:
            continue
        shares = []
        for n in rows:
            size = gates[n].abs()
            mask = torch.zeros(width, dtype=torch.float64)
            mask[kept[n]] = 1.0
            part = size if loss_type == "normalized" else size * mask
            idle = part.sum() == 0  # relu may leave a row without any active neuron
            shares.append(part if loss_type == "raw" or idle else part / part.sum())
        share = torch.stack(shares).mean(dim=0)
        if loss_type == "entropy":
            used = share[share > 0]
            total = total + (used * (1 + used.log() / math.log(max(width, 2)))).sum()
            continue
        count = torch.zeros(width, dtype=torch.float64)
        for n in rows:
            count[kept[n]] += 1
        f = width * count / count.sum()
        total = total + (f * share).sum()
    return total / num_experts


def balance_loss(mask, gate_K, gate_NF, block, experts, loss_type, neurons_per_token):
    """The loss of rows whose blocks are experts, all on this rank."""
    output = GroupedMLPOutput(gate_K, mask, gate_K, gate_NF)
    shares = gate_shares(output, block, experts, loss_type=loss_type)
    share_BF, _, total_N = shares.sums()
    counts = kept_counts(output, block, experts).to(share_BF.dtype)
    weights = row_weights(
        BlockStatistics(torch.bincount(block, minlength=experts).double(), counts, share_BF),
        loss_type=loss_type,
        num_experts=experts,
        num_neurons=mask.num_neurons,
        neurons_per_token=neurons_per_token,
    )
    return shares.loss(weights, share_BF, total_N)


def loss_of_one_expert(gate, mask, loss_type, neurons_per_token):
    """Of dense gates [N, F] and a dense mask."""
    block = torch.zeros(gate.shape[0], dtype=torch.long)
    kept = NeuronMask.from_bool(mask)
    return balance_loss(kept, gate[mask], gate, block, 1, loss_type, neurons_per_token)


@st.composite
def cases(draw):
    groups, block = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([1, 1, 2, 3, 4]))
    size = draw(st.integers(1, 5))
    kept = draw(st.integers(1, size))
    selection = draw(st.sampled_from(["topk", "threshold"]))
    return dict(
        seed=draw(st.integers(0, 2**31)),
        num_experts=draw(st.integers(1, 4)),
        rows=draw(st.lists(st.integers(0, 5), min_size=4, max_size=4)),
        hidden=draw(st.sampled_from([4, 8])),
        changes=dict(
            moe_ffn_hidden_size=groups * size * block,
            mone_neuron_ratio=None,
            mone_neurons_per_token=groups * kept * block,
            mone_neuron_groups=groups,
            mone_neuron_block=block,
            mone_selection=selection,
            mone_threshold=draw(st.sampled_from([0.05, 0.5, 1.0])),
            mone_activation=draw(st.sampled_from(ACTIVATIONS)),
            mone_ng_loss_type=draw(st.sampled_from(LOSSES)),
        ),
    )


@settings(max_examples=120, deadline=None)
@given(cases())
def test_experts_and_loss_equal_an_independent_computation(case):
    """Outputs, the loss and every gradient, in float64, relative error <= 1e-9."""
    torch.manual_seed(case["seed"])
    experts = build_experts(
        case["num_experts"], hidden_size=case["hidden"], params_dtype=torch.float64,
        **case["changes"],
    )  # fmt: skip
    config, width = experts.config, case["changes"]["moe_ffn_hidden_size"]
    counts = case["rows"][: case["num_experts"]]
    owners = [e for e, n in enumerate(counts) for _ in range(n)]
    with torch.no_grad():
        experts.linear_fc1.normal_()
        experts.linear_fc2.normal_()
    x = torch.randn(len(owners), case["hidden"], dtype=torch.float64, requires_grad=True)
    p = torch.rand(len(owners), dtype=torch.float64, requires_grad=True)

    output = experts(x, torch.tensor(counts), p)
    block = torch.tensor(owners, dtype=torch.long)
    loss_type = config.mone_ng_loss_type
    kept_per_row = config.mone_neurons_per_token if config.mone_selection == "topk" else None
    loss = balance_loss(
        output.mask, output.gate_K, output.gate_NF, block, len(counts), loss_type, kept_per_row
    )
    leaves = [x, p, experts.linear_fc1, experts.linear_fc2]
    if not owners:
        assert output.y_NH.shape == (0, case["hidden"])
        assert loss.item() == 0.0
        return
    y_plain, kept, gates = plain_forward(
        config, x, p, owners, experts.w_gate_EFH, experts.w_up_EFH, experts.w_down_EFH
    )
    loss_plain = plain_loss(loss_type, owners, kept, gates, len(counts), width)
    for n, chosen in enumerate(kept):
        assert output.mask.to_bool()[n].nonzero().flatten().tolist() == chosen
    torch.testing.assert_close(output.y_NH, y_plain, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, loss_plain, rtol=1e-9, atol=1e-9)
    weight = torch.randn_like(y_plain)
    got = torch.autograd.grad((output.y_NH * weight).sum() + loss, leaves)
    wanted = torch.autograd.grad((y_plain * weight).sum() + loss_plain, leaves)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


def test_loss_is_alpha_free_one_when_uniform():
    """Every neuron kept as often and as strongly: sum_j f_j P_j = 1 for scale-free P."""
    gate = torch.eye(4).repeat(3, 1) + 1e-9
    mask = torch.eye(4, dtype=torch.bool).repeat(3, 1)
    for loss_type, value in [("selected", 1.0), ("normalized", 1.0), ("entropy", 0.0)]:
        loss = loss_of_one_expert(gate, mask, loss_type, 1)
        assert loss.item() == pytest.approx(value, abs=1e-6)


def test_only_the_raw_loss_falls_when_all_gates_shrink():
    """The reviewer's objection to the published P: shrinking every gate lowers it."""
    torch.manual_seed(0)
    gate = torch.randn(32, 16, dtype=torch.float64)
    mask = gate.abs() >= gate.abs().median()

    def value(loss_type, scale):
        return loss_of_one_expert(gate * scale, mask, loss_type, None).item()

    assert value("raw", 0.5) == pytest.approx(0.5 * value("raw", 1.0))
    for loss_type in ("selected", "normalized", "entropy"):
        assert value(loss_type, 0.5) == pytest.approx(value(loss_type, 1.0), rel=1e-12)


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keep_all_is_stock_megatron_to_the_bit(dispatcher, dtype):
    """S = F, same seed: same weights, outputs and gradients, because the same GEMMs are made."""
    equals_stock(moe_token_dispatcher_type=dispatcher, dtype=dtype)


MEGATRONS = {"silu": F.silu, "sigmoid": torch.sigmoid, "softmax": partial(torch.softmax, dim=-1),
             "gelu": F.gelu, "relu": F.relu, "squared_relu": squared_relu}  # fmt: skip


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_keep_all_is_a_stock_moe_of_any_gate_to_the_bit(gate):
    """What stands for a dense MoE with a gate in studies is one: Megatron's own with that gate."""
    equals_stock(mone_activation=gate, activation_func=MEGATRONS[gate], dtype=torch.float32)


def equals_stock(*, dtype, **changes):
    """A layer that keeps all neurons and stock Megatron's, made and asked alike."""
    changes |= dict(
        mone_neuron_ratio=1.0, mone_ng_loss_coeff=0.0, mone_backend="reference",
        hidden_size=32, moe_ffn_hidden_size=48, params_dtype=dtype,
        bf16=dtype == torch.bfloat16, moe_router_dtype="fp32",
    )  # fmt: skip
    mone, stock = build_layer("mone", **changes), build_layer("stock", **changes)
    torch.manual_seed(0)
    x = torch.randn(17, 3, 32, dtype=dtype)
    results = []
    for layer in (mone, stock):
        inputs = x.clone().requires_grad_()
        y, _ = layer(inputs)
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y))
        results.append((y, inputs.grad, layer.router.weight.grad, layer.experts))
    (y, dx, dr, ours), (y_, dx_, dr_, theirs) = results
    assert torch.equal(y, y_)
    assert torch.equal(dx, dx_)
    assert torch.equal(dr, dr_)
    for e, expert in enumerate(theirs.local_experts):
        fc1, fc2 = expert.linear_fc1.weight, expert.linear_fc2.weight
        assert torch.equal(ours.linear_fc1[e].reshape(fc1.shape), fc1)
        assert torch.equal(ours.linear_fc2[e].t(), fc2)
        assert torch.equal(ours.linear_fc1.grad[e].reshape(fc1.shape), fc1.grad)
        assert torch.equal(ours.linear_fc2.grad[e].t(), fc2.grad)


def test_selecting_changes_the_output():
    x = torch.randn(9, 2, 16)
    kept, all_of_them = (build_layer(mone_neuron_ratio=r)(x)[0] for r in (0.25, 1.0))
    assert not torch.allclose(kept, all_of_them)


@pytest.mark.parametrize("tokens", [1, 3])
def test_experts_without_tokens(tokens):
    layer = build_layer(num_moe_experts=8, moe_router_topk=1, moe_router_pre_softmax=True)
    x = torch.randn(tokens, 1, 16, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert (layer.neuron_balancer.load.step_counts_EF.sum(dim=1) == 0).sum() >= 8 - tokens
    assert y.shape == x.shape
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(layer.experts.linear_fc1.grad).all()


def test_nan_input_surfaces_where_the_check_is_off():
    layer = build_layer(mone_check_for_nan=False)
    x = torch.randn(6, 1, 16)
    x[2] = math.nan
    y, _ = layer(x)
    assert y[2].isnan().all()
    assert torch.isfinite(y[[0, 1, 3, 4, 5]]).all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_in_an_expert_stops_naming_rank_layer_and_expert(value):
    from megatron_mone.moe.finite_check import NonFiniteExpertError

    layer = build_layer()
    with torch.no_grad():
        layer.experts.linear_fc2[3] = value
    with pytest.raises(NonFiniteExpertError, match=r"rank 0: layer 1, expert 3 gave NaN or inf"):
        layer(torch.randn(40, 1, 16))


def assert_same(got, wanted, backend):
    """To the bit with the reference; native kernels sum a given mask's gates in another order."""
    if backend == "reference":
        assert torch.equal(got, wanted)
    else:
        assert_near(got, wanted, backend)


def assert_near(got, wanted, name):
    """Equal to 1e-6 of the tensor's largest entry: float32 sums in another order."""
    scale = wanted.double().abs().max().item()
    error = (got.double() - wanted.double()).abs().max().item()
    assert error <= 1e-6 * scale, f"{name}: {error:.2e} of {scale:.2e}"


def test_rows_padded_to_capacity_leave_no_trace():
    """Same statistics and loss as without padding, where nothing is dropped."""
    from megatron_mone.moe.metrics import install_tracker

    x, seen = torch.randn(30, 1, 16), []
    for pad in (False, True):
        install_tracker().clear()
        layer = build_layer(
            moe_expert_capacity_factor=2.0, moe_pad_expert_input_to_capacity=pad,
            mone_ng_loss_coeff=0.5,
        )  # fmt: skip
        (layer(x)[0] * 0).sum().backward()
        seen.append(
            (
                layer.neuron_balancer.load.step_counts_EF.clone(),
                layer.neuron_balancer.load.step_rows_E.clone(),
                install_tracker().metrics["ng_loss"].values.clone(),
                layer.experts.linear_fc1.grad,
            )
        )
    for name, a, b in zip(("kept", "rows", "loss", "gradient"), *seen, strict=True):
        assert_near(a, b, name)


@pytest.mark.parametrize("loss_type", ["selected", "entropy"])
def test_global_batch_loss_is_the_same_however_the_batch_is_cut(loss_type):
    """Gradient and value over one step of 48 tokens: one micro-batch, or 2, 3 or 6 of them."""
    from megatron_mone.moe.metrics import install_tracker

    first, second = torch.randn(48, 1, 16), torch.randn(48, 1, 16)
    seen = []
    for parts in (1, 2, 3, 6):
        layer = build_layer(
            mone_ng_loss_type=loss_type, mone_ng_loss_scope="global_batch", mone_ng_loss_coeff=0.5
        )
        for step in (first, second):
            install_tracker().clear()
            layer.zero_grad()
            for x in step.chunk(parts):
                (layer(x)[0] * 0).sum().div(parts).backward()
            value = install_tracker().metrics["ng_loss"].values / parts
            layer.end_step()
            seen.append((parts, value, layer.experts.linear_fc1.grad / parts))
    assert all(value == 0 and not grad.any() for _, value, grad in seen[::2])
    _, value, grad = seen[1]
    assert value != 0
    assert grad.any()
    for parts, other_value, other_grad in seen[3::2]:
        assert_near(other_value, value, f"value in {parts} parts")
        assert_near(other_grad, grad, f"gradient in {parts} parts")


@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
@pytest.mark.parametrize("loss_type", LOSSES)
def test_loss_reaches_the_gate_weights_and_the_tracker(loss_type, scope):
    """The attached loss alone has a gradient, and it is the one of the logged value."""
    from megatron_mone.moe.metrics import install_tracker

    install_tracker().clear()
    layer = build_layer(mone_ng_loss_type=loss_type, mone_ng_loss_scope=scope,
                        mone_ng_loss_coeff=0.5)  # fmt: skip
    if scope == "global_batch":  # the first step has no statistics to go by
        layer(torch.randn(20, 1, 16))
        layer.end_step()
    y, _ = layer(torch.randn(20, 1, 16))
    (y * 0).sum().backward()
    grad = layer.experts.linear_fc1.grad
    assert grad[:, 0].abs().sum() > 0
    assert grad[:, 1].abs().sum() == 0  # up vectors have no part in the loss
    logged = install_tracker().metrics["ng_loss"].values
    assert logged.shape == (1,)
    assert logged.item() != 0
    layer.neuron_balancer.end_step()


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("scope", ["micro_batch", "global_batch"])
def test_recompute_changes_nothing(scope, backend):
    """Full gradients, statistics and the logged loss are the same with the layer recomputed."""
    from megatron_mone.moe.metrics import install_tracker

    x = torch.randn(12, 2, 16)
    seen = []
    for changes in ({}, dict(recompute_granularity="selective", recompute_modules=["moe"])):
        install_tracker().clear()
        layer = build_layer(
            mone_ng_loss_scope=scope, mone_ng_loss_coeff=0.1, mone_backend=backend, **changes
        )
        assert layer.moe_layer_recompute == bool(changes)
        inputs = x.clone().requires_grad_()
        layer(inputs)[0].square().sum().backward()
        seen.append(
            (
                inputs.grad,
                layer.experts.linear_fc1.grad,
                layer.neuron_balancer.load.step_counts_EF.clone(),
                install_tracker().metrics["ng_loss"].values.clone(),
            )
        )
    for a, b in zip(*seen, strict=True):
        assert_same(a, b, backend)


def test_evaluation_leaves_no_trace():
    from megatron_mone.moe.metrics import install_tracker

    install_tracker().clear()
    layer = build_layer().eval()
    with torch.no_grad():
        layer(torch.randn(8, 1, 16))
    assert layer.neuron_balancer.load.step_counts_EF.sum() == 0
    assert install_tracker().metrics["ng_loss"].values.sum() == 0


def test_selection_bias_moves_against_the_load():
    """bias: no loss; a neuron kept too often loses, one kept too seldom gains, by the rate."""
    layer = build_layer(mone_ng_loss_type="bias", mone_ng_bias_update_rate=0.25)
    y, _ = layer(torch.randn(40, 1, 16))
    y.sum().backward()
    counts = layer.neuron_balancer.load.step_counts_EF.clone()
    layer.neuron_balancer.end_step()
    mean = counts.sum(dim=1, keepdim=True) / counts.shape[1]
    expected = 0.25 * torch.sign(mean - counts)
    assert torch.equal(layer.experts.neuron_bias, expected)
    assert "neuron_bias" in layer.experts.state_dict()
    assert layer.neuron_balancer.load.step_counts_EF.sum() == 0


def test_layers_with_shared_experts_and_bf16_selection():
    layer = build_layer(moe_shared_expert_intermediate_size=16, params_dtype=torch.bfloat16,
                        bf16=True, moe_router_dtype="fp32")  # fmt: skip
    y, _ = layer(torch.randn(8, 1, 16, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
