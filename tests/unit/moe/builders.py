"""Experts and layers of a small model on one rank."""

from tests.conftest import mone_config


def build_experts(num_experts, **changes):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.moe.experts import MoNEExperts

    groups = ProcessGroupCollection.use_mpu_process_groups()
    config = mone_config(
        num_moe_experts=num_experts, moe_router_topk=1, moe_router_pre_softmax=True, **changes
    )
    return MoNEExperts(num_experts, config, pg_collection=groups)


def build_layer(kind="mone", **changes):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mone.model.layer_spec import mone_layer_spec

    config = mone_config(**changes)
    config.mone_layer_freq = [int(kind == "mone")]
    spec = mone_layer_spec(config).layer_specs[0]
    model_parallel_cuda_manual_seed(11)
    from megatron.core.process_groups_config import ProcessGroupCollection

    groups = ProcessGroupCollection.use_mpu_process_groups()
    return spec.submodules.mlp(config=config, layer_number=1, pg_collection=groups)
