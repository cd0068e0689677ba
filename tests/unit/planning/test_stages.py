"""Virtual stages: what each holds, and the job of stages that stands for a job of chunks."""

from dataclasses import replace

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_mone.common.phases import DISPATCH, FORWARD
from megatron_mone.model.arguments import flag_parser
from megatron_mone.planning.tracing.stages import in_job, stage_flags, stage_job, virtual_stages
from megatron_mone.planning.tracing.trace import Collective, StageMemory, Trace
from tests.training_cases import MOCK, TINY
from tests.unit.planning.parsed_jobs import JOB, parsed

PP2, PP4 = (("--pipeline-model-parallel-size", n) for n in "24")
TWO_CHUNKS = ("--num-virtual-stages-per-pipeline-rank", "2")
DENSE_FIRST = ("--moe-layer-freq", "([0]*1+[1]*7)", "--num-layers", "8")
# name -> (flags, keys in the order of a micro-batch's way through them)
LAYOUTS = {
    "one stage": ((), ["embedding, mone*2, norm, head"]),
    "even": (
        (*PP2, *TWO_CHUNKS, "--num-layers", "8"),
        ["embedding, mone*2", "mone*2", "mone*2", "mone*2, norm, head"],
    ),
    "layers of a chunk": (
        (*PP2, "--num-layers-per-virtual-pipeline-stage", "1", *DENSE_FIRST),
        ["embedding, dense*1", *["mone*1"] * 6, "mone*1, norm, head"],
    ),
    "uneven ends": (
        (*PP4, *TWO_CHUNKS, "--num-layers", "14", "--decoder-first-pipeline-num-layers", "4",
         "--decoder-last-pipeline-num-layers", "2"),
        ["embedding, mone*2", "mone*2", "mone*2", "mone*1",
         "mone*2", "mone*2", "mone*2", "mone*1, norm, head"],
    ),
    "uneven last": (
        (*PP2, "--num-layers", "5", "--decoder-last-pipeline-num-layers", "2"),
        ["embedding, mone*3", "mone*2, norm, head"],
    ),
    "ends count as layers": (
        (*PP2, *TWO_CHUNKS, "--num-layers", "6", "--account-for-embedding-in-pipeline-split",
         "--account-for-loss-in-pipeline-split"),
        ["embedding, mone*1", "mone*2", "mone*2", "mone*1, norm, head"],
    ),
    "written layout": (
        (*PP2, "--num-layers", "5", "--mtp-num-layers", "1",
         "--pipeline-model-parallel-layout", "Et|t*2|tt|mL"),
        ["embedding, mone*1", "mone*2", "mone*2, norm", "no layer, mtp*1, head"],
    ),
    "MoNE every second": (
        (*PP2, *TWO_CHUNKS, "--num-layers", "8", "--mone-layer-freq", "([0]+[1])*4"),
        ["embedding, moe*1, mone*1", "moe*1, mone*1", "moe*1, mone*1", "moe*1, mone*1, norm, head"],
    ),
    "MTP": (
        (*PP2, *TWO_CHUNKS, "--num-layers", "4", "--mtp-num-layers", "1"),
        ["embedding, mone*1", "mone*1", "mone*1", "mone*1, norm, mtp*1, head"],
    ),
    "by number": (
        (*PP2, "--num-layers", "4", "--window-size", "8,0"),
        ["embedding, mone*2, from layer 1", "mone*2, from layer 3, norm, head"],
    ),
    "hybrid": (
        (*PP2, "--hybrid-layer-pattern", "M*EM*E"),
        ["embedding, mamba*1, attention*1, mone*1", "mamba*1, attention*1, mone*1, norm, head"],
    ),
    "hybrid, cut": (
        (*PP2, "--hybrid-layer-pattern=-M|E|M-|E"),
        ["embedding, mlp*1, mamba*1", "mone*1", "mamba*1, mlp*1", "mone*1, norm, head"],
    ),
}  # fmt: skip
# Of one job each, all that a stage's own job must not have.
DROPPED = (
    "--overlap-moe-expert-parallel-comm", "--microbatch-group-size-per-virtual-pipeline-stage=4",
    "--expert-model-parallel-size", "2", "--bf16", "--seed=7", "--lr", "1e-3", "--data-path",
    "a", "b", "--save", "c",
)  # fmt: skip


def stage_keys(args, config):
    return {place: stage.key for place, stage in virtual_stages(args, config.transformer).items()}


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_each_stage_holds_and_that_the_job_of_stages_has_the_same(monkeypatch, name):
    changes, keys = LAYOUTS[name]
    flags = [*JOB, *changes]
    args, config = parsed(monkeypatch, flags, 4)
    assert list(stage_keys(args, config).values()) == keys
    chunked = virtual_stages(args, config.transformer)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    apart = stage_flags(flags, flag_parser(), chunked)
    args, config = parsed(monkeypatch, apart, 4 * chunks)
    assert args.virtual_pipeline_model_parallel_size is None
    assert args.pipeline_model_parallel_size == len(chunked)
    stages = virtual_stages(args, config.transformer)
    assert list(stages) == [(s, 0) for s in range(len(chunked))]
    assert list(stages.values()) == list(chunked.values())


