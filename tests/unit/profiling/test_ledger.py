"""The ledger against what the allocator counts and against steps small enough to add up by hand."""

import gc
import itertools
import threading
from types import SimpleNamespace

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from megatron_mone.benchmarking.memory import _allocated
from megatron_mone.common import phases
from megatron_mone.profiling.ledger import KINDS, TIMELINE_POINTS, MemoryLedger, persistent_tensors

NUMBERS = 100_000
SIZE = 4 * NUMBERS  # bytes of one float32 tensor of the steps below


class Run:
    """One weight of SIZE bytes and a step that a test writes."""

    def __init__(self):
        self.weight = torch.nn.Parameter(torch.ones(NUMBERS))
        self.state = []

    def persistent(self):
        gradients = [] if self.weight.grad is None else [self.weight.grad]
        return {"weights": [self.weight], "gradients": gradients, "optimizer": self.state}

    def record(self, step, **options):
        """(record, base bytes) of a step, which is given the ledger."""
        with MemoryLedger(self.persistent, **options) as ledger:
            step(ledger)
        return ledger.record(), ledger.base_bytes


@pytest.fixture(autouse=True)
def _no_garbage_of_other_tests():
    """What other tests left in cycles would be freed, and recorded, in the midst of a step."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.fixture
def run() -> Run:
    return Run()


def backward_of(tensor):
    """Add up and go back: two numbers of four bytes, the sum and its gradient."""
    tensor.sum().backward()


def levels(record):
    return [sum(level) for level in zip(*(record["timeline"][k] for k in KINDS), strict=True)]


def test_peak_is_the_allocators_where_operators_need_scratch_and_share_inputs():
    torch.manual_seed(0)
    layers = [torch.nn.Linear(64, 64), torch.nn.LayerNorm(64), torch.nn.GELU()] * 2
    model = torch.nn.Sequential(*layers)
    optimizer = torch.optim.Adam(model.parameters())
    rows = torch.randn(256, 64)

    def step():
        # Twice, so that autograd adds up gradients.
        (model(rows) * model(rows)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    _, growth, left = _allocated(step)
    with MemoryLedger(lambda: persistent_tensors([model], optimizer)) as ledger:
        step()
    record = ledger.record()
    assert record["peak_bytes"] == ledger.base_bytes + growth
    assert levels(record)[-1] == ledger.base_bytes + left
    # Adam's moments are two tensors a parameter, and a count of steps.
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert record["by_kind"]["weights"] == weights
    assert record["by_kind"]["optimizer"] == 2 * weights + 4 * len(list(model.parameters()))


def test_forward_is_what_is_kept_and_what_is_not(run):
    def step(ledger):
        ledger.enter(phases.ATTENTION)
        kept = (run.weight * 2).exp()  # exp keeps its result, a product with a number nothing
        ledger.enter(phases.LOSS)
        backward_of(kept)

    record, base = run.record(step)
    attention = record["by_phase"][phases.ATTENTION]
    assert attention["weights"] == SIZE
    # The product keeps the factor, an int64, and needs it as a float32 for a moment.
    assert attention["activations"] == SIZE + 8
    before = base - SIZE  # what other tests have left alive
    assert attention["temporaries"] == before + SIZE + 4


def test_frees_inside_the_backward_are_seen_when_they_happen(run):
    def step(ledger):
        kept = run.weight
        for _ in range(10):
            kept = kept.exp()
        backward_of(kept)

    record, base = run.record(step)
    # Ten results (the step itself holds the last), the sum and its gradient. Then each node makes
    # one gradient, and lets go of one result and of the gradient that came in: most is needed when
    # the second node has made its own.
    assert record["peak_bytes"] == base + 12 * SIZE + 2 * 4
    assert (record["peak_phase"], record["peak_pass"]) == (phases.OTHER, phases.BACKWARD)
    assert levels(record)[-1] == base + SIZE  # the weight's gradient
    assert record["timeline"]["gradients"][-1] == SIZE


def test_recompute_makes_activations(run):
    def block(tensor):
        with torch.no_grad():
            mask = tensor > 0
        return (tensor.exp() * mask).exp()

    def step(ledger):
        backward_of(checkpoint(block, run.weight, use_reentrant=True))

    record, base = run.record(step)
    # Beside the result of the forward: exp, the mask, the product (which nothing keeps), exp.
    assert record["peak_pass"] in (phases.RECOMPUTE, phases.BACKWARD)
    assert max(record["timeline"]["activations"]) >= 3 * SIZE + NUMBERS
    assert record["peak_bytes"] > base + 3 * SIZE


def test_what_the_step_makes_and_keeps_is_named(run):
    def step(ledger):
        run.state.append(torch.zeros(NUMBERS))
        backward_of(run.weight * 2)

    record, _ = run.record(step)
    last = {kind: record["timeline"][kind][-1] for kind in KINDS}
    assert (last["weights"], last["gradients"], last["optimizer"]) == (SIZE, SIZE, SIZE)
    assert last["activations"] == 0


def test_resized_and_replaced_storages_end(run):
    def step(ledger):
        resized, replaced = torch.zeros(NUMBERS), torch.zeros(NUMBERS)
        resized.untyped_storage().resize_(0)
        replaced.data = torch.empty(1)  # Megatron's deallocate_output_tensor
        again = torch.zeros(NUMBERS)
        del again

    record, base = run.record(step)
    assert record["peak_bytes"] == base + 2 * SIZE
    assert levels(record)[-1] < base + SIZE


def test_what_lived_before_the_step_ends_in_it(run):
    before = [torch.zeros(NUMBERS)]

    def step(ledger):
        before.clear()
        made = torch.zeros(NUMBERS)
        del made

    record, base = run.record(step)
    assert record["peak_bytes"] == base
    assert levels(record)[-1] == base - SIZE


def test_tensors_of_other_runs_are_left_out(run):
    others = [torch.zeros(NUMBERS)]
    _, base = run.record(lambda ledger: torch.zeros(1))
    record, without = run.record(lambda ledger: torch.zeros(1), others=lambda: others)
    assert without == base - SIZE
    assert record["peak_bytes"] == without + 4


def test_tensors_of_collectives_are_communication(run, one_rank):
    def step(ledger):
        exchanged, own = torch.zeros(NUMBERS), torch.zeros(NUMBERS)
        torch.distributed.all_reduce(exchanged)
        torch.distributed.all_reduce(run.weight.data)
        del exchanged, own

    record, _ = run.record(step)
    assert record["by_kind"]["communication"] == SIZE
    assert record["by_kind"]["weights"] == SIZE


def test_storage_freed_by_a_thread_of_the_process_group_ends_with_the_exchange(run, one_rank):
    def step(ledger):
        exchanged = [torch.zeros(NUMBERS)]
        torch.distributed.all_reduce(exchanged[0])
        # Torch's profiler hears nothing of this thread, as of gloo's after the exchange.
        thread = threading.Thread(target=exchanged.clear)
        thread.start()
        thread.join()
        ledger.enter(phases.OPTIMIZER)
        torch.zeros(2 * NUMBERS)

    record, base = run.record(step)
    assert record["by_phase"][phases.OPTIMIZER]["communication"] == 0
    assert record["peak_bytes"] == base + 2 * SIZE


def test_timeline_is_short_and_has_the_peak(run):
    def step(ledger):
        for size in itertools.chain(range(1, 1000), [NUMBERS], range(1000, 1, -1)):
            torch.zeros(size)

    record, base = run.record(step)
    lines = record["timeline"]
    assert len(lines["ms"]) <= TIMELINE_POINTS
    assert {len(line) for line in lines.values()} == {len(lines["ms"])}
    assert lines["ms"] == sorted(lines["ms"])
    assert max(levels(record)) == record["peak_bytes"] == base + SIZE
    assert min(levels(record)) == base
    assert sum(record["by_kind"].values()) == record["peak_bytes"]
    assert record["peak_ms"] == lines["ms"][levels(record).index(record["peak_bytes"])]


def test_a_step_that_failed_has_no_record(run):
    def step(ledger):
        raise KeyError("in the step")

    with pytest.raises(KeyError), MemoryLedger(run.persistent) as ledger:
        step(ledger)
    with pytest.raises(RuntimeError, match="no whole step"):
        ledger.record()


def test_megatrons_tensors_are_found_wherever_they_hang():
    weight, main = torch.nn.Parameter(torch.ones(4)), torch.ones(4)
    weight.main_grad, main.grad = torch.zeros(4), torch.zeros(4)
    module = torch.nn.Module()
    module.weight = weight
    module.register_buffer("table", torch.ones(2))
    grad_data, param_data = torch.zeros(8), torch.zeros(8)
    module.expert_parallel_buffers = [SimpleNamespace(grad_data=grad_data, param_data=param_data)]
    moment, scale = torch.zeros(4), torch.ones(1)
    adam = SimpleNamespace(state={weight: {"exp_avg": moment}}, param_groups=[{"params": [main]}])
    single = SimpleNamespace(optimizer=adam, groups=[[main]], _scale=scale)
    chained = SimpleNamespace(chained_optimizers=[single])

    found = persistent_tensors([module], chained)
    found = {kind: {id(tensor) for tensor in tensors} for kind, tensors in found.items()}
    assert found["weights"] == {id(weight), id(module.table), id(param_data)}
    assert found["gradients"] == {id(weight.main_grad), id(main.grad), id(grad_data)}
    assert found["optimizer"] == {id(moment), id(scale), id(main)}
