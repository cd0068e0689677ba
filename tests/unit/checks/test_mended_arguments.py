"""Arguments that Megatron drops, or hands to a name that is not there, have their effect; and
reading any changes nothing of the process but what Megatron's validation sets."""

import os
import sys
from argparse import Namespace

import pytest
from torch.nn.init import xavier_uniform_

from megatron_mone.model.arguments import parse_arguments, written_out
from megatron_mone.model.config_builder import build_model_config
from megatron_mone.model.loss_check import settle_rerun_mode
from tests.training_cases import MOCK, MONE, TINY

pytestmark = pytest.mark.usefixtures("one_rank")
MLA = [
    *("--multi-latent-attention", "--q-lora-rank", "16", "--kv-lora-rank", "16"),
    *("--qk-head-dim", "8", "--qk-pos-emb-head-dim", "8", "--v-head-dim", "8"),
]
GIVEN = [
    *("--init-method-xavier-uniform", "--use-rope-scaling", "--rope-scaling-factor", "4"),
    *("--train-iters", "1"),
]


def parsed(*words: str) -> Namespace:
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.training import global_vars

    try:
        return parse_arguments(words)
    finally:
        global_vars.destroy_global_vars()
        destroy_num_microbatches_calculator()


@pytest.mark.parametrize("model", [[], MONE, [*MONE, *MLA]], ids=["stock", "MoNE", "MoNE, MLA"])
def test_the_model_config_has_them(model):
    config = build_model_config(parsed(*TINY, *MOCK, *model, *GIVEN))
    assert config.rope_scaling
    assert config.rope_scaling_factor == 4
    transformer = config.transformer
    for name in ("init_method", "output_layer_init_method", "embedding_init_method"):
        assert getattr(transformer, name) is xavier_uniform_, name
    assert transformer.multi_latent_attention is (MLA[0] in model)


def test_words_are_read_one_after_another_and_nothing_else_is(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("train: {exit_interval: 5}\n")
    words = (*TINY, *MOCK, *GIVEN, "--config", str(run))
    assert written_out(words) == ["--exit-interval", "5", *words[:-2]]
    command, said, environment = sys.argv, list(sys.argv), dict(os.environ)
    assert [parsed(*words, *more).exit_interval for more in ((), ("--exit-interval", "6"))] == [
        5,
        6,
    ]
    assert sys.argv is command
    assert (sys.argv, os.environ) == (said, environment)


@pytest.mark.parametrize(
    ("given", "save", "settled"),
    [
        ("report_stats", None, "report_determinism_stats"),
        ("validate_results", None, "disabled"),
        ("validate_results", "folder", "validate_results"),
        ("disabled", "folder", "disabled"),
    ],
)
def test_the_rerun_mode_is_one_of_the_state_machines(given, save, settled):
    from megatron.core.rerun_state_machine import RerunMode

    args = Namespace(rerun_mode=given, save=save)
    settle_rerun_mode(args)
    assert RerunMode(args.rerun_mode).value == settled