def test_a_stock_model_has_stock_layers(monkeypatch):
    flags = (*TINY, *MOCK, "--moe-layer-freq", "([0]+[1])")
    found = stage_keys(*parsed(monkeypatch, flags, 1))
    assert found == {(0, 0): "embedding, dense*1, moe*1, norm, head"}


def test_flags_of_the_job_of_stages(monkeypatch):
    flags = [*JOB, *PP2, *TWO_CHUNKS, "--num-layers", "8", *DROPPED]
    stages = virtual_stages(*_config(monkeypatch, [*JOB, *PP2, *TWO_CHUNKS, "--num-layers", "8"]))
    found = stage_flags(flags, flag_parser(), stages)
    text = " ".join(found)
    for word in DROPPED:
        if word.startswith("--") and word not in ("--expert-model-parallel-size", "--bf16"):
            assert word.partition("=")[0] not in text or word == "--lr"
    assert "--lr 1e-4" in text
    assert "--num-layers 8" in text  # the last of two
    assert text.count("--num-layers ") == 1
    assert "--pipeline-model-parallel-layout Et*2|t*2|t*2|t*2L" in text
    assert "--pipeline-model-parallel-size 4" in text
    # In one order, whatever the user's.
    other = [*DROPPED, *PP2, *TWO_CHUNKS, *JOB, "--num-layers", "8"]
    assert stage_flags(other, flag_parser(), stages) == found


def _config(monkeypatch, flags):
    args, config = parsed(monkeypatch, flags, 4)
    return args, config.transformer


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (("--use-tp-pp-dp-mapping",), "use_tp_pp_dp_mapping = True cannot be planned"),
        ((*PP2, "--num-layers", "3"), "Megatron refuses the arguments: Number of layers should be"),
        (
            (*PP2, *TWO_CHUNKS, "--num-layers", "4", "--decoder-first-pipeline-num-layers", "3"),
            "a stage of 3, 1 layers has no 2 chunks of equal size: give another num_virtual",
        ),
        ((*PP2, "--pipeline-model-parallel-layout", "Ettt|L"), "Number of decoder layers 3"),
        ((*PP2, "--pipeline-model-parallel-layout", "Et|t|L"), "must be divisible"),
    ],
)
def test_refused_layouts_are_one_line(monkeypatch, flags, fault):
    with pytest.raises(ValueError, match=fault) as failure:
        virtual_stages(*_config(monkeypatch, [*JOB, *flags]))
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    ("tp", "cp", "ep", "etp", "dp", "pp", "chunks"),
    [(2, 1, 4, 1, 4, 2, 3), (1, 2, 2, 1, 2, 4, 2), (2, 2, 2, 2, 2, 3, 2), (1, 1, 1, 1, 5, 2, 2)],
)
def test_groups_inside_a_stage_are_the_same_in_its_own_job(tp, cp, ep, etp, dp, pp, chunks):
    """A stage's first rank has the same peers, counted from it, in both jobs."""
    world = tp * cp * dp * pp

    def generators(stages):
        ranks, order = tp * cp * dp * stages, "tp-cp-ep-dp-pp"
        return (
            RankGenerator(tp=tp, ep=1, dp=dp, pp=stages, cp=cp, order=order),
            RankGenerator(tp=etp, ep=ep, dp=ranks // (etp * ep * stages), pp=stages, cp=1,
                          order=order),
        )  # fmt: skip

    def groups(stages, rank):
        return [
            tuple(peer - rank for peer in group)
            for generator, kinds in zip(
                generators(stages), (("tp", "cp", "dp", "dp-cp"), ("tp", "ep", "dp")), strict=True
            )
            for kind in kinds
            for group in generator.get_ranks(kind)
            if rank in group
        ]

    each = world // pp
    for p in range(pp):
        for v in range(chunks):
            size, rank = stage_job(world, p, v, pp, chunks)
            assert size == world * chunks
            assert rank % each == 0
            assert rank // each == p + v * pp  # the stage that holds it
            assert groups(pp * chunks, rank) == groups(pp, p * each)


def test_a_trace_goes_back_into_its_job():
    def collective(group, ranks, stride):
        return Collective("all_reduce", 8, group, ranks, stride, DISPATCH, FORWARD)

    # W = 64, P = 4, V = 2: 16 ranks a stage; traced as stage 1 of 8, and of layers 3 and 4.
    trace = Trace(
        world_size=128, rank=16, micro_batches=1, backend="cpu", rows={3: 5, 4: 6}, ops=(),
        collectives=(
            collective("ep", 8, 1), collective("pp", 8, 16), collective("mp", 16, 1),
            collective("embedding", 2, 112), collective("world", 128, 1),
        ),
        memory=StageMemory(1, 2, 3, 4),
    )  # fmt: skip
    found = in_job(trace, (2, 1), stages=4, chunks=2, world_size=64, layers_on=10)
    assert (found.world_size, found.rank) == (64, 32)
    assert found.rows == {13: 5, 14: 6}
    assert found.collectives == (
        collective("ep", 8, 1), collective("pp", 4, 16), collective("mp", 8, 1),
        collective("embedding", 2, 48), collective("world", 64, 1),
    )  # fmt: skip
    assert found.memory == trace.memory
    assert in_job(trace, (1, 0), 8, 1, 128) == replace(trace, rank=16)
