"""Every family: imported, exported to the same bytes, and the same logits as in transformers, on
one rank and in layouts of two; what is wrong is one line, and nothing is left of it."""

import json
import shutil
import struct
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_mone.checkpoint.choice import saved_choice
from megatron_mone.conversion.exporting import _refuse_choice
from megatron_mone.conversion.folders import unfinished
from megatron_mone.conversion.hf_folder import Weights
from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.hf_model.folder import has_own_code
from megatron_mone.conversion.hf_model.loading import load_model
from megatron_mone.conversion.hf_model.modeling_mone import MoNEForCausalLM
from megatron_mone.conversion.placing import words_of_saved
from tests import forked_ranks
from tests.forked_ranks import ROOT
from tests.unit.conversion import conversion_cases
from tests.unit.conversion.conversion_cases import MTP

pytestmark = pytest.mark.slow

TOLERANCE = 1e-4
VOCABULARY = 64
TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=VOCABULARY, max_position_embeddings=64,
    attention_dropout=0.0, use_cache=False,
)  # fmt: skip
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)
_GLM = dict(
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_shared_experts=2,
    first_k_dense_replace=1, n_group=2, topk_group=1,
)  # fmt: skip
_LATENT = dict(
    num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=8,
)  # fmt: skip
FAMILIES = {
    "llama": {},
    "mistral": dict(sliding_window=None),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=16),
    "mixtral": dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "olmoe": dict(_EXPERTS, clip_qkv=None),
    "qwen2_moe": dict(_EXPERTS, moe_intermediate_size=24, shared_expert_intermediate_size=40),
    "qwen3_moe": dict(_EXPERTS, moe_intermediate_size=24, head_dim=8, mlp_only_layers=[0]),
    "granitemoe": dict(
        num_local_experts=4, num_experts_per_tok=2, attention_multiplier=0.015625 * 8,
        embedding_multiplier=12.0, residual_multiplier=0.22, logits_scaling=6.0,
        tie_word_embeddings=True,
    ),
    "deepseek_v2": dict(
        {**_GLM, "n_routed_experts": 8, "n_group": 4, "topk_group": 2}, **_LATENT,
        topk_method="group_limited_greedy",
    ),
    "deepseek_v3": dict(_GLM, **_LATENT),
    # num_hidden_layers: the first dense, the second without choice, the last with all there is
    "mone": dict(
        _EXPERTS, num_hidden_layers=3, mlp_layer_types=["dense", "sparse", "sparse"],
        moe_intermediate_size=24, mone_layers=[2], mone_neurons_per_token=12, mone_neuron_groups=2,
        mone_neuron_block=3, mone_selection_bias=True, shared_expert_intermediate_size=20,
        shared_expert_gate=True, attention_bias=True, qk_norm=True, qk_norm_all_heads=True,
        router_pre_softmax=True, router_dtype=None, routed_scaling_factor=1.5,
        rope_parameters={"rope_theta": 500, "partial_rotary_factor": 0.5},
        embedding_multiplier=2.5, residual_multiplier=0.7, logits_scaling=3.0,
        attention_multiplier=0.3,
    ),
    "mone latent": dict(
        _LATENT, num_experts=8, num_experts_per_tok=4, moe_intermediate_size=24, qk_norm=True,
        router_score_function="sigmoid", router_expert_bias=True, n_group=4, topk_group=2,
        mone_selection="threshold", mone_threshold=0.3, mone_min_neurons_per_token=4,
        mone_max_neurons_per_token=12, mone_neuron_groups=2, mone_activation="sigmoid",
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000, "factor": 40.0, "mscale": 1.0,
            "mscale_all_dim": 0.7, "original_max_position_embeddings": 4096, "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
    ),
    "glm4_moe": dict(_GLM, head_dim=8),
    # of docs/CONVERSION.md
    "dots1": dict(_GLM, head_dim=8, sliding_window=None, norm_topk_prob=True),
}  # fmt: skip
WITH_MTP = f"deepseek_v3 {MTP}"
HALF = "qwen3_moe in bfloat16"
AS_MONE = [
    "mixtral",
    "granitemoe",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "glm4_moe",
    "deepseek_v2",
    "deepseek_v3",
]


