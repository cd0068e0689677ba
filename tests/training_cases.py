"""Runs several training jobs one after another on ranks that are started once.

`run_cases` forks ranks that call `_main`; inside, every case is one complete
`megatron_mone.pretrain` run, with Megatron's global state torn down in between. Results are the
values Megatron wrote to TensorBoard, which hold every step's loss in full float32, and on request
the gradients of the first step and the parameters after the third, each gathered whole.
"""

import contextlib
import functools
import gc
import inspect
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from tests import forked_ranks
from tests.forked_ranks import ROOT as ROOT

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


def start(
    cases: list[Case], ranks: int, folder: Path, run: Callable[..., None] | None = None
) -> forked_ranks.Launch:
    """Start ranks over the cases; results go to folder/NAME, what they print to FIRST_NAME.log.

    Args:
        cases, ranks, folder: of the runs.
        run: what a rank calls in the place of `_main`, with the same arguments.
    """
    folder.mkdir(parents=True, exist_ok=True)
    todo = folder / f"cases-{ranks}-{time.monotonic_ns()}.json"
    todo.write_text(json.dumps([[c.name, list(c.flags), c.tensors] for c in cases]))
    log = folder / f"{cases[0].name}.log"
    return forked_ranks.start(ranks, run or _main, (str(todo), str(folder)), log)


def run_cases(
    cases: list[Case], ranks: int, folder: Path, run: Callable[..., None] | None = None
) -> None:
    """Run the cases to the end; a failure shows the end of the log. Arguments as of `start`."""
    job = start(cases, ranks, folder, run)
    try:
        failed = job.wait(timeout=900) != 0
    except subprocess.TimeoutExpired:
        job.kill()
        failed = True
    if failed:
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

    from megatron_mone.deepspeed.state import whole_parameters
    from tests.whole_tensors import all_gather_reduced, gather_whole

    build = training.setup_model_and_optimizer
    models: list = []
    folder: Path | None = None

    def set_folder(value: Path | None) -> None:
        nonlocal folder
        folder = value

    def write(name: str, values) -> None:
        assert folder is not None
        whole = gather_whole(models, values)
        if torch.distributed.get_rank() == 0:
            torch.save(whole, folder / name)

    def watched(*args, **kwargs):
        chunks, optimizer, *rest = build(*args, **kwargs)
        models.extend(chunks)
        engine = getattr(chunks[0], "engine", None) if chunks else None
        step, done = optimizer.step, 0

        def write_gradients() -> None:
            if folder and done == 1:  # and nothing is sent in a step of which nothing is written
                with whole_parameters(engine) if engine else contextlib.nullcontext():
                    of = reduced if engine else lambda parameter: parameter.main_grad
                    write("gradients.pt", of)

        def reduced(parameter: Any) -> Any:
            from deepspeed.utils import safe_get_full_grad

            return safe_get_full_grad(parameter)

        def counted():
            nonlocal done
            done += 1
            if training.get_args().use_distributed_optimizer and folder and done == 1:
                all_gather_reduced(chunks)
            if engine is None:
                write_gradients()
            result = step()
            if folder and done == 3:
                if training.get_args().overlap_param_gather:  # which the next forward would end
                    for chunk in chunks:
                        chunk.start_param_sync(force_sync=True)
                with whole_parameters(engine) if engine else contextlib.nullcontext():
                    write("parameters.pt", lambda parameter: None)
            return result

        if engine is not None:  # which reduces gradients in its step
            take = engine._take_model_step

            def looked(*given: Any) -> None:
                write_gradients()
                take(*given)

            engine._take_model_step = looked
        optimizer.step = counted
        return chunks, optimizer, *rest

    training.setup_model_and_optimizer = watched
    return models, set_folder


@functools.cache
def spare_repeated_work() -> None:
    """Let a process that trains many models do once what is the same for each, and drop what no
    test reads: the printed arguments, their copies in TensorBoard. No number depends on it."""
    from megatron.core.datasets import gpt_dataset
    from megatron.training import argument_utils, arguments
    from torch.utils.tensorboard import SummaryWriter

    # Megatron reads its classes' sources for the help texts of their flags, anew for every parser.
    inspect.getsource = functools.cache(inspect.getsource)  # type: ignore[assignment]
    factory = argument_utils.ArgumentGroupFactory
    read = functools.cache(lambda cls: texts(factory.__new__(factory), cls))
    texts = factory._get_field_docstrings
    factory._get_field_docstrings = lambda self, cls: read(cls)
    arguments._print_args = lambda *ignored: None
    SummaryWriter.add_text = lambda *ignored, **named: None

    shuffle, shuffled = gpt_dataset._build_shuffle_index, {}

    def shuffled_once(samples: int, size: int, generator: Any) -> Any:
        """Six million numbers of the mock data; the generator is not used after them."""
        kind, words, *place = generator.get_state()
        key = (samples, size, kind, words.tobytes(), *place)
        if key not in shuffled:
            shuffled[key] = shuffle(samples, size, generator)
        return shuffled[key]

    gpt_dataset._build_shuffle_index = shuffled_once


