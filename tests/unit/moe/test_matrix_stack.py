"""Optimizers that work on matrices step a stack of them as they step the matrices by themselves."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.moe.experts import fc1_matrices, fc2_matrices
from tests.unit.moe.builders import build_experts

pytest.importorskip("emerging_optimizers")
pytestmark = pytest.mark.usefixtures("one_rank")

SETTINGS = {"lr": 0.1, "weight_decay": 0.1}
OPTIMIZERS = ("muon", "lion", "soap", "laprop")  # SOAP's state has numbers and other shapes


def entry(name):
    from megatron.core.optimizer.emerging_optimizers import _EMERGING_OPTIMIZERS

    build_experts(1)  # the first experts of a process make Megatron's registry know stacks
    return _EMERGING_OPTIMIZERS[name]


def stepped(optimizer, parameters, gradients):
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("matrices", [fc1_matrices, fc2_matrices])
@settings(max_examples=20)
@given(
    experts=st.integers(1, 3), width=st.sampled_from([4, 8]), hidden=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_a_stack_is_stepped_as_its_matrices(name, matrices, experts, width, hidden, seed):
    cls = entry(name).optimizer_cls
    random = torch.Generator().manual_seed(seed)
    halves = (2,) if matrices is fc1_matrices else ()
    shape = (experts, *halves, width, hidden)
    values = [torch.randn(shape, generator=random) for _ in range(4)]
    vectors = [torch.randn(6, 5, generator=random) for _ in range(4)]  # a matrix of its own
    stack = torch.nn.Parameter(values[0].clone())
    stack.stacked_matrices = matrices
    ours = [stack, torch.nn.Parameter(vectors[0].clone())]
    theirs = [*matrices(values[0]), vectors[0]]
    theirs = [torch.nn.Parameter(t.clone(memory_format=torch.contiguous_format)) for t in theirs]
    optimizer, stock = cls(ours, **SETTINGS), cls.__mro__[2](theirs, **SETTINGS)

    stepped(optimizer, ours, [[v, w] for v, w in zip(values[1:3], vectors[1:3], strict=True)])
    resumed = cls(ours, **SETTINGS)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    stepped(resumed, ours, [[values[3], vectors[3]]])
    stepped(stock, theirs, [[*(m.contiguous() for m in matrices(v)), w]
                            for v, w in zip(values[1:], vectors[1:], strict=True)])  # fmt: skip

    for got, wanted in zip([*matrices(stack.data), ours[1]], theirs, strict=True):
        assert torch.equal(got, wanted)
    assert len(resumed.state) == len(ours)
    for key, held in resumed.state[stack].items():
        wanted = [stock.state[p][key] for p in theirs[:-1]]
        if not isinstance(held, torch.Tensor):
            assert [held] * experts == wanted, key
            continue
        got = matrices(held) if held.shape == stack.shape else list(held)
        for a, b in zip(got, wanted, strict=True):
            assert torch.equal(a, b), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_made_for_a_checkpoint_is_that_of_no_step(name):
    """Megatron fills the state before it loads; a first step from it is a first step."""
    known = entry(name)
    values, gradient = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 4, 8)
    results = []
    for filled in (False, True):
        stack = torch.nn.Parameter(values.clone())
        stack.stacked_matrices = fc1_matrices
        optimizer = known.optimizer_cls([stack], **SETTINGS)
        if filled:
            known.init_state_fn(optimizer)
            assert len(optimizer.state[stack]) > 0
            assert [len(g["params"]) for g in optimizer.param_groups] == [1]
        stepped(optimizer, [stack], [[gradient]])
        results.append(stack.data)
    assert torch.equal(*results)
    assert not torch.equal(results[0], values)


def test_a_stack_without_gradient_is_left_alone():
    stack = torch.nn.Parameter(torch.randn(2, 2, 4, 8))
    stack.stacked_matrices = fc1_matrices
    before = stack.detach().clone()
    optimizer = entry("muon").optimizer_cls([stack], **SETTINGS)
    optimizer.step()
    assert torch.equal(stack, before)


def test_megatron_tells_experts_from_vectors_and_embeddings():
    """By the rule of its registry, and by the one that lays out gradient buffers."""
    from megatron.core import optimizer
    from megatron.core.optimizer import layer_wise_optimizer

    (key,) = entry("muon").default_param_overrides
    experts = build_experts(2)
    vector, matrix, embedding, cube = (
        torch.nn.Parameter(torch.zeros(shape)) for shape in ((4,), (4, 4), (4, 4), (2, 4, 4))
    )
    embedding.is_embedding_or_output_parameter = True
    for parameter, is_matrix in (
        (experts.linear_fc1, True), (experts.linear_fc2, True), (matrix, True),
        (vector, False), (embedding, False), (cube, False),
    ):  # fmt: skip
        assert key.matches(parameter, "any") != is_matrix
        for module in (optimizer, layer_wise_optimizer):
            assert module.is_managed_by_layer_wise_optimizer(parameter) == is_matrix


def test_a_float32_copy_knows_its_matrices():
    from megatron.core.tensor_parallel.layers import copy_tensor_model_parallel_attributes

    experts = build_experts(2)
    main = experts.linear_fc2.detach().clone()
    copy_tensor_model_parallel_attributes(main, experts.linear_fc2)
    assert [m.shape for m in main.stacked_matrices(main)] == [(16, 24)] * 2


QUINTIC = (  # modded-nanogpt's, which emerging-optimizers rounds to single precision
    (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377), (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046), (2.8366, -3.0525, 1.2012),
)  # fmt: skip


def orthogonalized(matrix):
    """U f(S) V^T in float64: what Muon's polynomials make of the singular values."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for a, b, c in QUINTIC:
        values = a * values + b * values**3 + c * values**5
    assert (values > 0.5).all()  # near 1, as far as five steps go
    assert (values < 1.5).all()
    return left * values @ right


@pytest.mark.parametrize(("name", "shape"), [("linear_fc1", (48, 16)), ("linear_fc2", (16, 24))])
def test_muon_orthogonalizes_each_experts_matrix(name, shape):
    """Gates and ups together, [2 F, H], and [H, F]: against a singular value decomposition."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    cls = entry("muon").optimizer_cls
    groups = ProcessGroupCollection.use_mpu_process_groups()
    stack = getattr(build_experts(3), name)
    split, generator = stack.stacked_matrices, torch.Generator().manual_seed(2)
    gradients = [torch.randn(stack.shape, generator=generator) for _ in range(2)]
    before = [m.double().clone() for m in split(stack.detach())]
    optimizer = cls(
        [stack], lr=0.1, weight_decay=0.2, momentum=0.9, fp32_matmul_prec="highest",
        pg_collection=groups,
    )  # fmt: skip
    stepped(optimizer, [stack], [[gradient] for gradient in gradients])
    for e, matrix in enumerate(split(stack.detach())):
        assert matrix.shape == shape
        wanted, moment = before[e], torch.zeros(shape, dtype=torch.float64)
        for gradient in gradients:
            own = split(gradient)[e].double()
            moment = 0.9 * moment + 0.1 * own
            ahead = 0.1 * own + 0.9 * moment  # Nesterov's
            wanted = wanted * (1 - 0.1 * 0.2) - 0.1 * max(shape) ** 0.5 * orthogonalized(ahead)
        torch.testing.assert_close(matrix.double(), wanted, rtol=0, atol=2e-4)
