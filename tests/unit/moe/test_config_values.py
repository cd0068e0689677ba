"""Every mone_* field refuses a value of another type in one line, in Python, in MONE_CONFIG and in
run files alike; and what one of them takes, the others take."""

import dataclasses
import math

import numpy
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.config import MONE_FIELD_NAMES, MoNEFields, attach_fields_from_env
from tests.conftest import mone_config

FIELDS = {f.name: f for f in dataclasses.fields(MoNEFields)}
SWITCHES = ("mone_neuron_ratio", "mone_neurons_per_token")
MAY_BE_NONE = (
    *SWITCHES, "mone_min_neurons_per_token", "mone_max_neurons_per_token",
    "mone_record_masks", "mone_replay_masks",
)  # fmt: skip
TEXTS = ("mone_record_masks", "mone_replay_masks", "mone_record_mask_steps")
NUMBERS = tuple(
    name for name, field in FIELDS.items()
    if type(field.default) in (int, float)
    or (name in MAY_BE_NONE and name not in TEXTS)
)  # fmt: skip
NEVER = st.one_of(
    st.sampled_from([math.nan, math.inf, -math.inf, "", " ", b"1", 1j, {}, {"a": 1}, object()]),
    st.sampled_from(["1e-3", "0.25", "abc", "nan", "None", "yes", "\n"]),
    st.floats(max_value=-0.5, allow_nan=False),
    st.integers(max_value=-1),
    st.lists(st.sampled_from(["a", None, 0.5, -1, [1], True]), max_size=3),
    st.just(10**400),
)


