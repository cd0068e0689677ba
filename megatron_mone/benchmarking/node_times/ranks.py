"""The sections of a calibration on a rank: collectives, steps of small jobs, operators.

All ranks time a row at once, as they would in a step, and its seconds are their mean. Rank 0 keeps
times.json, written beside and renamed after every row; what stands in it is not timed again. A
section ends when its share of the time is used up, and what it did not reach is a note.
Not run on a GPU.
"""

import datetime
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_mone.benchmarking.node_times.links import Links
from megatron_mone.benchmarking.node_times.operators import Operators
from megatron_mone.benchmarking.node_times.small_steps import run_steps, step_time
from megatron_mone.common import machine
from megatron_mone.common.files import write_json
from megatron_mone.common.local_ranks import free_port
from megatron_mone.planning.cost.measured_times import operator_key
from megatron_mone.planning.fitting.node_times import (
    TIMES,
    LinkTime,
    OperatorTime,
    SmallJob,
    Times,
    Work,
    check_same_job,
)

SHARES = {"collectives": 0.15, "small job": 0.45, "launch": 0.1, "operators": 0.3}
"""Of the time; what a section leaves over is the next one's."""
_CALLED = {"small_job": "the small job", "launch_job": "one layer on one rank"}
Say = Callable[[str], None]


