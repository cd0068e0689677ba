"""A checkpoint's scores are the same in every layout and batch, and those of Megatron's own loss.

The model is trained with a capacity that drops tokens; an evaluation must not drop any.
"""

import json
from pathlib import Path

import pytest

from launch.runs.run_manifest import record_start
from megatron_mone.commands.app import main
from megatron_mone.common.machine import version
from megatron_mone.data.tokenizers import parse_spec, write_tokenizer
from megatron_mone.evaluation.harness import prepare
from megatron_mone.evaluation.suites import OWN_TASKS, task_manager
from tests import forked_ranks
from tests.integration import evaluation_ranks
from tests.parity.layouts import EP2, PP2, TP2
from tests.training_cases import MONE, TINY, Case, run_cases

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not version("lm-eval"), reason="needs lm-eval: megatron-mone[eval]"),
]

TASKS = ["mone_cloze", "mone_choice", "mone_prose", "mone_recall", "texts"]
LENGTH = ("--seq-length", "64")
TEXTS = ["A short text.", "Another one, of more words than the first."]
ONE_RANK = {"one row": 1, "eight rows": 8}
LAYOUTS = {"EP2": EP2, "TP2": TP2, "PP2": PP2}
HYBRID = ("TP2", "PP2")
PATTERN = (
    *("--hybrid-layer-pattern", "M*E-/*E", "--mamba-state-dim", "16", "--mamba-head-dim", "16"),
    *("--mamba-num-groups", "2"),
)
TASK = """
task: texts
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: byte_perplexity}]
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    write_tokenizer(parse_spec("byte"), folder / "tokenizer", iter([]))
    (folder / "wide").mkdir()
    wide = json.loads((folder / "tokenizer" / "tokenizer.json").read_text())
    own = wide["model"]["vocab"]
    own.update({f"<{i}>": i for i in range(257, 400)})
    (folder / "wide" / "tokenizer.json").write_text(json.dumps(wide))
    config = (folder / "tokenizer" / "tokenizer_config.json").read_text()
    (folder / "wide" / "tokenizer_config.json").write_text(config)
    (folder / "tasks").mkdir()
    lines = "".join(f"{json.dumps({'text': text})}\n" for text in TEXTS)
    (folder / "tasks" / "texts.jsonl").write_text(lines)
    (folder / "tasks" / "texts.yaml").write_text(TASK % (folder / "tasks" / "texts.jsonl"))

    data = ("--mock-data", "--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model",
            str(folder / "tokenizer"), "--make-vocab-size-divisible-by", "64")  # fmt: skip
    drops = ("--moe-expert-capacity-factor", "0.5")
    saved = folder / "run" / "checkpoints"
    saves = ("--train-iters", "2", "--save", str(saved), "--save-interval", "2")
    longest = ("--max-position-embeddings", "64")
    parts = (*TINY, *MONE, *data, *drops, *saves, *longest)
    pattern = (*PATTERN, "--save", str(folder / "hybrid" / "checkpoints"))
    run_cases([Case("train", parts), Case("hybrid train", (*parts, *pattern))], 1, folder)
    record_start(folder / "run", "run", {"values": {}, "arguments": []}, (), {"ranks": 1})

    hybrid = folder / "hybrid" / "checkpoints"
    words = ["--load", str(hybrid), *LENGTH]
    of_hybrid = [["hybrid", words, ["texts"], 8], ["hybrid direct", words, TEXTS, 0]]
    hybrid_two = [[f"hybrid, {name}", [*words, *LAYOUTS[name]], ["texts"], 8] for name in HYBRID]
    words = ["--load", str(saved), *LENGTH]
    one = [[name, words, TASKS, batch] for name, batch in ONE_RANK.items()]
    one.append(["direct", words, TEXTS, 0])
    log = folder / "export.log"
    places = (str(saved), str(folder / "exported"))
    export = forked_ranks.start(1, evaluation_ranks.export, places, log)
    one.append(["wrong tokenizer", [*words, "--tokenizer-model", str(folder / "wide")],
                ["mone_cloze"], 8])  # fmt: skip
    _run([*of_hybrid, *one], 1, folder)
    two = [[name, [*words, *flags], TASKS, 8] for name, flags in LAYOUTS.items()]
    _run([*two, *hybrid_two, ["registered", [*words, *EP2], ["mone_cloze"], 0]], 2, folder)
    assert export.wait(timeout=600) == 0, log.read_text(errors="replace")[-5000:]
    return folder


def _run(cases: list, ranks: int, folder: Path) -> None:
    todo, log = folder / f"{ranks}.json", folder / f"evaluate-{ranks}.log"
    todo.write_text(json.dumps(cases))
    job = forked_ranks.start(ranks, evaluation_ranks.evaluate, (str(todo), str(folder)), log)
    assert job.wait(timeout=600) == 0, log.read_text(errors="replace")[-5000:]


def samples(folder: Path, task: str) -> list[dict]:
    lines = (folder / f"samples-{task}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def exported(runs):
    """The checkpoint as a Hugging Face folder, and what `eval --model` finds of it."""
    folder = runs / "exported"
    words = ["--model", str(folder), "--out", str(runs / "export"), "--limit", "4"]
    tasks = ["--tasks", ",".join(TASKS), "--include-path", str(runs / "tasks")]
    assert main(["eval", *words, *tasks]) == 0
    return folder


@pytest.mark.parametrize("name", ["one row", *LAYOUTS, "export"])
def test_every_layout_and_the_export_score_the_same(runs, exported, name):
    """Of each sample: log-likelihoods, whether they are greedy, greedy continuations."""
    for task in TASKS:
        wanted, got = samples(runs / "eight rows", task), samples(runs / name, task)
        assert [one["hash"] for one in got] == [one["hash"] for one in wanted]
        for a, b in zip(wanted, got, strict=True):
            assert b.get("text") == a.get("text")
            assert b.get("greedy") == a.get("greedy")
            assert b.get("log_likelihoods") == pytest.approx(a.get("log_likelihoods"), abs=1e-4)
    assert any(one["text"][0] for one in samples(runs / name, "mone_recall"))


def test_lm_evals_own_model_scores_the_export_the_same(runs, exported, tmp_path, monkeypatch):
    """Given the folder's name alone, with the code that came with it."""
    from lm_eval import simple_evaluate
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    prepared = prepare(["mone_cloze"], None)
    model = {"pretrained": str(exported), "trust_remote_code": True, "device": "cpu"}
    found = simple_evaluate(
        model="hf", model_args=model, tasks=list(prepared.tasks.values()), limit=4, batch_size=8,
        bootstrap_iters=0, task_manager=task_manager(prepared.names, None),
    )  # fmt: skip
    got = [one["resps"][0][0][0] for one in found["samples"]["mone_cloze"]]
    wanted = [one["log_likelihoods"][0] for one in samples(runs / "eight rows", "mone_cloze")]
    assert got == pytest.approx(wanted, abs=1e-4)


