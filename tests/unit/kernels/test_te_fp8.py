"""fp8 through the Transformer Engine backend: its grouped products on operands that are quantized
for real, by torch's float8 types on the CPU. Not run on a GPU.

Every product lies within the float64 bound that the rounding of its operands gives, entry by entry,
and the whole near the exact expert with the same neurons. Delayed scaling is held to its histories
by hand.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from megatron_mone.kernels import Selection
from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.te import backend
from megatron_mone.kernels.te.delayed import DelayedScales
from megatron_mone.kernels.te.linears import TransformerEngineLinears
from megatron_mone.kernels.te.operand_names import OPERANDS
from megatron_mone.kernels.te.padding import PaddedLinears
from tests.unit.kernels.te_stand_ins import Recipe, install

COUNTS, HIDDEN, NEURONS, KEPT = [3, 0, 21], 64, 96, 24
KINDS = ["float8_current_scaling", "float8_block_scaling", "mxfp8", "delayed"]
# (half a step of the mantissa, half of the least subnormal number, the largest number)
E4M3, E5M2 = (2.0**-4, 2.0**-10, 448.0), (2.0**-3, 2.0**-17, 57344.0)
BF16 = 2.0**-8


def error_of(operand: Tensor, kind) -> Tensor:
    """What rounding may change of each entry; scales bring the largest of a tensor, or of a tile,
    to half of the largest number or beyond."""
    step, least, largest = kind
    exact = operand.double().abs()
    return step * exact + 2 * least * exact.max() / largest if exact.numel() else exact


def within(got: Tensor, left: Tensor, right: Tensor, kinds, so_far: Tensor | None = None) -> None:
    """got is left @ right (+ so_far) but for the rounding of both operands and of its own type."""
    a, b = left.double(), right.double()
    a_off, b_off = error_of(left, kinds[0]), error_of(right, kinds[1])
    exact = a @ b if so_far is None else a @ b + so_far.double()
    bound = a.abs() @ b_off + a_off @ b.abs() + a_off @ b_off
    bound += BF16 * (exact.abs() + bound) + 1e-30
    error = (got.double() - exact).abs()
    assert (error <= bound).all(), (error / bound).max()
    if exact.any() and so_far is None:
        assert bound.norm() < 3 * exact.norm()  # it says something
        assert error.norm() > 0.005 * exact.norm()  # and it was fp8


class Checked(TransformerEngineLinears):
    """Holds every product to the bound of its own operands."""

    def __init__(self, *given, **named) -> None:
        super().__init__(*given, **named)
        self.checked: list[str] = []

    def rows_by_neurons(self, x_NH, w_EFH, *, gradient=False):
        got = super().rows_by_neurons(x_NH, w_EFH, gradient=gradient)
        parts = zip(got.split(self.counts), x_NH.split(self.counts), w_EFH, strict=True)
        for y, x, w in parts:
            within(y, x, w.t(), (E5M2 if gradient else E4M3, E4M3))
        self.checked.append("dh" if gradient else "a, u")
        return got

    def rows_by_hidden(self, *products, gradient=False):
        so_far = None
        for count in range(1, len(products) + 1):
            got = super().rows_by_hidden(*products[:count], gradient=gradient)
            v_NF, w_EFH = products[count - 1]
            before = [None] * len(self.counts) if so_far is None else so_far.split(self.counts)
            parts = zip(
                got.split(self.counts), v_NF.split(self.counts), w_EFH, before, strict=True
            )  # fmt: skip
            for y, v, w, start in parts:
                within(y, v, w, (E5M2 if gradient else E4M3, E4M3), start)
            so_far = got
        self.checked.append("dx" if gradient else "y")
        return got

    def weight_grad(self, v_NF, x_NH, out_EFH, adds, gradient):
        assert not adds
        super().weight_grad(v_NF, x_NH, out_EFH, adds, gradient)
        kinds = (E5M2, E4M3) if gradient == "v" else (E4M3, E5M2)
        parts = zip(out_EFH, v_NF.split(self.counts), x_NH.split(self.counts), strict=True)
        for out, v, x in parts:
            within(out, v.t(), x, kinds)
        self.checked.append("dW")


def exactly(x, p, gate, up, down, dy, mask) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """One expert's results in float64, by autograd, of the same neurons; and their sizes."""
    given = [t.detach().double().requires_grad_() for t in (x, p, gate, up, down)]
    x, p, gate, up, down = given
    gated = torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())
    y = (p[:, None] * gated).where(mask, 0.0) @ down
    made = torch.autograd.grad(y, given, dy.double())
    names = ("dx", "dp", "dgate", "dup", "ddown")
    terms = (gated * (dy.double() @ down.t())).where(mask, 0.0).detach()
    found = {"y": y.detach(), **dict(zip(names, made, strict=True))}
    return found, {name: value.norm() for name, value in found.items()} | {
        "dp": terms.abs().sum(dim=1).norm()  # a sum that cancels out
    }


