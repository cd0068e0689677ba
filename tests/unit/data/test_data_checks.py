"""`check_dataset` accepts what `prepare` writes and names whatever was done to it since."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_mone.data.checks import check_dataset
from megatron_mone.data.manifest import load_manifest, sha256_of
from megatron_mone.data.merge import OutputPaths, unigram_entropy


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, run_prepare):
    folder = tmp_path_factory.mktemp("prepared")
    (folder / "x.jsonl").write_text('{"text": "aab"}\n{"text": "b"}\nbad\n{"text": ""}\n')
    run_prepare([folder / "x.jsonl"], folder / "x", licence="CC0")
    return folder


@pytest.fixture
def outputs(prepared, tmp_path):
    shutil.copytree(prepared, tmp_path / "copy")
    return OutputPaths(tmp_path / "copy" / "x")


def test_facts_and_manifest(outputs):
    """Two documents "aab" and "b": ids a a b e b e, so p = 1/3 each and the entropy is ln 3."""
    facts = check_dataset(outputs.data, 257, outputs.tokenizer)
    assert (facts.documents, facts.tokens, facts.dtype, facts.vocab_size) == (2, 6, "uint16", 257)
    assert facts.unigram_loss == pytest.approx(math.log(3), abs=1e-12)
    manifest = load_manifest(outputs.manifest)
    assert manifest is not None
    assert (manifest.empty_documents, manifest.bad_lines, manifest.licence) == (1, 1, "CC0")
    assert manifest.bin.sha256 == sha256_of(outputs.bin)
    assert manifest.idx.sha256 == sha256_of(outputs.idx)
    assert manifest.tokenizer.sha256 == sha256_of(outputs.tokenizer / "tokenizer.json")
    given = manifest.inputs[0]
    assert given.sha256 == sha256_of(Path(given.name))
    assert given.bytes == Path(given.name).stat().st_size
    assert manifest.megatron_core.startswith("0.19")


def test_without_manifest_facts_come_from_the_index(outputs):
    outputs.manifest.unlink()
    facts = check_dataset(outputs.data, 257)
    assert (facts.documents, facts.tokens, facts.unigram_loss) == (2, 6, None)


def test_padded_vocabulary_is_fine(outputs):
    assert check_dataset(outputs.data, 384, outputs.tokenizer).tokens == 6


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def other_manifest(outputs: OutputPaths, **changes) -> None:
    fields = json.loads(outputs.manifest.read_text())
    outputs.manifest.write_text(json.dumps(fields | changes))


def other_tokenizer(outputs: OutputPaths) -> None:
    path = outputs.tokenizer / "tokenizer.json"
    path.write_text(path.read_text() + " ")


def bigger_tokenizer(outputs: OutputPaths) -> None:
    path = outputs.tokenizer / "tokenizer.json"
    fields = json.loads(path.read_text())
    fields["added_tokens"].append(fields["added_tokens"][0] | {"id": 257, "content": "<new>"})
    path.write_text(json.dumps(fields))


DAMAGE = {
    "no bin": (lambda o: o.bin.unlink(), r"x_text_document\.bin: no such file"),
    "no idx": (lambda o: o.idx.unlink(), r"x_text_document\.idx: no such file"),
    "magic": (lambda o: o.idx.write_bytes(b"GARBAGE" * 20), r"\.idx: starts with b'GARBAGE"),
    "idx header cut": (lambda o: cut(o.idx, 20), r"\.idx: has 20 bytes"),
    "idx cut": (lambda o: cut(o.idx, 40), r"\.idx: has 40 bytes, but its header describes"),
    "bin cut": (lambda o: cut(o.bin, 10), r"\.bin: has 10 bytes, but its \.idx describes 12"),
    "bin long": (lambda o: o.bin.write_bytes(b"0" * 14), r"\.bin: has 14 bytes"),
    "counts": (lambda o: other_manifest(o, tokens=7), r"but its manifest says 2 and 7"),
    "schema": (lambda o: other_manifest(o, schema=9), r"manifest\.json: schema 9 is not 1"),
    "not json": (lambda o: o.manifest.write_text("{"), r"manifest\.json: not a manifest"),
    "tokenizer": (other_tokenizer, r"tokenizer\.json: sha256 .* was made with .*--tokenizer-model"),
    "vocabulary": (bigger_tokenizer, r"has a vocabulary of 258, .* made with 257"),
    "no tokenizer": (lambda o: shutil.rmtree(o.tokenizer), r"tokenizer.*no such file"),
    "bad tokenizer": (
        lambda o: (o.tokenizer / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: cannot be read",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_in_one_line(outputs, damage):
    inflict, message = DAMAGE[damage]
    inflict(outputs)
    with pytest.raises(ValueError, match=message) as error:
        check_dataset(outputs.data, 384, outputs.tokenizer)
    assert "\n" not in str(error.value)


def test_small_model_vocabulary(outputs):
    with pytest.raises(ValueError, match="made with a vocabulary of 257, the model has 256"):
        check_dataset(outputs.data, 256)
    outputs.manifest.unlink()
    with pytest.raises(ValueError, match="holds token id 256, the vocabulary is 256"):
        check_dataset(outputs.data, 256)
    outputs.bin.write_bytes(bytes(12))
    with pytest.raises(ValueError, match="has a vocabulary of 257, the model has 200"):
        check_dataset(outputs.data, 200, outputs.tokenizer)


def test_output_prefix_in_place_of_data_path_gets_a_hint(outputs):
    with pytest.raises(ValueError, match=r"did you mean the data path .*x_text_document\?"):
        check_dataset(outputs.prefix)


def test_entropy_of_known_frequencies():
    assert unigram_entropy(np.array([5, 5, 0, 5, 5])) == pytest.approx(math.log(4), abs=1e-15)
    assert unigram_entropy(np.array([0, 9])) == 0
