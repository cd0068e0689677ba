"""`megatron-mone generate`: text from a folder, and one line where a folder cannot give it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_mone.commands.app import main
from megatron_mone.conversion.hf_model import generation
from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.hf_model.folder import AUTO_MAP, copy_code
from megatron_mone.conversion.hf_model.loading import load_model
from megatron_mone.conversion.hf_model.modeling_mone import MoNEForCausalLM
from megatron_mone.conversion.mone_folder import generation_of

pytestmark = pytest.mark.usefixtures("one_thread")

WORDS = ["a", "bird", "sings", "in", "the", "tree", "and", "flies", "away", "<end>"]
PROMPT = "the bird"
WEIGHTS = "model.safetensors"


def tokenizer_of(words: list[str]):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="a"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A whole folder, to be copied."""
    folder = tmp_path_factory.mktemp("made") / "model"
    torch.manual_seed(5)
    config = MoNEConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32, moe_intermediate_size=16, num_experts=2,
        eos_token_id=9, initializer_range=0.3, auto_map=AUTO_MAP,
    )  # fmt: skip
    MoNEForCausalLM(config).save_pretrained(folder)
    tokenizer_of(WORDS).save_pretrained(folder)
    copy_code(folder)
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "model"))


def generate(folder: Path, *more: str) -> int:
    try:
        return main(["generate", "--model", str(folder), "--prompt", PROMPT, *more])
    except SystemExit as ended:
        return int(ended.code or 0)


