"""What an evaluation refuses before any rank starts, each in one line."""

import json
from argparse import Namespace

import pytest

from megatron_mone.commands.app import main
from megatron_mone.commands.evaluate import ranks_needed
from megatron_mone.common.machine import version
from megatron_mone.config import MONE_FIELD_NAMES
from megatron_mone.evaluation import suites
from megatron_mone.evaluation.arguments import checkpoint_of, evaluation_words, is_training
from megatron_mone.evaluation.requests import prompt_of, row_of
from megatron_mone.evaluation.suites import OWN_TASKS, SUITES, task_names
from megatron_mone.evaluation.tokens import Tokenizer
from megatron_mone.model.saved_model import model_values

needs_lm_eval = pytest.mark.skipif(
    not version("lm-eval"), reason="needs lm-eval: megatron-mone[eval]"
)


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(suites, "version", lambda name: "0.4.13")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--load", "x"), "--tasks is missing: name tasks, or a suite: paper, quick"),
        (("--tasks", ","), "--tasks is empty"),
        (("--tasks", "quick", "--limit", "0"), "--limit 0 is not allowed: give at least 1"),
        (("--tasks", "quick", "--ranks", "0"), "--ranks 0 is not allowed"),
        (("--tasks", "quick", "--batch-size", "-1"), "--batch-size -1 is not allowed"),
        (("--tasks", "quick", "--model", "x", "--load", "y"), "--load y is of a checkpoint"),
        (("--tasks", "quick", "--model", "x", "--bf16"), "--bf16 is of a checkpoint"),
        (("--tasks", "quick", "--model", "x"), "--model x holds no config.json"),
        (("compare", "a"), "eval compare takes two results, 1 are given"),
    ],
)
def test_a_wrong_word_is_one_line(installed, capsys, words, said):
    assert main(["eval", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("megatron-mone: error: ")
    assert said in error
    assert error.count("\n") == 1


def test_without_lm_eval_the_line_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(suites, "version", lambda name: "")
    assert main(["eval", "--tasks", "quick", "--load", "x"]) == 2
    assert "pip install 'megatron-mone[eval]'" in capsys.readouterr().err


@needs_lm_eval
def test_an_unknown_task_is_told_with_the_nearest_name(monkeypatch, tmp_path):
    from lm_eval.tasks import manager

    from megatron_mone.evaluation.harness import prepare

    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))  # its 14,000 files
    with pytest.raises(ValueError, match=r"--tasks mone_cloz: .* \(did you mean 'mone_cloze'\?\)"):
        prepare(["mone_cloz"], None)


@needs_lm_eval
def test_own_tasks_are_whole_and_need_no_network():
    from megatron_mone.evaluation.harness import prepare

    found = prepare(["quick"], None)
    assert found.names == SUITES["quick"]
    for task in found.tasks.values():
        documents = list(task.eval_docs)
        assert len(documents) >= 10
        assert all(task.doc_to_target(one) is not None for one in documents)
    choice = json.loads((OWN_TASKS / "choice.json").read_text())
    right = [one["answer"] for one in choice]
    assert all(right.count(place) == len(choice) // 4 for place in range(4))
    assert all(len(set(one["choices"])) == 4 for one in choice)


def test_suites_are_written_out_and_no_task_is_twice():
    assert task_names(["mone_prose,quick"])[0] == "mone_prose"
    assert len(task_names(["mone_prose,quick"])) == len(SUITES["quick"])
    assert len(SUITES["paper"]) == 10


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--load", "none"], "--load none holds no checkpoint"),
        ([], "--load is missing"),
        (["--load", "x", "--save", "y"], "--save is of training"),
        (["--load", "x", "--lr=1"], "--lr is of training"),
        (["--load", "LOAD", "--ckpt-step", "x"], "--ckpt-step x is no iteration: give its number"),
    ],
)
def test_a_wrong_checkpoint_or_flag_of_training_is_refused(words, said, saved):
    with pytest.raises(ValueError, match=said):
        evaluation_words([str(saved) if word == "LOAD" else word for word in words])


@pytest.fixture
def saved(tmp_path):
    """A folder of checkpoints of which only the names are there."""
    for step in (4, 8):
        (tmp_path / f"iter_{step:07d}").mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    return tmp_path


@pytest.mark.parametrize("words", ["", "/iter_0000004", " --ckpt-step 4", " --ckpt-step=4"])
def test_the_checkpoint_is_the_newest_or_the_one_that_is_named(saved, words):
    folder, *flags = f"{saved}{words}".split()
    name = "iter_0000004" if words else "iter_0000008"
    assert checkpoint_of(["--load", folder, *flags]) == saved / name
    with pytest.raises(ValueError, match=rf"checkpoint file {saved / name}/\S+ is missing"):
        evaluation_words(["--load", folder, *flags])


def test_a_checkpoint_gives_its_model_and_nothing_of_its_training():
    saved = dict(
        num_layers=4, num_experts=8, mone_neuron_ratio=0.25, group_query_attention=False,
        num_query_groups=4, tensor_model_parallel_size=2, micro_batch_size=4, save="x", lr=0.1,
        moe_expert_capacity_factor=1.0, tokenizer_model="t", params_dtype=object(),
        mone_record_masks="here", seq_length=64,
    )  # fmt: skip
    found = model_values(saved)
    assert {name: value for name, value in found.items() if not is_training(name)} == {
        "num_layers": 4, "num_experts": 8, "mone_neuron_ratio": 0.25, "tokenizer_model": "t",
        "seq_length": 64,
    }  # fmt: skip


def test_fields_of_the_model_are_none_of_training():
    notes = {"mone_record_masks", "mone_record_mask_steps", "mone_replay_masks"}
    assert not [name for name in MONE_FIELD_NAMES if is_training(name) and name not in notes]


@pytest.mark.parametrize(
    ("words", "ranks"),
    [
        ("", 1),
        ("--tensor-model-parallel-size 2", 2),
        ("--tensor-model-parallel-size 2 --expert-model-parallel-size=2", 4),
        ("--tensor-model-parallel-size 2 --expert-tensor-parallel-size 1 "
         "--expert-model-parallel-size 4 --pipeline-model-parallel-size 3", 12),
    ],
)  # fmt: skip
def test_as_many_ranks_as_the_layout_needs(words, ranks):
    assert ranks_needed(None, words.split()) == ranks


def test_a_tokenizer_without_text_is_refused():
    with pytest.raises(ValueError, match="tokenizer_type = 'NullTokenizer' reads no text"):
        Tokenizer(Namespace(tokenizer_type="NullTokenizer"))


def test_a_request_keeps_its_end():
    row, cut = row_of([1, 2, 3, 4], [5, 6], length=4)
    assert (row.tokens, row.scored, cut) == ((2, 3, 4, 5, 6), 2, True)
    assert row_of([1], [2, 3], length=4)[1] is False
    with pytest.raises(ValueError, match="scores 5 tokens, the model's seq_length is 4"):
        row_of([1], [2, 3, 4, 5, 6], length=4)


def test_only_greedy_generation_that_fits_is_done():
    prompt, cut = prompt_of([1, 2, 3, 4], {"max_gen_toks": 2, "until": "."}, length=5)
    assert (prompt.tokens, prompt.most, prompt.until, cut) == ((2, 3, 4), 2, (".",), True)
    with pytest.raises(ValueError, match="generates up to 256 tokens, the model's seq_length is 5"):
        prompt_of([1], {}, length=5)
    with pytest.raises(ValueError, match="only greedy decoding is here"):
        prompt_of([1], {"do_sample": True, "max_gen_toks": 1}, length=5)