class Calibration:
    """A rank's part.

    Args:
        work: what is timed.
        folder: of times.json.
        seconds: of all sections.
        row_seconds: of one row, as of `clock.seconds`.
        say: told by rank 0 how it goes.

    Attributes:
        device, device_name: of this rank.
    """

    def __init__(
        self, work: Work, folder: Path, seconds: float, row_seconds: float, say: Say
    ) -> None:
        self._work, self._folder, self._say = work, folder, say
        self._spend = row_seconds
        self._end = time.monotonic() + seconds
        self._first = dist.get_rank() == 0
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        on_cpu = self.device.type == "cpu"
        self.device_name = machine.cpu_model() if on_cpu else torch.cuda.get_device_name()
        found = [self._begun() if self._first else None]
        dist.broadcast_object_list(found, src=0, device=self.device)
        assert found[0] is not None
        self._times: dict[str, Any] = found[0]

    def run(self) -> Times:
        """All sections."""
        sections = {
            "collectives": self._collectives, "small job": self._small, "launch": self._launch,
            "operators": self._operators,
        }  # fmt: skip
        names = list(sections)
        for place, name in enumerate(names):
            left = max(0.0, self._end - time.monotonic())
            cap = left * SHARES[name] / sum(SHARES[one] for one in names[place:])
            sections[name](time.monotonic() + cap)
        return self._found()

    def _found(self) -> Times:
        return Times.of({"schema": Times.SCHEMA, **self._times}, self._folder / TIMES)

    def _begun(self) -> dict[str, Any]:
        """What an earlier run of the same job left, or an empty file's content."""
        path = self._folder / TIMES
        if path.exists():
            earlier = Times.read(path, "give another --out")
            check_same_job(path, earlier.job, self._work.job)
            found = earlier.plain()
            found["notes"] = list(self._work.notes)
            return found
        facts = machine.facts()
        return {
            "job": self._work.job.plain(), "processor": facts["Processor"],
            "device": self.device_name, "on_cpu": self.device.type == "cpu", 
            "ranks": dist.get_world_size(), "load": machine.load_average(),
            "date": facts["Date"], "operators": [], "links": [], "small_job": None,
            "launch_job": None, "notes": list(self._work.notes),
        }  # fmt: skip

    def _write(self) -> None:
        if self._first:
            # Unchecked: of hundreds of rows each was, when it was made.
            write_json(self._folder / TIMES, {"schema": Times.SCHEMA, **self._times})

    def _note(self, words: str) -> None:
        self._times["notes"].append(words)
        self._write()

    def _operators(self, end: float) -> None:
        known = [OperatorTime.model_validate(row) for row in self._times["operators"]]
        done = {operator_key(row.operator.op()) for row in known}
        left = [one for one in self._work.operators if operator_key(one.operator.op()) not in done]
        meter = Operators(self.device, self._work.job.neuron_block, self._spend)
        for place, one in enumerate(left):
            if self._over(end):
                share = sum(row.share for row in left[place:])
                self._note(
                    f"operators: {len(left) - place} of {len(self._work.operators)}, {share:.1%} "
                    "of their price, are priced by curves: no time was left"
                )
                return
            op = one.operator.op()
            seconds, by, error = 0.0, "", ""
            dist.barrier()
            try:
                seconds, by = meter.time(op)
            except (RuntimeError, ValueError, NotImplementedError) as failure:
                error = " ".join(str(failure).split())[:200]
            mean = self._mean(None if error else seconds)
            if mean is None:
                self._note(f"operators: {op.name} cannot be timed here: {error or 'on a rank'}")
                continue
            row = OperatorTime(operator=one.operator, seconds=mean, by=by, share=one.share)
            self._times["operators"].append(row.plain())
            self._write()
            self._tell(f"operators: {place + 1} of {len(left)}", place, len(left))

    def _small(self, end: float) -> None:
        self._steps("small_job", self._work.small, end)

    def _launch(self, end: float) -> None:
        self._steps("launch_job", self._work.launch, end)

    def _steps(self, name: str, job: SmallJob | None, end: float) -> None:
        """Steps of a small job, on as many ranks as it has; the others wait."""
        if job is None or self._times[name] is not None:
            return
        here = dist.get_world_size()
        if here != self._work.ranks:
            self._note(
                f"{_CALLED[name]} was made for {self._work.ranks} ranks, {here} are here: prepare "
                f"with --ranks {here}"
            )
        if job.ranks > here:
            return
        folder, rank, error = self._folder / name, dist.get_rank(), ""
        ports = [free_port() if self._first else 0]
        dist.broadcast_object_list(ports, src=0, device=self.device)
        try:
            if rank < job.ranks:
                run_steps(job, folder, rank, ports[0], end - time.monotonic())
        except RuntimeError as failure:
            error = str(failure)
        errors: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error)
        if said := next(filter(None, errors), None):
            self._note(f"{_CALLED[name]}: {said}")
            return
        found = [step_time(folder).plain() if self._first else None]
        dist.broadcast_object_list(found, src=0, device=self.device)
        self._times[name] = found[0]
        self._write()
        self._tell(_CALLED[name], 0, 1)

    def _collectives(self, end: float) -> None:
        done = [LinkTime.model_validate(row).link for row in self._times["links"]]
        left = [one for one in self._work.links if one.link not in done]
        meter = Links(self.device, self._spend)
        refused: dict[str, None] = {}
        for place, one in enumerate(left):
            if reason := meter.why_not(one.link):
                refused.setdefault(reason)
                continue
            if self._over(end):
                self._note(
                    f"collectives: {len(left) - place} of {len(self._work.links)} are priced by "
                    "the cluster file: no time was left"
                )
                break
            dist.barrier()
            taken = meter.time(one.link)
            mean = self._mean(taken, some=True)
            assert mean is not None
            row = LinkTime(link=one.link, seconds=mean, share=one.share)
            self._times["links"].append(row.plain())
            self._write()
            self._tell(f"collectives: {place + 1} of {len(left)}", place, len(left))
        for reason in refused:
            self._note(f"collectives: {reason}, {dist.get_world_size()} are here")

    def _over(self, end: float) -> bool:
        """Whether rank 0's time is up."""
        said = torch.tensor([float(time.monotonic() > end)], device=self.device)
        dist.broadcast(said, 0)
        return bool(said.item())

    def _mean(self, seconds: float | None, *, some: bool = False) -> float | None:
        """Over ranks; None where one has none, or with `some` where all have none."""
        both = torch.tensor(
            [0.0 if seconds is None else seconds, float(seconds is not None)], device=self.device,
            dtype=torch.float64,
        )  # fmt: skip
        dist.all_reduce(both)
        total, count = both.tolist()
        enough = count > 0 if some else count == dist.get_world_size()
        return total / count if enough else None

    def _tell(self, words: str, place: int, of: int) -> None:
        if self._first and (place + 1 == of or place % 50 == 49):
            self._say(words)


def begin_ranks(timeout_seconds: float) -> None:
    """Start the process group of this rank, over NCCL on GPUs, over gloo on CPU ranks."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    dist.init_process_group(
        "nccl" if cuda else "gloo", timeout=datetime.timedelta(seconds=timeout_seconds)
    )
