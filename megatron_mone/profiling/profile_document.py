"""profile.json, as the class that writes and reads it; docs/PROFILER.md has the fields.

Touches nothing; imports no torch.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from megatron_mone.common.checked_json import Fault
from megatron_mone.common.documents import (
    Column,
    Document,
    Key,
    Number,
    Part,
    Place,
    Positive,
    SignedColumn,
    Text,
    Whole,
    check_lengths,
    check_names,
    whole,
)
from megatron_mone.common.load_edges import LOAD_EDGES
from megatron_mone.profiling.rank_record import (
    MOST_RANKS,
    CallHead,
    Config,
    Memory,
    Operations,
    PassName,
    Phase,
)

PROFILE = "profile.json"
_Layer = Annotated[int, whole(100_000)]


def path_of(path: Path) -> Path:
    """The profile of a folder, or the file itself."""
    return path / PROFILE if path.is_dir() else path


class Ranks(Part):
    """Which ranks there are."""

    world_size: Annotated[int, whole(MOST_RANKS)]
    present: Whole
    missing: list[Whole]
    """without a file"""
    incomplete: list[Whole]
    """stopped before the others"""
    hosts: dict[Key, list[Whole]]


class Samples(Part):
    """One value a step that all ranks have in common."""

    steps: Column
    windows: Column
    step_ms: Column
    """of the slowest rank"""
    phases: dict[Phase, Column]
    """mean over ranks"""

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if not len(self.steps):
            raise Fault("is empty", "steps")
        columns: list[tuple[Place, Any]] = [
            (("windows",), self.windows),
            (("step_ms",), self.step_ms),
        ]
        columns += [(("phases", name), times) for name, times in self.phases.items()]
        check_lengths(len(self.steps), columns)
        if not self.phases:
            raise Fault("is empty", "phases")
        return self


class _Spread(Part):
    min: Number
    median: Number
    max: Number


class RankSpread(_Spread):
    """Over ranks."""

    min_rank: Whole
    max_rank: Whole


class NodeSpread(_Spread):
    """Over hosts, a host being the mean of its ranks."""

    min_host: Text
    max_host: Text


class ByRank(Part):
    """One value a rank, mean over the middle half of the steps."""

    rank: list[Whole]
    host: list[Text]
    stage: Column
    """of the pipeline"""
    step_ms: Column
    compute_ms: SignedColumn
    """the step without communication phases"""
    rows: Column
    peak_bytes: list[Whole | None]
    phases: dict[Phase, Column]

    @model_validator(mode="after")
    def _alike(self) -> Self:
        if not self.rank:
            raise Fault("is empty", "rank")
        columns: list[tuple[Place, Any]] = [
            ((name,), getattr(self, name))
            for name in type(self).model_fields
            if name not in ("rank", "phases")
        ]
        columns += [(("phases", name), times) for name, times in self.phases.items()]
        check_lengths(len(self.rank), columns)
        return self


class Straggler(Part):
    """A rank that computes at least 10% longer than its pipeline stage's median."""

    rank: Whole
    host: Text
    stage: Number
    compute_ms: Number
    """the step without communication phases"""
    median_ms: Number
    phase: Phase
    """where most of the excess is"""
    rows_over_mean: Number


class ExpertGroup(Part):
    """An expert-parallel group."""

    ranks: list[Whole]
    rows_max_over_mean: Number
    expert_ms_max_over_mean: Number


class MeanTraffic(Part):
    """Of a step, mean over ranks."""

    calls: Number
    bytes: Number
    ms: Number


class MeanCalls(CallHead):
    """Of a step, mean over ranks."""

    calls: Number
    ms: Number


class LayerRouting(Part):
    """A MoE layer."""

    layer: _Layer
    rows: list[Number | None]
    """of each expert; null where no rank that has it wrote a file"""
    max_over_mean: Number


class Routing(Part):
    """What was routed over all replicas."""

    rows_max_over_mean: Number
    """of the worst layer"""
    layers: list[LayerRouting]


class _Load(Part):
    kept_ratio: Number
    load_p1: Number
    """percentile of load over the mean, linear within a bin"""
    load_p50: Number
    load_p99: Number
    max_over_mean: Number
    dead: Whole
    """neurons without a row; the least over replicas"""


