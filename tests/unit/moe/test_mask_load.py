"""Neurons' load from recorded masks, as safetensors, is what was kept; `export-load`."""

import pytest
import torch
from safetensors import safe_open

from megatron_mone.commands.app import main
from megatron_mone.kernels.neuron_bits import pack_bits
from megatron_mone.moe.masks.load import SCHEMA, count
from megatron_mone.moe.masks.tape import record_masks
from megatron_mone.moe.masks.trace import MaskTrace, TraceModel, mask_file
from tests.unit.moe.builders import build_layer

MODEL = TraceModel(
    hidden_size=16, num_layers=3, num_experts=4, moe_ffn_hidden_size=13, seq_length=8
)
LAYERS = (1, 3)


@pytest.fixture
def recorded(tmp_path):
    """A folder of masks of two steps, and what was kept: {layer: [tokens, E, F], -1 not routed}."""
    torch.manual_seed(4)
    kept = {layer: [] for layer in LAYERS}
    for step in (5, 6):
        trace = MaskTrace(MODEL)
        for layer in LAYERS:
            mask_TEF = torch.rand(20, 4, 13) < 0.3
            routed_TE = torch.rand(20, 4) < 0.5
            routed_TE[:, 2] = False  # an idle expert
            kept[layer].append(mask_TEF.int().masked_fill(~routed_TE.unsqueeze(2), -1))
            keys_P = (torch.arange(20)[:, None] * 4 + torch.arange(4))[routed_TE]
            order = torch.randperm(keys_P.numel())
            for part in order.chunk(3):  # as ranks and micro-batches record it
                trace.layer(step, layer).add(keys_P[part], pack_bits(mask_TEF[routed_TE][part]))
        trace.save(tmp_path / "masks", step)
    return tmp_path / "masks", {layer: torch.cat(steps) for layer, steps in kept.items()}


def test_counts_are_those_of_the_masks(recorded):
    folder, kept = recorded
    found = count(folder)
    assert found.steps == (5, 6)
    assert found.model == MODEL
    assert tuple(found.layers) == LAYERS
    for number, kept_TEF in kept.items():
        layer, routed_TE = found.layers[number], kept_TEF[:, :, 0] >= 0
        assert torch.equal(layer.kept_EF, (kept_TEF == 1).sum(dim=0))
        assert torch.equal(layer.rows_E, routed_TE.sum(dim=0))
        assert layer.tokens == int(routed_TE.any(dim=1).sum())
        assert int(layer.rows_E[2]) == 0
    half = count(folder, (6, 6)).layers[3]
    assert torch.equal(half.kept_EF, (kept[3][20:] == 1).sum(dim=0))


@pytest.mark.usefixtures("one_rank")
def test_a_layers_own_counters_say_the_same(tmp_path):
    layer, trace = build_layer(), MaskTrace()
    with record_masks([layer], trace, step=1):
        for _ in range(2):
            layer(torch.randn(7, 2, 16))[0].sum().backward()
    trace.save(tmp_path, step=1)
    found, own = count(tmp_path).layers[1], layer.neuron_balancer.load
    assert torch.equal(found.kept_EF, own.step_counts_EF)
    assert torch.equal(found.rows_E, own.step_rows_E)
    assert found.tokens == 2 * 7 * 2


def _empty(folder):
    for layer in LAYERS:
        mask_file(folder, 5, layer).unlink()


def test_the_command_writes_tensors_and_what_they_are(recorded, tmp_path, capsys):
    folder, kept = recorded
    out = tmp_path / "load.safetensors"
    assert main(["export-load", str(folder), "--out", str(out), "--steps", "5-6"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("steps 5-6: 4 experts of 13 neurons\nlayer 1: ")
    with safe_open(out, framework="pt") as file:
        facts = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert sorted(tensors) == [f"layer.{n}.{what}" for n in LAYERS for what in ("kept", "rows")]
    for number, kept_TEF in kept.items():
        assert torch.equal(tensors[f"layer.{number}.kept"], (kept_TEF == 1).sum(dim=0))
        tokens = int((kept_TEF[:, :, 0] >= 0).any(dim=1).sum())
        assert facts[f"layer.{number}.tokens"] == str(tokens)
        assert f"layer {number}: {tokens} tokens" in printed
    assert {name: facts[name] for name in ("schema", "first_step", "last_step", "layers")} == {
        "schema": SCHEMA, "first_step": "5", "last_step": "6", "layers": "1,3",
    }  # fmt: skip
    assert (facts["num_experts"], facts["moe_ffn_hidden_size"]) == ("4", "13")


def _cut(folder):
    path = mask_file(folder, 5, 1)
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("change", "words", "said"),
    [
        (None, ["--steps", "5-7"], "steps 5-7 are not all in "),
        (None, ["--steps", "last"], "--steps = 'last' is not allowed"),
        (None, ["--out", "load.bin"], "must end in .safetensors"),
        (None, ["--out", "/nowhere/load.safetensors"], "/nowhere is no folder"),
        (lambda folder: mask_file(folder, 6, 3).unlink(), [], "step 6 holds other layers than"),
        (_empty, [], "step 5 holds no layer"),
        (_cut, [], "is damaged"),
        (lambda folder: folder.rename(folder.with_name("gone")), [], "holds no recorded steps"),
        (lambda folder: folder.with_name("x.safetensors").touch(), [], "is there: choose another"),
    ],
)
def test_what_is_wrong_is_one_line(recorded, capsys, change, words, said):
    folder, _ = recorded
    if change is not None:
        change(folder)
    out = folder.with_name("x.safetensors")
    before = out.exists()
    assert main(["export-load", str(folder), "--out", str(out), *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
    assert out.exists() == before
