"""--data-path and its kin are read as Megatron reads them, and a slip is named in one line."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.datasets.utils import get_blend_from_list
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_mone.data.blend import FILES, WORDS, check_sources, read_blend, read_data

A, B = "/data/A_text_document", "/data/B_text_document"


@pytest.fixture(autouse=True)
def somewhere(tmp_path, monkeypatch):
    """An empty working folder: relative prefixes are looked for in it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


BLENDS = {
    "one": [A],
    "two by size": [A, B],
    "three by size": [A, B, A],
    "weights": ["0.5", A, "0.5", B],
    "exponents": ["1e-3", A, "0.999", B],
    "forms of numbers": ["+1", A, ".5", B, "1_000", A, "7.", B],
    "blanks around": [" 0.5 ", f" {A}", "0.5", f"{B} "],
    "a blank in a path": ["/data/my corpus/A"],
    "one with a weight": ["1", A],
    "the same twice": ["0.5", A, "0.5", A],
}


@pytest.mark.parametrize("kind", BLENDS)
def test_a_blend_is_megatron_s(kind):
    blend = read_blend("data_path", BLENDS[kind])
    prefixes, weights = get_blend_from_list(BLENDS[kind])
    assert list(blend.prefixes) == prefixes
    assert blend.weights == (None if weights is None else tuple(weights))


@given(
    st.lists(
        st.one_of(st.sampled_from([A, B, "x"]), st.floats(1e-300, 1e300).map(repr)),
        min_size=1, max_size=6,
    )
)  # fmt: skip
def test_what_is_not_refused_is_read_as_megatron_reads_it(words):
    try:
        blend = read_blend("data_path", words)
    except ValueError:
        return
    prefixes, weights = get_blend_from_list(words)
    assert (list(blend.prefixes), blend.weights) == (
        prefixes, None if weights is None else tuple(weights)
    )  # fmt: skip


SLIPS = {
    "a string of several": ([f"0.5 {A} 0.5 {B}"], f"write a list in a run file, [0.5, {A}, 0.5"),
    "paths in one string": ([f"{A} {B}"], "this is one word"),
    "a weight missing": (["0.5", A, B], "0.5 is read as a dataset's path: give each dataset its"),
    "two weights missing": (["0.5", A, B, A], "0.5 is read as a dataset's path"),
    "a weight behind": ([A, "0.5", B, "0.5"], "0.5 is read as a dataset's path"),
    "a weight too many": (["0.5", "0.5", A, B], "0.5 is read as a dataset's path"),
    "only a weight": (["1e-3"], "1e-3 is read as a dataset's path"),
    ".bin": ([f"{A}.bin"], f"give {A}"),
    ".idx": (["0.5", f"{A}.idx", "0.5", B], f"give {A}"),
    "a home folder": (["~/data/A"], "read as it stands, without a shell: write the whole path"),
    "a variable": (["$DATA/A"], "read as it stands"),
    "a pattern": (["/data/*_text_document"], "not as a pattern: name each dataset"),
    "a slash behind": ([f"{A}/"], "is a folder: name a dataset in it"),
    "nothing": ([], "names no dataset"),
    "an empty word": ([""], "one word is empty"),
    "weight 0": (["0", A, "1", B], f"the weight 0 of {A} must be a number above 0"),
    "a negative weight": (["-0.5", A, "1.5", B], "the weight -0.5"),
    "no number": (["nan", A, "1", B], "the weight nan"),
    "no bound": (["inf", A, "1", B], "the weight inf"),
}


@pytest.mark.parametrize("kind", SLIPS)
def test_a_slip_is_one_line_that_says_what_is_meant(kind):
    words, said = SLIPS[kind]
    with pytest.raises(ValueError) as refusal:
        read_blend("data_path", words)
    assert str(refusal.value).startswith("data_path")
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["0.5 A", "1e-3", "A.bin", "a*", "~a", "a$b"])
def test_a_dataset_that_is_there_may_be_called_anything(somewhere, name):
    (somewhere / f"{name}.idx").touch()
    assert read_blend("data_path", [name]).prefixes == (name,)


