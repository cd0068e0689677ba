"""Shapes of public models: equal to what configs/model has of them, flags that Megatron takes, and
a line for what is wrong or not said."""

import json
from importlib import import_module

import pytest
import yaml
from transformers import AutoConfig

from megatron_mone.commands.app import main
from megatron_mone.common.places import CONFIG_ROOT
from megatron_mone.conversion.families import MODULES, families
from megatron_mone.conversion.hf_model.configuration_mone import MoNEConfig
from megatron_mone.conversion.inspect import model_file
from megatron_mone.conversion.shape import layer_pattern
from megatron_mone.model.arguments import flag_parser
from megatron_mone.model.run_config import load_run, read_part, to_flags

# As published in the models' folders.
QWEN3_235B = {
    "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 94, "mlp_only_layers": [], "model_type": "qwen3_moe",
    "moe_intermediate_size": 1536, "norm_topk_prob": True, "num_attention_heads": 64,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 94,
    "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001,
    "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK_V3 = {
    "aux_loss_alpha": 0.0001, "first_k_dense_replace": 3, "hidden_act": "silu",
    "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 4096, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256,
    "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": 4096},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False,
    "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Of a function that writes a config.json there."""

    def write(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("published", "name"),
    [(QWEN3_235B, "qwen3-235b-a22b"), (DEEPSEEK_V3, "moe-671b-a37b")],
    ids=["Qwen3-235B-A22B", "DeepSeek-V3"],
)
def test_published_models_are_the_files_that_we_have(folder, published, name):
    text = model_file(folder(published))
    found = yaml.safe_load(text)
    want = load_run_model(CONFIG_ROOT / "model" / f"{name}.yaml")
    for values in (found, want):  # both leave no row of padding, up to other numbers of ranks
        assert values["vocab_size"] % (8 * values.pop("make_vocab_size_divisible_by")) == 0
    assert found == want
    assert text.count("#") == 1  # everything is said


def load_run_model(path):
    """A model file as a run reads it."""
    return read_part(path, "model", path.stem)


@pytest.mark.parametrize("kind", sorted(set(families()) - {"gpt_oss"}))
def test_each_family_is_flags_that_megatron_takes(kind, folder, tmp_path):
    """Of the sizes that transformers gives a model of the family by default."""
    config = MoNEConfig() if kind == "mone" else AutoConfig.for_model(kind)
    values = config.to_dict()
    if kind == "deepseek_v2":  # has none by default
        values["num_experts_per_tok"] = 6
    run = tmp_path / "run.yaml"
    text = model_file(folder(values))
    run.write_text(f"model: {json.dumps(yaml.safe_load(text))}\n")
    shape, parser = load_run(run), flag_parser()
    read = vars(parser.parse_args(to_flags(shape, parser, run)))
    assert read["num_layers"] == config.num_hidden_layers
    assert read["hidden_size"] == config.hidden_size
    assert (read["num_experts"] is not None) == (kind not in DENSE)
    assert not [line for line in text.splitlines() if "not translated" in line]


DENSE = ("llama", "mistral", "qwen2", "qwen3")


def test_every_family_is_in_the_table_once():
    kinds = [kind for name in MODULES for kind in _family(name).model_types]
    assert sorted(kinds) == sorted(families())
    assert len({_family(name).name for name in MODULES}) == len(MODULES)


def _family(name):
    return import_module(f"megatron_mone.conversion.families.{name}").FAMILY


def test_layers_with_and_without_experts():
    assert layer_pattern([0, 0, 1, 1, 0]) == "([0]*2+[1]*2+[0]*1)"


def test_dense_layers_between_those_with_experts(folder):
    shape = yaml.safe_load(
        model_file(
            folder(QWEN3_235B | {"num_hidden_layers": 4, "decoder_sparse_step": 2,
                                 "mlp_only_layers": [3]})
        )
    )  # fmt: skip
    assert shape["moe_layer_freq"] == "([0]*1+[1]*1+[0]*2)"


