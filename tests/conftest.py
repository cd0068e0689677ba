"""Shared fixtures: one CPU rank under the emulation, small configs, a spawner for more ranks."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from megatron_mone.common.child_processes import end_with
from tests.processes import Keeper

# Fresh examples on a developer's machine, the same ones in CI, which must not fail by luck; and no
# deadline on either, nor a look at how fast examples come, for a busy machine is slow.
_AT_ANY_SPEED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", derandomize=True, **_AT_ANY_SPEED)
settings.register_profile("own", **_AT_ANY_SPEED)
settings.load_profile("ci" if os.environ.get("CI") else "own")

_KEEPER = pytest.StashKey[Keeper]()
_FORKING: list[int] = []


def pytest_configure(config: pytest.Config) -> None:
    """From here on no process outlives these tests, killed or not."""
    config.stash[_KEEPER] = Keeper()
    os.register_at_fork(
        before=lambda: _FORKING.append(os.getpid()),
        after_in_parent=_FORKING.clear,
        after_in_child=lambda: end_with(_FORKING.pop()),
    )


def pytest_unconfigure(config: pytest.Config) -> None:
    """End what tests left running, the process that forks ranks among them."""
    config.stash[_KEEPER].close()


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This process as the only rank of a Megatron job on the CPU."""
    from megatron_mone import cpu_emulation

    if not torch.cuda.is_available():
        cpu_emulation.install()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not torch.distributed.is_initialized():
        store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(7)
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


@pytest.fixture(scope="session")
def trace_pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """{kind of jobs: WorkerPool}: processes that trace for the planner, started once for all."""
    from megatron_mone.planning.tracing.trace_worker import CPU, GPU
    from megatron_mone.planning.tracing.worker_pool import WorkerPool

    folder = tmp_path_factory.mktemp("pools")
    pools = {kind: WorkerPool(kind, folder / kind, 2, 600.0) for kind in (GPU, CPU)}
    yield pools
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def shared_tracer(trace_pools: dict[str, Any]) -> Callable[..., Any]:
    """`shared_tracer(TraceCache(folder))`: a Tracer on these processes, which none ends."""
    from megatron_mone.planning.tracing.trace_server import Tracer

    def of(cache: Any) -> Tracer:
        tracer = Tracer(cache)
        tracer._folder.cleanup()  # of pools of its own
        tracer._pools = trace_pools
        return tracer

    return of


def mone_config(*, latent: bool = False, **changes: Any):
    """A small MoNEConfig (`latent`: MoNEMLAConfig); `changes` override fields."""
    from megatron_mone.config import MoNEConfig, MoNEMLAConfig

    fields: dict[str, Any] = dict(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        ffn_hidden_size=32,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        transformer_impl="local",
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=0.0,
        mone_neuron_ratio=0.25,
        mone_ng_loss_coeff=0.01,
    )
    return (MoNEMLAConfig if latent else MoNEConfig)(**{**fields, **changes})
