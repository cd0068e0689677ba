"""Lower bounds of layouts against layouts planned: nothing is called hopeless that fits."""

import random
from collections import Counter
from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_mone.planning.bounds import Bounds
from megatron_mone.planning.composed import Sum, Unit, layer_kinds
from megatron_mone.planning.cost.hardware import load_cluster
from megatron_mone.planning.cost.rank_memory import CONTEXT
from megatron_mone.planning.fixes import faster_stages
from megatron_mone.planning.job import JobSpec, job_spec, parse_layout
from megatron_mone.planning.layout_axes import (
    ALLOWABLE,
    Pipeline,
    Shards,
    all_shards,
    all_stages,
    axes_of,
)
from megatron_mone.planning.layout_model import Model
from megatron_mone.planning.planner import Planner
from megatron_mone.planning.scaled_bound import Scaled
from megatron_mone.planning.search import prepared
from megatron_mone.planning.small_groups import SmallGroups
from megatron_mone.planning.stage_split import even_split
from megatron_mone.planning.tracing.trace_cache import TraceCache
from tests.unit.planning.made_jobs import CLUSTER, EXACT, STAGE, facts
from tests.unit.planning.test_composed import MODEL

GPUS = 64
PAPER_GPUS = 256
LAYERS = 8


@dataclass
class PaperModel:
    """Bytes of a model by what shards them, each of its 8 layers alike; its composer, too."""

    sharded: int  # of a layer, by tensor parallelism
    whole: int  # of a layer, by nothing: norms, routers
    embedding: int  # by tensor parallelism; at the first stage, and again at the last
    tied: bool
    experts: int  # of a layer
    weights: float  # bytes of weights over bytes of gradients
    state: float  # bytes of optimizer state over bytes of gradients
    shared: bool  # among replicas

    @property
    def job(self):
        return JobSpec("paper", {"untie_embeddings_and_output_weights": not self.tied}, {}, {}, {})

    def parts(self, sizes, replicas, copies):
        """Of one rank, whose optimizer so many replicas and copies of experts share."""
        dense = {
            "moe": self.sharded / sizes.tp + self.whole,
            "embedding": self.embedding / sizes.tp,
            "head": self.embedding / sizes.tp,
            "rest": 0.0,
        }
        found = {}
        for part, size in dense.items():
            experts = self.experts / (sizes.ep * sizes.etp) * (part == "moe")
            shards = (replicas, copies) if self.shared else (1, 1)
            own = {"weights": self.weights * experts, "gradients": experts,
                   "optimizer": self.state * experts / shards[1]}  # fmt: skip
            memory = {
                "weights": self.weights * size + own["weights"],
                "gradients": size + own["gradients"],
                "optimizer": self.state * size / shards[0] + own["optimizer"],
                "activations": 0.0, "forward_peak": 0.0, "backward_peak": 0.0,
                # Megatron's experts of ep = 1 are parameters like others.
                **{f"expert_{name}": value * (sizes.ep > 1) for name, value in own.items()},
            }  # fmt: skip
            found[part] = Sum(Counter(), Counter(), memory)
        return found

    def unit(self, job, of, kinds):
        """As a Composer's, of two copies at least of everything."""
        ranks = 2 * of.tp * of.ep * of.etp
        parts = self.parts(of, ranks // of.tp, ranks // (of.ep * of.etp))
        return Unit(parts, STAGE, replace(of, world_size=ranks, pp=4), self.tied)

    def fullest(self, shards, pipeline):
        """Bytes of weights, gradients and optimizer of the stage that has most."""
        replicas = PAPER_GPUS // (shards.tp * pipeline.pp)
        copies = PAPER_GPUS // (shards.ep * shards.etp * pipeline.pp)
        held = {
            part: sum(one.memory[name] for name in ("weights", "gradients", "optimizer"))
            for part, one in self.parts(shards, replicas, copies).items()
        }
        stages = []
        for stage in range(pipeline.pp):
            layers = sum(pipeline.split[stage :: pipeline.pp])
            of_ends = (stage == 0) + (stage == pipeline.pp - 1)
            if pipeline.pp == 1 and self.tied:
                of_ends = 1
            stages.append(layers * held["moe"] + of_ends * held["embedding"])
        return max(stages)


PAPER = st.builds(
    PaperModel, *(st.integers(10**6, 10**9),) * 3, st.booleans(), st.integers(10**6, 10**11),
    st.sampled_from([0.25, 0.5, 1.0]), st.sampled_from([0.0, 1.5, 3.0]), st.booleans(),
)  # fmt: skip
SHARDS = st.builds(
    lambda tp, ep, is_wide: Shards(tp, 1, ep, tp if is_wide else 1, 1),
    st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4, 8]), st.booleans(),
)  # fmt: skip


