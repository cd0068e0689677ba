"""Cases of random states, unequal collectives, norms and devices on two tensor-parallel ranks."""

import pytest
import torch
import torch.distributed as dist


def _gathered(tensor):
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor)
    return parts


def _draw(state=None):
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    if state is None:
        return torch.rand(8)
    with get_cuda_rng_tracker().fork(state):
        return torch.rand(8)


def case_sharded_draws_differ():
    mine, other = _gathered(_draw("model-parallel-rng"))
    assert not torch.equal(mine, other)


def case_replicated_draws_agree():
    for state in (None, "data-parallel-rng"):
        mine, other = _gathered(_draw(state))
        assert torch.equal(mine, other)


def case_fork_leaves_the_default_state():
    first = _draw()
    torch.cuda.manual_seed(123)
    _draw("model-parallel-rng")
    assert torch.equal(first, _draw())


def case_fork_continues_its_own_state():
    assert not torch.equal(_draw("model-parallel-rng"), _draw("model-parallel-rng"))


def case_states_restore():
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    _draw("model-parallel-rng")
    saved = {k: v.clone() for k, v in get_cuda_rng_tracker().get_states().items()}
    default = torch.cuda.get_rng_state()
    expected = [_draw("model-parallel-rng"), _draw()]
    get_cuda_rng_tracker().set_states(saved)
    torch.cuda.set_rng_state(default)
    assert all(map(torch.equal, expected, [_draw("model-parallel-rng"), _draw()]))


def case_data_loader_on_one_rank():
    """A loader on TP rank 0 alone must not set the replicated dropout of the ranks apart."""
    if dist.get_rank() == 0:
        list(torch.utils.data.DataLoader([1, 2, 3]))
    mine, other = _gathered(_draw())
    assert torch.equal(mine, other)


def case_warm_up_draws_nothing():
    """A router's weights come from this generator, so nothing of the layout may advance it."""
    from megatron.training import initialize

    before = torch.get_rng_state()
    initialize._warmup_jit_function(tp_size=2)
    assert torch.equal(before, torch.get_rng_state())


def case_transformer_engine_error_names_the_flag():
    from megatron.core.models.gpt import gpt_layer_specs

    if gpt_layer_specs.HAVE_TE:
        return
    with pytest.raises(RuntimeError, match="--transformer-impl local"):
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec()


def case_weights_by_the_gpu_path():
    from megatron.core import ModelParallelConfig
    from megatron.core.tensor_parallel import ColumnParallelLinear

    layer = ColumnParallelLinear(
        8,
        8,
        config=ModelParallelConfig(tensor_model_parallel_size=2),
        init_method=torch.nn.init.normal_,
        bias=False,
    )
    mine, other = _gathered(layer.weight.detach())
    assert not torch.equal(mine, other)


def case_unequal_all_gather():
    """Gather and its transpose as Megatron's autograd pair does them, with 3 and 5 rows."""
    from megatron.core.parallel_state import get_tensor_model_parallel_group
    from megatron.core.tensor_parallel import (
        gather_from_sequence_parallel_region,
        reduce_scatter_to_sequence_parallel_region,
    )

    rank, rows = dist.get_rank(), [3, 5]
    group = get_tensor_model_parallel_group()
    whole = torch.arange(16.0).view(8, 2)
    local = whole.split(rows)[rank].clone().requires_grad_()
    gathered = gather_from_sequence_parallel_region(local, group=group, output_split_sizes=rows)
    assert torch.equal(gathered, whole)
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(local.grad, torch.full_like(local, 3.0))

    scattered = reduce_scatter_to_sequence_parallel_region(
        whole.clone() * (rank + 1), group=group, input_split_sizes=rows
    )
    assert torch.equal(scattered, 3 * whole.split(rows)[rank])


def case_unequal_async_handle():
    rank = dist.get_rank()
    parts = [torch.empty(1), torch.empty(2)]
    handle = dist.all_gather(parts, torch.full((rank + 1,), float(rank)), async_op=True)
    handle.wait()
    assert [p.tolist() for p in parts] == [[0.0], [1.0, 1.0]]


def case_norm_carries_sequence_parallel():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    for kind in ("LayerNorm", "RMSNorm"):
        config = TransformerConfig(
            num_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            normalization=kind,
            tensor_model_parallel_size=2,
            sequence_parallel=True,
            persist_layer_norm=True,
        )
        norm = WrappedTorchNorm(config, 8, 1e-5)
        assert all(p.sequence_parallel is True for p in norm.parameters())
        assert config.sequence_parallel
        assert config.persist_layer_norm


def case_devices():
    x = torch.zeros(2, device="cuda:0")
    assert x.device.type == "cpu"
    assert torch.empty_like(x, device=torch.device("cuda", 1), pin_memory=True).device.type == "cpu"
    assert x.new_ones(3, device=0).sum() == 3
    assert x.to("cuda", torch.bfloat16).dtype == torch.bfloat16
    assert x.cuda() is x
    assert x.type() == "torch.cuda.FloatTensor"
    assert x.type("torch.cuda.HalfTensor").dtype == torch.float16
    assert not torch.cuda.is_available()
    with torch.device("meta"):
        assert torch.empty(2).device.type == "meta"
    assert torch.zeros(2, device="meta").is_meta


def case_streams_and_events():
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    side = torch.cuda.Stream()
    assert side == torch.cuda.current_stream()
    with torch.cuda.stream(side):
        start.record()
        torch.ones(64, 64) @ torch.ones(64, 64)
        end.record()
    torch.cuda.synchronize()
    assert start.elapsed_time(end) > 0


TP_2 = tuple(value for name, value in list(globals().items()) if name.startswith("case_"))
