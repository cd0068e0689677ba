"""What a plan says of a job under Megatron FSDP is what ranks of that job hold and send.

Real CPU ranks over gloo, of every strategy, with MoNE and stock experts, in fp32 and bf16, with
expert and tensor parallelism and in two instances. Bytes are those that are there as a step's last
micro-batch begins, to the byte; collectives are those of a whole step of several micro-batches.
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
from tests.parity.layouts import EP2, ETP1, FULL_RECOMPUTE, TP2
from tests.parity.test_sharded_weights import MEGATRON, STRATEGY, TWO_INSTANCES, WHOLE

pytestmark = pytest.mark.slow


def cut(strategy: str) -> tuple[str, ...]:
    """Flags of Megatron FSDP."""
    return *MEGATRON, STRATEGY, strategy


LAYOUTS: Layouts = {
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
AHEAD = ("whole, one micro-batch", "weights")
"""As the only micro-batch begins, layers gathered ahead are there: transient bytes in a plan."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fsdp")


@pytest.fixture(scope="module")
def found(shared_tracer, folder):
    return planned_and_run(LAYOUTS, shared_tracer(TraceCache(folder / "cache")), folder)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_kept_from_micro_batch_to_micro_batch_is_exact(found, name, kind):
    if (name, kind) == AHEAD:
        assert found[name, 0].error(kind) < 0
    else:
        assert found[name, 0].error(kind) == 0, planned.table(found)


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
    path = next((folder / name / "profile" / "ranks").glob("*0.json"))
    phases = json.loads(path.read_text())["runs"][0]["phases"]
    assert reduces == set(phases[GRAD_REDUCE])
    assert gathers <= set(phases.get(PARAMETER_GATHER, {}))
    assert BACKWARD in gathers or BACKWARD not in phases.get(PARAMETER_GATHER, {})


def test_products_are_of_one_micro_batch(found, shared_tracer, folder):
    """Though two are traced: those of the job without FSDP."""
    plain = shared_tracer(TraceCache(folder / "plain")).trace((*NATIVE, *samples(8)), 2)
    for name in ("no_shard", "optim_grads", "whole"):
        assert found[name, 0].job.traces[0, 0].flops == plain.traces[0, 0].flops, name
