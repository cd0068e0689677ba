"""Which jobs are GPU jobs, what of them cannot be planned, and the package that stands in."""

import subprocess
import sys
from argparse import Namespace

import pytest

from megatron_mone.planning.tracing.gpu_job import check_traceable, is_gpu_job, parse_gpu_job
from megatron_mone.planning.tracing.stage_messages import mtp_layers_before


@pytest.mark.parametrize(
    ("flags", "gpu"),
    [
        ([], True),  # Megatron's default
        (["--transformer-impl", "transformer_engine"], True),
        (["--transformer-impl", "local"], False),
        (["--transformer-impl=local"], False),
        (["--transformer-impl", "local", "--transformer-impl", "transformer_engine"], True),
        (["--num-layers", "2", "--transformer-impl"], True),  # argparse refuses it later
    ],
)
def test_the_layers_say_what_kind_of_job_it_is(flags, gpu):
    assert is_gpu_job(flags) is gpu


def test_a_run_file_says_it_too(tmp_path):
    run = tmp_path / "run.yaml"
    run.write_text("cluster:\n  transformer_impl: local\n")
    assert not is_gpu_job(["--config", str(run)])
    assert is_gpu_job(["--config", str(run), "--transformer-impl", "transformer_engine"])
    with pytest.raises(ValueError, match=r"gone\.yaml"):
        is_gpu_job(["--config", str(tmp_path / "gone.yaml")])


def arguments(**changed):
    return Namespace(**{"cp_comm_type": ["p2p"], "context_parallel_size": 2, **changed})


def test_what_is_not_modelled_is_refused_in_one_line():
    check_traceable(arguments())
    for changed in (
        {"use_torch_fsdp2": True},
        {"dataloader_inter_document_masking": True, "window_size": (7, 0)},
        {"cpu_offloading": True},
        {"hybrid_layer_pattern": "M*E/*E"},
        {"hybrid_layer_pattern": "GE"},
        {"hybrid_layer_pattern": "M*E", "cuda_graph_impl": "local"},
        {
            "hybrid_layer_pattern": "M*E",
            "window_size": None,
            "dataloader_inter_document_masking": True,
        },
    ):
        with pytest.raises(ValueError, match=list(changed)[-1]) as failure:
            check_traceable(arguments(**changed))
        assert "\n" not in str(failure.value)


def test_deepspeeds_offload_is_refused(tmp_path):
    given = tmp_path / "zero.json"
    given.write_text('{"zero_optimization": {"offload_param": {"device": "cpu"}}}')
    sizes = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size",
             "context_parallel_size", "global_batch_size", "micro_batch_size")  # fmt: skip
    job = Namespace(
        **dict.fromkeys(sizes, 1), engine="deepspeed", zero_stage=3, clip_grad=1.0, bf16=True,
        zero_offload_optimizer=False, deepspeed_config=None, cp_comm_type=None,
    )  # fmt: skip
    check_traceable(job)
    for changed, name in (
        ({"zero_offload_optimizer": True}, "offload_optimizer"),
        ({"deepspeed_config": str(given)}, "offload_param"),
    ):
        with pytest.raises(ValueError, match=rf"{name}.device = 'cpu' cannot be planned"):
            check_traceable(Namespace(**{**vars(job), **changed}))


def test_depths_that_travel_behind_an_mtp_stage():
    from megatron.core.transformer.enums import LayerType

    layout = Namespace(
        layout=[
            [[LayerType.embedding, LayerType.decoder]],
            [[LayerType.decoder]],
            [[LayerType.mtp, LayerType.mtp]],
            [[LayerType.loss]],
        ]
    )
    assert [mtp_layers_before(layout, stage) for stage in range(5)] == [0, 0, 0, 2, 2]


def run(program):
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )


def test_the_package_comes_before_megatron():
    """Megatron decides on import whether Transformer Engine is there."""
    done = run(
        "import megatron.core.extensions.transformer_engine\n"
        "from megatron_mone.planning.tracing.stand_ins import package\n"
        "package.install()"
    )
    assert done.returncode != 0
    assert "imported before the stand-in" in done.stderr


def test_megatron_builds_its_own_classes_on_the_package():
    done = run(
        "from megatron_mone.planning.tracing.stand_ins import package\n"
        "package.install()\n"
        "from megatron.core.extensions import transformer_engine as te\n"
        "from megatron_mone.planning.tracing.stand_ins.linear import Linear\n"
        "from megatron.core.optimizer import Adam\n"
        "from megatron.core.tensor_parallel.layers import _grad_accum_fusion_available\n"
        "assert te.HAVE_TE and issubclass(te.TEColumnParallelLinear, Linear)\n"
        "assert Adam.__module__.endswith('stand_ins.optimizers') and _grad_accum_fusion_available\n"
        "package.install()\n"
    )
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_planned_is_said_before_megatron_asks_for_more():
    """Its own checks of FSDP may name an environment variable."""
    with pytest.raises(ValueError, match="use_torch_fsdp2 = True cannot be planned"):
        parse_gpu_job(["--use-torch-fsdp2"], 8, 0)