def prepare_ahead() -> None:
    """Do that work before ranks are forked: read Megatron's sources, shuffle the mock data."""
    from megatron.core.datasets.gpt_dataset import (
        GPTDatasetConfig,
        MockGPTDataset,
        MockGPTLowLevelDataset,
    )
    from megatron.core.datasets.utils import Split
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training import arguments

    from megatron_mone.model.arguments import reading

    spare_repeated_work()
    args = arguments.parse_args(reading([*TINY, *MOCK]))
    args.padded_vocab_size = args.vocab_size
    config: Any = GPTDatasetConfig(
        random_seed=args.seed, sequence_length=args.seq_length, tokenizer=build_tokenizer(args),
        reset_position_ids=False, reset_attention_mask=False, eod_mask_loss=False,
    )  # fmt: skip
    data = MockGPTLowLevelDataset(config.tokenizer)
    for split, (first, last) in zip(Split, config.split_matrix, strict=True):
        rows = numpy.arange(round(first * len(data)), round(last * len(data)), dtype=numpy.int32)
        MockGPTDataset(data, None, rows, 1, split, config)


class _Groups:
    """Process groups that serve again in the next run.

    A gloo group costs milliseconds to make, and while it lives a thread that wakes a hundred times
    a second. Groups of one rank, which send nothing, are one; another is that of the run before
    with the same ranks, name and place among its like.
    """

    def __init__(self) -> None:
        import torch

        self._new = torch.distributed.new_group
        self._destroy = torch.distributed.destroy_process_group
        self._kept: dict[tuple, Any] = {}
        self._used: dict[tuple, int] = {}
        torch.distributed.new_group = self._find
        torch.distributed.destroy_process_group = lambda *a, **k: None

    def _find(self, ranks=None, timeout=None, backend=None, *args, **kwargs):
        kind: tuple = (tuple(ranks) if ranks is not None else None, str(backend), args)
        if ranks is None or len(ranks) > 1:
            kind = (*kind, str(timeout), str(sorted(kwargs.items(), key=str)))
        place = self._used.get(kind, 0)
        self._used[kind] = place + 1
        key = (kind, place if len(kind) > 3 else 0)
        if key not in self._kept:
            self._kept[key] = self._new(ranks, timeout, backend, *args, **kwargs)
        return self._kept[key]

    def end_run(self) -> None:
        """Destroy the groups that the run which ends did not ask for; all ranks agree on them."""
        import torch
        from torch.distributed.tensor.debug import _clear_sharding_prop_cache

        _clear_sharding_prop_cache()  # which knows, by shape and op, meshes of groups
        for kind, place in list(self._kept):
            if place >= self._used.get(kind, 0):
                group = self._kept.pop((kind, place))
                if group is not torch.distributed.GroupMember.NON_GROUP_MEMBER:
                    self._destroy(group)
        self._used.clear()

    def end(self) -> None:
        """Destroy all."""
        self._destroy()


def _main(todo: str, folder: str) -> None:
    from megatron_mone import cpu_emulation, pretrain

    cpu_emulation.install()
    import torch
    from megatron.core.pipeline_parallel.fine_grained_activation_offload import (
        PipelineOffloadManager,
    )
    from megatron.core.transformer import multi_token_prediction
    from megatron.core.transformer.moe import router_trace
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import get_tensorboard_writer, training

    from megatron_mone.model.arguments import one_parser

    spare_repeated_work()
    parser = contextlib.ExitStack()  # here alone: the fork server starts stock Megatron's, too
    parser.enter_context(one_parser())
    models, keep_in = _watch_models()
    groups = _Groups()
    for name, flags, tensors in json.loads(Path(todo).read_text()):
        (Path(folder) / name).mkdir(parents=True, exist_ok=True)
        keep_in(Path(folder) / name if tensors else None)
        print(f"=== case {name}", flush=True)
        try:
            pretrain.main([*flags, "--tensorboard-dir", f"{folder}/{name}"])
        except SystemExit as stop:  # --exit-interval
            if stop.code:
                raise
        torch.distributed.barrier()
        if writer := get_tensorboard_writer():
            writer.close()
        training.destroy_global_state()
        destroy_moe_metrics_tracker()
        PipelineOffloadManager.OFFLOAD_MGR = None  # it knows the groups of one model
        multi_token_prediction.MTPLossLoggingHelper.tracker.clear()
        router_trace._MOE_ROUTER_TRACER = None
        # Megatron's DDP hangs on itself by hooks that no collector sees.
        for chunk in models:
            vars(chunk).clear()
        models.clear()
        groups.end_run()
        gc.collect()
    groups.end()


if __name__ == "__main__":
    _main(*sys.argv[1:])
