"""A value survives from a run file through a flag, for all flags of Megatron and ours, by type."""

import argparse
import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.model.run_config import load_run, to_flags

PATTERNS = {"moe_freq_type", "la_freq_type", "no_rope_freq_type"}
TEXTS = [
    "plain", "two words", "", "-x", "--flag", "a=b", "'quoted'", "1e-3x", "4:00:00", "010",
    "2026-01-01", "$HOME", "*", "@file", "ünïcödé", "line\nbreak", "null", "true", "#no comment",
]  # fmt: skip
NUMBERS = [0.5, 0, -2, -1e-3, 1e-30, -1e30, 1e6, 3.0]


def megatron_parser():
    from megatron_mone.model.arguments import flag_parser

    return flag_parser()


@pytest.fixture(scope="module")
def parser():
    return megatron_parser()


@pytest.fixture
def run_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def samples(action):
    """[(value in a run file, the value that the parser must give)] of one flag."""
    kind = getattr(action.type, "reads", None) or getattr(action.type, "__name__", None)
    if action.nargs == 0:
        values = {getattr(action, "const", None), action.default}
        if isinstance(action, argparse.BooleanOptionalAction):
            values = {True, False}
        return [(value, value) for value in values if isinstance(value, bool)]
    if action.choices is not None:
        one = [(getattr(c, "name", c), c) for c in action.choices]
    elif kind == "int":
        one = [(7, 7), (-3, -3), (2e3, 2000), (5.0, 5), ("12", 12), ("010", 10), (0, 0)]
    elif kind in ("float", "_seconds"):
        one = [(v, float(v)) for v in NUMBERS if kind == "float"] + [(60, 60.0), ("1e2", 100.0)]
    elif kind in PATTERNS:
        one = [([0, 1], [0, 1]), (2, 2), ("([0]+[1]*3)*2", [0, 1, 1, 1] * 2), ("[0, 1]", [0, 1])]
    elif kind == "tuple_type":
        one = [([128, 0], (128, 0)), ("1,2", (1, 2)), ([-1, -1], (-1, -1))]
    elif kind == "bool":
        one = [(True, True), (False, False), ("no", False)]
    elif kind == "enum_type_handler":
        import signal

        one = [("SIGINT", signal.SIGINT), ("SIGUSR1", signal.SIGUSR1)]
    elif kind == "_parse_cuda_graph_modules_arg":
        from megatron.core.transformer.enums import CudaGraphModule

        one = [("full", "full"), *((m.name, m) for m in CudaGraphModule)]
    else:
        assert kind in ("str", None), f"{action.option_strings}: a type without samples, {kind}"
        one = [(text, text) for text in TEXTS]
        one += [(17, "17"), (0.25, "0.25")]
    if action.nargs is None:
        return one
    alone = [pair for pair in one if str(pair[0]).startswith("-") and " " not in str(pair[0])]
    together = [pair for pair in one if pair not in alone or isinstance(pair[0], int | float)]
    if isinstance(action.nargs, int):
        together = together[: action.nargs] if len(together) >= action.nargs else together * 3
        return [tuple([*column] for column in zip(*together[: action.nargs], strict=True))]
    lists = [tuple([*column] for column in zip(*together, strict=True))]
    lists += [([value], [read]) for value, read in (*alone, *one[:3])]
    return [*lists, (one[0][0], [one[0][1]])]


