"""Experts of a model in fp8: what they keep of delayed scaling, and what a model must be."""

import sys
from dataclasses import replace
from types import ModuleType

import pytest
import torch

from megatron_mone.kernels.neuron_mask import NeuronMask
from megatron_mone.kernels.registry import BACKENDS
from megatron_mone.kernels.te.operand_names import OPERANDS
from tests.conftest import mone_config
from tests.unit.kernels.te_stand_ins import Recipe, install

WIDTHS = {"hidden_size": 32, "moe_ffn_hidden_size": 64, "ffn_hidden_size": 64}
FP8 = {"fp8": "hybrid", "fp8_recipe": "tensorwise", "mone_backend": "te"}


def fp8_config(**changes):
    """As a machine with Transformer Engine makes it."""
    config = mone_config(**WIDTHS)
    for name, value in {**FP8, **changes}.items():
        setattr(config, name, value)
    return config


@pytest.mark.parametrize("recipe", ["tensorwise", "delayed", "blockwise", "mxfp8"])
def test_four_recipes_are_let_through(recipe):
    from megatron.core.enums import Fp8Recipe

    from megatron_mone.config import validate

    validate(fp8_config(fp8_recipe=recipe))
    validate(fp8_config(fp8_recipe=Fp8Recipe(recipe)))
    validate(fp8_config(first_last_layers_bf16=True))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mone_backend": "auto"}, "mone_backend = 'auto' .* te with fp8"),
        ({"mone_backend": "triton"}, "mone_backend = 'triton' .* te with fp8"),
        ({"fp8_recipe": "custom"}, "fp8_recipe = 'custom' .* tensorwise, delayed, block"),
        ({"fp8_param": True}, "fp8_param = True .*no --fp8-param-gather"),
        ({"fp8_wgrad": False}, "fp8_wgrad = False "),
        ({"moe_ffn_hidden_size": 72}, "moe_ffn_hidden_size = 72 .* a multiple of 16 with fp8_rec"),
        ({"fp8_recipe": "mxfp8", "expert_tensor_parallel_size": 4}, "moe_ffn_hidden_size = 64 "),
        ({"hidden_size": 24}, "hidden_size = 24 .* a multiple of 16"),
        ({"fp8_recipe": "mxfp8", "moe_latent_size": 16}, "moe_latent_size = 16 .* of 32 with"),
        ({"fp8": None, "fp4": "e2m1"}, "fp4 = 'e2m1' .*--fp4-format"),
    ],
)
def test_what_fp8_experts_have_not_is_one_line(changes, says):
    from megatron_mone.config import validate

    with pytest.raises(ValueError, match=f"^{says}") as error:
        validate(fp8_config(**changes))
    assert "\n" not in str(error.value)


