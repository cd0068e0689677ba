"""Which pipeline stages read micro-batches: where embedding, loss or token prediction stand."""

from types import SimpleNamespace

import pytest

from megatron_mone.model import gpt_training


@pytest.mark.parametrize(
    ("layout", "layers", "stage", "chunk", "found"),
    [
        (None, 1, 3, None, True),  # without a layout it stands at the end
        (None, 1, 2, None, False),
        (None, None, 3, None, False),
        ("Et|t|tm|L", 1, 2, None, True),
        ("Et|t|tm|L", 1, 3, None, False),
        ("Et|t|t|t|t|tm|t|L", 1, 1, 1, True),  # 4 stages of 2 chunks
        ("Et|t|t|t|t|tm|t|L", 1, 1, 0, False),
    ],
)
def test_a_layout_may_place_further_token_prediction(
    monkeypatch, layout, layers, stage, chunk, found
):
    from megatron.core import parallel_state

    args = SimpleNamespace(
        pipeline_model_parallel_layout=layout, mtp_num_layers=layers,
        pipeline_model_parallel_size=4,
    )  # fmt: skip
    monkeypatch.setattr(gpt_training, "get_args", lambda: args)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", lambda: stage)
    monkeypatch.setattr(
        parallel_state, "is_pipeline_last_stage", lambda ignore_virtual, vp_stage: stage == 3
    )
    monkeypatch.setattr(
        parallel_state, "get_virtual_pipeline_model_parallel_world_size",
        lambda: None if chunk is None else 2,
    )  # fmt: skip
    assert gpt_training._has_mtp(chunk) is found
