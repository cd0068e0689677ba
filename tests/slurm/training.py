"""Training runs on the test cluster: submitted by the launcher, watched, frozen at a step.

A frozen rank (SIGSTOP) takes no step and no processor, so a test decides at which step a time
limit or a lost node meets the run, however fast this machine is.
"""

import contextlib
import io
import os
import re
import signal
import time
from pathlib import Path

from launch.__main__ import main
from tests.slurm.cluster import processes_with
from tests.slurm.jobs import PATIENCE_SECONDS
from tests.training_cases import recorded

STEPS = 12
LOSS = "lm loss"
# The demo's model on tokens that need no files, a checkpoint at every fourth step.
FLAGS = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--train-iters", str(STEPS), "--lr-decay-iters", str(STEPS), "--lr-warmup-iters", "2"),
    *("--eval-iters", "0", "--log-interval", "1", "--save-interval", "4"),
    *("--micro-batch-size", "2", "--global-batch-size", "8"),
]


def launch(*words: str) -> str:
    """What a launch command that must succeed printed."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        assert main(words) == 0, said.getvalue()
    return said.getvalue()


def submit_training(runs: Path, name: str, *words: str, ranks: int = 2) -> str:
    """Submit the demo model, one rank a node; returns the job's id. After -- in `words`: flags."""
    site = runs / "site.yaml"
    site.parent.mkdir(parents=True, exist_ok=True)
    site.write_text("tasks_per_node: 1\ncpus_per_task: 1\nrequeue: true\n")
    own = ["--runs", str(runs), "--name", name, "--launch", str(site), "--nodes", str(ranks)]
    cut = words.index("--") if "--" in words else len(words)
    flags = [*FLAGS, "--expert-model-parallel-size", str(ranks), *words[cut + 1 :]]
    curve = ["--tensorboard-dir", str(runs / name / "curve")]
    demo = ["--config", "configs/demo-mone.yaml", *own]
    said = launch("submit", *demo, *words[:cut], "--", *flags, *curve)
    found = re.search(r"^job (\d+), log ", said, re.MULTILINE)
    assert found, said
    return found[1]


def losses(run: Path) -> dict[int, float]:
    """Step -> loss in full float32; of a step that was done twice, the later."""
    return {step: values[0] for step, values in recorded(run / "curve")[LOSS].items()}


def ends_of_logs(folder: Path) -> str:
    """What a run or a sweep said last, for a test that failed."""
    logs = sorted(folder.rglob("*.log"))
    return "\n".join(f"{log}:\n{log.read_text(errors='replace')[-1500:]}" for log in logs)


def ranks_of(run: Path) -> list[int]:
    """Process ids of the run's ranks on this machine, without srun, which names the program too."""
    found = []
    for pid in processes_with(str(run)):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if b"python" in words[0] and b"megatron_mone.pretrain" in words:
                found.append(pid)
    return found


def freeze_at(run: Path, attempt: str, step: int) -> list[int]:
    """Stop all ranks of a run once one logged `step`; returns their process ids."""
    logs = run / "logs" / attempt
    wanted = f"iteration {step:8d}/"
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not any(wanted in log.read_text(errors="replace") for log in logs.glob("rank-*.log")):
        said = "\n".join(log.read_text(errors="replace")[-1500:] for log in logs.glob("rank-*"))
        assert time.monotonic() < deadline, f"{attempt} never came to step {step}:\n{said}"
        time.sleep(0.02)
    ranks = ranks_of(run)
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    return ranks


def thaw(ranks: list[int]) -> None:
    """Let ranks go on; those that are gone need nothing."""
    for pid in ranks:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def wait_for_signal(ranks: list[int], number: signal.Signals) -> None:
    """Until every frozen rank has a signal waiting for it (proc(5): SigPnd, ShdPnd)."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not all(_pending(pid) & (1 << (number - 1)) for pid in ranks):
        assert time.monotonic() < deadline, f"no {number.name} came"
        time.sleep(0.1)


def _pending(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(int(word, 16) for word in re.findall(r"^(?:SigPnd|ShdPnd):\s*(\w+)", status, re.M))