class _LayerHead(Part):
    layer: Whole
    rows: Whole
    width: Whole


class LayerLoad(_Load, _LayerHead):
    """A MoNE layer."""

    histogram: Column
    """as in a rank file, all ranks together"""

    @model_validator(mode="after")
    def _has_all_bins(self) -> Self:
        check_lengths(len(LOAD_EDGES) + 1, [(("histogram",), self.histogram)])
        return self


class NeuronLoad(_Load):
    """What was kept, all layers together."""

    layers: list[LayerLoad]


class RunFlops(Part):
    """Operations of a step, summed over ranks."""

    executed: Number
    active: Number
    modules: dict[Phase, Operations]
    bytes: dict[Key, Number]
    """the least that the expert GEMMs must move"""
    peak_flops: Number | None = None
    """null where a rank's is unknown"""
    peak_bytes_per_s: Number | None = None
    executed_per_s: Number
    active_per_s: Number
    utilisation_executed: Number | None
    """null where `peak_flops` is"""
    utilisation_active: Number | None


class RunMemory(Memory):
    """As in a rank file, of the rank with the highest peak."""

    peak_rank: Whole


class ProfiledRun(Part):
    """One run over all ranks."""

    name: Text
    backend: Text
    model: dict[Key, Any]
    """fields of the model that are set"""
    step_ms: Positive
    """mean over ranks and over the middle half of the steps (by the slowest rank's time; of n steps
    (n + 1) // 4 are left out at each end), so that `phases` adds up to it"""
    phases: dict[Phase, Number]
    """ms a step, likewise"""
    passes: dict[Phase, dict[PassName, Number]]
    samples: Samples
    over_ranks: dict[Key, RankSpread]
    """of `step_ms` and of each phase"""
    over_nodes: dict[Key, NodeSpread]
    by_rank: ByRank
    stragglers: list[Straggler]
    expert_groups: list[ExpertGroup]
    communication: dict[Key, MeanTraffic]
    """by `op group`"""
    collectives: list[MeanCalls] = Field(default_factory=list)
    """the same by size and phase; absent in files of before"""
    routing: Routing
    neurons: NeuronLoad | None
    """null for a stock model"""
    flops: RunFlops
    memory: RunMemory | None
    """null where no memory pass was made"""

    def ranks(self) -> Iterator[tuple[Place, Sequence[int]]]:
        """Every list of ranks with its place."""
        yield ("by_rank", "rank"), self.by_rank.rank
        for index, group in enumerate(self.expert_groups):
            yield ("expert_groups", index, "ranks"), group.ranks
        for index, entry in enumerate(self.stragglers):
            yield ("stragglers", index, "rank"), [entry.rank]
        if self.memory is not None:
            yield ("memory", "peak_rank"), [self.memory.peak_rank]


class Profile(
    Document,
    schema="megatron-mone/profile/1",
    again="merge its rank files again with tools/merge_profile.py",
):
    """What all ranks of a job measured."""

    config: Config
    """as in the rank files"""
    ranks: Ranks
    runs: list[ProfiledRun]

    @classmethod
    def read_folder(cls, path: Path) -> Self:
        """The profile in a file, or in a folder's profile.json.

        Raises:
            ValueError: one line that names the file, the field and the fix.
        """
        return cls.read(
            path_of(path), f"give a {PROFILE} that tools/profile.py wrote, or its folder"
        )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        ranks = self.ranks
        if not ranks.present:
            raise Fault("is 0: there is nothing to draw", "ranks", "present")
        check_names([run.name for run in self.runs], "run")
        if not self.runs:
            raise Fault("is empty: there is nothing to draw", "runs")
        lists: list[tuple[Place, Sequence[int]]] = [
            (("ranks", "missing"), ranks.missing),
            (("ranks", "incomplete"), ranks.incomplete),
            *((("ranks", "hosts", host), members) for host, members in ranks.hosts.items()),
        ]
        for index, run in enumerate(self.runs):
            lists += [(("runs", index, *place), members) for place, members in run.ranks()]
        for place, members in lists:
            if max(members, default=0) >= ranks.world_size:
                raise Fault(f"must be ranks below world_size {ranks.world_size}", *place)
        return self