@settings(deadline=None)
@given(PAPER, SHARDS, st.sampled_from([(1, 1), (2, 1), (2, 2), (4, 1), (8, 1)]))
def test_what_a_layout_holds_is_known_before_it_is_traced(paper, shards, stages):
    """Never more than it does, and nearly all of it: experts, and what ep = 1 hides, apart."""
    of = facts(num_experts=8, num_layers=LAYERS, distributed_optimizer=paper.shared)
    model = Model(paper.job, of, ("moe",) * LAYERS, 0, PAPER_GPUS)
    scaled = Scaled(SmallGroups(paper, model, ("none",)), CLUSTER, EXACT)
    pipeline = Pipeline(*stages, even_split(LAYERS, *stages), True)
    true = paper.fullest(shards, pipeline)
    least = scaled.bound(shards, pipeline).held - CONTEXT
    assert least <= 1.000001 * true
    # At ep = 1 the experts' state may stand in the group of all replicas, or in their own.
    assert least >= (0.97 if shards.ep > 1 or shards.tp == 1 else 0.2) * true


@pytest.fixture(scope="module")
def planner(shared_tracer, tmp_path_factory):
    tracer = shared_tracer(TraceCache(tmp_path_factory.mktemp("traces")))
    return Planner(tracer, load_cluster("h100-ndr"))


def job_of(**changes):
    plain = job_spec("moe-30b-a3b")
    train = {**plain.train, "global_batch_size": 64, "vocab_size": None, "seq_length": 512}
    model = {
        name: value
        for name, value in {**MODEL, **changes}.items()
        if value is not None and not name.startswith("mone_")
    }
    return JobSpec("tiny", model, {}, plain.cluster, {k: v for k, v in train.items() if v})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "tried"),
    [
        ({"untie_embeddings_and_output_weights": None}, 4),
        (dict.fromkeys(name for name in MODEL if "moe" in name or "experts" in name), 2),
    ],
)
def test_nothing_is_hopeless_that_plans_as_fitting(planner, changes, tried, monkeypatch):
    """Nor slower, nor larger: both bounds of random layouts are below their plans."""
    job = job_of(**changes)

    def some_axes(*of):
        axes = axes_of(*of)
        return replace(axes, recomputes=axes.recomputes[:3:2])  # each list is a unit more

    monkeypatch.setattr("megatron_mone.planning.search.axes_of", some_axes)
    model, bounds, composer = prepared(planner, job, GPUS)
    assert isinstance(bounds, Bounds)
    draw = random.Random(20)
    axes = bounds.axes(ALLOWABLE)
    assert len(axes.states) == 4
    assert len(axes.offloads) > 1
    every = [
        (shards, *stages)
        for shards in all_shards(model.facts, GPUS, 8)
        for stages in all_stages(shards, model.facts, GPUS)
    ]
    done = 0
    for plain, pp, vpp in draw.sample(every, len(every)):
        if done == tried:
            break
        recompute = draw.choice(axes.recomputes)
        offload = draw.choice(axes.offloads) if recompute == "none" else "none"
        shards = replace(
            plain, recompute=recompute, state=draw.choice(axes.states), offload=offload
        )  # fmt: skip
        pipeline = draw.choice(bounds.pipelines(shards, pp, vpp) or [None])
        if pipeline is None:
            continue
        fields = {**shards.fields, **pipeline.fields(0)}
        try:
            plan = composer.plan(job.with_layout(fields), GPUS).prediction
        except ValueError:
            continue  # Megatron refuses it
        done += 1
        held = max(m.weights + m.gradients + m.optimizer for m in plan.memory_P) + CONTEXT
        first, second = bounds.first(shards, pipeline), bounds.second(shards, pipeline)
        assert first.held <= 1.0001 * held, (shards, pipeline)
        assert second.held <= 1.0001 * held, (shards, pipeline)
        assert first.held >= 0.9 * held, (shards, pipeline)
        assert max(first.peak, second.peak) <= 1.0001 * plan.peak, (shards, pipeline)
        assert max(first.seconds, second.seconds) <= 1.0001 * plan.seconds, (shards, pipeline)
    assert done == tried


@pytest.mark.slow
def test_kinds_of_layers_are_read_from_stages(planner):
    job = job_of()
    keys = planner.tracer.describe(planner.flags(job), GPUS).keys
    assert layer_kinds(job, keys) == ["dense"] + ["moe"] * 7


@pytest.mark.slow
def test_layers_move_from_the_slowest_stage(planner):
    """Two layers against six: what is found is faster by a plan, and has all layers."""
    uneven = job_of().with_layout(parse_layout("tp=1,pp=2,ep=8,stages=Et*2|t*6L"))
    planned = planner.plan(uneven, GPUS)
    words, faster = faster_stages(planner, planned, GPUS)
    assert "of stage 1: 6 to " in words
    assert faster.prediction.seconds < 0.9 * planned.prediction.seconds
    assert sum(key.count("moe") for key in faster.stage_kinds.values()) == 2
    assert layer_kinds(uneven, faster.stage_kinds) == layer_kinds(uneven, planned.stage_kinds)
    assert faster_stages(planner, faster, GPUS) is None
