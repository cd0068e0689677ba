"""The order in which a model says its phases, forward and back, and that nothing is left behind."""

from itertools import groupby

import pytest
import torch

from megatron_mone.profiling.clock import HostStamps, PhaseClock
from megatron_mone.profiling.instrument import Instruments, check_visible
from megatron_mone.profiling.load_facts import LoadFacts
from tests.conftest import mone_config

TOKENS = 6


@pytest.fixture(autouse=True)
def fresh_tracker(one_rank):
    """Megatron's metrics tracker keeps the number of layers of the first model it sees."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    destroy_moe_metrics_tracker()


def build(**changes):
    from megatron.core.models.gpt.gpt_model import GPTModel

    from megatron_mone.model.layer_spec import mone_layer_spec

    config = mone_config(mone_backend="cpu", **changes)
    return GPTModel(
        config, mone_layer_spec(config), vocab_size=32, max_sequence_length=TOKENS
    ).train()


def build_hybrid(pattern, **changes):
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from megatron_mone.model.hybrid_spec import mone_hybrid_spec

    of_mamba = {"mamba_state_dim": 8, "mamba_head_dim": 8, "mamba_num_groups": 2}
    config = mone_config(mone_backend="cpu", num_layers=len(pattern), **of_mamba, **changes)
    config.hybrid_layer_pattern = pattern
    return HybridModel(
        config, mone_hybrid_spec(), vocab_size=32, max_sequence_length=TOKENS,
        hybrid_layer_pattern=pattern,
    ).train()  # fmt: skip


def spans(model):
    """(phase, pass) of one forward and backward, repetitions and returns to the caller left out."""
    clock = PhaseClock(HostStamps())
    instruments = Instruments(clock)
    instruments.attach_modules([model])
    clock.begin()
    ids = torch.arange(TOKENS).unsqueeze(0)
    model(ids, ids, None, labels=ids).sum().backward()
    clock.end()
    instruments.detach()
    return [key for key, _ in groupby((p, w) for _, _, p, w in clock.host_spans())]


def of_pass(found, wanted):
    return [phase for phase, _ in groupby(p for p, pass_ in found if pass_ == wanted)]


def without_callers(phases):
    """Without what goes on around the parts: the phase that a wrapper switches back to."""
    kept = [phase for phase in phases if phase not in ("other", "layer norm")]
    return [phase for phase, _ in groupby(kept)]


def test_a_step_goes_through_the_phases_in_order():
    found = spans(build())
    forward = without_callers(of_pass(found, "forward"))
    assert forward == [
        *("embedding", "attention", "router", "permute", "dispatch", "permute"),
        *("up/down GEMM", "gate GEMM", "selection", "up/down GEMM"),
        *("balance loss", "combine", "loss"),
    ]
    backward = without_callers(of_pass(found, "backward"))
    assert backward == [
        *("loss", "combine", "balance loss", "up/down GEMM", "permute", "dispatch", "permute"),
        *("router", "attention", "embedding"),
    ]
    assert of_pass(found, "recompute") == []


def test_a_phase_ends_where_its_method_returns():
    forward = of_pass(spans(build()), "forward")
    assert forward[:5] == ["other", "embedding", "other", "attention", "other"]
    at = forward.index("router")
    assert forward[at - 1 : at + 3] == ["layer norm", "router", "layer norm", "permute"]
    assert forward[-2:] == ["loss", "other"]


def test_layer_norm_stands_between_the_parts():
    backward = of_pass(spans(build()), "backward")
    assert backward.index("layer norm") < backward.index("combine")
    after_router = backward[backward.index("router") + 1 :]
    assert after_router == ["layer norm", "attention", "embedding"]


def test_a_tensor_that_is_passed_on_keeps_its_phase():
    """The allgather dispatcher hands probabilities on; their backward is the router's."""
    backward = of_pass(spans(build(moe_token_dispatcher_type="allgather")), "backward")
    after_experts = without_callers(backward[backward.index("up/down GEMM") :])
    assert after_experts[-3:] == ["router", "attention", "embedding"]


def test_what_runs_again_in_the_backward_is_a_recompute():
    changes = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    found = spans(build(**changes))
    again = without_callers(of_pass(found, "recompute"))
    assert again[:3] == ["attention", "router", "permute"]
    assert "selection" not in again  # the mask of the first pass is taken
    assert "embedding" not in again
    assert of_pass(found, "backward")[-1] == "embedding"


def test_shared_experts_and_dense_layers_have_phases():
    found = spans(
        build(num_layers=2, moe_layer_freq=[0, 1], moe_shared_expert_intermediate_size=16)
    )
    for pass_ in ("forward", "backward"):
        assert {"shared experts", "dense MLP"} <= set(of_pass(found, pass_)), pass_


def test_latent_projections_have_a_phase():
    forward = without_callers(of_pass(spans(build(moe_latent_size=8)), "forward"))
    at = [place for place, phase in enumerate(forward) if phase == "latent projection"]
    assert forward[at[0] - 1 : at[0] + 2] == ["router", "latent projection", "permute"]
    assert forward[at[1] - 1] == "combine"
    assert "latent projection" in of_pass(spans(build(moe_latent_size=8)), "backward")


def test_a_hybrid_models_layers_have_their_own_phases():
    found = spans(build_hybrid("M*E-"))
    forward = without_callers(of_pass(found, "forward"))
    assert forward[:4] == ["embedding", "mamba", "attention", "router"]
    assert forward[-3:] == ["combine", "dense MLP", "loss"]
    backward = without_callers(of_pass(found, "backward"))
    assert backward[:3] == ["loss", "dense MLP", "combine"]
    assert backward[-4:] == ["router", "attention", "mamba", "embedding"]


def test_nothing_is_left_behind():
    from megatron.core.pipeline_parallel import schedules

    from megatron_mone.common import phases

    model = build()
    before = [dict(vars(module)) for module in model.modules()], dict(vars(schedules))
    spans(model)
    assert [dict(vars(module)) for module in model.modules()] == before[0]
    assert dict(vars(schedules)) == before[1]
    assert phases._listener is None
    dispatcher = model.decoder.layers[0].mlp.token_dispatcher
    assert "token_dispatch" not in vars(dispatcher)


def test_rows_and_neurons_are_counted():
    model = build()
    layer = model.decoder.layers[0].mlp
    facts = LoadFacts([layer])
    facts.attach()
    ids = torch.arange(TOKENS).unsqueeze(0)
    for _ in range(2):
        facts.begin_step()
        model(ids, ids, None, labels=ids).sum().backward()
        with torch.no_grad():
            model(ids, ids, None)  # an evaluation does not count
        facts.end_step()
        layer.end_step()
    facts.detach()
    assert facts.rows() == [TOKENS * 2] * 2
    (routing,) = facts.routing()["layers"]
    assert (routing["layer"], routing["first_expert"]) == (1, 0)
    assert sum(routing["rows"]) == TOKENS * 2 * 2
    (neurons,) = facts.neurons()["layers"]
    assert (neurons["rows"], neurons["kept"]) == (TOKENS * 4, TOKENS * 4 * 6)  # 24 / 4
    used = sum(1 for rows in routing["rows"] if rows)
    assert sum(neurons["histogram"]) == used * 24


def test_models_that_pass_modules_by_are_refused():
    config = type("Config", (), {"cuda_graph_impl": "full_iteration"})
    with pytest.raises(ValueError, match=r"cuda_graph_impl = .* is not allowed under the profiler"):
        check_visible(config)