def test_a_value_of_every_flag_survives(parser, run_file):
    """All flags at once, as many times as the flag with the most samples has."""
    actions = {}
    for action in parser._actions:
        if not isinstance(action, argparse._HelpAction):
            actions.setdefault(action.dest, []).append(action)
    of_flag = {name: [s for a in own for s in samples(a)] for name, own in actions.items()}
    assert len(of_flag) > 800
    assert all(of_flag.values())
    for i in range(max(map(len, of_flag.values()))):
        wanted = {name: found[i % len(found)] for name, found in of_flag.items()}
        path = run_file(yaml.safe_dump({"model": {n: v for n, (v, _) in wanted.items()}}))
        read = vars(parser.parse_args(to_flags(load_run(path), parser, path)))
        for name, (value, result) in wanted.items():
            assert read[name] == result, (name, value)
            assert type(read[name]) is type(result), (name, value)


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("moe_layer_freq: [0, 1]", "moe_layer_freq", [0, 1]),
        ("train_iters: 1e6", "train_iters", 1_000_000),
        ("train_iters: 1.5e3", "train_iters", 1500),
        ("train_iters: 12.0", "train_iters", 12),
        ("train_iters: 0x10", "train_iters", 16),
        ("seed: 010", "seed", 10),
        ("lr: 1e-3", "lr", 0.001),
        ("lr: -1e-3", "lr", -0.001),
        ("clip_grad: 1", "clip_grad", 1.0),
        ("swiglu: yes", "swiglu", True),
        ("swiglu: 'true'", "swiglu", True),
        ("swiglu: 'Off'", "swiglu", False),
        ("add_bias_linear: no", "add_bias_linear", False),
        ("rl_partial_rollouts: on", "rl_partial_rollouts", True),
        ("rl_partial_rollouts: false", "rl_partial_rollouts", False),
        ("save: my folder/of runs", "save", "my folder/of runs"),
        ("save: 4:00:00", "save", "4:00:00"),
        ("save: 007", "save", "007"),
        ("save: 2026-01-01", "save", "2026-01-01"),
        ("save: -dash", "save", "-dash"),
        ("save: '-1e-3'", "save", "-1e-3"),
        ("save: ''", "save", ""),
        ("save: ~", "save", None),
        ("data_path: [1e-3, A, 0.999, B]", "data_path", ["0.001", "A", "0.999", "B"]),
        ("data_path: []", "data_path", []),
        ("recompute_modules: moe", "recompute_modules", ["moe"]),
        ("profile_ranks: []", "profile_ranks", []),
        ("attention_backend: fused", "attention_backend", "fused"),
        ("window_size: [128, 0]", "window_size", (128, 0)),
        ("mone_layer_freq: [0, 1]", "mone_layer_freq", [0, 1]),
        ("mone_ng_loss_coeff: 1e-3", "mone_ng_loss_coeff", 0.001),
    ],
)  # fmt: skip
def test_as_it_is_written(parser, run_file, line, name, value):
    path = run_file(f"train:\n  {line}\n")
    read = getattr(parser.parse_args(to_flags(load_run(path), parser, path)), name)
    assert getattr(read, "name", read) == value


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("train_iters: 1.5", "train_iters = 1.5 must be a whole number"),
        ("train_iters: yes", "train_iters = True must be a whole number"),
        ("train_iters: .nan", "train_iters = nan must be a whole number"),
        ("train_iters: .inf", "train_iters = inf must be a whole number"),
        ("train_iters: [1]", "train_iters = [1] must be one number, not a list"),
        ("train_iters: many", "train_iters = 'many' must be a whole number"),
        ("train_iters: 4:00:00", "train_iters = '4:00:00' must be a whole number"),
        ("lr: fast", "lr = 'fast' must be a number"),
        ("lr: {a: 1}", "lr = {'a': 1} must be a value, not a mapping"),
        ("swiglu: 1", "swiglu = 1 must be true or false"),
        ("swiglu: maybe", "swiglu = 'maybe' must be true or false"),
        ("swiglu: [true]", "swiglu = [True] must be true or false"),
        ("save: yes", "save = True must be a text or a number: write a text in quotes"),
        ("save: [a, b]", "save = ['a', 'b'] must be one value"),
        ("data_path: [[a]]", "data_path = [['a']] must be a value, not a mapping or a list in a"),
        ("data_path: [a, null]", "data_path = ['a', None] must be values, not null"),
        ("data_path: [a, -b]", "data_path = ['a', '-b'] holds '-b', which a list on the command"),
        ("rampup_batch_size: [1, 2]", "rampup_batch_size = [1, 2] must be 3 values"),
        ("moe_layer_freq: [0.5]", "moe_layer_freq = [0.5] must be a whole number"),
        ("moe_layer_freq: [true]", "moe_layer_freq = [True] must be one value"),
        ("moe_layer_freq: abc", "'abc' is not allowed: it must be a whole number, or a list of 0"),
        ("moe_layer_freq: '[0,x]'", "--moe-layer-freq: '[0,x]' is not allowed: it must be a who"),
        ("attention_backend: flashy", "'flashy' is none of its values: flash, fused, unfused"),
        ("exit_signal: SIGFOO", "'SIGFOO' is none of its values: SIGHUP, SIGINT, "),
        ("cuda_graph_modules: [x]", "'x' is none of its values: full, full_iteration, "),
        ("window_size: wide", "'wide' is not allowed: it must be whole numbers with commas"),
        ("help: true", "unknown key 'help'"),
        ("disable_bias_linear: true", "(--disable-bias-linear is the flag of 'add_bias_linear'"),
        ("hidden_sizes: 3", "did you mean 'hidden_size'"),
        ("seed: 1\n  seed: 2", "'seed' is given twice"),
    ],
)
def test_what_a_flag_does_not_take_is_one_line(parser, run_file, line, part):
    """With flag, value and what is taken; the name of no function."""
    path = run_file(f"train:\n  {line}\n")
    with pytest.raises(ValueError) as caught:
        parser.parse_args(to_flags(load_run(path), parser, path))
    message = str(caught.value)
    assert part in message
    assert "\n" not in message
    assert not any(name in message for name in ("_type", "reading", "lambda", "_parse", "handler"))


@given(
    st.dictionaries(
        st.sampled_from(["train_iters", "lr", "save", "data_path", "swiglu", "moe_layer_freq",
                         "rampup_batch_size", "attention_backend", "onnx_safe", "window_size"]),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
            max_leaves=4,
        ),
        max_size=3,
    )
)  # fmt: skip
def test_any_value_survives_or_is_one_line(parsers, values):
    """No other exception than ValueError, whatever a run file holds."""
    try:
        read = vars(parsers.parse_args(to_flags(values, parsers, Path("run.yaml"))))
    except ValueError:
        return
    for name in ("lr", "train_iters"):
        if isinstance(values.get(name), float | int) and not math.isnan(values[name]):
            assert read[name] == values[name]


@pytest.fixture(scope="module")
def parsers(parser):
    """The parser, for a test whose examples share it."""
    return parser
