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

from megatron_mone.model.run_config import to_flags
from megatron_mone.planning.cost.documents import with_documents
from megatron_mone.planning.cost.efficiency import Efficiency
from megatron_mone.planning.cost.hardware import Cluster
from megatron_mone.planning.cost.prediction import Prediction, predict
from megatron_mone.planning.cost.routing_skew import Skew, expert_rows, hottest
from megatron_mone.planning.job import JobSpec
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
        description = self.tracer.describe(flags, gpus)
        facts = with_documents(description.facts, self.document_tokens)
        rows = rows_of(self.skew, facts)
        traced = replace(self.tracer.trace(flags, gpus, rows, progress), facts=facts)
        prediction = predict(traced.traces, facts, self.cluster, self.efficiency)
        return Planned(job, traced, description.keys, prediction, hottest(rows, max(1, facts.ep)))


def rows_of(skew: Skew, facts: JobFacts) -> list[int] | None:
    """Rows of each expert from one router call of a job; None: balanced, or no experts."""
    if not facts.num_experts:
        return None
    tokens = facts.micro_batch_size * facts.seq_length // (facts.tp * facts.cp)
    return expert_rows(skew, tokens, facts.topk, facts.num_experts, facts.ep)
