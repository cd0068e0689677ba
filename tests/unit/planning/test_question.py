"""What a user asks the planner, checked before anything is traced."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megatron_mone.common.program import parse
from megatron_mone.planning.planner import check_batch
from megatron_mone.planning.question import Asked, read_question
from tests.unit.conversion.test_inspect import DEEPSEEK_V3, QWEN3_235B


@pytest.mark.parametrize("by_file", [True, False])
def test_a_model_is_named_by_its_config_json(tmp_path, by_file):
    folder = tmp_path / "Qwen3-235B-A22B"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(QWEN3_235B))
    named = folder / "config.json" if by_file else folder
    question = read_question(Asked(model=str(named), gpus=256, layout="tp=2,pp=8,ep=16,etp=1"))
    job = question.job
    assert job.name == "Qwen3-235B-A22B"
    assert yaml.safe_load(question.model_file) == job.model
    values = job.values()
    assert (values["num_layers"], values["num_experts"]) == (94, 128)
    assert (values["pipeline_model_parallel_size"], values["vocab_size"]) == (8, 151936)
    check_batch(job, 256)


def test_a_family_that_is_not_known_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**DEEPSEEK_V3, "model_type": "whisper"}))
    with pytest.raises(ValueError, match="model_type") as refused:
        read_question(Asked(model=str(tmp_path), gpus=8))
    assert "\n" not in str(refused.value)


def test_a_comparison_that_changes_nothing_is_refused():
    asked = Asked(model="moe-30b-a3b", gpus=64, against="blocks:mone_neuron_block=128")
    with pytest.raises(ValueError, match="changes nothing of moe-30b-a3b, which has no MoNE"):
        read_question(asked)
    mone = read_question(Asked(model="moe-30b-a3b-mone", gpus=64, against=asked.against))
    assert mone.baselines[0].name == "blocks"
    assert mone.model_file == ""
    assert mone.json == Path("out/plan/plan.json")


def test_two_run_files_are_compared(tmp_path):
    one = read_question(Asked(model="moe-30b-a3b", gpus=64, layout="tp=1,pp=2,ep=8")).job
    one.write(tmp_path / "one.run.yaml")
    one.with_text_layout("pp=4").write(tmp_path / "two.run.yaml")
    files = (tmp_path / "one.run.yaml", tmp_path / "two.run.yaml")
    question = read_question(Asked(compare=files, gpus=64))
    assert question.job.values()["pipeline_model_parallel_size"] == 2
    assert question.second.values()["pipeline_model_parallel_size"] == 4
    with pytest.raises(ValueError, match="--layout beside --compare says nothing"):
        read_question(Asked(compare=files, gpus=64, layout="tp=2"))


def test_the_command_takes_two_files():
    asked, rest = parse(Asked, ["--compare", "a.yaml", "b.yaml", "--gpus", "8"])
    assert asked.compare == (Path("a.yaml"), Path("b.yaml"))
    assert not rest
    assert parse(Asked, ["--gpus", "8"])[0].compare is None


def test_what_a_search_may_change_is_named():
    asked = Asked(model="moe-30b-a3b", gpus=64, search=True, allow="precision, offload")
    assert read_question(asked).allowed == ("precision", "offload")
    with pytest.raises(ValueError, match="--allow presicion is none of precision, offload"):
        read_question(replace(asked, allow="presicion"))
    with pytest.raises(ValueError, match="--allow offload says nothing without --search"):
        read_question(replace(asked, search=False, allow="offload"))


@pytest.mark.parametrize("name", ["limit", "best"])
def test_how_much_a_search_seeks_is_a_searchs(name):
    asked = Asked(model="moe-30b-a3b", gpus=64, search=True, **{name: 20})
    read_question(asked)
    with pytest.raises(ValueError, match=f"--{name} 0 is not allowed: give at least 1"):
        read_question(replace(asked, **{name: 0}))
    with pytest.raises(ValueError, match=f"--{name} 20 says nothing without --search"):
        read_question(replace(asked, search=False))
