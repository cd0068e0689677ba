"""The tables of a profile's page: header and rows of text. Touches no files."""

from collections.abc import Sequence

from megatron_mone.common.phases import COMMUNICATION, PHASES
from megatron_mone.profiling.compare import STEP, Row
from megatron_mone.profiling.profile_document import Profile, ProfiledRun, RunMemory, Straggler
from megatron_mone.reporting.profile.view import (
    all_phases,
    baselines,
    changes,
    engineering,
    large_phases,
    mebibytes,
    milliseconds,
    name_of,
    peak_bytes,
    rank_ranges,
    short,
    signed_ms,
    subject,
    tokens_per_second,
)

Table = tuple[list[str], list[list[str]]]
"""Header, rows."""
MOST_ROWS = 24
_MOST_GROUPS = 10
"""Of a table whose length grows with the ranks."""
NOTHING = "-"


def runs_table(profile: Profile) -> Table:
    """One row a run: time, speed, memory, arithmetic, with the skew beside them."""
    reference = baselines(profile)[0] if baselines(profile) else None
    ratio = [f"ratio to {name_of(reference)}"] if reference else []
    header = ["run", "ms / step", *ratio, "tokens/s", "peak memory", "FLOP executed",
              "FLOP active", "util. executed", "util. active", "rows max / mean",
              "neurons kept"]  # fmt: skip
    rows = []
    for run in profile.runs:
        flops, neurons = run.flops, run.neurons
        times = [f"{run.step_ms / reference.step_ms:.2f}"] if reference else []
        rows.append([
            name_of(run), milliseconds(run.step_ms), *times,
            f"{tokens_per_second(profile, run):,.0f}", _or(peak_bytes(run), mebibytes),
            engineering(flops.executed), engineering(flops.active),
            _or(flops.utilisation_executed, _percent),
            _or(flops.utilisation_active, _percent),
            _two(run.routing.rows_max_over_mean) if run.routing.layers else NOTHING,
            NOTHING if neurons is None else _percent(neurons.kept_ratio),
        ])  # fmt: skip
    return header, rows


def phase_table(profile: Profile) -> Table:
    """ms and share of the step by phase; the last columns what the first run takes more.

    A difference that may be chance (its 95% interval holds 0, or is unknown) is in parentheses.
    """
    runs, ours = profile.runs, subject(profile)
    others = baselines(profile)
    changed = [changes(profile, other) for other in others]
    header = ["phase", *(f"{name_of(run)} ms (share)" for run in runs),
              *(f"{name_of(ours)} less {name_of(other)}, ms" for other in others)]  # fmt: skip
    rows = []
    for phase in all_phases(runs):
        values = [run.phases.get(phase) for run in runs]
        cells = [
            NOTHING if ms is None else f"{milliseconds(ms)} ({ms / run.step_ms:.1%})"
            for ms, run in zip(values, runs, strict=True)
        ]
        differences = [_change(rows.get(phase)) for rows in changed]
        waits = " *" if phase in COMMUNICATION else ""
        rows.append([phase + waits, *cells, *differences])
    total = ["step", *(milliseconds(run.step_ms) for run in runs),
             *(_change(rows[STEP]) for rows in changed)]  # fmt: skip
    return header, [*rows, total]


def rank_table(run: ProfiledRun) -> Table:
    """How a run's phases spread over ranks, and which node is the slowest."""
    header = ["phase", "least ms (rank)", "median ms", "most ms (rank)", "most / median",
              "slowest node"]  # fmt: skip
    rows = []
    for phase in ["step_ms", *large_phases([run])]:
        over = run.over_ranks.get(phase)
        if over is None:
            continue
        node = run.over_nodes.get(phase)
        slowest = f"{short(node.max_host)} ({milliseconds(node.max)})" if node else NOTHING
        rows.append([
            "step" if phase == "step_ms" else phase,
            f"{milliseconds(over.min)} ({over.min_rank})",
            milliseconds(over.median),
            f"{milliseconds(over.max)} ({over.max_rank})",
            _two(over.max / over.median) if over.median else NOTHING,
            slowest,
        ])  # fmt: skip
    return header, rows


def flops_table(profile: Profile) -> Table:
    """Executed and active operations by module."""
    runs = profile.runs
    header = ["module", *(f"{name_of(run)} {kind}" for run in runs
                          for kind in ("executed", "active"))]  # fmt: skip
    used = {module for run in runs for module in run.flops.modules}
    modules = [phase for phase in PHASES if phase in used] + sorted(used - {*PHASES})
    rows = []
    for module in modules:
        rows.append([short(module)])
        for run in runs:
            of = run.flops.modules.get(module)
            rows[-1] += [NOTHING] * 2 if of is None else [
                engineering(of.executed), engineering(of.active)
            ]  # fmt: skip
    totals = [engineering(n) for run in runs for n in (run.flops.executed, run.flops.active)]
    return header, [*rows, ["all", *totals]]


