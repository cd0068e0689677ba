"""What a plan says of a job that DeepSpeed steps is what ranks of that job hold and send.

Real CPU ranks over gloo, of every ZeRO stage, with MoNE and with stock experts, in fp32 and bf16,
sharded by expert and tensor parallelism, in one bucket and in many. Bytes are those that are there
as a step's last micro-batch begins, to the byte; collectives are those of a whole step of several
micro-batches.
"""

import json

import pytest

from megatron_mone.planning.tracing.trace_cache import TraceCache
from tests.integration import test_planned_against_ranks as planned
from tests.integration.test_planned_against_ranks import (
    EXACT,
    NATIVE,
    STOCK,
    Layouts,
    planned_and_run,
    samples,
)
from tests.parity.engines import BF16
from tests.parity.layouts import EP2, EP4, ETP1, TP2

pytestmark = pytest.mark.slow


def zero(stage: int, **settings) -> tuple[str, ...]:
    """Flags of the engine; `settings` of DeepSpeed's zero_optimization go into a file."""
    flags = ("--engine", "deepspeed", "--zero-stage", str(stage))
    return (*flags, "--deepspeed-config", json.dumps(settings)) if settings else flags


SMALL = {"reduce_bucket_size": 20_000, "allgather_bucket_size": 20_000}
CUT = {"stage3_param_persistence_threshold": 100, "stage3_prefetch_bucket_size": 4_000}
LAYOUTS: Layouts = {
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
REST = 100_000
"""Bytes beside the three kinds: batches, rotary tables, masks, one parameter's copy."""


@pytest.fixture(scope="module")
def found(shared_tracer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero")
    layouts: Layouts = {}
    for name, (ranks, flags) in LAYOUTS.items():
        words = list(flags)
        if "--deepspeed-config" in words:
            at = words.index("--deepspeed-config") + 1
            path = folder / f"{name}.json"
            path.write_text(json.dumps({"zero_optimization": json.loads(words[at])}))
            words[at] = str(path)
        layouts[name] = ranks, tuple(words)
    return planned_and_run(layouts, shared_tracer(TraceCache(folder / "cache")), folder)


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_kept_from_micro_batch_to_micro_batch_is_exact(found, name, kind):
    assert found[name, 0].error(kind) == 0, planned.table(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_is_nothing_else(found, name):
    assert found[name, 0].held["others"] < REST, found[name, 0].held


@pytest.mark.parametrize("name", LAYOUTS)
def test_activations_are_within_two_percent(found, name):
    assert abs(found[name, 0].error("activations")) < 0.02, planned.table(found)


@pytest.mark.parametrize("name", LAYOUTS)
def test_collectives_of_a_step_are_exact(found, name):
    one = found[name, 0]
    assert one.planned == one.run, planned.table(found)
