"""plan.json and a search's file, as the classes that write and read them; docs/PLANNER.md has them.

May touch: nothing.
"""

from collections.abc import Mapping
from typing import Annotated, Self

from pydantic import BeforeValidator, Strict, model_validator

from megatron_mone.common.checked_json import Fault
from megatron_mone.common.documents import (
    AtLeast1,
    Column,
    Difference,
    Document,
    Key,
    Number,
    Part,
    Positive,
    Signed,
    Text,
    Whole,
    Words,
    check_lengths,
    check_names,
    one_of,
)
from megatron_mone.planning.cost.rank_memory import ORDER
from megatron_mone.planning.layout_axes import AXIS_USES
from megatron_mone.profiling.rank_record import Phase

_AGAIN = "plan again with tools/plan_scale.py"
_SLACK = 0.01  # of a sum that must agree with its parts, which may be written rounded


class ClusterFacts(Part):
    """The hardware."""

    name: Text
    device: Text
    memory_gib: Positive
    """GiB of a device"""
    node_devices: AtLeast1
    domain_devices: AtLeast1
    """that NVLink connects"""


class Routing(Part):
    """How tokens find their experts."""

    kind: Annotated[str, one_of(("balanced", "zipf", "replayed"))]
    hottest: Number
    """the hottest rank's rows over the mean"""


class Layout(Part):
    """Sizes of the parallel groups and of the batch."""

    tp: AtLeast1
    cp: AtLeast1
    pp: AtLeast1
    dp: AtLeast1
    ep: AtLeast1
    etp: AtLeast1
    edp: AtLeast1
    micro_batch_size: AtLeast1
    global_batch_size: AtLeast1
    micro_batches: AtLeast1
    """of a step"""
    vpp: AtLeast1
    recompute: Text
    """`none`, `full`, or the modules"""


class Memory(Part):
    """GiB of one rank at its fullest moment; the parts add up to `peak`."""

    weights: Difference
    gradients: Difference
    optimizer: Difference
    activations: Difference
    transient: Difference
    """beside what is kept, while a pass runs"""
    buffers: Difference
    """of communication; an allowance"""
    context: Difference
    """of CUDA; an allowance"""
    fragmentation: Difference
    """an allowance"""
    peak: Positive

    @property
    def parts(self) -> dict[str, float]:
        """All but the peak, in the order in which they are stacked."""
        return {name: getattr(self, name) for name in ORDER}

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _check_sum("the parts", self.parts, "peak", self.peak)
        return self


class ChunkTimes(Part):
    """One micro-batch in one virtual stage."""

    forward_ms: Number
    backward_ms: Number


class Stage(Part):
    """One pipeline stage."""

    stage: Whole
    layers: Text
    """what it holds, in short"""
    memory_gib: Memory
    end_ms: Number
    """when its last pass ends"""
    busy_ms: Number = 0.0
    """of its passes; what is left until the pipeline's end it waits: while the pipeline fills,
    drains and sends, which is the same for all stages, and for a slower stage"""
    imbalance_ms: Number = 0.0
    """for a slower stage"""
    chunks: list[ChunkTimes]


class Fix(Part):
    """A change by which a layout fits, or is faster."""

    change: Text
    """in words"""
    layout: Text = ""
    """as `--layout` takes it"""
    step_ms: Number
    peak_gib: Number


class Collective(Part):
    """Equal collectives of a rank of the stage that ends last."""

    kind: Text
    group: Text
    ranks: Whole
    stride: Whole
    """between neighbours"""
    calls: Whole
    """a step"""
    bytes: Number
    """of one call"""
    ms: Number
    """of one call"""
    exposed: bool | None = None
    """whether nothing hides it"""


def _five(value: object) -> object:
    if isinstance(value, list) and len(value) != 5:
        raise Fault("must be [start_ms, end_ms, F or B, micro-batch, chunk]")
    return value


Pass = Annotated[
    tuple[Number, Number, Annotated[str, one_of(("F", "B"))], Whole, Whole],
    Strict(False),
    BeforeValidator(_five),
]
"""One micro-batch in one chunk, forward or back."""


class Timeline(Part):
    """The passes of a step."""

    shown: Text
    """`all`, or which passes where there are too many"""
    stages: list[list[Pass]]
    """a list a stage of [start_ms, end_ms, `F` or `B`, micro-batch, chunk]"""
    gather_ms: Number
    """of parameters, before the first pass"""
    reduce_ms: Column
    """of gradients, by stage; what nothing hides"""
    optimizer_ms: Number

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        for number, passes in enumerate(self.stages):
            if not passes:
                raise Fault("is empty: a stage has passes", "stages", number)
            latest = 0.0
            for index, (start, end, *_) in enumerate(passes):
                place = ("stages", number, index)
                if end < start:
                    raise Fault(f"{end} is before its start, {start}", *place, 1)
                if start < latest:
                    words = f"{start} is before the end of the pass before, {latest}"
                    raise Fault(words, *place, 0)
                latest = end
        return self


