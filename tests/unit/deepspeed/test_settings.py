"""What DeepSpeed is told, and what is refused before a model is built."""

import json
from pathlib import Path
from typing import Any

import pytest
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.training import global_vars

from megatron_mone.deepspeed import supported
from megatron_mone.deepspeed.settings import MOOT, for_engine, settings_of, stage_of
from megatron_mone.model.arguments import flag_parser, parse_arguments
from tests.parity.engines import PAGE, with_tables
from tests.training_cases import MOCK, TINY

ENGINE = ("--engine", "deepspeed")
RUN = (*TINY, *MOCK, "--train-iters", "2")


@pytest.fixture
def parsed(monkeypatch):
    """Arguments of a run on so many ranks, judged away from them."""

    def of(*words: str, ranks: int = 2) -> Any:
        monkeypatch.setenv("WORLD_SIZE", str(ranks))
        try:
            return parse_arguments([*RUN, *words], elsewhere=True)
        finally:
            global_vars.destroy_global_vars()
            destroy_num_microbatches_calculator()

    return of


@pytest.fixture
def given(parsed, tmp_path: Path):
    """The same with a JSON of DeepSpeed's."""

    def of(content: Any, *words: str) -> Any:
        path = tmp_path / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return parsed(*ENGINE, "--deepspeed-config", str(path), *words)

    return of


def test_settings_follow_from_the_flags(parsed):
    args = parsed(*ENGINE, "--zero-stage", "2", "--global-batch-size", "16", "--clip-grad", "0.5")
    found = settings_of(args)
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 4
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 2}
    assert found["bf16"] == {"enabled": False}
    bf16 = settings_of(parsed(*ENGINE, "--bf16"))
    assert bf16["zero_optimization"] == {"stage": 1}
    assert bf16["communication_data_type"] == "fp32"


def test_a_json_is_merged(given):
    zero = {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 1000}
    args = given({"zero_optimization": zero, "gradient_clipping": "auto", "steps_per_print": 7,
                  "train_batch_size": 8, "comms_logger": {"enabled": True}})  # fmt: skip
    assert stage_of(args) == 2
    found = settings_of(args)
    assert found["zero_optimization"] == zero
    assert found["gradient_clipping"] == 1.0
    assert found["steps_per_print"] == 7
    assert found["comms_logger"] == {"enabled": True}
    assert "train_batch_size" not in found


@pytest.mark.parametrize(
    ("content", "words", "line"),
    [
        ("[1]", (), "holds no JSON object"),
        ("{", (), "not JSON, or cut short"),
        ({"zero_optimisation": {}}, (), "unknown key 'zero_optimisation' (did you mean"),
        ({"optimizer": {}}, (), "'optimizer' is not read: Megatron's flags choose it"),
        ({"zero_optimization": []}, (), "zero_optimization must be an object"),
        ({"zero_optimization": {"stage": 5}}, (), "stage = 5 must be one of 0, 1, 2, 3"),
        ({"zero_optimization": {"stage": 2}}, ("--zero-stage", "1"), "stage = 2, and zero_stage"),
        ({"gradient_clipping": 3}, (), "gradient_clipping = 3, but the run has 1.0 (--clip-grad)"),
        ({"bf16": {"enabled": True}}, (), "bf16.enabled = True, but the run has False (--bf16)"),
        ({"train_batch_size": 9}, (), "train_batch_size = 9, but the run has 8"),
        ({"comms_logger": "auto"}, (), "comms_logger = 'auto': nothing here fills it in"),
        ({"zero_optimization": {"stage": 1, "overlap_comm": True}}, (),
         "overlap_comm = true: ZeRO 1 reduces when the step comes"),
        ({"zero_optimization": {"stage": 3}}, ("--expert-model-parallel-size", "2"),
         "expert_model_parallel_size = 2 does not go with engine = deepspeed: ZeRO 3 cuts"),
    ],
)  # fmt: skip
def test_a_wrong_json_is_one_line(given, content, words, line):
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        given(content, *words)
    assert line in str(error.value)


def test_deepspeeds_own_model_judges_the_rest(given, monkeypatch):
    args = given({"zero_optimization": {"nonsense": 3}})
    with pytest.raises(ValueError, match=r"zero_optimization\.nonsense = 3: Extra inputs"):
        supported.check_files(args)
    monkeypatch.setattr(supported, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package deepspeed: pip install"):
        supported.check_package(args)


# What each refusal is met by; the page has the others' words.
MET = {
    "pipeline_model_parallel_size": ("--pipeline-model-parallel-size", "2"),
    "expert_model_parallel_size": ("--expert-model-parallel-size", "2", "--zero-stage", "3"),
    "optimizer": ("--optimizer", "lion"),
    "bf16": ("--bf16", "--zero-stage", "0"),
    "hybrid_layer_pattern": ("--hybrid-layer-pattern", "*E"),
    "fp4": ("--fp4-format", "e2m1", "--bf16"),
    "fp8": ("--fp8-format", "e4m3", "--bf16"),
    "zero_offload_optimizer": ("--zero-offload-optimizer", "--zero-stage", "0"),
    "cuda_graph_impl": ("--cuda-graph-impl", "local"),
    "save_wgrads_interval": ("--save-wgrads-interval", "1"),
    "load_deepspeed": ("--load-deepspeed", "x", "--expert-model-parallel-size", "2"),
    "save_deepspeed": ("--save-deepspeed", "x", "--expert-model-parallel-size", "2"),
    "ckpt_format": ("--ckpt-format", "torch"),
}


@pytest.mark.parametrize("refusal", supported.REFUSALS, ids=lambda one: one.name)
def test_a_refusal_is_met_by_its_argument(parsed, refusal):
    action = next(one for one in flag_parser()._actions if one.dest == refusal.name)
    words = MET.get(refusal.name)
    if words is None:
        assert action.nargs == 0, f"give {refusal.name} words in MET"
        words = (action.option_strings[0],)
    with pytest.raises(ValueError, match=f"{refusal.name} = .* does not go with engine"):
        parsed(*ENGINE, *words)


@pytest.mark.parametrize(
    "words", [("--zero-stage", "1"), ("--zero-offload-optimizer",), ("--deepspeed-config", "x")]
)
def test_flags_of_deepspeed_need_it(parsed, words):
    with pytest.raises(ValueError, match="would have no effect: the engine is Megatron's"):
        parsed(*words)


def test_flags_of_megatrons_engine_change_nothing(parsed):
    words = [*ENGINE, *MOOT]
    kept, lines = for_engine(words)
    assert not {*MOOT} & {*kept}
    assert len(lines) == len(MOOT)
    args = parsed(*words)
    assert not args.use_distributed_optimizer
    assert not args.gradient_accumulation_fusion
    assert for_engine([*MOOT]) == ([*MOOT], [])


def test_the_page_has_the_tables():
    text = PAGE.read_text(encoding="utf-8")
    assert with_tables(text) == text