def stock_config(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = dict(
        num_layers=1, hidden_size=16, num_attention_heads=2, num_moe_experts=4,
        moe_ffn_hidden_size=24, gated_linear_unit=True, add_bias_linear=False,
    )  # fmt: skip
    return TransformerConfig(**{**fields, **changes})


@pytest.fixture
def read_env(tmp_path, monkeypatch):
    """A config with the fields that a YAML text gives it."""
    path = tmp_path / "mone.yaml"
    monkeypatch.setenv("MONE_CONFIG", str(path))

    def read(text, **changes):
        path.write_text(text)
        config = stock_config(**changes)
        attach_fields_from_env(config)
        return config

    return read


def only_line(field, value, changes):
    with pytest.raises(ValueError) as caught:
        mone_config(**{**changes, field: value})
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{field} = "), message
    shown = {repr(value)}
    if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300:
        shown |= {repr(float(value)), repr(math.trunc(value))}  # as the field holds it
    said, _, allowed = message.removeprefix(f"{field} = ").partition(" is not allowed: it must be ")
    assert allowed
    assert said in shown or (said.endswith("...") and repr(value).startswith(said[:-3]))
    return message


@settings(max_examples=300)
@given(st.sampled_from(MONE_FIELD_NAMES), NEVER)
def test_a_value_of_the_wrong_type_is_one_line_with_field_and_value(field, value):
    """Whatever the field and the value: none of these is a value of it."""
    is_text = isinstance(value, str) and value.strip()
    if field in TEXTS and (is_text or isinstance(value, int)):
        return  # a folder may have any name
    if field == "mone_layer_freq" and isinstance(value, list | str):
        return  # below
    only_line(field, value, {"mone_neuron_ratio": None, "mone_neurons_per_token": 6}
              if field != "mone_neurons_per_token" else {"mone_neuron_ratio": None})  # fmt: skip


@pytest.mark.parametrize("field", NUMBERS)
@pytest.mark.parametrize("value", [True, False, [1], "1", None])
def test_numbers_are_no_bools_lists_texts_or_nothing(field, value):
    if value is None and field in MAY_BE_NONE:
        return
    if field == "mone_layer_freq" and value in ([1], "1"):
        return
    only_line(field, value, {"mone_neuron_ratio": None} if field in SWITCHES else {})


@pytest.mark.parametrize("field", [n for n, f in FIELDS.items() if isinstance(f.default, bool)])
@pytest.mark.parametrize("value", [0, 1, "true", None, [True]])
def test_a_switch_is_a_bool(field, value):
    assert "true or false" in only_line(field, value, {})


def test_a_number_in_quotes_is_told_apart():
    assert "without them" in only_line("mone_ng_loss_coeff", "1e-3", {})
    assert "without them" not in only_line("mone_ng_loss_coeff", "small", {})


@pytest.mark.parametrize(
    "value",
    [[1.5], [True], ["1"], [None], [[1]], "abc", "[0]+[x]", "[", "", "[1.5]", "([0]+[1]*3", 1.5],
)
def test_a_layer_pattern_is_whole_numbers(value):
    with pytest.raises(ValueError, match=r"mone_layer_freq = .* is not allowed: it must be"):
        mone_config(num_layers=4, mone_layer_freq=value)


@pytest.mark.parametrize("moe", [0, [1], [1, 1, 2, 1], "1"])
def test_a_wrong_pattern_of_moe_layers_is_named(moe):
    with pytest.raises(ValueError, match="moe_layer_freq = "):
        mone_config(num_layers=4, moe_layer_freq=moe)


@pytest.mark.parametrize(
    ("field", "value", "held"),
    [
        ("mone_neurons_per_token", 6.0, 6),
        ("mone_neurons_per_token", numpy.int64(6), 6),
        ("mone_neuron_ratio", 1, 1.0),
        ("mone_neuron_ratio", numpy.float64(0.25), 0.25),
        ("mone_ng_loss_coeff", 0, 0.0),
        ("mone_record_mask_steps", 5, "5"),
        ("mone_layer_freq", (1,), [1]),
        ("mone_layer_freq", "[1] * 1", [1]),
        ("mone_layer_freq", 1.0, 1),
    ],
)
def test_a_value_in_another_form_is_held_in_the_fields_own(field, value, held):
    config = mone_config(**{**({"mone_neuron_ratio": None} if field in SWITCHES else {}),
                            field: value})  # fmt: skip
    got = getattr(config, field)
    assert got == held
    assert type(got) is type(held)


RANGES = [
    ("mone_threshold", -0.5), ("mone_threshold", 1.5), ("mone_min_neurons_per_token", 0),
    ("mone_max_neurons_per_token", -1), ("mone_ng_loss_coeff", -1e-9),
    ("mone_ng_bias_update_rate", 0.0), ("mone_record_mask_steps", "8-5"),
    ("mone_record_mask_steps", "0"), ("mone_record_mask_steps", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "value"), RANGES)
def test_a_field_that_another_leaves_unused_is_checked_too(field, value):
    only_line(field, value, {})


def test_environment_file_reads_numbers_as_run_files_do(read_env):
    config = read_env("mone_neurons_per_token: 6.0\nmone_ng_loss_coeff: 1e-3\nmone_layer_freq: [1]")
    assert (config.mone_neurons_per_token, config.mone_ng_loss_coeff) == (6, 0.001)
    assert config.mone_layer_freq == [1]
    assert read_env("mone_neuron_ratio: 2.5e-1\nmone_check_for_nan: off").mone_enabled


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("mone_ng_loss_coeff: 1e-3", "neither mone_neuron_ratio nor mone_neurons_per_token is set"),
        ("", "neither mone_neuron_ratio nor mone_neurons_per_token is set"),
        ("mone_neuron_ratio: '0.25'", "mone_neuron_ratio = '0.25' is not allowed: it must be a f"),
        ("mone_neuron_ratio: .nan", "mone_neuron_ratio = nan is not allowed"),
        ("mone_neuron_ratio: 0.25\nmone_ng_loss_coeff:", "mone_ng_loss_coeff = None is not"),
        ("mone_neuron_ratio: yes", "mone_neuron_ratio = True is not allowed"),
        ("mone_neuron_ratio: [0.25]", r"mone_neuron_ratio = [0.25] is not allowed"),
        ("mone_neuron_ratio: 0.25\nmone_neuron_ratio: 0.5", "'mone_neuron_ratio' is given twice"),
        ("mone_neuron_ratio: !!python/object/apply:os.getcwd []", "cannot be read"),
        ("mone_neuron_ratio: 0.25\nmone_activation: [silu]", "one of silu, sigmoid"),
    ],
)
def test_environment_file_errors_name_the_file_and_the_field(read_env, text, part):
    with pytest.raises(ValueError, match=r"^MONE_CONFIG = '.*mone.yaml'") as caught:
        read_env(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=60)