class HostPart(Part):
    """What a rank's host holds and does, of the stage that has most there; published bandwidths,
    fitted to nothing."""

    memory_gib: Number
    """GiB that the rank keeps there"""
    limit_gib: Positive
    """the device's share of the host's memory"""
    to_host_gib: Number
    """copied there in a step"""
    to_device_gib: Number
    """and back"""
    copy_ms: Number
    """both, alone on the link; of activations what nothing hides is `host copies` of `parts_ms`"""
    update_ms: Number
    """of the host's own operators: the optimizer, and what converts parameters"""


class Range(Part):
    """What nine of ten are taken to lie in, by the errors of the runs fitted to."""

    low: Number
    high: Number


class Shape(Part):
    """What a model is known by, as a profile names it; 0 is what it has none of."""

    num_layers: AtLeast1
    hidden_size: AtLeast1
    seq_length: AtLeast1
    num_experts: Whole
    moe_router_topk: Whole
    moe_ffn_hidden_size: Whole
    neurons_per_token: Whole
    """kept in each expert of a token; all of them of stock experts"""
    params_dtype: Text


class PlannedModel(Part):
    """One model, predicted."""

    name: Text
    """`mone` (`moe` where it is stock) for the model asked for, then those of `--against`"""
    shape: Shape | None = None
    layout: Layout
    fits: bool
    first_unfit: Annotated[str, one_of((*ORDER, "host"))] | None
    """the part of memory at which the device's limit is passed; `host`: the host's"""
    cheapest_fix: Fix | None
    step_ms: Positive
    step_ms_band: Range | None = None
    tokens_per_s_per_gpu: Number
    tflops_per_gpu: Number
    """of the model's operations, 1e12/s"""
    mfu: Number
    """of the bf16 peak"""
    executed_tflops_per_gpu: Number
    """what the kernels compute, recomputation included"""
    memory_gib: Memory
    """of the fullest stage"""
    peak_gib_band: Range | None = None
    stages: list[Stage]
    parts_ms: dict[Key, Difference]
    """of the stage that ends last, by compute, bubble, optimizer and groups of exposed
    communication; add up to `step_ms`"""
    phases_ms: dict[Phase, Number]
    """compute of that stage by profiler phase; adds up to it: time in which a late host leaves the
    device idle is in `other`"""
    exposed_comm_ms: Difference
    hidden_comm_ms: Number
    bubble_ms: Difference
    """`fill_ms` and `imbalance_ms`"""
    fill_ms: Difference = 0.0
    """while the pipeline fills, drains and sends"""
    imbalance_ms: Number = 0.0
    """while a slower stage works"""
    faster_stages: Fix | None = None
    """layers moved between stages, where that is faster and fits"""
    collectives: list[Collective]
    timeline: Timeline
    host: HostPart | None = None

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not self.fits and self.first_unfit is None:
            raise Fault("must be a text", "first_unfit")
        for index, one in enumerate(self.stages):
            if one.stage != index:
                words = f"is {one.stage}, in the order of the pipeline it is {index}"
                raise Fault(words, "stages", index, "stage")
        count = len(self.stages)
        if count != self.layout.pp:
            raise Fault(f"has {count} stages where layout.pp is {self.layout.pp}", "stages")
        _check_sum("parts_ms", self.parts_ms, "step_ms", self.step_ms)
        check_lengths(count, [(("timeline", "reduce_ms"), self.timeline.reduce_ms)])
        rows = len(self.timeline.stages)
        if rows != count:
            words = f"has {rows} rows where the model has {count} stages"
            raise Fault(words, "timeline", "stages")
        return self


class ScaledModel(Part):
    """A model on another number of devices."""

    step_ms: Positive
    tokens_per_s_per_gpu: Positive
    tflops_per_gpu: Number
    fits: bool
    peak_gib: Number


class ScalingPoint(Part):
    """One number of devices."""

    gpus: AtLeast1
    models: dict[Key, ScaledModel]
    """by name; those that can be scaled to it"""


class _Swept(Part):
    step_ms: Positive
    tokens_per_s_per_gpu: Positive
    peak_gib: Positive
    expert_ms: Positive
    """of a step: GEMMs, selection, dispatch and combine"""
    active_flops: Positive
    """operations of a step that the kept neurons need"""


class Ratio(Part):
    """A share of neurons kept."""

    r: Positive
    neurons: AtLeast1
    """kept in each expert of a token, K_N"""


class RatioPoint(_Swept, Ratio):
    """The model at one share of neurons kept."""


class ExpertCount(Part):
    """A number of experts a token."""

    topk: Whole
    """K_E"""
    neurons: AtLeast1
    """K_N"""
    r: Positive
    """K_N over the neurons of an expert"""


class ExpertPoint(_Swept, ExpertCount):
    """The model at one pair K_E x K_N of equal active operations."""

    exposed_comm_ms: Difference


