"""Masks recorded in one forward are the masks of another: in recompute, in memory, over a file."""

import pytest
import torch

from megatron_mone.kernels.neuron_bits import unpack_bits
from megatron_mone.moe.masks.tape import TokenPlaces, record_masks, replay_masks
from megatron_mone.moe.masks.trace import LayerMasks, MaskTrace, TraceModel, mask_file, read_masks
from tests.unit.moe.builders import build_layer
from tests.unit.moe.test_layer import assert_same

pytestmark = pytest.mark.usefixtures("one_rank")


class FickleSelector:
    """Keeps other neurons each time it is asked: the worst case of a choice."""

    def __init__(self):
        self.calls = 0

    def local_selection(self):
        return None

    def __call__(self, gate_NF, bias_NF=None):
        generator = torch.Generator().manual_seed(self.calls)
        self.calls += 1
        return torch.rand(gate_NF.shape, generator=generator) < 0.3


def gradients(layer, xs):
    """Input and weight gradients of several forwards whose backwards run afterwards, in order."""
    inputs = [x.clone().requires_grad_() for x in xs]
    outputs = [layer(x)[0] for x in inputs]
    for y in outputs:
        y.square().sum().backward()
    return [*(x.grad for x in inputs), layer.experts.linear_fc1.grad, layer.experts.linear_fc2.grad]


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_recompute_keeps_the_neurons_of_the_first_pass(backend):
    """Three micro-batches in flight, a selector that never answers alike: equal to no recompute."""
    xs, seen = [torch.randn(10, 2, 16) for _ in range(3)], []
    for changes in ({}, dict(recompute_granularity="selective", recompute_modules=["moe"])):
        layer = build_layer(mone_backend=backend, **changes)
        layer.experts.select = FickleSelector()
        seen.append(gradients(layer, xs))
        assert layer.experts.select.calls == len(xs)
        assert layer.recompute_masks.bytes_held == 0
    for a, b in zip(*seen, strict=True):
        assert_same(a, b, backend)


@pytest.mark.parametrize("block", [2, 3, 6])
def test_recompute_knows_that_the_mask_is_of_blocks(block):
    """So that the repetition takes the kernels of the first pass."""
    layer = build_layer(
        recompute_granularity="selective", recompute_modules=["moe"], mone_neuron_block=block
    )
    forward, blocks = layer.experts.forward, []

    def watched(rows, counts, probs, mask, rows_ER):
        blocks.append(None if mask is None else mask.block)
        return forward(rows, counts, probs, mask, rows_ER)

    layer.experts.forward = watched
    gradients(layer, [torch.randn(10, 2, 16)])
    assert blocks == [None, block]


def test_first_pass_without_a_backward_is_forgotten_at_the_end_of_the_step():
    layer = build_layer(recompute_granularity="selective", recompute_modules=["moe"])
    layer(torch.randn(5, 1, 16))
    assert layer.recompute_masks.bytes_held == 5 * 2 * 3  # 24 neurons: 3 bytes for each routed row
    layer.end_step()
    assert layer.recompute_masks.bytes_held == 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_replay_repeats_a_recorded_forward(dispatcher, backend):
    """Masks of a fickle selector, replayed into an exact one: the same output and gradients."""
    xs = [torch.randn(7, 2, 16) for _ in range(2)]
    layer = build_layer(moe_token_dispatcher_type=dispatcher, mone_backend=backend)
    exact = layer.experts.select
    layer.experts.select = FickleSelector()
    trace = MaskTrace()
    with record_masks(layer, trace, step=4):
        recorded = gradients(layer, xs)
    keys, bits = trace.recorded(4, 1).merged()
    assert keys.tolist() == sorted(set(keys.tolist()))
    assert len(keys) == 2 * 7 * 2 * 2
    assert 0.2 < unpack_bits(bits, 24).float().mean() < 0.4
    layer.experts.select = exact
    layer.zero_grad()
    own = gradients(layer, xs)
    layer.zero_grad()
    with replay_masks(layer, trace, step=4):
        replayed = gradients(layer, xs)
    for a, b in zip(replayed, recorded, strict=True):
        assert_same(a, b, backend)
    assert not torch.allclose(own[0], replayed[0])
    assert not layer.mask_tape.active


def test_trace_goes_through_a_file(tmp_path):
    xs = [torch.randn(7, 2, 16)]
    layer, trace = build_layer(mone_backend="reference"), MaskTrace()
    layer.experts.select = FickleSelector()
    with record_masks([layer], trace):
        recorded = gradients(layer, xs)
    trace.save(tmp_path, step=0)
    layer.zero_grad()
    with replay_masks([layer], tmp_path):
        replayed = gradients(layer, xs)
    assert all(torch.equal(a, b) for a, b in zip(recorded, replayed, strict=True))


