"""What a profile says, in sentences computed from its numbers, whoever is faster. No files."""

from megatron_mone.common.phases import COMMUNICATION, PHASES
from megatron_mone.profiling.compare import STEP
from megatron_mone.profiling.profile_document import Profile, ProfiledRun
from megatron_mone.reporting.profile.view import (
    baselines,
    changes,
    device_class,
    engineering,
    mebibytes,
    milliseconds,
    name_of,
    peak_bytes,
    rank_ranges,
    short,
    signed_ms,
    skew_note,
    speed_verdict,
    subject,
    tokens_per_second,
)

_NAMED_PHASES = 4
"""So many phases are named where two runs differ most."""


def title(profile: Profile) -> str:
    """Model and layout, on one line."""
    run, ranks = subject(profile), profile.ranks.world_size
    layout = profile.config.layout
    split = " ".join(f"{short(k).upper()}{v}" for k, v in layout.plain().items() if v > 1)
    model = run.model
    shape = [
        f"{short(str(model[field]))} {unit}"
        for field, unit in (("num_layers", "layers"), ("hidden_size", "hidden"),
                            ("num_experts", "experts"))
        if field in model
    ]  # fmt: skip
    of = f", {', '.join(shape)}" if shape else ""
    return (
        f"Profile of {name_of(run)}{of}: {ranks:,} {device_class(profile)}"
        f"{', ' if split else ''}{split}"
    )


def headline(profile: Profile) -> str:
    """What the first run costs or saves in time against each baseline, with its skew."""
    run = subject(profile)
    where = f"On {profile.ranks.world_size:,} {device_class(profile)}"
    step = (
        f"{where} a training step of {name_of(run)} takes {milliseconds(run.step_ms)} ms "
        f"({tokens_per_second(profile, run):,.0f} tokens/s)"
    )
    against = [_against(profile, other) for other in baselines(profile)]
    if not against:
        comparison = "; no baseline ran beside it, so nothing is said about what it costs or saves"
    else:
        comparison = f": {_and(against)}"
    return f"{step}{comparison}. {skew_note(profile)}"


def findings(profile: Profile) -> list[str]:
    """The sentences under the headline: where time went, memory, arithmetic."""
    run = subject(profile)
    found = [_largest_phases(run)]
    for other in baselines(profile):
        found.append(_difference(profile, other))
    found += _memory(run, baselines(profile))
    found.append(_arithmetic(profile))
    return found


def warnings(profile: Profile) -> list[str]:
    """What a reader must know before the numbers: ranks that are missing or stopped early."""
    ranks, said = profile.ranks, []
    world = ranks.world_size
    if ranks.missing:
        said.append(
            f"{len(ranks.missing):,} of {world:,} ranks wrote no file "
            f"(rank {rank_ranges(ranks.missing)}): every mean and sum here is over the "
            f"{ranks.present:,} that did."
        )
    if ranks.incomplete:
        said.append(
            f"{len(ranks.incomplete):,} of {world:,} ranks stopped before the end "
            f"(rank {rank_ranges(ranks.incomplete)}): they count with the steps they measured."
        )
    stragglers = {(s.rank, s.host) for run in profile.runs for s in run.stragglers}
    if stragglers:
        ranks_text = rank_ranges([rank for rank, _ in stragglers])
        said.append(
            f"{len(stragglers):,} of {world:,} ranks computed at least 10% longer than their "
            f"pipeline stage's median in some run (rank {ranks_text}): see Stragglers."
        )
    return said


def _against(profile: Profile, other: ProfiledRun) -> str:
    verdict = speed_verdict(profile, other)
    ratio = subject(profile).step_ms / other.step_ms
    than = "from" if verdict.startswith("not") else "than"
    return (
        f"{verdict} {than} {name_of(other)} ({milliseconds(other.step_ms)} ms, ratio {ratio:.2f})"
    )


def _largest_phases(run: ProfiledRun) -> str:
    step = run.step_ms
    largest = sorted(run.phases.items(), key=lambda item: -item[1])[:_NAMED_PHASES]
    named = [f"{phase} {ms / step:.0%}" for phase, ms in largest]
    waiting = sum(run.phases.get(phase, 0.0) for phase in COMMUNICATION) / step
    return (
        f"{name_of(run)} spends its step in {_and(named)}; communication phases, in which a rank "
        f"mostly waits for others, make {waiting:.0%}."
    )


def _difference(profile: Profile, other: ProfiledRun) -> str:
    """The phases in which two runs differ most, what is left over, and how sure the sum is."""
    rows = changes(profile, other)
    step = rows.pop(STEP)
    change = {what: row.b - row.a for what, row in rows.items() if what in PHASES}
    largest = sorted(change, key=lambda phase: (-abs(change[phase]), phase))[:_NAMED_PHASES]
    named = ", ".join(f"{phase} {signed_ms(change[phase])}" for phase in largest)
    rest = sum(change.values()) - sum(change[phase] for phase in largest)
    sure = "no confidence interval from a single step"
    if step.lower is not None and step.upper is not None:
        sure = f"95% interval {signed_ms(step.lower)} to {signed_ms(step.upper)}"
    return (
        f"Against {name_of(other)}, ms a step: {named}, all other phases {signed_ms(rest)}; "
        f"together {signed_ms(step.b - step.a)} ({sure})."
    )


def _memory(run: ProfiledRun, others: list[ProfiledRun]) -> list[str]:
    ours = peak_bytes(run)
    if ours is None or run.memory is None:
        return []
    against = [
        f"{mebibytes(theirs)} of {name_of(other)} (ratio {ours / theirs:.2f})"
        for other in others
        if (theirs := peak_bytes(other)) is not None
    ]
    than = f" against {_and(against)}" if against else ""
    memory = run.memory
    return [
        f"The highest peak memory of a rank is {mebibytes(ours)}{than}; {name_of(run)}'s is on "
        f"rank {memory.peak_rank} in {memory.peak_phase}, {memory.peak_pass}."
    ]


def _arithmetic(profile: Profile) -> str:
    run = subject(profile)
    flops = run.flops
    text = f"{name_of(run)} executes {engineering(flops.executed, 'FLOP')} a step"
    if run.neurons is not None:
        text += f"; with its kept neurons alone it would be {engineering(flops.active, 'FLOP')}"
        text += " (active)"
    known = [r for r in profile.runs if r.flops.utilisation_executed is not None]
    if not known:
        return f"{text}; no peak is known for these ranks, so no utilisation is given."
    used = [
        f"{name_of(r)} {r.flops.utilisation_executed:.1%} executed and "
        f"{r.flops.utilisation_active:.1%} active"
        for r in known
    ]
    return f"{text}; utilisation of the ranks' peak: {', '.join(used)}."


def _and(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
