"""Planner: a job as a user states it -> its traces -> its prediction.

    with Tracer() as tracer:
        planned = Planner(tracer, load_cluster("h100-ndr")).plan(job_spec("moe-30b-a3b-mone",
            "tp=1,pp=4,ep=8"), gpus=128)

May touch: the tracer's processes and cache.
"""

import logging
import warnings
from argparse import ArgumentParser
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from megatron_mone.common.spelling import nearest_name
from megatron_mone.model.run_config import to_flags
from megatron_mone.planning.cost.documents import with_documents
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.prediction import Prediction, predict
from megatron_mone.planning.cost.routing_skew import Skew, expert_rows, hottest
from megatron_mone.planning.job import OFFLOAD, RECOMPUTE, SHORT, STAGES, STATE, JobSpec
from megatron_mone.planning.tracing.job_facts import JobFacts
from megatron_mone.planning.tracing.trace_server import TracedJob, Tracer

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """One job, planned.

    Attributes:
        job: as it was stated.
        traced: its traces.
        stage_kinds: (stage, chunk) -> what it holds, in short.
        prediction: of its step.
        hottest: rows of the fullest rank of an expert-parallel group over the mean.
    """

    job: JobSpec
    traced: TracedJob
    stage_kinds: dict[tuple[int, int], str]
    prediction: Prediction
    hottest: float


class Planner:
    """Plans jobs on one cluster.

    Args:
        tracer: entered.
        cluster: where jobs run.
        efficiency: how near to its peaks; assumptions if None.
        skew: how tokens spread over experts; balanced if None.
        document_tokens: of each packed document; assumed (job_facts.py) if None.
    """

    def __init__(
        self,
        tracer: Tracer,
        cluster: Cluster,
        efficiency: Efficiency | None = None,
        skew: Skew | None = None,
        document_tokens: int | None = None,
    ) -> None:
        self.tracer = tracer
        self.cluster = cluster
        self.efficiency = efficiency or Efficiency()
        self.skew = skew or Skew()
        self.document_tokens = document_tokens

    @cached_property
    def _parser(self) -> ArgumentParser:
        with warnings.catch_warnings():
            # On import Megatron and torch say which GPU packages are missing: no news here.
            warnings.simplefilter("ignore")
            logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
            from megatron_mone.model.arguments import flag_parser

            return flag_parser()

    def flags(self, job: JobSpec) -> list[str]:
        """Command-line flags of a job, as it is planned: without data and checkpoints.

        Raises:
            ValueError: one line; an unknown argument, one that two parts set, or no vocab_size.
        """
        known = [action.dest for action in self._parser._actions]
        for part, values in job.parts().items():
            for name in values:
                if name not in known:
                    short = [*SHORT, RECOMPUTE, STATE, OFFLOAD, STAGES] if part == LAYOUT else []
                    meant = nearest_name(name, short) or nearest_name(name, known)
                    raise ValueError(
                        f"{job.name}: {name} = {values[name]!r} of the {_PARTS[part]} is no "
                        f"argument{meant}"
                    )
        return to_flags(job.planned_values(), self._parser, Path(job.name))

    def plan(self, job: JobSpec, gpus: int, progress: Progress | None = None) -> Planned:
        """Plan one job.

        Args:
            job: model, layout and flags.
            gpus: W.
            progress: told (traces there are, traces needed).

        Raises:
            ValueError: one line; Megatron refuses the layout, or it cannot be planned.
            RuntimeError: one line; a trace failed.
        """
        flags = self.flags(job)
        check_batch(job, gpus)
        description = self.tracer.describe(flags, gpus)
        facts = with_documents(description.facts, self.document_tokens)
        rows = rows_of(self.skew, facts)
        traced = replace(self.tracer.trace(flags, gpus, rows, progress), facts=facts)
        prediction = predict(traced.traces, facts, self.cluster, self.efficiency)
        return Planned(job, traced, description.keys, prediction, hottest(rows, max(1, facts.ep)))


LAYOUT = "parallel"
_PARTS = {"model": "model", LAYOUT: "layout", "cluster": "cluster's flags", "train": "train part"}


def check_batch(job: JobSpec, gpus: int) -> None:
    """The replicas of a layout share the samples of a step in whole micro-batches.

    Args:
        job: in its layout.
        gpus: W.

    Raises:
        ValueError: one line; they do not, or the GPUs are no whole number of replicas.
    """
    values = job.values()
    given = [values.get(SHORT[name]) or 1 for name in ("tp", "cp", "pp", "mbs", "gbs")]
    if not all(isinstance(one, int) and one > 0 for one in given):
        return  # Megatron says what is wrong with them
    tp, cp, pp, size, batch = given
    of_model = tp * cp * pp
    if gpus % of_model:
        raise ValueError(
            f"--gpus {gpus} is no multiple of tp x cp x pp = {tp} x {cp} x {pp} = {of_model}: give "
            f"{max(1, gpus // of_model) * of_model} GPUs, or another layout"
        )
    replicas = gpus // of_model
    if batch % (size * replicas):
        fewer = max(n for n in range(1, replicas + 1) if batch % (size * n) == 0 or n == 1)
        raise ValueError(
            f"--gpus {gpus} at tp x cp x pp = {of_model} are {replicas} replicas of micro-batches "
            f"of {size}, which do not divide global_batch_size = {batch}: give "
            f"gbs={max(1, batch // (size * replicas)) * size * replicas} in --layout, or "
            f"--gpus {fewer * of_model}"
        )


def rows_of(skew: Skew, facts: JobFacts) -> list[int] | None:
    """Rows of each expert from one router call of a job; None: balanced, or no experts."""
    if not facts.num_experts:
        return None
    tokens = facts.micro_batch_size * facts.seq_length // (facts.tp * facts.cp)
    return expert_rows(skew, tokens, facts.topk, facts.num_experts, facts.ep)