def test_padding_to_capacity_records_and_replays():
    """Pairs that a capacity drops keep nothing; the others repeat."""
    layer = build_layer(moe_expert_capacity_factor=0.75, moe_pad_expert_input_to_capacity=True)
    layer.experts.select = FickleSelector()
    x, trace = [torch.randn(12, 1, 16)], MaskTrace()
    with record_masks(layer, trace):
        recorded = gradients(layer, x)
    layer.zero_grad()
    with replay_masks(layer, trace):
        replayed = gradients(layer, x)
    assert all(torch.allclose(a, b) for a, b in zip(recorded, replayed, strict=True))


def test_other_routing_is_refused():
    layer, trace = build_layer(), MaskTrace()
    with record_masks(layer, trace):
        layer(torch.randn(7, 2, 16))
    with (
        replay_masks(layer, trace),
        pytest.raises(
            ValueError, match=r"layer 1, step 0: \d+ of 28 routed pairs have no recorded"
        ),
    ):
        layer(torch.randn(7, 2, 16))
    with (
        replay_masks(layer, trace, step=3),
        pytest.raises(ValueError, match="no masks were recorded for step 3; steps: 0"),
    ):
        layer(torch.randn(7, 2, 16))


@pytest.fixture
def saved(tmp_path):
    layer, trace = build_layer(), MaskTrace()
    with record_masks(layer, trace):
        layer(torch.randn(7, 2, 16))
    trace.save(tmp_path, step=0)
    return mask_file(tmp_path, 0, 1), trace.model


def test_damaged_and_foreign_files_are_refused(saved, tmp_path):
    path, model = saved
    whole = path.read_bytes()
    read_masks(path, 0, 1, model)
    with pytest.raises(
        ValueError, match=r"layer-001.pt was recorded with step = 0, this run has 2"
    ):
        read_masks(path, 2, 1, model)
    other = type(model)(**{**vars(model), "num_experts": 8})
    with pytest.raises(ValueError, match="num_experts = 4, this run has 8"):
        read_masks(path, 0, 1, other)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"layer-001.pt is not a mask file, or is damaged"):
        read_masks(path, 0, 1, model)
    bits = trace_bits(whole)
    flipped = bytearray(whole)
    flipped[whole.index(bits)] ^= 1
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"layer-001.pt is .*damaged"):
        read_masks(path, 0, 1, model)
    path.unlink()
    with pytest.raises(ValueError, match=r"layer-001.pt is missing"):
        read_masks(path, 0, 1, model)


def test_a_bit_beyond_the_last_neuron_is_refused(tmp_path):
    model = TraceModel(16, 1, 4, 12, 7)
    trace = MaskTrace(model)
    trace.layer(0, 1).add(torch.tensor([3]), torch.tensor([[255, 15]], dtype=torch.uint8))
    trace.layer(0, 2).add(torch.tensor([3]), torch.tensor([[255, 16]], dtype=torch.uint8))
    trace.save(tmp_path, step=0)
    read_masks(mask_file(tmp_path, 0, 1), 0, 1, model)
    with pytest.raises(ValueError, match=r"layer-002.pt has a mask .* beyond its 12 neurons"):
        read_masks(mask_file(tmp_path, 0, 2), 0, 2, model)


def trace_bits(data):
    import io

    return torch.load(io.BytesIO(data), weights_only=True)["bits_PB"].numpy().tobytes()[:24]


class Evil:
    def __reduce__(self):
        return (print, ("code from a mask file ran",))


def test_a_file_with_code_in_it_runs_none(saved, capsys):
    path, model = saved
    torch.save({"manifest": Evil()}, path)
    with pytest.raises(ValueError, match="is not a mask file"):
        read_masks(path, 0, 1, model)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("dp", [1, 3])
def test_places_cover_the_global_batch_once(tp, cp, dp):
    """Two micro-batches of 2 samples of 16 tokens on each data-parallel rank."""
    seen = torch.cat(
        [
            TokenPlaces(t, tp, c, cp, d, dp).tokens(16 // (tp * cp), 2, microbatch)
            for t in range(tp)
            for c in range(cp)
            for d in range(dp)
            for microbatch in range(2)
        ]
    )
    assert sorted(seen.tolist()) == list(range(2 * dp * 2 * 16))


def test_lookup_finds_each_pair_in_any_order():
    masks = LayerMasks()
    masks.add(torch.tensor([8, 2]), torch.tensor([[8], [2]], dtype=torch.uint8))
    masks.add(torch.tensor([5]), torch.tensor([[5]], dtype=torch.uint8))
    assert masks.lookup(torch.tensor([5, 8, 2])).flatten().tolist() == [5, 8, 2]
    with pytest.raises(ValueError, match="1 of 2 routed pairs"):
        masks.lookup(torch.tensor([5, 9]))
