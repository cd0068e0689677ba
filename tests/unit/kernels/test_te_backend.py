"""The Transformer Engine backend with stand-ins for its GEMMs: not run on a GPU.

The glue (selection, masked activation, padding) runs as it is. The adapter is held to the layouts
and signatures of TE's source; that TE computes them is not tested here.
"""

import sys
from functools import partial

import pytest
import torch
from torch import Tensor

from megatron_mone.kernels import Selection, grouped_mlp_with_gates, resolve_backend
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.neuron_selection import NeuronSelector
from megatron_mone.kernels.te import backend, linears
from megatron_mone.kernels.te.device_counts import DeviceCountLinears, takes_device_counts
from megatron_mone.kernels.te.linears import TransformerEngineLinears
from megatron_mone.kernels.te.padding import PaddedLinears
from tests.unit.kernels.te_stand_ins import AlignedLinears, MatmulLinears, Recipe, install

HIDDEN, NEURONS = 16, 32
STATELESS = ["float8_current_scaling", "float8_block_scaling", "mxfp8"]


def leaves(rows: int, experts: int, hidden: int = HIDDEN, neurons: int = NEURONS) -> list[Tensor]:
    """x, p, w_gate, w_up, w_down; gate and up share a parameter in a model, so here too."""
    gate_up = torch.randn(experts, 2, neurons, hidden) * hidden**-0.5
    w_down = torch.randn(experts, neurons, hidden) * neurons**-0.5
    tensors = [torch.randn(rows, hidden), torch.rand(rows), gate_up[:, 0], gate_up[:, 1], w_down]
    return [tensor.requires_grad_() for tensor in tensors]


def compare(products, counts, choose, activation="silu", tolerance=1e-5, hidden=HIDDEN) -> None:
    """y, mask, gates and every gradient, through y and the gates, against the reference."""
    ours = leaves(sum(counts), len(counts), hidden)
    twins = [leaf.detach().clone().requires_grad_() for leaf in ours]
    made = backend.grouped_mlp_on(
        products, *ours[:2], counts, *ours[2:], choose=choose, activation=activation
    )
    want = grouped_mlp_with_gates(
        *twins[:2], counts, *twins[2:], choose=choose if tolerance < 1e-3 else made.mask,
        activation=activation, backend="reference",
    )  # fmt: skip
    assert made.mask == want.mask
    dy, dgate = torch.randn_like(made.y_NH), torch.randn_like(made.gate_K)
    pairs = [(made.y_NH, want.y_NH), (made.gate_K, want.gate_K)]
    for mine, theirs in zip((made, want), (ours, twins), strict=True):
        torch.autograd.backward([mine.y_NH, mine.gate_K], [dy, dgate], inputs=theirs)
    pairs += [(a.grad, b.grad) for a, b in zip(ours, twins, strict=True)]
    for got, right in pairs:
        assert got.shape == right.shape
        assert (got - right).norm() <= tolerance * right.norm() + 1e-12


def threshold(gate_NF: Tensor) -> Tensor:
    """A rule whose rows keep different numbers."""
    return NeuronSelector("threshold", 1, 20, threshold=0.3)(gate_NF)


RAGGED = torch.rand(24, NEURONS, generator=torch.Generator().manual_seed(1)) < 0.3
CHOICES = {
    "topk": Selection(8),
    "keep all": Selection(NEURONS),
    "groups": Selection(8, groups=4),
    "blocks": Selection(16, groups=2, block=4),
    "rule": threshold,
    "ragged": NeuronMask.from_bool(RAGGED),
    "none kept": NeuronMask.from_bool(RAGGED & False),
}