def test_a_folder_names_a_dataset_in_it(somewhere):
    (somewhere / "D").mkdir()
    (somewhere / "D/x_text_document.idx").touch()
    with pytest.raises(ValueError, match=r"D is a folder: .* such as D/x_text_document$"):
        read_blend("data_path", ["D"])


def values(**given):
    return {**dict.fromkeys((*WORDS, *FILES)), "mock_data": False, **given}


def test_files_that_list_data_are_read_as_megatron_reads_them(somewhere):
    (somewhere / "list").write_text(f"1e-3 {A}\n0.999\t{B}\n")
    (somewhere / "per.json").write_text(
        json.dumps({"train": f"1 {A} 2 {B}", "valid": [B], "test": None})
    )
    for name, path in (("data_args_path", "list"), ("per_split_data_args_path", "per.json")):
        one, per_split = get_blend_and_blend_per_split(Namespace(**values(**{name: path})))
        blends = [blend for blend in (per_split or [one]) if blend is not None]
        read = read_data(values(**{name: path}))
        assert [(list(b.prefixes), b.weights and list(b.weights)) for b in read.blends] == blends
        assert set(read.prefixes) == {A, B}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("data_args_path", f"0.5 {A} {B}", "data_args_path = 'list'.*0.5 is read as a dataset"),
        ("data_args_path", "", "data_args_path = 'list' names no dataset"),
        ("data_args_path", "\udcff", "data_args_path = 'list' cannot be read"),
        ("per_split_data_args_path", "[]", "must hold a JSON mapping with train, valid, test"),
        ("per_split_data_args_path", "{", "cannot be read"),
        ("per_split_data_args_path", '{"train": "A"}', "must hold a JSON mapping"),
        ("per_split_data_args_path", '{"train": "A", "valid": 3, "test": null}', "valid: 3 must"),
        (
            "per_split_data_args_path",
            '{"train": "A.bin", "valid": null, "test": null}',
            "per_split_data_args_path = 'list', train = 'A.bin': .*give A$",
        ),
        (
            "per_split_data_args_path",
            '{"train": "A", "valid": null, "test": null, "vaild": "B"}',
            "vaild: Megatron reads train, valid, test alone",
        ),
    ],
)
def test_a_wrong_file_is_named(somewhere, name, text, said):
    (somewhere / "list").write_text(text, errors="surrogateescape")
    with pytest.raises(ValueError, match=said) as refusal:
        read_data(values(**{name: "list"}))
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_elsewhere_is_told(somewhere):
    assert read_data(values(data_args_path="/nowhere/list")).unread == (
        ("data_args_path", "/nowhere/list"),
    )


@pytest.mark.parametrize(
    "pair",
    [
        {"data_path": [A], "data_args_path": "x"},
        {"data_path": [A], "train_data_path": [B]},
        {"data_args_path": "x", "valid_data_path": [B]},
        {"test_data_path": [A], "per_split_data_args_path": "x"},
        {"data_args_path": "x", "per_split_data_args_path": "x"},
        {"data_path": [A], "mock_data": True},
        {"data_args_path": "x", "mock_data": True},
    ],
)
def test_two_sources_are_one_too_many(pair):
    """Megatron asserts of some pairs, without words, and takes the first of others in silence."""
    with pytest.raises(ValueError, match="are both given: leave one out"):
        check_sources(values(**pair))


def test_splits_of_their_own_go_together():
    own = values(train_data_path=["0.5", A, "0.5", B], valid_data_path=B)
    check_sources(own)
    read = read_data(own)
    assert read.prefixes == (A, B)
    assert [blend.source for blend in read.blends] == ["train_data_path", "valid_data_path"]


def test_values_of_a_run_file_may_be_numbers():
    assert read_data({"data_path": [1e-3, A, 0.999, B]}).blends[0].weights == (1e-3, 0.999)


def test_a_path_is_no_path_object_s(somewhere):
    """pathlib drops a slash at the end, with which Megatron opens another file."""
    (somewhere / "A.idx").touch()
    with pytest.raises(ValueError, match="give A, without the slash"):
        read_blend("data_path", [str(Path("A")) + "/"])
