"""Megatron-Bridge's provider with MoNE's fields, where that package is installed."""

import sys
import types
from pathlib import Path

import pytest

from tests import forked_ranks


def _bridge() -> Path | None:
    """The folder of megatron.bridge."""
    import megatron

    found = [Path(place) / "bridge" for place in megatron.__path__]
    return next((folder for folder in found if (folder / "models").is_dir()), None)


pytestmark = pytest.mark.skipif(_bridge() is None, reason="needs the package megatron-bridge")


def _import_provider():
    """Without what the packages above it import, which needs those of a GPU machine."""
    for name in ("megatron.bridge", "megatron.bridge.models"):
        package = types.ModuleType(name)
        package.__path__ = [str(_bridge().joinpath(*name.split(".")[2:]))]
        sys.modules[name] = package
    from megatron_mone.model.bridge_provider import MoNEModelProvider

    return MoNEModelProvider


def build() -> None:
    """A tiny model by the provider, forward and backward, on one rank."""
    import torch

    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.moe.layer import MoNELayer

    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    fields = dict(
        num_layers=2, hidden_size=32, num_attention_heads=4, ffn_hidden_size=64,
        num_moe_experts=4, moe_ffn_hidden_size=32, moe_router_topk=2, gated_linear_unit=True,
        activation_func=torch.nn.functional.silu, add_bias_linear=False, vocab_size=64,
        seq_length=16, normalization="RMSNorm", position_embedding_type="rope",
        transformer_impl="local", moe_token_dispatcher_type="alltoall", hidden_dropout=0.0,
        gradient_accumulation_fusion=False, bias_dropout_fusion=False, bias_activation_fusion=False,
        masked_softmax_fusion=False, persist_layer_norm=False, apply_rope_fusion=False,
    )  # fmt: skip
    provider_class = _import_provider()
    with pytest.raises(ValueError, match="mone_neuron_ratio"):
        provider_class(mone_neuron_ratio=1.5, **fields).finalize()
    provider = provider_class(mone_neuron_ratio=0.25, **fields)
    provider.finalize()
    provider._pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = provider.provide(pre_process=True, post_process=True)
    layers = [module for module in model.modules() if isinstance(module, MoNELayer)]
    assert len(layers) == 2
    assert layers[0].experts.select.max_neurons == 8
    tokens = torch.arange(16).view(1, 16)
    loss = model(tokens, tokens, None, labels=tokens).mean()
    loss.backward()
    assert all(layer.experts.linear_fc1.grad.abs().sum() > 0 for layer in layers)
    torch.distributed.destroy_process_group()


def test_a_recipes_provider_builds_mone_experts(tmp_path):
    log = tmp_path / "log"
    assert forked_ranks.start(1, build, (), log).wait(300) == 0, log.read_text()[-3000:]
