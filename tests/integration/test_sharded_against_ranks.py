"""What a plan says of a job whose state is cut over replicas is what ranks of that job hold and
send: by Megatron FSDP, and by DeepSpeed's engine.

Real CPU ranks over gloo, of every strategy and ZeRO stage, with MoNE and stock experts, in fp32 and
bf16, with expert and tensor parallelism, in two instances, in one bucket and in many. Bytes are
those that are there as a step's last micro-batch begins, to the byte; collectives are those of a
whole step of several micro-batches.
"""

import json

import pytest

from megatron_mone.common.phases import BACKWARD, FORWARD, GRAD_REDUCE, PARAMETER_GATHER
from megatron_mone.planning.tracing.trace_cache import TraceCache
from tests.integration import test_planned_against_ranks as planned
from tests.integration.test_planned_against_ranks import (
    EXACT,
    NATIVE,
    OVERLAP,
    STOCK,
    Layouts,
    planned_and_run,
    samples,
)
from tests.parity.engines import BF16
from tests.parity.layouts import EP2, EP4, ETP1, FULL_RECOMPUTE, TP2
from tests.parity.test_sharded_weights import MEGATRON, STRATEGY, TWO_INSTANCES, WHOLE

pytestmark = pytest.mark.slow


def cut(strategy: str) -> tuple[str, ...]:
    """Flags of Megatron FSDP."""
    return *MEGATRON, STRATEGY, strategy


def zero(stage: int, **settings) -> tuple[str, ...]:
    """Flags of the engine; `settings` of DeepSpeed's zero_optimization go into a file."""
    flags = ("--engine", "deepspeed", "--zero-stage", str(stage))
    return (*flags, "--deepspeed-config", json.dumps(settings)) if settings else flags


