"""Runs the sections, each in a process of its own, and ends them in time.

A kernel that faults takes its process's device context with it, and one that hangs is killed: the
next section starts afresh. This process imports torch and never asks for a device, so that the
processes it forks may. Answer and report are written anew after every section. May touch: `out`.
"""

import importlib
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from megatron_mone.benchmarking.gpu_answer import notebook
from megatron_mone.benchmarking.gpu_answer.given import device_here
from megatron_mone.benchmarking.gpu_answer.plan import SHARES, Plan
from megatron_mone.benchmarking.gpu_answer.report import markdown
from megatron_mone.benchmarking.gpu_answer.sections import SECTIONS
from megatron_mone.common.child_processes import end_with
from megatron_mone.common.files import atomic_write
from megatron_mone.kernels.gpu_answer_results import GpuAnswer, Section

ANSWER, REPORT = "answer.json", "report.md"
_FORK = multiprocessing.get_context("fork")


class Conductor:
    """One run of the sections.

    Args:
        out: folder for answer.json, report.md and sections/; made where it is not there.
        plan: what is measured.
        seconds: of the whole.
        interpreter: whether the kernels run in Triton's interpreter.
    """

    def __init__(self, out: Path, plan: Plan, seconds: float, *, interpreter: bool) -> None:
        self.out, self.plan, self.seconds, self.interpreter = out, plan, seconds, interpreter
        self.folder = out / "sections"
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in (*self.folder.iterdir(), out / ANSWER, out / REPORT):  # of an earlier run
            path.unlink(missing_ok=True)

    def run(self, say: Callable[[str], None] = print) -> GpuAnswer:
        """All sections; what was found so far is on disk whenever this ends.

        Raises:
            KeyboardInterrupt: on SIGINT, and on SIGTERM where the caller makes it one; the answer
                is written.
        """
        with suppress(ImportError):  # once, here; sections say what is missing
            importlib.import_module("triton")
        end = time.monotonic() + self.seconds
        names = list(SECTIONS)
        for place, name in enumerate(names):
            left = end - time.monotonic()
            cap = left * SHARES[name] / sum(SHARES[one] for one in names[place:])
            section = self._section(name, cap)
            say(f"{name}: {section.state}, {section.seconds:.0f} s" + _because(section))
        return self.write()

    def write(self) -> GpuAnswer:
        """The answer so far, as JSON and Markdown."""
        sections = [notebook.read(self._file(name), name) for name in SECTIONS]
        facts = sections[0].facts
        answer = GpuAnswer(
            interpreter=self.interpreter, device=facts.get("GPU", "none"),
            machine_class=facts.get("Class", "interpreter" if self.interpreter else "unknown"),
            seconds=self.seconds, sections=sections,
        )  # fmt: skip
        answer.write(self.out / ANSWER)
        atomic_write(self.out / REPORT, markdown(answer).encode())
        return answer

    def _section(self, name: str, cap: float) -> Section:
        start = time.monotonic()
        process = _FORK.Process(target=self._child, args=(name, os.getpid()))
        process.start()
        cut = "the run was stopped"
        try:
            process.join(max(0.0, cap))
            cut = f"its share of the time, {cap:.0f} s, was over"
        finally:
            late = process.is_alive()
            _end(process)
            self._close(name, process, cut if late else "", time.monotonic() - start)
        return notebook.read(self._file(name), name)

    def _close(self, name: str, process: BaseProcess, cut: str, seconds: float) -> None:
        section = notebook.read(self._file(name), name)
        changes: dict[str, Any] = {"seconds": seconds}
        if section.state in ("running", "not started"):
            died = f"its process ended with status {process.exitcode}"
            changes |= {"state": "cut" if cut else "failed", "error": cut or died}
        section.model_copy(update=changes).write(self._file(name))
        for path in self.folder.glob(".*.tmp"):  # of a killed process
            path.unlink()
        self.write()

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _child(self, name: str, parent: int) -> None:
        end_with(parent)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's goes to the parent too
        book = notebook.Notebook(self._file(name), name)
        try:
            SECTIONS[name](self.plan, device_here(), book)
        except Exception as error:
            book.close("failed", _said(error))
        else:
            book.close("done")


def why_no_device() -> str:
    """Why the kernels cannot run here, asked in a process of its own; "" where they can."""
    receive, send = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_ask, args=(send,))
    process.start()
    send.close()
    try:
        return receive.recv()
    except EOFError:
        process.join()
        return f"asking for a device ended its process with status {process.exitcode}"
    finally:
        _end(process)


def _ask(send: Connection) -> None:
    try:
        device = device_here()
        torch.ones(1, device=device)
        send.send("")
    except Exception as error:
        send.send(str(error))


def _end(process: BaseProcess) -> None:
    """At once, with SIGKILL: a hung kernel hears nothing else."""
    if process.is_alive():
        process.kill()
    process.join()


def _said(error: Exception) -> str:
    """One line with the place."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({place})"


def _because(section: Section) -> str:
    return f": {section.error}" if section.error else ""
