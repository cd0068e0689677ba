"""What one rank measured, as a file: the classes that write it whole and read it checked.

docs/PROFILER.md has the fields. Touches the folder it is given; imports no torch, so that ranks can
be merged where none is installed.
"""

from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import ConfigDict, model_validator

from megatron_mone.common.checked_json import Fault
from megatron_mone.common.documents import (
    AnyText,
    AtLeast1,
    Column,
    Document,
    Key,
    Number,
    Part,
    Place,
    Text,
    Whole,
    check_lengths,
    check_names,
    one_of,
    texts_of,
    whole,
)
from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.common.phases import PASSES, PHASES

FOLDER = "ranks"
MOST_RANKS = 1_000_000
MOST_EXPERTS = 1_000_000

Phase = Annotated[str, one_of(tuple(PHASES))]
PassName = Annotated[str, one_of(PASSES)]
_Ranks = Annotated[int, whole(MOST_RANKS)]


class Coordinates(Part):
    """Of a rank in each group."""

    tp: _Ranks
    cp: _Ranks
    dp: _Ranks
    pp: _Ranks
    ep: _Ranks
    etp: _Ranks
    edp: _Ranks


class Layout(Part):
    """Sizes of the groups."""

    tp: _Ranks
    cp: _Ranks
    dp: _Ranks
    pp: _Ranks
    vpp: _Ranks
    ep: _Ranks
    etp: _Ranks
    edp: _Ranks


COORDINATES, LAYOUT = tuple(Coordinates.model_fields), tuple(Layout.model_fields)


class Config(Part):
    """Of the job."""

    layout: Layout
    routing: Text
    """`real`, `balanced` or `replayed`"""
    micro_batches: Whole
    tokens_per_step: AtLeast1
    argv: list[AnyText]
    machine: dict[Key, Any]
    """what was installed, by name"""


class Traffic(Part):
    """Collectives of one kind in one group; one value a step."""

    calls: Column
    bytes: Column
    """sent by this rank"""
    ms: Column
    """overlap the phases"""


class CallHead(Part):
    """Collectives that a step makes alike."""

    operation: Text
    group: Text
    bytes: Whole
    """that a rank puts into one"""
    phase: Phase
    """in which they are called"""


class Calls(CallHead):
    """One value a step."""

    calls: Column
    ms: Column
    """from launch to return, and in waiting for them"""


class LayerRows(Part):
    """A MoE layer of this rank."""

    layer: Whole
    first_expert: Annotated[int, whole(MOST_EXPERTS)]
    rows: Column
    """of each local expert, summed over the steps"""

    @model_validator(mode="after")
    def _has_experts(self) -> Self:
        if not 1 <= len(self.rows) <= MOST_EXPERTS:
            raise Fault(f"must have the rows of 1 to {MOST_EXPERTS} experts", "rows")
        return self


class Rows(Part):
    """What was routed."""

    layers: list[LayerRows]


class LayerNeurons(Part):
    """The neurons of a MoNE layer on this rank."""

    layer: Whole
    rows: Whole
    kept: Whole
    width: Whole
    dead: Whole
    max_over_mean: Number
    histogram: Column
    """neurons by relative load, in the bins of common/load_edges.LOAD_EDGES"""

    @model_validator(mode="after")
    def _has_all_bins(self) -> Self:
        check_lengths(len(LOAD_EDGES) + 1, [(("histogram",), self.histogram)])
        return self


class Neurons(Part):
    """What was kept."""

    layers: list[LayerNeurons]


class Operations(Part):
    """Of a step, forward and backward."""

    executed: Number
    active: Number
    """of kept neurons, nothing twice"""


class Flops(Part):
    """Operations of this rank in a step."""

    modules: dict[Phase, Operations]
    bytes: dict[Key, Number]
    """the least that the expert GEMMs must move"""
    peak_flops: Number | None
    """null where unknown"""
    peak_bytes_per_s: Number | None


