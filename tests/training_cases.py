"""Runs several training jobs one after another on ranks that are started once.

`run_cases` launches torchrun on this file; inside, every case is one complete
`megatron_mone.pretrain` run, with Megatron's global state torn down in between. Results are the
scalars Megatron wrote to TensorBoard, which hold every step's loss in full float32.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# A model small enough that a step takes milliseconds, with every part a real one has.
TINY = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4"),
    *("--num-experts", "4", "--moe-router-topk", "2", "--moe-ffn-hidden-size", "48"),
    *("--ffn-hidden-size", "64", "--swiglu", "--disable-bias-linear", "--normalization", "RMSNorm"),
    *("--position-embedding-type", "rope", "--untie-embeddings-and-output-weights"),
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--seq-length", "32"),
    *("--max-position-embeddings", "32", "--micro-batch-size", "2", "--global-batch-size", "8"),
    *("--moe-token-dispatcher-type", "alltoall", "--moe-aux-loss-coeff", "0.01"),
    *("--moe-router-load-balancing-type", "aux_loss", "--moe-router-dtype", "fp32"),
    *("--transformer-impl", "local", "--distributed-backend", "gloo"),
    *("--no-gradient-accumulation-fusion", "--no-bias-swiglu-fusion"),
    *("--no-masked-softmax-fusion", "--no-rope-fusion"),
    *("--no-persist-layer-norm", "--no-bias-dropout-fusion"),
    *("--lr", "3e-3", "--min-lr", "3e-4", "--lr-decay-style", "cosine", "--lr-decay-iters", "20"),
    *("--clip-grad", "1.0", "--weight-decay", "0.1", "--seed", "99", "--num-workers", "0"),
    *("--eval-interval", "1000", "--eval-iters", "0", "--log-interval", "1"),
    *("--tensorboard-log-interval", "1", "--ckpt-format", "torch_dist"),
]  # fmt: skip
MONE = ["--mone-neuron-ratio", "0.25", "--mone-ng-loss-coeff", "0.01"]
# Megatron pads the vocabulary to a multiple of this times TP, and the softmax sees the padding:
# 64 keeps it at 128 rows for TP 1 and 2, so that both are the same model.
MOCK = [
    *("--mock-data", "--tokenizer-type", "NullTokenizer", "--vocab-size", "127"),
    *("--make-vocab-size-divisible-by", "64"),
]


@dataclass(frozen=True)
class Case:
    """One training run: a name (its folder) and its flags."""

    name: str
    flags: tuple[str, ...]


def start(cases: list[Case], ranks: int, folder: Path) -> subprocess.Popen:
    """Launch torchrun over the cases; results go to folder/NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = folder / f"cases-{ranks}-{time.monotonic_ns()}.json"
    todo.write_text(json.dumps([[c.name, list(c.flags)] for c in cases]))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
        *("--nproc-per-node", str(ranks), "-m", "tests.training_cases", str(todo), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    log = (folder / f"{cases[0].name}.log").open("w")
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
    )


def run_cases(cases: list[Case], ranks: int, folder: Path) -> None:
    """Run the cases to the end; a failure shows the end of the log."""
    if start(cases, ranks, folder).wait(timeout=900) != 0:
        text = (folder / f"{cases[0].name}.log").read_text(errors="replace")
        raise AssertionError(f"cases {[c.name for c in cases]} failed:\n{text[-6000:]}")


def scalars(folder: Path, tag: str) -> dict[int, float]:
    """{step: value} of one TensorBoard tag, over all event files in `folder`, later files last."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = {}
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = float(value.tensor.float_val[0])
    return found


def _main(todo: str, folder: str) -> None:
    from megatron_mone import cpu_emulation, pretrain

    cpu_emulation.install()
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import training

    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *a, **k: None
    for name, flags in json.loads(Path(todo).read_text()):
        sys.argv = ["pretrain", *flags, "--tensorboard-dir", f"{folder}/{name}"]
        print(f"=== case {name}", flush=True)
        pretrain.main()
        torch.distributed.barrier()
        training.destroy_global_state()
        destroy_moe_metrics_tracker()
        # Megatron forgets its groups; each would keep two gloo threads that poll.
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                destroy(group)
    destroy()


if __name__ == "__main__":
    _main(*sys.argv[1:])