def test_a_text_scores_as_megatrons_loss_says(runs):
    wanted = json.loads((runs / "direct").read_text())
    got = samples(runs / "eight rows", "texts")
    assert [one["log_likelihoods"][0] for one in got] == pytest.approx(wanted, abs=1e-4)
    size = [len(text.encode()) for text in TEXTS]
    assert [one["metrics"]["byte_perplexity"][1] for one in got] == size


def test_a_hybrid_model_scores_as_its_loss_says_in_every_layout(runs):
    wanted = json.loads((runs / "hybrid direct").read_text())
    assert len(wanted) == len(TEXTS)
    for name in ("hybrid", *(f"hybrid, {name}" for name in HYBRID)):
        got = [one["log_likelihoods"][0] for one in samples(runs / name, "texts")]
        assert got == pytest.approx(wanted, abs=1e-4), name
    assert wanted != json.loads((runs / "direct").read_text())


def test_lm_eval_finds_the_model_by_its_name_on_two_ranks(runs):
    wanted = [one["log_likelihoods"][0] for one in samples(runs / "eight rows", "mone_cloze")]
    assert json.loads((runs / "registered").read_text()) == pytest.approx(wanted, abs=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder: a tiny model with random weights, and bytes for tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama") / "model"
    write_tokenizer(parse_spec("byte"), folder, iter([]))
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=257, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=256,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_scores_as_its_own_logits_say(llama, tmp_path, capsys):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    words = ["--model", str(llama), "--tasks", "mone_cloze", "--limit", "3", "--out", str(tmp_path)]
    assert main(["eval", *words]) == 0
    assert "mone_cloze" in capsys.readouterr().out
    model, tokenizer = (
        kind.from_pretrained(llama) for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    documents = json.loads((OWN_TASKS / "cloze.json").read_text())[:3]
    for one, got in zip(documents, samples(tmp_path, "mone_cloze"), strict=True):
        ids = torch.tensor([tokenizer(f"{one['context']} {one['word']}").input_ids])
        with torch.no_grad():
            scores = model(ids).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
        wanted = float(scores[-len(f" {one['word']}") :].sum())
        assert got["log_likelihoods"] == pytest.approx([wanted], abs=1e-4)


def test_the_command_starts_the_ranks_it_needs_and_the_runs_page_shows_the_scores(runs, capfd):
    run = runs / "run"
    (run / "results.html").write_text("an older one")
    flags = ["--load", str(run / "checkpoints" / "iter_0000002"), *LENGTH]
    tasks = ["--tasks", "texts", "--include-path", str(runs / "tasks")]
    assert main(["eval", *tasks, *flags]) == 0
    out = run / "eval" / "iter_0000002-texts"
    said = capfd.readouterr().err
    assert f"wrote {out / 'results.json'}" in said
    assert f"wrote {run / 'results.html'}" in said
    wanted, got = samples(runs / "eight rows", "texts"), samples(out, "texts")
    for a, b in zip(wanted, got, strict=True):
        assert b["log_likelihoods"] == pytest.approx(a["log_likelihoods"], abs=1e-4)
    page = (run / "results.html").read_text()
    value = json.loads((out / "results.json").read_text())["tasks"]["texts"]["metrics"]
    assert "<th>iteration 2</th>" in page
    assert f"<td>{value['byte_perplexity']['value']:.4f} ± " in page


def test_the_document_says_what_was_evaluated(runs):
    document = json.loads((runs / "EP2" / "results.json").read_text())
    model = document["model"]
    assert (model["world_size"], model["expert_model_parallel_size"]) == (2, 2)
    assert (model["iteration"], model["limit"], model["seq_length"]) == (2, 4, 64)
    assert model["truncated_requests"] > 0  # a sentence of bytes is longer than the model
    cloze = document["tasks"]["mone_cloze"]
    assert cloze["samples"] == 4
    assert cloze["metrics"]["acc"]["stderr"] is not None


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(runs):
    said = (runs / "wrong tokenizer.refused").read_text()
    assert "has 400 ids, the embedding of" in said
    assert "give the tokenizer it was trained with" in said