def write_source(folder: Path, name: str, tokens: torch.Tensor) -> None:
    """A Hugging Face folder with a tokenizer's file, and its logits beside it."""
    kind = name.partition(" ")[0]
    values = {**TINY, **FAMILIES.get(name, FAMILIES[kind])}
    dtype = torch.bfloat16 if name == HALF else torch.float32
    if kind == "mone":
        model = MoNEForCausalLM(MoNEConfig(**values)).eval()
    else:
        config = AutoConfig.for_model(kind, **values)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(dtype).eval()
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor_name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and "inv_freq" not in tensor_name:
                noise = torch.randn(tensor.shape, generator=generator) * 0.2
                tensor.copy_(noise + ("norm" in tensor_name))
        torch.save(model(tokens).logits.float(), folder / "theirs.pt")
    model.save_pretrained(folder / "source")
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    own.save(str(folder / "source" / "tokenizer.json"))
    if name == WITH_MTP:
        _add_mtp(folder / "source" / "model.safetensors")


def _add_mtp(path: Path) -> None:
    """As the model was published: one more layer, with copies of embedding and head."""
    tensors = load_file(path)
    last = TINY["num_hidden_layers"] - 1
    more = {
        name.replace(f"layers.{last}.", f"layers.{last + 1}."): value + 0.5
        for name, value in tensors.items()
        if f"layers.{last}." in name
    }
    at, hidden = f"model.layers.{last + 1}.", TINY["hidden_size"]
    for name in ("enorm", "hnorm", "shared_head.norm"):
        more[f"{at}{name}.weight"] = torch.randn(hidden)
    more[f"{at}eh_proj.weight"] = torch.randn(hidden, 2 * hidden)
    more[f"{at}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    more[f"{at}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file({**tensors, **more}, path, {"format": "pt"})


def documented_family() -> str:
    """The family that the docs add."""
    text = (ROOT / "docs" / "CONVERSION.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("```")[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("conversion")
    tokens = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(3))
    torch.save(tokens, found / "tokens.pt")
    names, family = [*FAMILIES, WITH_MTP, HALF], documented_family()
    for name in names:
        (found / name).mkdir()
        write_source(found / name, name, tokens)
    for ranks, run, more in (
        (1, conversion_cases.convert_all, (names, AS_MONE, family, wrong_commands(found))),
        (2, conversion_cases.laid_out, (list(FAMILIES), family)),
    ):
        log = found / f"{ranks}.log"
        job = forked_ranks.start(ranks, run, (str(found), *more), log)
        assert job.wait(600) == 0, log.read_text(errors="replace")[-4000:]
    return found


@pytest.mark.parametrize("name", [*FAMILIES, WITH_MTP, HALF])
def test_the_round_trip_is_bit_equal(folder, name):
    before, after = Weights(folder / name / "source"), Weights(folder / name / "export")
    left_out = set(before.tensors) - set(after.tensors)
    copies = {f"model.layers.2.{tensor}.weight" for tensor in ("embed_tokens", "shared_head.head")}
    assert left_out == (copies if name == WITH_MTP else set())
    assert len({stored.path for stored in after.tensors.values()}) > 1
    for tensor, stored in after.tensors.items():
        assert stored.dtype == before.tensors[tensor].dtype
        assert torch.equal(after.read(tensor), before.read(tensor)), tensor
    for travels in ("config.json", "tokenizer.json", "generation_config.json"):
        source, export = (folder / name / where / travels for where in ("source", "export"))
        if name.startswith("mone") and travels == "config.json":
            was, now = map(MoNEConfig.from_pretrained, (source, export))
            was.mone_layers = was.choosing_layers
            was, now = was.to_dict(), now.to_dict()
            changed = {field for field in {**was, **now} if was.get(field) != now.get(field)}
            assert changed <= {"architectures", "auto_map", "dtype", "use_cache"}
            assert has_own_code(export.parent)
        elif source.exists():
            assert export.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("name", FAMILIES)
def test_only_what_was_trained_to_choose_says_so(folder, name):
    """Weights of another family kept every neuron, also those that --mone will train further."""
    choice = saved_choice(folder / name / "checkpoint" / "release")
    assert (choice is not None) == name.startswith("mone")
    if name in AS_MONE:
        assert saved_choice(folder / name / "mone checkpoint" / "release") is None
    if name == "mone":
        assert choice["mone_neurons_per_token"] == 12
        assert choice["mone_layer_freq"] == [0, 0, 1]


def test_a_model_that_chooses_is_not_written_as_one_that_keeps_all(folder, monkeypatch):
    checkpoint = folder / "mone latent" / "checkpoint" / "release"
    with pytest.raises(ValueError, match=r"keeps 6 of 24 neurons .*threshold.*add --mone"):
        _refuse_choice(checkpoint, Namespace(moe_ffn_hidden_size=24))
    _refuse_choice(folder / "mixtral" / "checkpoint" / "release", Namespace(moe_ffn_hidden_size=24))
    kept = saved_choice(checkpoint) | {"mone_selection": "topk", "mone_neurons_per_token": 24}
    monkeypatch.setattr("megatron_mone.checkpoint.choice.saved_choice", lambda folder: kept)
    _refuse_choice(checkpoint, Namespace(moe_ffn_hidden_size=24))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_transformers(folder, name):
    wanted = torch.load(folder / name / "theirs.pt")
    found = {path.stem for path in (folder / name).glob("*.pt")} - {"theirs", "mone"}
    dense = name in ("llama", "mistral", "qwen2", "qwen3")
    assert found == ({"one", "TP2"} if dense else {"one", "TP2", "EP2"})
    for layout in found:
        got = torch.load(folder / name / f"{layout}.pt")
        assert (got - wanted).abs().max() <= TOLERANCE, layout
    assert wanted.std() > 0.1


def test_the_documents_table_is_what_was_found(folder):
    """A row a model: made anew of these tests' files, and compared with docs/CONVERSION.md."""
    rows = [row_of(folder, name) for name in [*FAMILIES, WITH_MTP, HALF]]
    table = "\n".join(
        ["| model | round trip | logits as there | as MoNE |", "| --- " * 4 + "|", *rows]
    )
    assert table in (ROOT / "docs" / "CONVERSION.md").read_text(encoding="utf-8"), f"\n{table}\n"


def row_of(folder: Path, name: str) -> str:
    """What the files of one model say of it."""
    here = folder / name
    before, after = Weights(here / "source"), Weights(here / "export")
    equal = all(torch.equal(after.read(tensor), before.read(tensor)) for tensor in after.tensors)
    copies = len(before.tensors) - len(after.tensors)
    bits = f"bit for bit{f', {copies} copies left out' if copies else ''}" if equal else "differs"
    wanted = torch.load(here / "theirs.pt")
    near = [
        words
        for layout, words in (("one", "1 rank"), ("TP2", "TP 2"), ("EP2", "EP 2"))
        if (here / f"{layout}.pt").exists()
        and (torch.load(here / f"{layout}.pt") - wanted).abs().max() <= TOLERANCE
    ]
    if name == HALF:
        near = []  # the same model in float32 is compared
    kept = "a quarter" if (here / "mone.pt").exists() else ""
    return f"| {name} | {bits} | {', '.join(near)} | {kept} |"


@pytest.mark.parametrize("name", AS_MONE)
def test_a_mone_model_of_ours_has_megatrons_logits(folder, name):
    """Imported, made a MoNE model that keeps a quarter, exported as our own class."""
    model = load_model(folder / name / "mone").model
    assert model.config.kept * 4 == model.config.moe_intermediate_size
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    wanted = torch.load(folder / name / "mone.pt")
    assert (logits - wanted).abs().max() <= TOLERANCE
    assert (wanted - torch.load(folder / name / "theirs.pt")).abs().max() > 0.01
    assert (folder / name / "mone" / "tokenizer.json").exists()


def test_rows_of_padding_are_exported():
    """A model of 127 tokens that was trained with 128 rows: its config.json says 128."""
    saved = dict(num_layers=2, vocab_size=127, padded_vocab_size=128)
    words = words_of_saved(saved, Path("checkpoint"), 32)
    assert words[words.index("--vocab-size") + 1] == "128"


def test_transformers_loads_what_was_exported(folder):
    model = AutoModelForCausalLM.from_pretrained(folder / "qwen3_moe" / "export").eval()
    with torch.no_grad():
        logits = model(torch.load(folder / "tokens.pt")).logits
    assert torch.allclose(logits, torch.load(folder / "qwen3_moe" / "theirs.pt"), atol=TOLERANCE)


def test_what_is_left_out_is_told(folder):
    said = json.loads((folder / WITH_MTP / "said.json").read_text())
    assert len(said) == 2
    assert all("a copy of the model's own" in line for line in said)
    assert json.loads((folder / "qwen3_moe" / "said.json").read_text()) == []
    (line,) = json.loads((folder / "glm4_moe" / "said.json").read_text())
    assert "mtp_num_layers" in line


def test_no_space_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with (
        pytest.raises(ValueError, match="bytes are to be written, 1,000 are free there"),
        unfinished(tmp_path / "out", 1500, "a model"),
    ):
        pytest.fail("nothing is written")
    assert not (tmp_path / "out").exists()


def test_a_stopped_import_goes_on(folder):
    first, second = json.loads((folder / "llama" / "resumed.json").read_text())
    assert first == [second[0], False]
    assert second[1]
    whole, resumed = folder / "llama" / "checkpoint", folder / "llama" / "resumed"
    names = sorted(path.name for path in (whole / "release").iterdir())
    assert names == sorted(path.name for path in (resumed / "release").iterdir())
    assert not (folder / "llama" / "resumed.partial").exists()


def wrong_commands(folder: Path) -> dict[str, list[str]]:
    """Name -> the words of a command that must be refused."""
    good = folder / "llama" / "source"

    def changed(name: str, change, of: str = "llama") -> Path:
        copy = folder / "wrong" / name
        shutil.copytree(folder / of / "source", copy)
        change(copy)
        return copy

    def tensors(edit):
        def change(copy: Path) -> None:
            held = load_file(copy / "model.safetensors")
            edit(held)
            save_file(held, copy / "model.safetensors", {"format": "pt"})

        return change

    def config(**values):
        def change(copy: Path) -> None:
            path = copy / "config.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

        return change

    def truncate(copy: Path) -> None:
        path = copy / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-100])

    def lie(copy: Path) -> None:
        path = copy / "model.safetensors"
        path.write_bytes(struct.pack("<Q", 10**12) + path.read_bytes()[8:])

    norm = "model.norm.weight"
    sources = {
        "missing": changed("missing", tensors(lambda held: held.pop(norm))),
        "extra": changed("extra", tensors(lambda held: held.update(more=torch.ones(3)))),
        "mis-shaped": changed(
            "mis-shaped", tensors(lambda held: held.update({norm: torch.ones(3)}))),
        "several dtypes": changed("several dtypes", tensors(lambda held: held.update({
            "model.layers.0.self_attn.k_proj.weight":
                held["model.layers.0.self_attn.k_proj.weight"].half()}))),
        "truncated": changed("truncated", truncate),
        "a header that lies": changed("a header that lies", lie),
        "no weights": changed("no weights", lambda copy: (copy / "model.safetensors").unlink()),
        "wrong family": changed("wrong family", config(model_type="bert")),
        "gpt-oss": changed("gpt-oss", config(model_type="gpt_oss")),
        "other outputs": changed("other outputs", config(
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})),
        "clipped": changed("clipped", config(clip_qkv=8.0), of="olmoe"),
        "no folder": folder / "nowhere",
    }  # fmt: skip
    out = str(folder / "refused")
    found = {
        name: ["convert", "import", str(source), "--out", out] for name, source in sources.items()
    }
    found["out is there"] = ["convert", "import", str(good), "--out", str(good)]
    found["mone of a dense model"] = [
        "convert", "import", str(good), "--out", out, "--mone", "quarter",
    ]  # fmt: skip
    found["mone of a mone model"] = [
        "convert", "import", str(folder / "mone" / "source"), "--out", out, "--mone", "quarter",
    ]  # fmt: skip
    checkpoint = str(folder / "mone" / "checkpoint")
    found["like a mone model"] = [
        "convert", "export", checkpoint, "--out", out, "--like", str(folder / "mone" / "source"),
    ]  # fmt: skip
    found["no checkpoint"] = ["convert", "export", str(good), "--out", out]
    checkpoint = str(folder / "qwen3" / "checkpoint")
    found["another shape"] = [
        "convert", "export", checkpoint, "--out", out, "--like", str(folder / "llama" / "source"),
    ]  # fmt: skip
    return found


SAID = {
    "missing": "tensor model.norm.weight [32] is missing",
    "extra": "tensor more [3] is none of the model",
    "mis-shaped": "model.norm.weight is [3], by its config.json it is [32]",
    "several dtypes": "of several dtypes: torch.float16, torch.float32",
    "truncated": "no whole safetensors file: it ends within",
    "a header that lies": "its header has 1000000000000 bytes",
    "no weights": "model.safetensors is missing",
    "wrong family": "model_type = 'bert' is no family",
    "gpt-oss": "biases",
    "other outputs": "--differs to import the weights all the same",
    "clipped": "clip_qkv = 8.0: q, k and v are not clipped here",
    "no folder": "nowhere",
    "out is there": "is there: choose another folder",
    "mone of a dense model": "is a dense model",
    "mone of a mone model": "says itself which neurons are kept",
    "like a mone model": "a MoNE model is written by the checkpoint's own arguments",
    "no checkpoint": "holds no checkpoint",
    "another shape": "kv_channels = 16",
}


@pytest.mark.parametrize("name", SAID)
def test_what_is_wrong_is_one_line(folder, name):
    conversion_cases.check_refused(folder, name, SAID[name])
