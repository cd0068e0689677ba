"""Runs several training jobs one after another on ranks that are started once.

`run_cases` launches torchrun on this file; inside, every case is one complete
`megatron_mone.pretrain` run, with Megatron's global state torn down in between. Results are the
values Megatron wrote to TensorBoard, which hold every step's loss in full float32, and on request
the gradients of the first step and the parameters after the third, each gathered whole.
"""

from __future__ import annotations

import functools
import gc
import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
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
    """One training run: a name (its folder), its flags, and whether to keep whole tensors."""

    name: str
    flags: tuple[str, ...]
    tensors: bool = False


def start(cases: list[Case], ranks: int, folder: Path) -> subprocess.Popen:
    """Launch torchrun over the cases; results go to folder/NAME."""
    folder.mkdir(parents=True, exist_ok=True)
    todo = folder / f"cases-{ranks}-{time.monotonic_ns()}.json"
    todo.write_text(json.dumps([[c.name, list(c.flags), c.tensors] for c in cases]))
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
    return {step: values[0] for step, values in recorded(folder).get(tag, {}).items()}


def recorded(folder: Path) -> dict[str, dict[int, list[float]]]:
    """{tag: {step: values}} over all event files in `folder`; a histogram has many values."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, dict[int, list[float]]] = {}
    for path in sorted(folder.glob("events.*"), key=lambda p: p.stat().st_mtime):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.tensor.float_val:
                    found.setdefault(value.tag, {})[event.step] = list(value.tensor.float_val)
                elif value.tensor.tensor_shape.dim:
                    found.setdefault(value.tag, {})[event.step] = _histogram(value.tensor)
    return found


def _histogram(proto) -> list[float]:
    """[lower edge, upper edge, count] of every bucket, flattened."""
    from tensorboard.util.tensor_util import make_ndarray

    return make_ndarray(proto).flatten().tolist()


def _watch_models() -> tuple[list, Callable[[Path | None], None]]:
    """(the model chunks of the run under way, a function that names the folder of its tensors).

    In that folder a run writes gradients.pt (step 1) and parameters.pt (after step 3); None: none.
    """
    import torch
    from megatron.training import training

    from tests.whole_tensors import all_gather_reduced, gather_whole

    build = training.setup_model_and_optimizer
    models: list = []
    folder: Path | None = None

    def set_folder(value: Path | None) -> None:
        nonlocal folder
        folder = value

    def write(name: str, values) -> None:
        whole = gather_whole(models, values)
        if torch.distributed.get_rank() == 0:
            torch.save(whole, folder / name)

    def watched(*args, **kwargs):
        chunks, optimizer, *rest = build(*args, **kwargs)
        models.extend(chunks)
        step, done = optimizer.step, 0

        def counted():
            nonlocal done
            done += 1
            if folder and done == 1:
                if training.get_args().use_distributed_optimizer:
                    all_gather_reduced(chunks)
                write("gradients.pt", lambda parameter: parameter.main_grad)
            result = step()
            if folder and done == 3:
                write("parameters.pt", lambda parameter: None)
            return result

        optimizer.step = counted
        return chunks, optimizer, *rest

    training.setup_model_and_optimizer = watched
    return models, set_folder


def _main(todo: str, folder: str) -> None:
    from megatron_mone import cpu_emulation, pretrain

    cpu_emulation.install()
    import torch
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    # Megatron reads its classes' sources for the help texts of their flags, anew for every parser.
    inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
    from megatron.training import training

    models, keep_in = _watch_models()
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda *a, **k: None
    for name, flags, tensors in json.loads(Path(todo).read_text()):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        keep_in(Path(folder) / name if tensors else None)
        sys.argv = ["pretrain", *flags, "--tensorboard-dir", f"{folder}/{name}"]
        print(f"=== case {name}", flush=True)
        try:
            pretrain.main()
        except SystemExit as stop:  # --exit-interval
            if stop.code:
                raise
        torch.distributed.barrier()
        training.destroy_global_state()
        destroy_moe_metrics_tracker()
        # Megatron's DDP hangs on itself by hooks that no collector sees, and holds its process
        # groups, each of which keeps three gloo threads that poll.
        for chunk in models:
            vars(chunk).clear()
        models.clear()
        for group in list(torch.distributed.distributed_c10d._world.pg_map):
            if group is not torch.distributed.group.WORLD:
                destroy(group)
        del group
        gc.collect()
    destroy()


if __name__ == "__main__":
    _main(*sys.argv[1:])
