"""Run files become the flags that make Megatron's parser produce their values."""

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_mone.model.run_config import CONFIG_ROOT, MONE, PARTS, load_run, to_flags


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser()
    p.add_argument("--hidden-size", type=int, default=1)
    p.add_argument("--lr", type=float)
    p.add_argument("--swiglu", action="store_true")
    p.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    p.add_argument("--recompute-modules", nargs="*")
    p.add_argument("--moe-layer-freq", type=str)
    return p


@given(
    st.fixed_dictionaries(
        {},
        optional={
            "hidden_size": st.integers(-9, 9999),
            "lr": st.floats(1e-9, 10),
            "swiglu": st.booleans(),
            "add_bias_linear": st.booleans(),
            "recompute_modules": st.lists(st.sampled_from(["moe", "mlp"]), min_size=1, max_size=2),
            "moe_layer_freq": st.lists(st.integers(0, 1), min_size=1, max_size=3),
        },
    )
)
def test_flags_give_the_values_back(values):
    p = parser()
    parsed = vars(p.parse_args(to_flags(values, p, Path("run.yaml"))))
    for name, value in values.items():
        wanted = str(value) if name == "moe_layer_freq" else value
        assert parsed[name] == wanted


def test_later_flags_win():
    p = parser()
    flags = to_flags({"hidden_size": 8}, p, Path("run.yaml"))
    assert p.parse_args([*flags, "--hidden-size", "16"]).hidden_size == 16


@pytest.mark.parametrize("path", sorted(CONFIG_ROOT.glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_run_files_are_known_to_megatron(path, one_rank):
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mone.model.arguments import add_arguments

    p = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    values = load_run(path)
    args = p.parse_args(to_flags(values, p, path))
    assert {name for name in values if getattr(args, name) is None} == set()


def test_one_parser_reads_as_many_do(one_rank):
    """What one reading is given, and what it sets on its parser, the next does not see."""
    from megatron.training import arguments

    from megatron_mone.model.arguments import flag_parser, one_parser, parse_given

    def found():
        given = (["--num-layers", "2", "--mone-neuron-ratio", "0.5"], ["--num-layers", "3"])
        flags = [(one.dest, one.default, one.option_strings) for one in flag_parser()._actions]
        return [vars(parse_given(words)) for words in given], flags

    many, add = found(), arguments.add_megatron_arguments
    with one_parser():
        assert found() == many
        with pytest.raises(ValueError, match=r"did you mean .--num-layers"):
            parse_given(["--num-layer", "2"])
        assert flag_parser()._actions[0] is flag_parser()._actions[0]
    assert arguments.add_megatron_arguments is add
    assert found() == many
    assert flag_parser()._actions[0] is not flag_parser()._actions[0]


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "run.yaml").write_text("model: !!python/object/apply:os.system ['echo hi']\n")
    with pytest.raises(ValueError, match="cannot be read"):
        load_run(tmp_path / "run.yaml")


def test_parts_are_folders():
    assert all((CONFIG_ROOT / part).is_dir() for part in (*PARTS, MONE))


def run_of(folder: Path, text: str) -> Path:
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


FIELDS = "{mone_neuron_ratio: 0.25, mone_ng_loss_coeff: 1.0e-3}"


@pytest.mark.parametrize(
    "text",
    [
        "model: moe-30b-a3b\nmone: quarter\n",
        f"model: moe-30b-a3b\nmone: {FIELDS}\n",
        f"model: {{base: moe-30b-a3b, mone: {FIELDS}}}\n",
        "model: {base: moe-30b-a3b-mone}\n",
        "model: other.yaml\n",
    ],
)
def test_a_model_beside_its_mone_part_is_the_model_of_the_old_name(text, tmp_path):
    (tmp_path / "other.yaml").write_text("base: beside.yaml\nmone: quarter\n")
    (tmp_path / "beside.yaml").write_text("base: moe-30b-a3b\n")
    old = load_run(run_of(tmp_path, "model: moe-30b-a3b-mone\n"))
    assert load_run(run_of(tmp_path, text)) == old
    assert old["mone_neuron_ratio"] == 0.25


def test_what_a_file_says_wins_over_its_base(tmp_path):
    run = run_of(tmp_path, "model: {base: moe-30b-a3b-mone, num_layers: 2, mone_neuron_ratio: 0.5}")
    assert {"num_layers": 2, "mone_neuron_ratio": 0.5}.items() <= load_run(run).items()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("model: moe-30b-a3b-mone\nmone: quarter",
         "'mone_neuron_ratio' is set by both model and mone"),
        ("model: {mone: quarter, mone_neuron_ratio: 0.5}",
         "'mone_neuron_ratio' is set by both model and mone"),
        ("mone: {num_layers: 2}", "'num_layers' is no mone_\\* field"),
        ("mone: quater", "did you mean 'quarter'"),
        ("mone: 0.25", "mone = 0.25 must be a name, a path or a mapping"),
        ("train: {mone: quarter}", "mone stands in a run file or a model, not in train"),
        ("mnoe: quarter", "unknown key 'mnoe' .*did you mean 'mone'"),
        ("model: round.yaml", "base = 'round.yaml' comes back to .*round.yaml"),
    ],
)  # fmt: skip
def test_a_mone_part_or_a_base_that_is_wrong_is_named(text, line, tmp_path):
    (tmp_path / "round.yaml").write_text("base: round.yaml\n")
    with pytest.raises(ValueError, match=line):
        load_run(run_of(tmp_path, text + "\n"))