def test_what_a_shape_does_not_say_is_told(folder):
    text = model_file(folder(QWEN3_235B | {
        "sliding_window": 4096, "use_sliding_window": True, "new_trick": [1, 2],
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
    }))  # fmt: skip
    assert "# sliding_window = 4096: all layers attend to all tokens here\n" in text
    assert "# rope_type = 'linear': positions are not scaled here" in text
    assert "# new_trick = [1, 2]: not translated\n" in text


GRANITE = {
    "model_type": "granitemoe", "hidden_size": 1024, "intermediate_size": 512, "vocab_size": 49155,
    "num_hidden_layers": 24, "num_attention_heads": 16, "num_local_experts": 32,
    "num_experts_per_tok": 8, "max_position_embeddings": 4096,
}  # fmt: skip


def test_granites_multipliers_are_megatrons_and_ours(folder):
    """Where they multiply by 1 nothing is said of them; scores are multiplied by 1 by default."""
    plain = yaml.safe_load(model_file(folder(GRANITE | {"attention_multiplier": 0.125})))
    assert not [name for name in plain if "mup" in name or "multiplier" in name]
    text = model_file(folder(GRANITE | {
        "embedding_multiplier": 12.0, "logits_scaling": 6.0, "residual_multiplier": 0.22,
    }))  # fmt: skip
    added = {name: value for name, value in yaml.safe_load(text).items() if name not in plain}
    assert added == {
        "use_mup": True, "mup_embedding_mult": 12.0, "mup_output_mult": 1 / 6,
        "mup_base_head_dim": 1.0, "mup_attn_scale_power": 0.0, "mone_residual_multiplier": 0.22,
    }  # fmt: skip
    assert text.count("#") == 1
    with pytest.raises(ValueError, match="logits_scaling = 0 must be above 0"):
        model_file(folder(GRANITE | {"logits_scaling": 0}))


def test_a_file_is_written_once_and_a_run_takes_it(folder, tmp_path, capsys):
    out = tmp_path / "models" / "mine.yaml"
    words = ["inspect", str(folder(QWEN3_235B)), "--out", str(out), "--mone", "quarter"]
    assert (main(words), main(words)) == (0, 0)
    assert capsys.readouterr().out == f"wrote {out}\n" * 2
    run = tmp_path / "run.yaml"
    run.write_text("model: models/mine.yaml\n")
    assert load_run(run)["mone_neuron_ratio"] == 0.25
    out.write_text("mine")
    assert refusal(capsys, *words[1:]) == f"--out {out} is there: choose another name, or delete it"
    assert out.read_text() == "mine"


def refusal(capsys, *words):
    """The one line that a command ends with."""
    try:
        status = main(["inspect", *words])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    [line] = capsys.readouterr().err.splitlines()
    return line.removeprefix("megatron-mone: error: ")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"model_type": "qwen3_moee"},
            "is no family that is translated (did you mean 'qwen3_moe'?)",
        ),
        ({"model_type": None}, "model_type is missing"),
        ({"model_type": "gpt_oss"}, "its experts have biases and a gate that is clamped"),
        ({"hidden_size": -1}, "hidden_size = -1 must be a whole number of 1 or more"),
        ({"hidden_size": True}, "hidden_size = True must be a whole number"),
        ({"num_experts_per_tok": 129}, "num_experts_per_tok = 129 is more than the 128 experts"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': only silu"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps = '1e-6' must be a number"),
        ({"mlp_only_layers": [94]}, "mlp_only_layers = [94] must be a list of layers from 0 to 93"),
        ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn' must be an object"),
        ({"vocab_size": None}, "vocab_size is missing"),
    ],
)
def test_a_wrong_field_is_one_line(folder, capsys, change, words):
    assert words in refusal(capsys, str(folder(QWEN3_235B | change)))


def test_no_config_or_a_broken_one_is_one_line(tmp_path, capsys):
    assert "config.json: cannot be read" in refusal(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("[")
    assert "not JSON, or cut short" in refusal(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    assert "holds no JSON object" in refusal(capsys, str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "num_hidden_layers is missing" in refusal(capsys, str(tmp_path))
    dense = {**QWEN3_235B, "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    assert "is a dense model" in refusal(capsys, str(tmp_path), "--mone", "quarter")