def communication_table(profile: Profile) -> Table:
    """Calls, bytes and time of every collective and group, a step, mean over ranks."""
    header = ["operation and group", "run", "calls", "sent by a rank", "ms", "achieved"]
    names = sorted({name for run in profile.runs for name in run.communication})
    rows = []
    for name in names[:MOST_ROWS]:
        for run in profile.runs:
            done = run.communication.get(name)
            if done is not None:
                speed = 1e3 * done.bytes / done.ms if done.ms else None
                rows.append([
                    short(name), name_of(run), f"{done.calls:,.1f}".removesuffix(".0"),
                    mebibytes(done.bytes), milliseconds(done.ms),
                    _or(speed, lambda v: engineering(v, "B/s")),
                ])  # fmt: skip
    return header, rows


def memory_table(profile: Profile) -> Table:
    """Where each run's peak is, and what allocator and system measured beside the ledger."""
    header = ["run", "peak of the ledger", "rank", "peak in", "allocator's peak", "process's peak"]
    rows = []
    for run in profile.runs:
        memory = run.memory
        if memory is not None:
            measured = memory.measured
            rows.append([
                name_of(run), mebibytes(memory.peak_bytes), str(memory.peak_rank),
                f"{memory.peak_phase}, {memory.peak_pass}",
                _or(measured.allocator_peak_bytes, mebibytes),
                _or(measured.process_peak_bytes, mebibytes),
            ])  # fmt: skip
    return header, rows


def memory_by_phase_table(memory: RunMemory) -> Table:
    """The most MiB of each kind during each phase."""
    by_phase = memory.by_phase
    kinds = list(memory.by_kind)
    header = ["phase", *(short(kind) for kind in kinds)]
    rows = [
        [phase, *(f"{by_phase[phase].get(kind, 0) / 2**20:,.1f}" for kind in kinds)]
        for phase in PHASES
        if phase in by_phase
    ]
    return header, rows


def stragglers_table(profile: Profile) -> tuple[Table, int]:
    """The ranks that compute longest over their stage's median first; and how many are left out."""
    header = ["rank", "host", "run", "stage", "compute ms", "stage's median", "over it",
              "mostly in", "rows / mean"]  # fmt: skip
    found = [(entry, run) for run in profile.runs for entry in run.stragglers]
    found.sort(key=lambda pair: (-_excess(pair[0]), pair[0].rank))
    rows = [
        [
            str(entry.rank), short(entry.host), name_of(run), str(entry.stage),
            milliseconds(entry.compute_ms), milliseconds(entry.median_ms),
            f"+{_excess(entry) - 1.0:.0%}", entry.phase, _two(entry.rows_over_mean),
        ]
        for entry, run in found[:MOST_ROWS]
    ]  # fmt: skip
    return (header, rows), len(found) - len(rows)


def groups_table(profile: Profile) -> tuple[Table, int]:
    """Expert groups, the most uneven first; and how many are left out."""
    header = ["ranks", "run", "rows max / mean", "expert ms max / mean"]
    found = [(group, run) for run in profile.runs for group in run.expert_groups]
    found.sort(key=lambda pair: -pair[0].expert_ms_max_over_mean)
    rows = [
        [rank_ranges(group.ranks, most=6), name_of(run),
         _two(group.rows_max_over_mean), _two(group.expert_ms_max_over_mean)]
        for group, run in found[:_MOST_GROUPS]
    ]  # fmt: skip
    return (header, rows), len(found) - len(rows)


def neurons_table(runs: Sequence[ProfiledRun]) -> Table:
    """Kept share and load of the neurons of the runs that choose them."""
    header = ["run", "kept", "load p1", "load p50", "load p99", "max / mean", "never kept"]
    rows = [
        [name_of(run), _percent(of.kept_ratio), _two(of.load_p1), _two(of.load_p50),
         _two(of.load_p99), _two(of.max_over_mean), f"{of.dead:,}"]
        for run in runs
        if (of := run.neurons) is not None
    ]  # fmt: skip
    return header, rows


def model_table(profile: Profile) -> Table:
    """The model's fields, a column a run."""
    fields = sorted({field for run in profile.runs for field in run.model})
    rows = [
        [short(field), *(_any(run.model.get(field)) for run in profile.runs)]
        for field in fields
    ]  # fmt: skip
    backends = ["kernel backend", *(short(run.backend) for run in profile.runs)]
    return ["field", *(name_of(run) for run in profile.runs)], [backends, *rows]


def _change(row: Row | None) -> str:
    if row is None:
        return NOTHING
    change = signed_ms(row.b - row.a)
    return change if row.significant else f"({change})"


def _excess(entry: Straggler) -> float:
    return entry.compute_ms / entry.median_ms if entry.median_ms else 1.0


def _any(value: object) -> str:
    """Whatever is there, as a short text."""
    return NOTHING if value is None else short(str(value))


def _or(value, shown) -> str:
    return NOTHING if value is None else shown(value)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _percent(value: float) -> str:
    return f"{value:.1%}"
