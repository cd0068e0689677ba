"""The page of a profile: report.html and its plots, from the content of profile.json.

Writes report.html and plots/NAME.png, plots/NAME.svg under one folder, each whole or not at all.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_mone.common.phases import COMMUNICATION
from megatron_mone.profiling.profile_document import Profile
from megatron_mone.reporting.page.html import Page
from megatron_mone.reporting.page.plots import save
from megatron_mone.reporting.profile import plots as profile_plots
from megatron_mone.reporting.profile import resource_plots as profile_resource_plots
from megatron_mone.reporting.profile import tables as profile_tables
from megatron_mone.reporting.profile.check import check_one_model
from megatron_mone.reporting.profile.statement import findings, headline, title, warnings
from megatron_mone.reporting.profile.tables import Table
from megatron_mone.reporting.profile.view import (
    SMALL_PHASE,
    baselines,
    name_of,
    rank_ranges,
    short,
    skew_note,
    subject,
)

PAGE = "report.html"
PLOTS = "plots"
_MOST_TEXT = 4000
_MOST_HOSTS = 16


def write_report(profile: Profile, folder: Path, others: Sequence[Profile] = ()) -> Path:
    """Write report.html and the plots.

    Args:
        profile: content of a profile.json.
        folder: where report.html and plots/ go; made if it is not there.
        others: profiles of the same model at other world sizes, for the scaling curve.

    Returns:
        The page's path.

    Raises:
        ValueError: `others` are of another model; one line.
    """
    every = [profile, *others]
    check_one_model(every, [f"profile {i} of {len(every)}" for i in range(1, len(every) + 1)])
    return _Report(profile, list(others), folder).page().write(folder / PAGE)


class _Report:
    """Fills the page from top to bottom."""

    def __init__(self, profile: Profile, others: list[Profile], folder: Path) -> None:
        self._profile, self._others, self._plots = profile, others, folder / PLOTS
        self._page = Page(title(profile))
        self._skew = skew_note(profile)

    def page(self) -> Page:
        """The whole page."""
        for text in warnings(self._profile):
            self._page.warning(text)
        self._page.paragraph(headline(self._profile))
        self._time()
        self._ranks()
        self._scaling()
        self._memory()
        self._arithmetic()
        self._communication()
        self._load()
        self._made_with()
        return self._page

    def _time(self) -> None:
        page, profile = self._page, self._profile
        self._figure("phases", profile_plots.phase_bars(profile),
                     "Where a step's time goes. Hatched: phases in which a rank mostly waits for "
                     f"others. {self._skew}")  # fmt: skip
        self._table(profile_tables.runs_table(profile))
        page.bullets(findings(profile))
        page.heading("Phases")
        chance = ""
        if baselines(profile):
            chance = "A difference in parentheses may be chance: its 95% interval holds 0. "
        self._table(profile_tables.phase_table(profile))
        page.paragraph(
            "Mean over ranks, and over the middle half of the steps by the slowest rank's time; "
            "the phases add up to the step. * marks phases of waiting for others "
            f"({', '.join(COMMUNICATION)}). {chance}{self._skew}"
        )
        self._figure("passes", profile_plots.passes(profile),
                     "The same by pass; a recompute is a forward inside the backward. Phases under "
                     f"{SMALL_PHASE:.1%} of the step are left out. {self._skew}")  # fmt: skip

    def _ranks(self) -> None:
        profile, run = self._profile, subject(self._profile)
        if profile.ranks.world_size < 2:
            return
        self._page.heading("Ranks")
        columns = profile_plots.ranks_in_a_column(profile.ranks.world_size)
        pooled = (
            f" Each column stands for {columns} ranks and shows the one furthest from the median."
            if columns > 1
            else ""
        )
        for i, each in enumerate(profile.runs):
            self._figure(f"ranks-{i}", profile_plots.rank_heat_map(profile, each),
                         f"{name_of(each)}: time of each phase on each rank over the median of its "
                         "pipeline stage; grey: no file, or the phase does not run there; lines "
                         f"or marks below: node boundaries.{pooled} {self._skew}")  # fmt: skip
        self._stragglers()
        self._page.paragraph(f"How {name_of(run)}'s phases spread over ranks. {self._skew}")
        self._table(profile_tables.rank_table(run))
        groups, left = profile_tables.groups_table(profile)
        if groups[1]:
            self._page.heading("Expert groups")
            self._page.paragraph(
                "Ranks that share one set of experts, the most uneven first: the busiest rank "
                f"over the mean of its group.{_left_out(left)} {self._skew}"
            )
            self._table(groups)

    def _stragglers(self) -> None:
        table, left = profile_tables.stragglers_table(self._profile)
        self._page.heading("Stragglers")
        if not table[1]:
            self._page.paragraph(
                "None: no rank computes 10% longer than the median of its pipeline stage."
            )
            return
        self._page.paragraph(
            "Ranks whose step without waiting is at least 10% longer than the median of their "
            f"pipeline stage; the furthest first.{_left_out(left)} {self._skew}"
        )
        self._table(table)

    def _scaling(self) -> None:
        figure = profile_plots.scaling(self._profile, self._others)
        if figure is None:
            return
        self._page.heading("Scaling")
        every = [self._profile, *self._others]
        tokens = {one.config.tokens_per_step for one in every}
        per_rank = {one.config.tokens_per_step / one.ranks.world_size for one in every}
        kind = "Batch and ranks both change."
        if len(tokens) == 1:
            kind = "Strong scaling: the same tokens a step at every size."
        elif len(per_rank) == 1:
            kind = "Weak scaling: the same tokens a rank at every size."
        differs = [
            what
            for what, values in (
                ("processor or GPU", [_device(one) for one in every]),
                ("routing", [one.config.routing for one in every]),
            )
            if len({*values}) > 1
        ]
        whole = "100% is each run at its fewest ranks."
        unlike = f" Beware, not the same at every size: {', '.join(differs)}." if differs else ""
        notes = " ".join(
            f"{one.ranks.world_size:,} ranks: {skew_note(one)}"
            for one in sorted(every, key=lambda one: one.ranks.world_size)
        )
        self._figure("scaling", figure, f"{kind} {whole}{unlike} {notes}")

    def _memory(self) -> None:
        profile, run = self._profile, subject(self._profile)
        timeline = profile_resource_plots.memory_timeline(profile)
        self._page.heading("Memory")
        if timeline is None:
            self._page.paragraph("No memory pass was made.")
            return
        self._figure("memory_timeline", timeline,
                     "Bytes by kind over one step, on the rank with the highest peak of each "
                     "run.")  # fmt: skip
        self._figure("memory_at_peak", profile_resource_plots.memory_at_peak(profile),
                     "What the peaks are made of.")  # fmt: skip
        self._table(profile_tables.memory_table(profile))
        self._page.paragraph(
            "The ledger follows every allocation of torch; the allocator's peak is torch's own "
            "count, where it keeps one. The process's peak is what the ledger held before the step "
            "and what the process then grew by in a step without the ledger."
        )
        if run.memory is not None:
            self._page.paragraph(f"{name_of(run)}: the most MiB of each kind during each phase.")
            self._table(profile_tables.memory_by_phase_table(run.memory))

    def _arithmetic(self) -> None:
        profile = self._profile
        self._page.heading("Arithmetic")
        self._page.paragraph(
            "Floating-point operations of a step over all ranks, forward and backward: executed is "
            "what the backend runs, active what the kept neurons need."
        )
        self._table(profile_tables.flops_table(profile))
        peak, _ = profile_resource_plots.roof(profile)
        under = "the line is the ranks' summed peak" if peak else "no peak is known"
        self._figure("roofline", profile_resource_plots.roofline(profile),
                     "The expert GEMMs: operations over the least bytes they must move, and "
                     f"operations a second of their phase over all ranks; {under}. "
                     f"{self._skew}")  # fmt: skip

    def _communication(self) -> None:
        table = profile_tables.communication_table(self._profile)
        if not table[1]:
            return
        self._page.heading("Communication")
        self._page.paragraph(
            "A step, mean over ranks. These times include waiting for the slowest rank and lie "
            f"inside the phases: do not add the two. {self._skew}"
        )
        self._table(table)

    def _load(self) -> None:
        profile = self._profile
        figure = profile_resource_plots.skew(profile)
        neurons = profile_tables.neurons_table(profile.runs)
        if figure is None and not neurons[1]:
            return
        self._page.heading("Load of experts and neurons")
        self._figure("skew", figure,
                     "Routed rows of the experts over the mean, and how often each neuron was kept "
                     "in multiples of a balanced load, over all layers.")  # fmt: skip
        if neurons[1]:
            self._table(neurons)

    def _made_with(self) -> None:
        page, profile = self._page, self._profile
        config, ranks = profile.config, profile.ranks
        page.heading("Configuration")
        layout = ", ".join(f"{short(key)} {value}" for key, value in config.layout.plain().items())
        page.bullets([
            f"Layout: {layout}; {ranks.world_size:,} ranks on {len(ranks.hosts):,} "
            "nodes",
            f"Routing: {short(config.routing)}; {config.micro_batches} micro-batches, "
            f"{config.tokens_per_step:,} tokens a step",
            *(f"{short(str(key))}: {_cut(str(value), 300)}"
              for key, value in config.machine.items()),
        ])  # fmt: skip
        page.code(_cut(shlex.join(config.argv), _MOST_TEXT))
        self._table(profile_tables.model_table(profile))
        hosts = list(ranks.hosts.items())
        more = f"; {len(hosts) - _MOST_HOSTS:,} nodes more" if len(hosts) > _MOST_HOSTS else ""
        listed = "; ".join(f"{short(h)}: {rank_ranges(r)}" for h, r in hosts[:_MOST_HOSTS])
        page.paragraph(f"Ranks by node: {listed}{more}.")

    def _figure(self, stem: str, figure: Figure | None, caption: str) -> None:
        if figure is not None:
            self._page.figure(save(figure, self._plots / stem), caption)

    def _table(self, table: Table) -> None:
        self._page.table(*table)


def _device(profile: Profile) -> str:
    machine = profile.config.machine
    return str(machine.get("GPU", machine.get("Processor")))


def _left_out(count: int) -> str:
    return f" {count:,} more are left out." if count else ""


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