class _Head(Document, again=_AGAIN):
    model: Text
    gpus: AtLeast1
    tokens_per_step: AtLeast1
    cluster: ClusterFacts
    efficiency: Text
    """where the curves of kernels and links come from"""
    routing: Routing
    warnings: list[Words]


class Plan(_Head, schema="megatron-mone/plan/1", again=_AGAIN, indent=1):
    """What was predicted of a job and of the models compared with it."""

    models: list[PlannedModel]
    scaling: list[ScalingPoint]
    """may be empty, as the sweeps may"""
    ratio_sweep: list[RatioPoint]
    expert_sweep: list[ExpertPoint]

    @model_validator(mode="after")
    def _names(self) -> Self:
        names = [model.name for model in self.models]
        check_names(names, "model")
        if not names:
            raise Fault("is empty: there is nothing to draw", "models")
        seen: set[int] = set()
        for index, point in enumerate(self.scaling):
            if point.gpus in seen:
                raise Fault(f"{point.gpus} stands in two points", "scaling", index, "gpus")
            seen.add(point.gpus)
            for name in point.models.keys() - names:
                words = f"{name!r} is none of the models, {', '.join(names)}"
                raise Fault(words, "scaling", index, "models")
        return self


class CandidateLayout(Part):
    """A layout that was predicted."""

    name: Text
    layout: Layout
    fits: bool
    step_ms: Positive
    tokens_per_s_per_gpu: Positive
    peak_gib: Positive
    parts_ms: dict[Key, Difference]
    pareto: bool
    """whether no other is both faster and smaller"""
    step_ms_band: Range | None = None
    tied: bool = False
    """whether its band overlaps that of the fastest that fits: which is faster is not known"""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        _check_sum("parts_ms", self.parts_ms, "step_ms", self.step_ms)
        return self


class Refused(Part):
    """A layout that Megatron refuses."""

    layout: Text
    reason: Words


class Best(Part):
    """One of the fastest that fit."""

    layout: Text
    """the name of a candidate"""
    why: Words


class Search(_Head, schema="megatron-mone/plan-search/2", again=_AGAIN, indent=1):
    """Layouts that were tried for a job."""

    candidates: list[CandidateLayout]
    """the fastest first"""
    refused: list[Refused]
    hopeless: list[Text]
    """layouts whose weights, gradients and optimizer alone pass the device's memory"""
    not_tried: dict[Key, Whole]
    """how many layouts, by why: `slower` than those found, `too large` with what they keep for
    backward, by lower bounds; `limit` and `interrupt`: could have been among the fastest"""
    axes: dict[Key, Annotated[str, one_of(AXIS_USES)]] | None = None
    """axes that a user allows, `precision` and `offload`: `needed` are those without which nothing
    fits"""
    least_ms: Number | None = None
    """of those of `limit` or `interrupt`, the least that one could take"""
    best: list[Best]
    """the fastest that fit, as many as were sought"""

    @model_validator(mode="after")
    def _best_are_candidates(self) -> Self:
        names = {one.name for one in self.candidates}
        for index, one in enumerate(self.best):
            if one.layout not in names:
                raise Fault(f"{one.layout!r} is the name of no candidate", "best", index, "layout")
        return self

    def best_candidates(self) -> list[CandidateLayout]:
        """The candidates that are the best, in their order."""
        by_name = {one.name: one for one in self.candidates}
        return [by_name[one.layout] for one in self.best]


class ComparedLayout(Part):
    """One of two layouts."""

    name: Text
    """of its run file"""
    layout: Text
    """in short"""
    fits: bool
    step_ms: Positive
    peak_gib: Positive


class PartDifference(Part):
    """One part of a step or of memory in both."""

    part: Text
    first: Difference
    second: Difference
    difference: Signed
    """the second's less the first's"""


class Comparison(_Head, schema="megatron-mone/plan-comparison/1", again=_AGAIN, indent=1):
    """Where the difference of two layouts goes."""

    first: ComparedLayout
    second: ComparedLayout
    step_ms: list[PartDifference]
    """parts of the step, of the stage that ends last; add up to it"""
    compute_ms: list[PartDifference]
    """compute of that stage by profiler phase"""
    memory_gib: list[PartDifference]
    """of the fullest stage; add up to the peak"""

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        for place, whole in (("first", self.first), ("second", self.second)):
            for what, total in (("step_ms", whole.step_ms), ("memory_gib", whole.peak_gib)):
                parts = {one.part: getattr(one, place) for one in getattr(self, what)}
                _check_sum(f"the {place} of {what}", parts, place, total)
        return self


def _check_sum(what: str, parts: Mapping[str, float], total: str, whole: float) -> None:
    """Refuse parts that a stacked bar would show longer or shorter than its total."""
    together = sum(max(value, 0.0) for value in parts.values())
    if abs(together - whole) > _SLACK * whole:
        raise Fault(f"{what} add up to {together:.6g}, {total} is {whole:.6g}")