@pytest.mark.parametrize("choose", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("alignment", [1, 16, 32])
def test_glue_matches_the_reference(choose, alignment):
    """Padded for fp8 or not: the same mask, outputs and gradients, with an empty expert."""
    products = PaddedLinears(partial(AlignedLinears, alignment=alignment), [3, 0, 21], alignment)
    compare(products, [3, 0, 21], choose)
    rows = {shape[0] for shape in products.inner.shapes}
    assert rows == {{1: 24, 16: 16 + 32, 32: 32 + 32}[alignment]}


@pytest.mark.parametrize("activation", ["sigmoid", "gelu", "relu", "squared_relu"])
def test_glue_activations(activation):
    compare(MatmulLinears([5, 2]), [5, 2], Selection(8), activation)


@pytest.mark.parametrize("alignment", [1, 16])
def test_no_rows(alignment):
    make = partial(AlignedLinears, alignment=alignment)
    compare(PaddedLinears(make, [0, 0], alignment), [0, 0], Selection(8))


def test_aligned_counts_are_not_copied():
    class Seen(MatmulLinears):
        def rows_by_neurons(self, x_NH, *rest, **options):
            self.x_NH = x_NH
            return super().rows_by_neurons(x_NH, *rest, **options)

    x, w = torch.randn(48, HIDDEN), torch.randn(2, NEURONS, HIDDEN)
    products = PaddedLinears(Seen, [16, 32], 16)
    products.rows_by_neurons(x, w)
    assert products.inner.x_NH is x


def test_probabilities_come_before_fc2():
    """What fc2 gets is p g u where kept and 0 elsewhere."""

    class Fc2(MatmulLinears):
        def rows_by_hidden(self, *products, gradient=False):
            self.h_NF = products[0][0]
            return super().rows_by_hidden(*products, gradient=gradient)

    products, (x, p, *w) = Fc2([3]), leaves(3, 1)
    made = backend.grouped_mlp_on(
        products, x, p, [3], *w, choose=Selection(8), activation="sigmoid"
    )
    gate, up = torch.sigmoid(x @ w[0][0].t()), x @ w[1][0].t()
    want = (p[:, None] * gate * up).where(made.mask.to_bool(), 0.0)
    torch.testing.assert_close(products.h_NF, want.detach())


def test_saved_for_backward_is_compact():
    """Beside x, p and the weights themselves: a, u and the mask; nothing of [N, F]."""
    tensors, saved = leaves(6, 2), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        backend.grouped_mlp_on(
            MatmulLinears([2, 4]), *tensors[:2], [2, 4], *tensors[2:],
            choose=Selection(8), activation="silu",
        )  # fmt: skip
    shapes = sorted(tuple(t.shape) for t in saved if t.dim() < 3)
    assert shapes == sorted([(6, HIDDEN), (6,), (48,), (48,), (48,), (7,)])
    assert {t.data_ptr() for t in saved if t.dim() == 3} == {t.data_ptr() for t in tensors[2:]}


# The adapter, on stand-ins with TE's names, signatures and layouts.


@pytest.mark.parametrize("version", ["2.10", "2.20"])
@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0]])
def test_adapter_matches_the_reference(monkeypatch, version, counts):
    library = install(monkeypatch, version=version)
    compare(TransformerEngineLinears(linears.active_recipe(), counts), counts, Selection(8))
    forward, backward = ["TN", "TN", "NN"], ["TN", "NN", "NN", "NT", "NT", "NT"]
    assert library.layouts == (forward + backward if sum(counts) else [])


@pytest.mark.parametrize("counts", [[3, 0, 5], [0, 0]])
def test_device_counts_match_the_reference(monkeypatch, counts):
    library = install(monkeypatch)
    compare(DeviceCountLinears(torch.tensor(counts)), counts, Selection(8))
    assert library.layouts == (
        ["TN", "TN", "NN", "TN", "NN", "NN", "NT", "NT", "NT"] if sum(counts) else []
    )


def test_rows_past_the_device_counts_are_of_nobody(monkeypatch):
    install(monkeypatch)
    linears, (x, _, w, _, down) = DeviceCountLinears(torch.tensor([3, 2])), leaves(9, 2)
    x.data[5:] = float("nan")
    want = MatmulLinears([3, 2])
    with torch.no_grad():
        wide = linears.rows_by_neurons(x, w)
        torch.testing.assert_close(wide[:5], want.rows_by_neurons(x[:5], w))
        back = linears.rows_by_hidden((wide, down), (wide, w))
        torch.testing.assert_close(back[:5], want.rows_by_hidden((wide[:5], down), (wide[:5], w)))
        for adds in (False, True):
            ours, theirs = torch.ones(2, NEURONS, HIDDEN), torch.ones(2, NEURONS, HIDDEN)
            linears.weight_grad(wide, x, ours, adds, "v")
            want.weight_grad(wide[:5], x[:5], theirs, adds, "v")
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(
    ("version", "dtype", "experts", "takes"),
    [
        ("2.20", torch.bfloat16, 64, True),
        ("2.20", torch.bfloat16, 65, False),
        ("2.20", torch.float32, 4, False),
        ("2.10", torch.bfloat16, 4, False),
    ],
)
def test_which_versions_take_device_counts(monkeypatch, version, dtype, experts, takes):
    install(monkeypatch, version=version)
    assert takes_device_counts(dtype, experts) is takes