@given(st.sampled_from([n for n in MONE_FIELD_NAMES if n not in SWITCHES]), NEVER)
def test_environment_file_refuses_what_python_refuses(tmp_path_factory, field, value):
    """The same line behind the file's name."""
    import os

    def message(build):
        try:
            build()
        except ValueError as error:
            return str(error)
        return None

    try:
        # In quotes: of a bare 1e-3 PyYAML's writer makes text, and our reader a number.
        style = '"' if isinstance(value, str) else None
        text = "mone_neuron_ratio: 0.25\n" + yaml.safe_dump({field: value}, default_style=style)
    except yaml.YAMLError:
        return
    path = tmp_path_factory.mktemp("env") / "mone.yaml"
    path.write_text(text)
    os.environ["MONE_CONFIG"] = str(path)
    try:
        ours = message(lambda: mone_config(**{field: value}))
        theirs = message(lambda: attach_fields_from_env(stock_config()))
    finally:
        del os.environ["MONE_CONFIG"]
    assert (ours is None) == (theirs is None)
    if theirs is not None:
        assert theirs.startswith(f"MONE_CONFIG = {str(path)!r}: {field} = ")
        assert "\n" not in theirs


def test_an_unset_variable_names_those_that_nobody_reads(monkeypatch):
    monkeypatch.delenv("MONE_CONFIG", raising=False)
    monkeypatch.setenv("MONE_CONFG", "mone.yaml")
    monkeypatch.setenv("MONE_NEURON_RATIO", "0.25")
    with pytest.raises(ValueError, match="MONE_CONFG, MONE_NEURON_RATIO in the environment is re"):
        attach_fields_from_env(stock_config())


@pytest.mark.parametrize("field", ["fp8", "fp4"])
def test_false_is_off_and_the_field_that_is_on_is_named(field):
    config = mone_config()
    config.fp8 = config.fp4 = False
    config.moe_latent_size = 0
    from megatron_mone.config import validate

    validate(config)
    setattr(config, field, "hybrid")
    named = "mone_backend = 'auto'" if field == "fp8" else "fp4 = 'hybrid'"
    with pytest.raises(ValueError, match=f"^{named} is not allowed: it must be "):
        validate(config)


def test_experts_that_expert_tensor_parallelism_does_not_divide_are_named():
    with pytest.raises(
        ValueError, match=r"moe_ffn_hidden_size = 24 .* expert_tensor_parallel_size"
    ):
        mone_config(expert_tensor_parallel_size=5)


def test_a_layer_without_a_selection_says_so(one_rank):
    from tests.unit.moe.builders import build_layer

    with pytest.raises(ValueError, match="neither mone_neuron_ratio nor mone_neurons_per_token"):
        build_layer(mone_neuron_ratio=None)


def test_a_layer_without_a_number_trains_and_checks(one_rank):
    """As Megatron's unit tests build theirs: no number, fp8 = False."""
    from megatron_mone.moe.finite_check import NonFiniteExpertError
    from megatron_mone.moe.masks.tape import record_masks
    from megatron_mone.moe.masks.trace import MaskTrace
    from tests.unit.moe.builders import build_layer

    layer = build_layer(mone_ng_loss_coeff=0.5)
    numbered = build_layer(mone_ng_loss_coeff=0.5)
    layer.layer_number = layer.router.layer_number = None
    x = torch.randn(9, 2, 16)
    for one in (layer, numbered):
        one(x)[0].square().sum().backward()
        one.end_step()
    assert torch.equal(layer.experts.linear_fc1.grad, numbered.experts.linear_fc1.grad)
    assert layer.table_row() is None
    with record_masks(layer, MaskTrace()), pytest.raises(ValueError, match="layer_number = None"):
        layer(x)
    with torch.no_grad():
        layer.experts.linear_fc2[1] = math.nan
    with pytest.raises(NonFiniteExpertError, match="a layer without a number, expert 1 gave"):
        layer(torch.randn(40, 1, 16))