SMALL = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
CUT = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 4_000}
FSDP: Layouts = {
    "no_shard": (2, (*NATIVE, *cut("no_shard"), *samples(8))),
    "no_shard bf16, overlapped": (2, (*STOCK, *BF16, *OVERLAP, *cut("no_shard"), *samples(12))),
    "optim": (2, (*STOCK, *cut("optim"), *samples(8))),
    "optim bf16, overlapped": (2, (*NATIVE, *BF16, *OVERLAP, *cut("optim"), *samples(12))),
    "optim_grads": (2, (*NATIVE, *cut("optim_grads"), *samples(8))),
    "optim_grads bf16": (2, (*STOCK, *BF16, *cut("optim_grads"), *samples(12))),
    "whole": (2, (*NATIVE, *WHOLE, *samples(8))),
    "whole, one micro-batch": (2, (*STOCK, *WHOLE, *samples(4))),
    "whole bf16, recompute": (2, (*NATIVE, *BF16, *WHOLE, *FULL_RECOMPUTE, *samples(12))),
    "whole EP2": (4, (*NATIVE, *EP2, *WHOLE, *samples(16))),
    "optim_grads EP2 bf16": (4, (*STOCK, *EP2, *BF16, *cut("optim_grads"), *samples(16))),
    "whole TP2 EP2 bf16": (4, (*NATIVE, *TP2, *ETP1, *EP2, *BF16, *WHOLE, *samples(8))),
    "two instances": (4, (*NATIVE, *WHOLE, *TWO_INSTANCES, *samples(24))),
}  # fmt: skip
ZERO: Layouts = {
    "0": (2, (*NATIVE, *zero(0), *samples(8))),
    "1": (2, (*STOCK, *zero(1), *samples(8))),
    "2": (2, (*NATIVE, *zero(2), *samples(8))),
    "3": (2, (*STOCK, *zero(3), *samples(8))),
    "1 bf16": (2, (*NATIVE, *BF16, *zero(1), *samples(8))),
    "2 bf16, overlapped": (2, (*STOCK, *BF16, *zero(2, overlap_comm=True, **SMALL), *samples(12))),
    "3 bf16, cut": (2, (*NATIVE, *BF16, *zero(3, **SMALL, **CUT), *samples(12))),
    "0 EP2": (4, (*STOCK, *EP2, *zero(0), *samples(16))),
    "1 EP2 bf16": (4, (*NATIVE, *EP2, *BF16, *zero(1), *samples(16))),
    "2 EP2 bf16": (4, (*NATIVE, *EP2, *BF16, *zero(2, **SMALL), *samples(16))),
    "2 EP4": (4, (*STOCK, *EP4, *zero(2), *samples(16))),
    "1 TP2 EP2": (4, (*NATIVE, *TP2, *ETP1, *EP2, *zero(1, **SMALL), *samples(8))),
    "3 TP2 bf16": (4, (*NATIVE, *TP2, *BF16, *zero(3, **CUT), *samples(8))),
    "3 cut": (4, (*STOCK, *zero(3, reduce_bucket_size=20_000, **CUT), *samples(16))),
}  # fmt: skip
LAYOUTS = [*FSDP, *ZERO]
AHEAD = ("whole, one micro-batch", "weights")
"""As the only micro-batch begins, layers gathered ahead are there: transient bytes in a plan."""
REST = 100_000
"""Bytes beside the three kinds: batches, rotary tables, masks, one parameter's copy."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def found(shared_tracer, folder):
    tracer = shared_tracer(TraceCache(folder / "cache"))
    of_engine: Layouts = {}
    for name, (ranks, flags) in ZERO.items():
        words = list(flags)
        if "--deepspeed-config" in words:
            at = words.index("--deepspeed-config") + 1
            path = folder / f"{name}.json"
            path.write_text(json.dumps({"zero_optimization": json.loads(words[at])}))
            words[at] = str(path)
        of_engine[name] = ranks, tuple(words)
    stages = {}
    for name, layouts in (("fsdp", FSDP), ("zero", of_engine)):
        (folder / name).mkdir()
        stages |= planned_and_run(layouts, tracer, folder / name)
    return stages


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_kept_from_micro_batch_to_micro_batch_is_exact(found, name, kind):
    if (name, kind) == AHEAD:
        assert found[name, 0].error(kind) < 0
    else:
        assert found[name, 0].error(kind) == 0, planned.table(found)


@pytest.mark.parametrize("name", ZERO)
def test_there_is_nothing_else(found, name):
    assert found[name, 0].held["others"] < REST, found[name, 0].held


@pytest.mark.parametrize("name", LAYOUTS)
def test_activations_are_within_two_percent(found, name):
    assert abs(found[name, 0].error("activations")) < 0.02, planned.table(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_of_a_step_are_exact(found, name):
    one = found[name, 0]
    assert one.planned == one.run, planned.table(found)


@pytest.mark.parametrize(
    ("name", "gathers", "reduces"),
    [
        ("no_shard", set(), {FORWARD}),
        ("optim", {FORWARD}, {FORWARD}),
        ("optim_grads", {FORWARD}, {FORWARD, BACKWARD}),
        ("whole", {FORWARD, BACKWARD}, {FORWARD, BACKWARD}),
    ],
)
def test_a_profile_tells_where_it_gathers_and_reduces(found, folder, name, gathers, reduces):
    """Around modules, in hooks of the backward pass, or as the step ends, which is `forward`."""
    path = next((folder / "fsdp" / name / "profile" / "ranks").glob("*0.json"))
    phases = json.loads(path.read_text())["runs"][0]["phases"]
    assert reduces == set(phases[GRAD_REDUCE])
    assert gathers <= set(phases.get(PARAMETER_GATHER, {}))
    assert BACKWARD in gathers or BACKWARD not in phases.get(PARAMETER_GATHER, {})


def test_products_are_of_one_micro_batch(found, shared_tracer, folder):
    """Though two are traced: those of the job without FSDP."""
    plain = shared_tracer(TraceCache(folder / "plain")).trace((*NATIVE, *samples(8)), 2)
    for name in ("no_shard", "optim_grads", "whole"):
        assert found[name, 0].job.traces[0, 0].flops == plain.traces[0, 0].flops, name