def leaves(dtype=torch.bfloat16) -> list[Tensor]:
    experts = len(COUNTS)
    made = [
        torch.randn(sum(COUNTS), HIDDEN), torch.rand(sum(COUNTS)),
        *(torch.randn(experts, NEURONS, HIDDEN) * HIDDEN**-0.5 for _ in range(2)),
        torch.randn(experts, NEURONS, HIDDEN) * NEURONS**-0.5,
    ]  # fmt: skip
    return [tensor.to(dtype).requires_grad_() for tensor in made]


def scales_of(steps: int = 1) -> tuple[Tensor, DelayedScales]:
    history = torch.zeros(len(COUNTS), len(OPERANDS), steps)
    return history, DelayedScales(lambda: history)


def run(tensors, scales=None, choose=None):
    tensors[2].fp8_scales = scales
    return backend.run(
        *tensors[:2], COUNTS, *tensors[2:], choose=choose or Selection(KEPT), activation="silu"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_products_lie_within_their_bounds_and_results_near(monkeypatch, kind):
    """Each of the ten products, forward and backward; and y, dx, dp and the weight gradients beside
    the exact expert's. Delayed scaling in its second step, by the scales of its first."""
    install(monkeypatch, recipe=Recipe(kind))
    monkeypatch.setattr(backend, "TransformerEngineLinears", Checked)
    seen: list[Checked] = []
    init = Checked.__init__
    monkeypatch.setattr(
        Checked, "__init__", lambda self, *a, **k: (init(self, *a, **k), seen.append(self))[0]
    )
    _, scales = scales_of()
    tensors = leaves()
    dy = torch.randn(sum(COUNTS), HIDDEN).bfloat16()
    for _ in range(2):
        for tensor in tensors:
            tensor.grad = None
        made = run(tensors, scales if kind == "delayed" else None)
        made.y_NH.backward(dy)
        scales.end_step(())
    for linears in seen:
        assert linears.checked == ["a, u", "a, u", "y", "dh", "dx", "dW", "dW", "dW"]
    got = dict(zip(
        ("dx", "dp", "dgate", "dup", "ddown"), [tensor.grad for tensor in tensors], strict=True
    ))  # fmt: skip
    mask, first = made.mask.to_bool(), 0
    for expert, rows in enumerate(COUNTS):
        at = slice(first, first + rows)
        first += rows
        right, sizes = exactly(
            tensors[0][at], tensors[1][at], *(tensor[expert] for tensor in tensors[2:]),
            dy[at], mask[at],
        )  # fmt: skip
        here = {"y": made.y_NH[at].detach(), "dx": got["dx"][at], "dp": got["dp"][at]}
        here |= {name: got[name][expert] for name in ("dgate", "dup", "ddown")}
        for name, exact in right.items():
            error = (here[name].double() - exact).norm()
            assert error <= 0.3 * sizes[name], name
            assert not rows or error > 0.001 * sizes[name], name


def test_neurons_are_chosen_by_the_gate_that_the_product_gives(monkeypatch):
    """Of quantized operands, in the rows' type: not by the exact gate, and not by an fp8 one."""
    install(monkeypatch, recipe=Recipe("float8_current_scaling"))
    tensors = leaves()
    seen = []

    def rule(gate_NF: Tensor) -> Tensor:
        seen.append(gate_NF)
        return gate_NF.abs() > 0.1

    made = run(tensors, choose=rule)
    [gate_NF] = seen
    assert gate_NF.dtype == torch.bfloat16
    x8 = tensors[0].float().split(COUNTS)
    parts = []
    for x, w in zip(x8, tensors[2].float(), strict=True):
        rounded = []
        for operand in (x, w):
            scale = 448 / operand.abs().max() if operand.numel() else torch.ones(())
            rounded.append((operand * scale).to(torch.float8_e4m3fn).double() / scale)
        parts.append((rounded[0] @ rounded[1].t()).bfloat16())
    torch.testing.assert_close(gate_NF, torch.nn.functional.silu(torch.cat(parts)))
    assert torch.equal(made.mask.to_bool(), gate_NF.abs() > 0.1)


class Seen(TransformerEngineLinears):
    """Notes the largest value of each expert's part of what it is given, by the operand's name."""

    maxima: dict[str, Tensor]

    def _note(self, name: str, *operands: Tensor) -> None:
        for operand in operands:
            parts = operand.unbind() if operand.dim() == 3 else operand.split(self.counts)
            found = [part.abs().max() if part.numel() else torch.zeros(()) for part in parts]
            most_E = torch.stack([value.float() for value in found])
            self.maxima[name] = torch.maximum(most_E, self.maxima.get(name, most_E))

    def rows_by_neurons(self, x_NH, w_EFH, *, gradient=False):
        self._note("dy" if gradient else "x", x_NH)
        self._note("fc2" if gradient else "fc1", w_EFH)
        return super().rows_by_neurons(x_NH, w_EFH, gradient=gradient)

    def rows_by_hidden(self, *products, gradient=False):
        self._note("dfc1" if gradient else "h", *(v_NF for v_NF, _ in products))
        return super().rows_by_hidden(*products, gradient=gradient)


def test_delayed_scaling_keeps_the_maxima_of_past_steps(monkeypatch):
    """Newest first, of six operands far apart in size; an expert without rows keeps what was known
    of it: nothing here."""
    install(monkeypatch, recipe=Recipe("delayed"))
    monkeypatch.setattr(backend, "TransformerEngineLinears", Seen)
    history, scales = scales_of(steps=3)
    wanted = []
    for step in range(4):
        monkeypatch.setattr(Seen, "maxima", {}, raising=False)
        tensors, dy = leaves(), torch.randn(sum(COUNTS), HIDDEN).bfloat16()
        run(tensors, scales).y_NH.backward(dy * 100 * (step + 1))
        scales.end_step(())
        wanted.append(Seen.maxima)
    assert set(wanted[0]) == set(OPERANDS)
    for back, step in enumerate((3, 2, 1)):
        for name, most_E in wanted[step].items():
            assert torch.equal(history[:, OPERANDS.index(name), back], most_E), (name, step)
    rows = [OPERANDS.index(name) for name in ("x", "h", "dy", "dfc1")]
    assert (history[1][rows] == 0).all()
    assert (history[[0, 2]] > 0).all()


def test_ranks_of_an_expert_have_one_history(monkeypatch):
    """The largest over its parts and replicas; no exchange in a group of one."""
    install(monkeypatch, recipe=Recipe("delayed"))
    history, scales = scales_of()
    run(leaves(), scales).y_NH.sum().backward()
    asked = []

    def all_reduce(found: Tensor, op, group) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        asked.append(group)
        found.copy_(found.clamp(min=0.5))  # of another rank

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    several, one = (SimpleNamespace(size=lambda ranks=ranks: ranks) for ranks in (2, 1))
    scales.end_step((several, one, several))
    assert asked == [several, several]
    assert history.min() == 0.5
    assert history.max() > 0.5


def test_scales_are_of_the_history_and_not_of_the_step(monkeypatch):
    """A step uses what earlier ones saw: much larger rows are cut off, and cut no more after it."""
    install(monkeypatch, recipe=Recipe("delayed"))
    _, scales = scales_of()
    tensors = leaves()

    def gate_error() -> float:
        make = partial(TransformerEngineLinears, Recipe("delayed"), scales=scales)
        with torch.no_grad():
            linears = PaddedLinears(make, COUNTS, 16)
            got = linears.rows_by_neurons(tensors[0], tensors[2]).float()
            right = torch.cat([
                x.float() @ w.float().t()
                for x, w in zip(tensors[0].split(COUNTS), tensors[2], strict=True)
            ])  # fmt: skip
        return float((got - right).norm() / right.norm())

    def step() -> None:
        run(tensors, scales).y_NH.sum().backward()
        scales.end_step(())

    assert gate_error() < 0.1  # nothing is known: scaled by its own maximum
    step()
    assert gate_error() < 0.1
    tensors[0].data *= 1000
    assert gate_error() > 0.9
    step()
    assert gate_error() < 0.1


def test_evaluation_and_first_passes_leave_no_maxima(monkeypatch):
    install(monkeypatch, recipe=Recipe("delayed"))
    history, scales = scales_of()
    tensors = leaves()
    with torch.no_grad():
        run(tensors, scales)
    scales.end_step(())
    assert not history.any()
    run(tensors, scales).y_NH.sum().backward()
    scales.end_step(())
    before = history.clone()
    with torch.no_grad():
        run([tensor.detach() * 100 for tensor in tensors], scales)
    scales.end_step(())
    assert torch.equal(history, before)


def test_maxima_that_are_no_numbers_are_not_kept(monkeypatch):
    install(monkeypatch, recipe=Recipe("delayed"))
    history, scales = scales_of()
    tensors = leaves()
    run(tensors, scales).y_NH.sum().backward()
    scales.end_step(())
    before = history.clone()
    tensors[0].data[0, 0] = float("inf")
    run(tensors, scales).y_NH.sum().backward()
    scales.end_step(())
    assert torch.isfinite(history).all()
    x = OPERANDS.index("x")
    assert history[0, x] == before[0, x]
    assert history[2, x] == before[2, x]


def test_a_resumed_history_gives_the_same_bits(monkeypatch):
    """A step from saved maxima is the step that would have followed."""
    install(monkeypatch, recipe=Recipe("delayed"))
    history, scales = scales_of()
    tensors = leaves()
    run(tensors, scales).y_NH.sum().backward()
    scales.end_step(())
    loaded, resumed = scales_of()
    loaded.copy_(history)
    resumed.forget()
    straight, again = (run(tensors, one).y_NH for one in (scales, resumed))
    assert torch.equal(straight, again)


def test_a_mask_that_is_given_is_taken(monkeypatch):
    install(monkeypatch, recipe=Recipe("mxfp8"))
    mask = NeuronMask.from_bool(torch.rand(sum(COUNTS), NEURONS) < 0.3)
    assert run(leaves(), choose=mask).mask == mask


def test_weight_gradients_put_off_use_the_scales_of_their_step(monkeypatch):
    """The operands of one step are scaled alike, whenever its weight gradients are made."""
    install(monkeypatch, recipe=Recipe("delayed"))
    results = []
    for later in (None, []):
        torch.manual_seed(3)
        _, scales = scales_of()
        tensors = leaves()
        for _ in range(2):
            for tensor in tensors:
                tensor.grad = None
            views = [tensor.view_as(tensor) for tensor in tensors]
            if later is not None:
                views[2].grad_later = later
            run(views, scales).y_NH.sum().backward()
            with torch.no_grad():
                made = later.pop()() if later else [tensor.grad for tensor in tensors[2:]]
            scales.end_step(())
        results.append(made)
    for here, there in zip(*results, strict=True):
        assert torch.equal(here, there)