@pytest.fixture
def experts(one_rank, monkeypatch):
    """`experts(history=L)`: of delayed scaling, on stand-ins for Transformer Engine's products."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.moe.experts import MoNEExperts

    install(monkeypatch, recipe=Recipe("delayed"))
    monkeypatch.setitem(BACKENDS, "te", replace(BACKENDS["te"], why_not=lambda call: None))

    def build(history: int = 2):
        config = fp8_config(fp8_recipe="delayed", fp8_amax_history_len=history)
        groups = ProcessGroupCollection.use_mpu_process_groups()
        return MoNEExperts(4, config, pg_collection=groups)

    return build


def step(experts, seed: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(24, 32, generator=generator, requires_grad=True)
    counts = torch.tensor([3, 0, 21, 0])
    made = experts(rows, counts, torch.full((24,), 0.5)).y_NH
    made.sum().backward()
    experts.end_step()
    return made.detach()


def test_maxima_of_each_step_are_kept(experts):
    made = experts(history=2)
    assert made.fp8_amax.shape == (4, len(OPERANDS), 2)
    step(made)
    assert (made.fp8_amax[[0, 2], :, 0] > 0).all()
    assert not made.fp8_amax[..., 1].any()
    first = made.fp8_amax[..., 0].clone()
    step(made, seed=6)
    assert torch.equal(made.fp8_amax[..., 1], first)


def test_they_stay_float32_in_a_model_of_16_bits(experts):
    made = experts()
    step(made)
    before = made.fp8_amax.clone()
    made.fp8_amax = made.fp8_amax.bfloat16()  # as Float16Module casts buffers
    made._keep_float32()
    assert made.fp8_amax.dtype == torch.float32
    torch.testing.assert_close(made.fp8_amax, before, rtol=1e-2, atol=0)


@pytest.mark.parametrize("saved_by", ["sharded_state_dict", "state_dict"])
def test_a_resumed_model_of_16_bits_has_them_whole(experts, saved_by):
    """What a load fills is asked for before a forward pass has seen the buffer."""
    made = experts()
    made.fp8_amax = made.fp8_amax.bfloat16()
    state = getattr(made, saved_by)()
    asked = next(value for key, value in state.items() if key.endswith("fp8_amax"))
    assert getattr(asked, "data", asked).dtype == made.fp8_amax.dtype == torch.float32


def test_a_checkpoint_has_them_by_expert(experts):
    """[E, operands, steps], and a loaded model goes on as the saved one would."""
    made, other = experts(), experts()
    step(made)
    state = made.sharded_state_dict("mlp.experts.", metadata={"dp_cp_group": None})
    pieces = state["mlp.experts.fp8_amax"].build()
    assert [piece.key for piece in pieces] == ["mlp.experts.experts.fp8_amax"] * 4
    assert {piece.global_shape for piece in pieces} == {(4, len(OPERANDS), 2)}
    assert [piece.global_offset[0] for piece in pieces] == [0, 1, 2, 3]
    joined = state["mlp.experts.fp8_amax"].merge_fn([piece.data for piece in pieces])
    assert torch.equal(joined, made.fp8_amax)
    step(other, seed=8)
    other.load_state_dict(made.state_dict())
    assert torch.equal(step(other, seed=9), step(made, seed=9))


def test_a_checkpoint_without_them_starts_them_anew(experts, tmp_path):
    """One of 16 bits goes on under delayed scaling as a fresh model with its weights."""
    from megatron.core import dist_checkpointing

    from megatron_mone.checkpoint.safe_metadata import read_metadata
    from megatron_mone.moe.stored_choice import name_as_held

    saved, other = experts(), experts()

    def state_of(made):
        return made.sharded_state_dict("mlp.experts.", metadata={"dp_cp_group": None})

    state = state_of(saved)
    del state["mlp.experts.fp8_amax"]
    dist_checkpointing.save(state, str(tmp_path))
    asked = state_of(other)
    name_as_held(asked, read_metadata(tmp_path).state_dict_metadata)
    found = dist_checkpointing.load(asked, str(tmp_path))
    other.load_state_dict({k.removeprefix("mlp.experts."): v for k, v in found.items()})
    assert not other.fp8_amax.any()
    assert torch.equal(step(other), step(saved))
    assert other.fp8_amax.any()


def test_other_recipes_keep_nothing(one_rank, monkeypatch):
    from megatron.core.process_groups_config import ProcessGroupCollection

    from megatron_mone.moe.experts import MoNEExperts

    monkeypatch.setitem(BACKENDS, "te", replace(BACKENDS["te"], why_not=lambda call: None))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    made = MoNEExperts(2, fp8_config(), pg_collection=groups)
    assert made.fp8_amax is None
    assert not any("fp8" in key for key in made.sharded_state_dict())
    made.end_step()


def test_masks_of_transformer_engines_checkpoint_are_kept(monkeypatch):
    """In fp8 Megatron recomputes by it."""
    from megatron_mone.moe.recompute import RecomputeMasks

    engine = ModuleType("transformer_engine.pytorch.distributed")
    engine.is_fp8_activation_recompute_enabled = lambda: True
    masks = RecomputeMasks()
    with torch.no_grad():
        masks.keep(NeuronMask.from_bool(torch.ones(3, 8, dtype=torch.bool)))
        assert masks.bytes_held == 0
        monkeypatch.setitem(sys.modules, engine.__name__, engine)
        masks.keep(NeuronMask.from_bool(torch.ones(3, 8, dtype=torch.bool)))
    assert masks.bytes_held == 3