def test_run_asks_for_counts_on_the_host_where_it_must(monkeypatch):
    """A tensor of counts by source, of the kind that no grouped tensor takes here: float32."""
    library = install(monkeypatch)
    x, p, *w = leaves(5, 2, 32)
    counts = torch.tensor([[2, 1], [0, 2]])
    made = backend.run(x, p, counts, *w, choose=Selection(8), activation="silu")
    want = backend.run(x, p, [3, 2], *w, choose=Selection(8), activation="silu")
    assert torch.equal(made.y_NH, want.y_NH)
    assert not library.device_counts
    with pytest.raises(ValueError, match="must be counts that sum to the 5 rows of x"):
        backend.run(x, p, counts * 0, *w, choose=Selection(8), activation="silu")


@pytest.mark.parametrize("kind", STATELESS)
def test_fp8_follows_the_active_recipe(monkeypatch, kind):
    """Operands in their formats, read as they were quantized; close to the reference."""
    library = install(monkeypatch, recipe=Recipe(kind))
    recipe = linears.active_recipe()
    assert linears.why_not_recipe(recipe) is None
    alignment = linears.alignment(recipe)
    assert alignment == (32 if kind == "mxfp8" else 16)
    make = partial(TransformerEngineLinears, recipe)
    products = PaddedLinears(make, [3, 0, 21], alignment)
    compare(products, [3, 0, 21], Selection(8), tolerance=0.2, hidden=32)
    weights = ("weight", "input"), ("weight", "grad_output")
    assert library.roles == [
        *[weights[0]] * 3, *[weights[1]] * 3,
        ("input", "grad_output"), ("input", "grad_output"), ("grad_output", "input"),
    ]  # fmt: skip


def test_run_pads_under_a_recipe_only(monkeypatch):
    """The stand-in GEMM refuses unaligned rows under a recipe."""
    x, p, *w = leaves(5, 1, 32)
    for recipe in (None, Recipe("mxfp8")):
        install(monkeypatch, recipe=recipe)
        made = backend.run(x, p, [5], *w, choose=Selection(8), activation="silu")
        assert made.y_NH.shape == (5, 32)
        assert made.mask.num_rows == 5


def test_fp8_sizes_must_fit(monkeypatch):
    install(monkeypatch, recipe=Recipe("mxfp8"))
    x, p, *w = leaves(5, 1, 16)
    with pytest.raises(ValueError, match="multiples of 32 for this fp8 recipe"):
        backend.run(x, p, [5], *w, choose=Selection(8), activation="silu")


# What it refuses.


def test_without_the_package(monkeypatch):
    linears.available.cache_clear()
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    try:
        with pytest.raises(
            ValueError, match=r"'te' cannot run here: .* pip install 'megatron-mone"
        ):
            resolve_backend("te", device="cuda")
    finally:
        linears.available.cache_clear()


@pytest.mark.parametrize(
    ("facts", "part"),
    [
        ({"device": "cpu"}, "are on cpu: move them to a CUDA device"),
        ({"dtype": torch.float64}, "use float32 or bfloat16"),
        ({"activation": "softmax"}, "'softmax': it has silu, sigmoid, gelu, relu, squared_relu"),
        ({"all_gates": True}, "mone_ng_loss_type"),
    ],
)
def test_refusals(monkeypatch, facts, part):
    install(monkeypatch)
    monkeypatch.setattr(backend, "available", lambda: (True, ""))
    assert resolve_backend("te", device="cuda", by_rule=True, block=4) == "te"
    with pytest.raises(ValueError) as caught:
        resolve_backend("te", **{"device": "cuda", **facts})
    assert part in str(caught.value)


def test_an_unknown_recipe_is_refused(monkeypatch):
    install(monkeypatch, recipe=Recipe("custom"))
    monkeypatch.setattr(backend, "available", lambda: (True, ""))
    with pytest.raises(ValueError, match="the fp8 recipe Recipe: use current scaling"):
        resolve_backend("te", device="cuda")


def test_delayed_scaling_needs_a_history(monkeypatch):
    install(monkeypatch, recipe=Recipe("delayed"))
    monkeypatch.setattr(backend, "available", lambda: (True, ""))
    assert resolve_backend("te", device="cuda") == "te"
    x, p, *w = leaves(5, 1, 32)
    with pytest.raises(ValueError, match="delayed scaling, and w_gate has no fp8_scales"):
        backend.run(x, p, [5], *w, choose=Selection(8), activation="silu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_device(monkeypatch):
    install(monkeypatch)
    linears.available.cache_clear()
    try:
        assert linears.available() == (False, "transformer_engine needs a CUDA device")
    finally:
        linears.available.cache_clear()