def change(folder: Path, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_likeliest_tokens_are_printed(folder, capsys):
    assert generate(folder, "--max-new-tokens", "6") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.endswith("\n")
    words = printed.out.split()
    assert words[:2] == PROMPT.split()
    ids = torch.tensor([[WORDS.index(word) for word in words]])
    with torch.no_grad():
        logits = load_model(folder).model(ids).logits[0]
    if len(words) < 8:  # it ended
        assert logits[-1].argmax() == 9
    assert [WORDS[n] for n in logits.argmax(dim=-1)][1:-1] == words[2:]


def test_tokens_that_the_folder_rules_out_are_not_printed(folder, capsys):
    assert generate(folder, "--max-new-tokens", "1") == 0
    likeliest = capsys.readouterr().out.split()[2:]
    never = [n for n, word in enumerate(WORDS) if word in likeliest or word == "<end>"]
    (folder / "generation_config.json").write_text(json.dumps({"suppress_tokens": never}))
    assert generate(folder, "--max-new-tokens", "9") == 0
    words = capsys.readouterr().out.split()
    assert len(words) == 11
    assert not set(words[2:]) & {WORDS[n] for n in never}


def test_an_export_says_which_ids_end_a_text_and_which_stand_for_none(folder):
    own = folder / "generation_config.json"
    own.unlink()
    rows = len(WORDS) + 3
    assert generation_of(folder, rows) == {"eos_token_id": 9, "suppress_tokens": [10, 11, 12]}
    assert generation_of(folder, len(WORDS)) == {"eos_token_id": 9}
    own.write_text("{}")
    assert generation_of(folder, rows) == {}  # it travels as it is
    own.unlink()
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        generation_of(folder, rows)
    assert generation_of(folder / "none", rows) == {}


def test_draws_are_those_of_the_seed(folder, capsys):
    texts = []
    for options in (["0.95", "--seed", "3"], ["0.95", "--seed", "3"], ["0.95"], ["1e-9"]):
        words = ("--temperature", "2", "--max-new-tokens", "9", "--top-p", *options)
        assert generate(folder, *words) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    assert generate(folder, "--max-new-tokens", "9") == 0
    assert capsys.readouterr().out == texts[3]  # of one token there is nothing to draw


def test_text_streams(folder, monkeypatch):
    """A word is printed before the next token is made."""
    seen: list[str] = []
    monkeypatch.setattr(
        generation.TextStreamer, "on_finalized_text",
        lambda self, text, stream_end=False: seen.append(text),
    )  # fmt: skip
    assert generate(folder, "--max-new-tokens", "5", "--dtype", "bfloat16") == 0
    assert len(seen) > 2


def test_a_family_of_transformers_runs(folder, capsys):
    """With code beside it, which is not run, and it is said."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    (folder / "modeling_llama.py").write_text("raise SystemExit('was run')")
    assert generate(folder, "--max-new-tokens", "2") == 0
    assert capsys.readouterr().err == ""
    change(folder, auto_map={"AutoModelForCausalLM": "modeling_llama.Model"})
    assert generate(folder, "--max-new-tokens", "2") == 0
    assert "(auto_map) is not run: transformers has llama itself\n" in capsys.readouterr().err


def evil(folder):
    (folder / "modeling_mone.py").write_text("raise SystemExit('was run')")


def cut(folder):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[:-9])


def rename_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["other"] = tensors.pop("model.norm.weight")
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def reshape_tensor(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(8)
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def spoil_numbers(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["lm_head.weight"][:] = torch.nan
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def drop_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def add_index(folder):
    text = json.dumps({"weight_map": {"lm_head.weight": "model-2.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(text)


def set_end(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 10]}')


WRONG = {
    "missing": (shutil.rmtree, "is no folder: give that of a Hugging Face model"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "half a config": (lambda f: (f / "config.json").write_text('{"model_'), "or cut short"),
    "a list": (lambda f: (f / "config.json").write_text("[1]"), "holds no JSON object"),
    "unknown": (lambda f: change(f, model_type="mine", auto_map=None), "model_type = 'mine' is"),
    "field": (lambda f: change(f, mone_activation="tanh"), "mone_activation = 'tanh' is not al"),
    "code": (evil, "(auto_map) is not run: it is not this package's configuration_mone.py and "),
    "other code": (lambda f: change(f, auto_map={"AutoModelForCausalLM": "x.Y"}), "is not run"),
    "hub code": (lambda f: change(f, attn_implementation="a/b"), "'a/b' names code elsewhere"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "model.safetensors is missing: give a folder"),
    "cut short": (cut, "model.safetensors is no whole safetensors file: it ends within"),
    "shard": (add_index, "model-2.safetensors is missing, which model.safetensors.index.json"),
    "tensor": (rename_tensor, "the tensor model.norm.weight is missing"),
    "shape": (reshape_tensor, "the tensor model.norm.weight has shape (8,), by the config it has"),
    "no tokenizer": (drop_tokenizer, "has no tokenizer (tokenizer.json, tokenizer.model, "),
    "half a tokenizer": (lambda f: (f / "tokenizer.json").write_text("{"), "cannot be loaded: "),
    "end": (set_end, "eos_token_id = [1, 10] must be tokens from 0 to 9"),
    "another's tokenizer": (lambda f: tokenizer_of(["x"] * 20 + WORDS).save_pretrained(f),
                            "it is the tokenizer of another model"),
    "NaN": (spoil_numbers, "the model's logits are NaN or infinite after 2 tokens"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_folder_is_one_line(kind, folder, capsys):
    spoil, said = WRONG[kind]
    spoil(folder)
    assert generate(folder, "--max-new-tokens", "4", "--temperature", "1") == 2
    printed = capsys.readouterr()
    assert said in printed.err
    assert printed.err.startswith("megatron-mone: error: ")
    assert printed.err.count("\n") == 1


def test_code_runs_where_it_is_trusted(folder, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "m"))
    evil(folder)
    with pytest.raises(SystemExit, match="was run"):
        main(["generate", "--model", str(folder), "--prompt", PROMPT, "--trust-remote-code"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--max-new-tokens", "0"), "--max-new-tokens 0 is not allowed: it must be 1 or more"),
        (("--max-new-tokens", "1.5"), "argument --max-new-tokens: invalid int value: '1.5'"),
        (("--max-new-tokens", "31"), "--max-new-tokens 31 after the 2 tokens of the prompt is ov"),
        (("--temperature", "-1"), "--temperature -1.0 is not allowed"),
        (("--temperature", "nan"), "--temperature nan is not allowed"),
        (("--top-p", "0.5"), "--top-p 0.5 is not allowed: it must be left out with --temperature"),
        (("--top-p", "1.5", "--temperature", "1"), "--top-p 1.5 is not allowed"),
        (("--seed", "4"), "--seed 4 is not allowed: it must be left out"),
        (("--dtype", "int8"), "argument --dtype: "),
        (("--prompt", ""), "--prompt '' makes no token: give a text"),
    ],
)
def test_a_wrong_option_is_one_line(more, said, folder, capsys):
    assert generate(folder, *more) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