class MemoryTimeline(Part):
    """At most 400 points, the peak among them; beside `ms` and `phase` the bytes of each kind."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Key, Column]

    ms: Column
    phase: Annotated[list[str], texts_of(tuple(PHASES))]

    @property
    def kinds(self) -> dict[str, Any]:
        """Bytes of each kind, [points]."""
        return self.__pydantic_extra__

    @model_validator(mode="after")
    def _alike(self) -> Self:
        columns = {"phase": self.phase, **self.kinds}
        check_lengths(len(self.ms), [((name,), column) for name, column in columns.items()])
        return self


class Measured(Part):
    """What the system says."""

    allocator_peak_bytes: Whole | None
    process_peak_bytes: Whole | None


class Memory(Part):
    """Of the untimed steps with the ledger."""

    peak_bytes: Whole
    peak_phase: Phase
    peak_pass: PassName
    peak_ms: Number
    by_kind: dict[Key, Whole]
    """bytes at the peak; add up to it"""
    by_phase: dict[Phase, dict[Key, Whole]]
    """the most of each kind in the phase"""
    timeline: MemoryTimeline
    measured: Measured


class RankRun(Part):
    """One run on this rank; its columns have one value a step."""

    name: Text
    backend: Text
    model: dict[Key, Any]
    """fields of the model that are set"""
    steps: Column
    """iteration numbers, warm-up left out"""
    windows: Column
    """the interleaved window that a step belongs to"""
    step_ms: Column
    phases: dict[Phase, dict[PassName, Column]]
    """ms; phases and passes that never ran are left out"""
    communication: dict[Key, Traffic]
    """by `op group`"""
    collectives: list[Calls]
    """the same by size and phase"""
    rows: Column
    """routed rows that this rank's experts took"""
    routing: Rows
    neurons: Neurons | None
    """null for a stock model"""
    memory: Memory | None
    """null where no memory pass was made"""
    flops: Flops

    @model_validator(mode="after")
    def _alike(self) -> Self:
        steps = self.steps
        if len(steps) and (steps.dtype.kind != "i" or (steps[1:] <= steps[:-1]).any()):
            raise Fault("must be iteration numbers, each above the one before", "steps")
        columns: list[tuple[Place, Any]] = [
            ((name,), getattr(self, name)) for name in ("windows", "rows", "step_ms")
        ]
        for phase, passes in self.phases.items():
            columns += [(("phases", phase, name), times) for name, times in passes.items()]
        for key, traffic in self.communication.items():
            for name in ("calls", "bytes", "ms"):
                columns.append((("communication", key, name), getattr(traffic, name)))
        for index, one in enumerate(self.collectives):
            for name in ("calls", "ms"):
                columns.append((("collectives", index, name), getattr(one, name)))
        check_lengths(len(steps), columns)
        if not (self.step_ms > 0).all():
            raise Fault("has a step of 0 ms", "step_ms")
        return self


class RankRecord(
    Document,
    schema="megatron-mone/rank-profile/1",
    again="profile again with this version, or delete the file to merge the other ranks",
):
    """What one rank measured."""

    job: Text
    """the same for all ranks of one job; random"""
    rank: Whole
    world_size: _Ranks
    host: Text
    device: Text
    coordinates: Coordinates
    config: Config
    complete: bool
    """false: stopped before the window's end"""
    runs: list[RankRun]

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rank >= self.world_size:
            raise Fault(f"{self.rank} is outside world_size {self.world_size}", "rank")
        check_names([run.name for run in self.runs], "run")
        if self.complete and not self.runs:
            raise Fault("is empty in a complete record", "runs")
        for index, run in enumerate(self.runs):
            if self.complete and not len(run.steps):
                raise Fault("is empty in a complete record", "runs", index, "steps")
        return self


def record_name(rank: int) -> str:
    """`rank-00003.json`."""
    return f"rank-{rank:05d}.json"


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """Check a record and write it as `folder/ranks/rank-NNNNN.json`, whole or not at all.

    Args:
        folder: of the job.
        record: the fields of a RankRecord.

    Raises:
        ValueError: one line that names the field that the schema does not allow.
    """
    path = folder / FOLDER / record_name(record["rank"])
    checked = RankRecord.of(record, path)
    path.parent.mkdir(parents=True, exist_ok=True)
    checked.write(path)
    return path


def clear_records(folder: Path) -> None:
    """Remove the rank files of an earlier job, which would not merge with those of a new one."""
    for path in (folder / FOLDER).glob("rank-*.json"):
        path.unlink(missing_ok=True)


def read_record(path: Path) -> RankRecord:
    """The record in a file.

    Raises:
        checked_json.UnreadableFile: the file holds no JSON.
        ValueError: its content is not that of a rank record; one line either way.
    """
    record = RankRecord.read(path, "delete it, or merge with --skip-unreadable")
    if path.name != record_name(record.rank):
        raise ValueError(
            f"{path}: holds rank {record.rank}, whose file is {record_name(record.rank)}; "
            "rename it, or delete it if it is a copy"
        )
    return record
