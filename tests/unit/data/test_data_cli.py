"""tools/prepare_data.py: exit codes, one-line errors, and folders Megatron's own code loads."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers

from megatron_mone.commands.prepare import main
from megatron_mone.data.tokenizers import Encoder

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "in.txt"
    path.write_text("some text, and more text\n")
    return path


def no_eod_tokenizer(folder: Path) -> Path:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.save(str(folder / "tok.json"))
    return folder / "tok.json"


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def emptied_directory(path: Path) -> Path:
    path.mkdir()
    (path / "README.md").write_text("not text we read")
    return path


# name: (arguments from a temporary folder, what the one line must hold)
WRONG = {
    "missing input": (lambda t: ["--input", t / "nope.txt"], "nope.txt: no such file"),
    "empty input": (lambda t: ["--input", written(t / "e.txt", b"")], "e.txt: the file is empty"),
    "extension": (lambda t: ["--input", written(t / "x.csv", b"a")], "unknown extension '.csv'"),
    "json, no text": (lambda t: ["--input", written(t / "x.json", b"{}")], "x.json:1: key 'text'"),
    "directory": (
        lambda t: ["--input", emptied_directory(t / "d")],
        "holds no .txt, .jsonl, .json or .parquet file that can be read (",
    ),
    "twice": (lambda t: ["--input", t / "in.txt", t / "in.txt"], "in.txt: is given twice"),
    "output": (lambda t: ["--output-prefix", t / "in.txt" / "x"], "cannot write beside it"),
    "no output": (lambda t: ["--output-prefix", "/"], "--output-prefix /: give a path"),
    "tokenizer": (lambda t: ["--tokenizer", t / "no"], "no: no such file or folder"),
    "no tokenizer in it": (lambda t: ["--tokenizer", emptied_directory(t / "d")], "--tokenizer"),
    "broken": (lambda t: ["--tokenizer", written(t / "t.json", b"{")], "t.json: cannot be read"),
    "small bpe": (lambda t: ["--tokenizer", "bpe:257"], "at least 258"),
    "bpe word": (lambda t: ["--tokenizer", "bpe:many"], "bpe:many: the size must be a number"),
    "no eod": (lambda t: ["--tokenizer", no_eod_tokenizer(t)], "give one with --eod-token"),
    "wrong eod": (
        lambda t: ["--tokenizer", no_eod_tokenizer(t), "--eod-token", "b"],
        "--eod-token 'b': not a token",
    ),
    "no documents": (
        lambda t: ["--input", written(t / "x.jsonl", b'{"text": ""}\n{\n')],
        "no document in it (1 empty documents, 1 bad lines, the first",
    ),
    "json key": (
        lambda t: ["--input", written(t / "x.jsonl", b'{"text": "a"}'), "--json-key", "body"],
        "key 'body' is missing",
    ),
    "strict": (
        lambda t: ["--input", written(t / "x.jsonl", b'{"text": "a"}\n{\n{"a'), "--strict"],
        "x.jsonl:2: invalid JSON: Expecting property name enclosed in double "
        "quotes at column 2; repair the line",
    ),
    "archive": (lambda t: ["--input", written(t / "x.txt.gz", b"no gzip")], "damaged archive"),
    "workers": (lambda t: ["--workers", "0"], "--workers 0: must be at least 1"),
    "option": (lambda t: ["--txt-documents", "word"], "--txt-documents"),
    "both": (lambda t: ["--corpus", "shakespeare"], "not allowed with"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_line_and_exit_code_2(tmp_path, text, capfd, wrong):
    make, message = WRONG[wrong]
    arguments = [str(a) for a in make(tmp_path)]
    before = set(tmp_path.rglob("*"))
    defaults = {"--input": str(text), "--output-prefix": str(tmp_path / "out")}
    for name, value in defaults.items():
        arguments = arguments if name in arguments else [name, value, *arguments]
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    error = capfd.readouterr().err
    assert code == 2
    assert message in error
    assert len(error.strip().splitlines()) == 1, error
    made = set(tmp_path.rglob("*")) - before
    assert all(".work" in str(path) for path in made), "no file under a final name"


def test_strict_with_workers_names_the_first_bad_line_in_input_order(tmp_path, capfd):
    folder = emptied_directory(tmp_path / "d")
    rows = ['{"text": "a"}'] * 20 + ["{"] + ['{"text": "a"}'] * 20 + ["["]
    for name in ("a", "b"):
        (folder / f"{name}.jsonl").write_text("\n".join(rows))
    arguments = ["--input", str(folder), "--output-prefix", str(tmp_path / "o"), "--strict"]
    assert main([*arguments, "--workers", "2"]) == 2
    assert re.match(r"error: \S*a\.jsonl:21: .*; repair the line", capfd.readouterr().err)
    # What the strict run finished serves the lenient one, and the other way round.
    assert main(arguments[:-1]) == 0
    captured = capfd.readouterr()
    assert captured.err.count("bad line ") == 4
    assert "documents      80\n" in captured.out


def test_at_most_20_bad_lines_are_printed_all_are_counted(tmp_path, capfd):
    path = written(tmp_path / "x.jsonl", b'{"text": "a"}\n' + b"{\n" * 1500)
    assert main(["--input", str(path), "--output-prefix", str(tmp_path / "o")]) == 0
    error = capfd.readouterr().err
    assert error.count("bad line ") == 20
    assert "... and 1480 more bad lines" in error
    manifest = json.loads((tmp_path / "o.manifest.json").read_text())
    assert (manifest["bad_lines"], len(manifest["bad_lines_named"])) == (1500, 1000)


@pytest.mark.parametrize("command", [["-m", "tools.prepare_data"], ["tools/prepare_data.py"]])
def test_both_ways_to_start_it(tmp_path, command):
    done = subprocess.run(
        [sys.executable, *command, "--input", str(tmp_path / "no"), "--output-prefix", "x"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: --input {tmp_path}/no: no such file")


@pytest.mark.parametrize("kind", ["byte", "bpe:300", "folder", "file", "slow"])
def test_megatron_builds_the_tokenizer_and_agrees(tmp_path, text, local_tokenizer, kind):
    """Megatron's build_tokenizer on our folder: same ids, same vocabulary, same end token."""
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer

    spec = {"folder": str(local_tokenizer), "file": f"{local_tokenizer}/tokenizer.json"}
    if kind == "slow":  # GPT-2's two files, without a tokenizer.json
        folder = emptied_directory(tmp_path / "gpt2")
        model = json.loads((local_tokenizer / "tokenizer.json").read_text())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = "\n".join(" ".join(pair) for pair in model["merges"])
        (folder / "merges.txt").write_text("#version: 0.2\n" + merges)
        (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer"}')
        spec["slow"] = str(folder)
    arguments = ["--input", str(text), "--output-prefix", str(tmp_path / "o")]
    assert main([*arguments, "--tokenizer", spec.get(kind, kind)]) == 0
    options = dict.fromkeys(
        ["chat_template", "vocab_file", "merge_file", "special_tokens", "metadata_path"]
    ) | dict.fromkeys(
        ["tokenizer_hf_no_use_fast", "trust_remote_code", "pad_vocab_size",
         "tokenizer_hf_no_include_special_tokens"], False
    )  # fmt: skip
    built = build_tokenizer(
        SimpleNamespace(
            tokenizer_type="HuggingFaceTokenizer",
            tokenizer_model=str(tmp_path / "o.tokenizer"),
            **options,
        )
    )
    encoder = Encoder(tmp_path / "o.tokenizer")
    manifest = json.loads((tmp_path / "o.manifest.json").read_text())["tokenizer"]
    assert built.vocab_size == encoder.vocab_size == manifest["vocab_size"]
    assert built.eod == encoder.eod_id == manifest["eod_id"]
    sample = "the cat, naïve café 日本語 🦉\n  and more"
    assert built.tokenize(sample) == encoder.encode(sample)
    assert built.detokenize(built.tokenize(sample)) == sample
    if kind in ("folder", "file"):
        copied = (tmp_path / "o.tokenizer" / "tokenizer.json").read_bytes()
        assert copied == (local_tokenizer / "tokenizer.json").read_bytes()


def test_code_in_a_tokenizer_folder_never_runs(tmp_path, text, local_tokenizer):
    folder = tmp_path / "evil"
    shutil.copytree(local_tokenizer, folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = {"auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]}, "tokenizer_class": "E"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    arguments = ["--input", str(text), "--tokenizer", str(folder), "--output-prefix"]
    assert main([*arguments, str(tmp_path / "a")]) == 0
    assert "auto_map" not in (tmp_path / "a.tokenizer" / "tokenizer_config.json").read_text()
    assert not (tmp_path / "a.tokenizer" / "evil.py").exists()
    (folder / "tokenizer.json").unlink()
    assert main([*arguments, str(tmp_path / "b")]) == 2
    assert not (tmp_path / "ran").exists()


def test_padding_truncation_and_start_tokens_of_a_tokenizer_are_not_applied(
    tmp_path, local_tokenizer
):
    shutil.copytree(local_tokenizer, tmp_path / "t")
    plain = Encoder(tmp_path / "t").encode("the cat sat")
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "t" / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(tmp_path / "t" / "tokenizer.json"))
    assert Encoder(tmp_path / "t").encode("the cat sat") == plain
