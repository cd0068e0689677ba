"""Dense models made models with experts: the same logits where that is promised, the loss that was
told where it is not, and what is wrong is one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_mone.conversion.calibration import _LENGTH
from megatron_mone.conversion.hf_folder import Weights
from megatron_mone.conversion.hf_model.loading import load_model
from megatron_mone.conversion.neuron_groups import balanced_clusters, fitted_router, split_by_firing
from tests import forked_ranks
from tests.unit.conversion import conversion_cases
from tests.unit.conversion.test_convert import TINY, VOCABULARY

TOLERANCE = 1e-4
WIDTH = TINY["intermediate_size"]
ROWS = 8  # of the text
SAME = {
    "carved": ["carve", "llama", "--experts", "4", "--topk", "4", "--shared-neurons", "8"],
    "carved by text": [
        "carve", "qwen3", "--experts", "8", "--topk", "8", "--by", "coactivation",
        "--text", "text.txt",
    ],
    "copied": ["upcycle", "qwen2", "--experts", "4", "--topk", "2"],
    "in slices": [
        "upcycle", "llama", "--experts", "12", "--topk", "6", "--granularity", "3",
    ],
    "merged": ["merge", "llama", "llama", "llama", "--topk", "2"],
}  # fmt: skip
OTHER = {
    "fewer": [
        "carve", "llama", "--experts", "4", "--topk", "2", "--shared-neurons", "16",
        "--by", "coactivation", "--text", "text.txt", "--tokens", "2048",
    ],
    "redrawn": ["upcycle", "llama", "--experts", "2", "--topk", "2", "--redraw", "0.25"],
    "of two": ["merge", "llama", "mistral", "--topk", "2", "--mone", "quarter"],
    "of the second": ["merge", "llama", "mistral", "--topk", "2", "--attention", "2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("experts")
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    torch.save(tokens, found / "tokens.pt")
    for seed, (name, more) in enumerate({
        "llama": {}, "mistral": {"sliding_window": None}, "qwen2": {"tie_word_embeddings": True},
        "qwen3": {"head_dim": 16}, "mixtral": {"num_local_experts": 2},
    }.items()):  # fmt: skip
        write_dense(found / name, {**TINY, "max_position_embeddings": 512, **more}, seed, tokens)
    drawn = torch.randint(0, VOCABULARY, (ROWS * _LENGTH + 5,))
    (found / "text.txt").write_text(" ".join(f"w{n:02}" for n in drawn.tolist()))
    (found / "short.txt").write_text("w01 w02 w03")
    (found / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    log = found / "log"
    made = {name: in_folder(found, words) for name, words in (SAME | OTHER).items()}
    job = forked_ranks.start(
        1, conversion_cases.make_all, (str(found), made, measured(found), wrong(found)), log
    )
    assert job.wait(600) == 0, log.read_text(errors="replace")[-4000:]
    return found


def write_dense(folder: Path, values: dict, seed: int, tokens: torch.Tensor) -> None:
    """A model of transformers with a tokenizer of words, and its logits in theirs.pt."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(folder.name, **values)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.copy_(torch.randn(tensor.shape) * 0.2 + ("norm" in name))
        model.save_pretrained(folder)
        torch.save(model(tokens).logits.float(), folder / "theirs.pt")
    words = Tokenizer(WordLevel({f"w{n:02}": n for n in range(VOCABULARY)}, unk_token="w00"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="w00", eos_token="w01"
    ).save_pretrained(folder)


def in_folder(folder: Path, words: list[str]) -> list[str]:
    """Names of what is in the folder, as paths."""
    return [
        "convert",
        *(str(folder / word) if (folder / word).exists() else word for word in words),
    ]


@pytest.mark.parametrize("name", SAME)
def test_the_logits_are_the_dense_models(folder, name):
    wanted = torch.load(folder / SAME[name][1] / "theirs.pt")
    assert (torch.load(folder / name / "one.pt") - wanted).abs().max() <= TOLERANCE
    model = load_model(folder / name / "export").model
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    assert (logits[..., :VOCABULARY] - wanted).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", OTHER)
def test_the_exported_model_computes_what_megatron_does(folder, name):
    model = load_model(folder / name / "export").model
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits[..., :VOCABULARY]
    found = torch.load(folder / name / "one.pt")
    assert (logits - found).abs().max() <= TOLERANCE
    assert (found - torch.load(folder / "llama" / "theirs.pt")).abs().max() > 0.01


def test_every_neuron_is_in_one_expert_or_shared(folder):
    dense, made = Weights(folder / "llama"), Weights(folder / "fewer" / "export")
    for layer in range(TINY["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp."
        gate_up = made.read(f"{at}experts.gate_up_proj")  # [E, 2f, H]
        shared = [made.read(f"{at}shared_experts.{name}_proj.weight") for name in ("gate", "up")]
        down = [
            made.read(f"{at}experts.down_proj"),
            made.read(f"{at}shared_experts.down_proj.weight"),
        ]
        rows = torch.cat([
            torch.cat([*gate_up.chunk(2, dim=1), down[0].transpose(1, 2)], dim=2).flatten(0, 1),
            torch.cat([*shared, down[1].t()], dim=1),
        ])  # fmt: skip
        parts = [dense.read(f"{at}{name}_proj.weight") for name in ("gate", "up", "down")]
        wanted = torch.cat([parts[0], parts[1], parts[2].t()], dim=1)
        assert len(rows) == WIDTH
        assert torch.equal(rows[rows[:, 0].argsort()], wanted[wanted[:, 0].argsort()])


def test_the_loss_that_was_told_is_the_checkpoints(folder):
    told = json.loads((folder / "fewer" / "checkpoint" / "experts.json").read_text())
    words = (folder / "text.txt").read_text().split()
    ids = torch.tensor([int(word[1:]) for word in words[: ROWS * _LENGTH]]).view(ROWS, _LENGTH)
    last = ids[-ROWS // 4 :]
    assert told["tokens_measured"] == len(last) * (_LENGTH - 1)
    for key, model in (
        ("loss_before", load_model(folder / "llama").model),
        ("loss_after", load_model(folder / "fewer" / "export").model),
    ):
        with torch.no_grad():
            logits = model(last).logits[..., :VOCABULARY]
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), last[:, 1:].flatten())
        assert told[key] == pytest.approx(loss.item(), abs=1e-4)
    assert abs(told["loss_after"] - told["loss_before"]) > 1e-3
    assert all(0 < error < 1 for error in told["error_by_layer"])
    said = (folder / "fewer" / "said.txt").read_text()
    assert f"{told['loss_after']:.4f} with 2 of 4 experts" in said


def measured(folder: Path) -> list[str]:
    """The words of `losses`."""
    return [
        "losses", str(folder / "fewer" / "checkpoint"), "--text", str(folder / "text.txt"),
        "--ratios", "1/2,1/4", "--tokens", "700", "--length", "96", "--out", str(folder / "losses"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kept", "layers"),
    [("as it is", 8, []), ("1/2 in all layers", 4, [0, 1]), ("1/2 in layer 1", 4, [1])],
)
def test_losses_are_those_of_the_model_that_keeps_fewer(folder, name, kept, layers):
    export = folder / "fewer" / "export"
    config = json.loads((export / "config.json").read_text())
    config |= {"mone_neuron_ratio": kept / 8, "mone_layers": layers}
    changed = folder / name.replace("/", "-")
    shutil.copytree(export, changed)
    (changed / "config.json").write_text(json.dumps(config))
    words = (folder / "text.txt").read_text().split()
    ids = [1, *(int(word[1:]) for word in words)][: 7 * 96 + 1]
    rows = torch.tensor(ids).unfold(0, 97, 96)
    with torch.no_grad():
        logits = load_model(changed).model(rows[:, :-1]).logits
    loss = cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    document = json.loads((folder / "losses" / "losses.json").read_text())
    assert document["losses"][name] == pytest.approx(loss.item(), abs=1e-4)
    assert document["measured"]["tokens"] == 7 * 96


def test_what_was_measured_is_not_measured_again(folder):
    first = json.loads((folder / "losses" / "first.json").read_text())["losses"]
    second = json.loads((folder / "losses" / "losses.json").read_text())["losses"]
    assert first.keys() == second.keys()
    assert len(first) == 1 + 2 * 3
    assert {name for name in first if first[name] != second[name]} == {"1/4 in layer 1"}
    assert second["1/4 in layer 1"] == 100.0
    said = (folder / "said-1.txt").read_text().splitlines()
    assert said[1].split() == ["grows", "by", "r", "=", "1/2", "r", "=", "1/4"]
    grown = first["1/4 in all layers"] - first["as it is"]
    assert said[4].split() == ["all", "layers", said[4].split()[2], f"{grown:.4f}"]
    assert (folder / "losses" / "losses.png").stat().st_size > 1000


def test_a_share_of_each_copy_is_redrawn(folder):
    gate = Weights(folder / "llama").read("model.layers.1.mlp.gate_proj.weight")
    down = Weights(folder / "llama").read("model.layers.1.mlp.down_proj.weight")
    made = Weights(folder / "redrawn" / "export")
    experts = made.read("model.layers.1.mlp.experts.gate_up_proj")[:, :WIDTH]
    downs = made.read("model.layers.1.mlp.experts.down_proj")
    kept = [(expert == gate).all(1) for expert in experts]
    for expert, other in zip(kept, downs, strict=True):
        assert expert.sum() == WIDTH * 3 // 4
        assert torch.equal((other == down).all(0), expert)
    assert not torch.equal(*kept)
    assert experts.std() == pytest.approx(gate.std().item(), rel=0.1)


def test_what_is_no_ffn_is_averaged_or_of_one(folder):
    name = "model.layers.0.self_attn.o_proj.weight"
    one, two = (Weights(folder / kind).read(name) for kind in ("llama", "mistral"))
    assert torch.allclose(Weights(folder / "of two" / "export").read(name), (one + two) / 2)
    assert torch.equal(Weights(folder / "of the second" / "export").read(name), two)


def test_neurons_that_fire_together_stay_together():
    """Eight groups of three neurons, each silent or loud as one, and four that are always loud."""
    generator = torch.Generator().manual_seed(2)
    group = torch.randint(0, 8, (200,), generator=generator)
    loud = torch.nn.functional.one_hot(group, 8).repeat_interleave(3, dim=1).float()
    noise = torch.rand(200, 28, generator=generator) * 0.1
    strength = torch.cat([torch.full((200, 4), 5.0), loud], dim=1) + noise
    order = torch.randperm(28, generator=generator)
    groups, shared = split_by_firing(strength[:, order], 8, 4, seed=1)
    assert sorted(order[shared].tolist()) == [0, 1, 2, 3]
    found = sorted(tuple(((order[one] - 4) // 3).tolist()) for one in groups)
    assert found == [(n, n, n) for n in range(8)]


def test_clusters_are_of_equal_size():
    points = torch.cat([torch.zeros(50, 3), torch.ones(10, 3)])
    owner = balanced_clusters(points + torch.rand(60, 3) * 0.01, 6, seed=1)
    assert owner.bincount(minlength=6).tolist() == [10] * 6


def test_a_fitted_router_finds_the_larger_part():
    x = torch.randn(500, 16, generator=torch.Generator().manual_seed(1))
    size = torch.stack([x[:, 0] + 4, 4 - x[:, 0]], dim=1).clamp_min(0.1)
    logits = x @ fitted_router(x, size).t()
    clear = x[:, 0].abs() > 0.5
    assert torch.equal(logits.argmax(1)[clear], (x[:, 0] < 0).long()[clear])
    assert logits.std() < 0.06


def wrong(folder: Path) -> dict[str, list[str]]:
    """Name -> the words of a command that must be refused."""
    commands = {
        "neurons": ["carve", "llama", "--experts", "5", "--topk", "2"],
        "all shared": ["carve", "llama", "--experts", "4", "--topk", "2", "--shared-neurons", "48"],
        "no text": ["carve", "llama", "--experts", "4", "--topk", "2", "--by", "coactivation"],
        "short text": ["carve", "llama", "--experts", "4", "--topk", "2", "--text", "short.txt"],
        "no UTF-8": ["carve", "llama", "--experts", "4", "--topk", "2", "--text", "bytes.txt"],
        "topk": ["carve", "llama", "--experts", "4", "--topk", "5"],
        "one expert": ["upcycle", "llama", "--experts", "1", "--topk", "1"],
        "slices": ["upcycle", "llama", "--experts", "4", "--topk", "2", "--granularity", "4"],
        "share": ["upcycle", "llama", "--experts", "4", "--topk", "2", "--redraw", "1.5"],
        "experts already": ["carve", "mixtral", "--experts", "4", "--topk", "2"],
        "one model": ["merge", "llama", "--topk", "2"],
        "two shapes": ["merge", "llama", "qwen3", "--topk", "2"],
        "third of two": ["merge", "llama", "mistral", "--topk", "2", "--attention", "3"],
        "mone": ["upcycle", "llama", "--experts", "4", "--topk", "2", "--mone", "hlaf"],
        "there": ["upcycle", "llama", "--experts", "4", "--topk", "2"],
    }  # fmt: skip
    checkpoint, text = str(folder / "fewer" / "checkpoint"), str(folder / "text.txt")
    losses = {
        "ratio": ["--text", text, "--ratios", "1/5"],
        "no ratio": ["--text", text, "--ratios", "half"],
        "few tokens": ["--text", str(folder / "short.txt")],
        "nowhere": ["--text", str(folder / "nowhere")],
    }
    out = {"there": "text.txt"}
    refused = {name: in_folder(folder, words) for name, words in commands.items()}
    refused |= {name: ["losses", checkpoint, *words] for name, words in losses.items()}
    return {
        name: [*words, "--out", str(folder / out.get(name, "refused"))]
        for name, words in refused.items()
    }


SAID = {
    "neurons": "--shared-neurons 0: 48 neurons less those of the shared expert do not divide by "
    "--experts 5; 3 would fit",
    "all shared": "--shared-neurons 48: ",
    "no text": "--by coactivation: give --text FILE",
    "short text": "short.txt has 3 tokens: give 512 or more",
    "no UTF-8": "bytes.txt is not UTF-8 text",
    "topk": "--topk 5 must be from 2 to the 4 experts",
    "one expert": "--topk 1 must be from 2 to the 1 experts",
    "slices": "--granularity 4 does not divide --topk 2",
    "share": "--redraw 1.5 must be a share from 0 to below 1",
    "experts already": "a Mixtral model has experts: convert import --mone NAME",
    "one model": "give two folders or more to merge",
    "two shapes": "only models of one shape are merged",
    "third of two": "--attention 3 must be average or a number from 1 to 2",
    "mone": "hlaf",
    "there": "is there: choose another folder",
    "ratio": "--ratios 1/5: 1/5 of 8 neurons is no multiple of 1 from 1 to all",
    "no ratio": "--ratios half: give shares such as",
    "few tokens": "short.txt has 3 tokens: give 256 or more",
    "nowhere": "nowhere: No such file",
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_one_line(folder, name):
    conversion_cases.check_refused(folder, name, SAID[name])
