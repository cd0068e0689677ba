"""Trace one rank of a job of any size: Megatron's own model and step, without weights or peers.

Megatron keeps its state in globals, so every trace is a process of its own. There the model is
built and `training.train_step` runs twice, of which the second is recorded: over loopback process
groups (`loopback.py`), on tensors without values (`unknown_values.py`), with what follows from
values supplied (`stand_ins/values.py`). A GPU job is built of Transformer Engine's layers and fused
kernels, each of which has a stand-in (`stand_ins/package.py`); a job with `transformer_impl
local` as its CPU ranks build it, whose core attention keeps whole scores, and without fused
kernels. May touch: that process, whole.
"""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

from megatron_mone.common.patch import Replaced, install
from megatron_mone.deepspeed.settings import is_deepspeed, settings_of
from megatron_mone.planning.tracing.trace import Trace, merged
from megatron_mone.planning.tracing.zero_step import MICRO_BATCHES, last_micro_batch, sent_by_any
from megatron_mone.profiling.clock import HostStamps, PhaseClock


def trace_step(job: dict[str, Any]) -> Trace:
    """Trace one step of one rank, in this process.

    Args:
        job: "flags" as `megatron_mone.pretrain` takes them, on GPUs or CPU ranks, whose batch size
            is replaced by the smallest that the schedule takes; "world_size", W ranks; "rank", 0 to
            W - 1; "rows", that one micro-batch on one rank sends to each of E experts, None:
            balanced.

    Raises:
        ValueError: the flags are wrong, or cannot be traced.
    """
    from megatron_mone.planning.tracing.gpu_job import is_gpu_job, parse_gpu_job, prepare

    flags, world_size, rank = job["flags"], job["world_size"], job["rank"]
    if not 0 <= rank < world_size:
        raise ValueError(f"rank = {rank} is not one of the {world_size} ranks, 0 to W - 1")
    prepare(is_gpu_job(flags))
    from megatron.training import global_vars

    from megatron_mone.deepspeed import attach

    install(attach.PATCHES)

    with (
        Replaced(global_vars, "_set_tensorboard_writer", lambda args: None),
        Replaced(global_vars, "_set_wandb_writer", lambda args: None),
    ):
        args, model_config = parse_gpu_job(flags, world_size, rank)
    return _trace(args, model_config, job["rows"])


def _trace(args: Namespace, model_config: Any, rows: Sequence[int] | None) -> Trace:
    from megatron.core.num_microbatches_calculator import reconfigure_num_microbatches_calculator
    from megatron.training.initialize import initialize_megatron

    from megatron_mone.deepspeed.model import start_with
    from megatron_mone.planning.tracing.loopback import Loopback
    from megatron_mone.planning.tracing.recorder import Recorder
    from megatron_mone.planning.tracing.traced_backend import TRACED, install
    from megatron_mone.planning.tracing.unknown_values import UnknownValues

    settings = settings_of(args) if is_deepspeed(args) else {}
    micro_batches = _fewest_micro_batches(args)
    args.global_batch_size = micro_batches * args.micro_batch_size * args.data_parallel_size
    reconfigure_num_microbatches_calculator(
        args.rank, None, args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    )
    args.load = args.pretrained_checkpoint = args.save = None
    args.train_iters, args.train_samples = 1, None
    args.lr_warmup_iters = args.lr_warmup_samples = 0
    args.lr_warmup_fraction = args.lr_decay_iters = args.lr_wsd_decay_iters = None
    # Megatron's flag of this name would also turn off the checks for NaN, which are work.
    args.fake_process_group = True
    recorder = Recorder(PhaseClock(HostStamps()))
    loopback = Loopback(recorder.saw_collective)
    loopback.start()
    initialize_megatron()
    config = model_config.transformer
    _one_micro_batch_at_a_time(args, config)
    backend = install(config)
    if settings:
        start_with(config, {**settings, "gradient_accumulation_steps": micro_batches})
    with _stand_ins(args, config, recorder, rows), UnknownValues(recorder.saw_operator):
        trace = _step(args, model_config, recorder, micro_batches)
    return replace(trace, backend=backend) if backend and trace.backend == TRACED else trace


@contextmanager
def _stand_ins(
    args: Namespace, config: Any, recorder: Any, rows: Sequence[int] | None
) -> Iterator[None]:
    """Everything that stands in for what values or a GPU would decide."""
    from megatron.core.optimizer import clip_grads

    from megatron_mone.planning.tracing.stage_messages import known_shapes
    from megatron_mone.planning.tracing.stand_ins import host, sharded_weights
    from megatron_mone.planning.tracing.stand_ins import layers as fused_layers
    from megatron_mone.planning.tracing.stand_ins import linear as fused_linear
    from megatron_mone.planning.tracing.stand_ins import mamba as fused_mamba
    from megatron_mone.planning.tracing.stand_ins import op as fused_op
    from megatron_mone.planning.tracing.stand_ins import quantized_weight as fused_weight
    from megatron_mone.planning.tracing.stand_ins import values as stand_ins

    l2_norm = clip_grads.l2_norm_impl
    with ExitStack() as stack:
        stack.enter_context(stand_ins.installed(args, config, recorder, rows))
        stack.enter_context(known_shapes(args, config))
        if args.optimizer_cpu_offload or args.fine_grained_activation_offloading:
            # Not of DeepSpeed on CPU ranks, which pins its own buffers.
            stack.enter_context(host.installed(recorder))
        stack.enter_context(_recompute_is_told(recorder.clock))
        stack.enter_context(fused_op.recording(recorder))
        if args.use_megatron_fsdp:
            stack.enter_context(sharded_weights.installed())
        if config.transformer_impl == "transformer_engine":
            stack.enter_context(fused_layers.installed())
            stack.enter_context(fused_mamba.installed())
            stack.enter_context(fused_weight.buffers_without_values())
            stack.enter_context(fused_linear.no_dummies_yet())
            stack.enter_context(Replaced(clip_grads, "l2_norm_impl", l2_norm))
        yield


@contextmanager
def _recompute_is_told(clock: Any) -> Iterator[None]:
    """While it lasts a forward function that runs again in a backward pass is a recompute even
    where it is less than a module, as modules alone tell the clock."""
    from megatron.core.tensor_parallel import random

    from megatron_mone.common.phases import RECOMPUTE

    fork = random._fork_rng

    @contextmanager
    def told() -> Iterator[None]:
        before = clock.phase, clock.pass_
        clock.switch(clock.phase, RECOMPUTE)
        try:
            with fork():
                yield
        finally:
            clock.switch(*before)

    with Replaced(random, "_fork_rng", told):
        yield


def _one_micro_batch_at_a_time(args: Namespace, config: Any) -> None:
    """The same work without the order in which two micro-batches hide each other's exchanges, and
    launched by modules, which the recorder follows, not from a CUDA graph."""
    for name in (
        "overlap_moe_expert_parallel_comm", "delay_wgrad_compute",
        "overlap_dispatch_backward_with_experts_wgrad",
    ):  # fmt: skip
        setattr(args, name, False)
        setattr(config, name, False)
    args.cuda_graph_impl = config.cuda_graph_impl = "none"


def _cuts_steps(args: Namespace) -> bool:
    """Whether a step is recorded from its last micro-batch on; see zero_step.py."""
    return is_deepspeed(args) or bool(args.use_megatron_fsdp)


def _fewest_micro_batches(args: Namespace) -> int:
    """1; an interleaved schedule takes multiples of the pipeline's length, and what DeepSpeed holds
    is there after the first."""
    if _cuts_steps(args):
        return MICRO_BATCHES
    interleaved = args.virtual_pipeline_model_parallel_size is not None
    return args.pipeline_model_parallel_size if interleaved else 1


def _step(args: Namespace, model_config: Any, recorder: Any, micro_batches: int) -> Trace:
    from megatron_mone.planning.tracing.recorder import held_bytes, stage_memory
    from megatron_mone.planning.tracing.stand_ins.linear import dummy_bytes
    from megatron_mone.profiling.baselines import RunSpec
    from megatron_mone.profiling.instrument import Instruments, moe_layers
    from megatron_mone.profiling.ledger import persistent_tensors
    from megatron_mone.profiling.live_run import build_run

    run = build_run(RunSpec("traced"), args, model_config, _readers)
    model, optimizer = run.run.model, run.run.optimizer
    Instruments(recorder.clock, whole_optimizer=True).attach(model, optimizer)
    # A first step makes the optimizer's state and agrees once on what later ones know.
    run.enter()
    run.step()
    run.leave()
    run.enter()
    rows = _count_rows(moe_layers(model), recorder.clock)

    def held() -> dict[str, list[Any]]:
        return persistent_tensors(model, optimizer)

    earlier: list[Any] | None = [] if args.use_megatron_fsdp else None
    if _cuts_steps(args):
        with (
            last_micro_batch(recorder, held, earlier) as kept,
            recorder.watch_kept(),
            recorder.watch_nodes(),
        ):
            run.step()
    else:
        recorder.clock.begin()
        with recorder.watch_kept(), recorder.watch_nodes():
            run.step()
        kept = held_bytes(held())
    recorder.clock.end()
    of_experts = persistent_tensors(model, optimizer, of_experts=True)
    sent = recorder.collectives if earlier is None else sent_by_any(earlier, recorder.collectives)
    return Trace(
        world_size=args.world_size,
        rank=args.rank,
        micro_batches=1 if _cuts_steps(args) else micro_batches,
        backend=run.run.backend,
        rows=rows,
        ops=merged([*recorder.ops, *recorder.work_beside()]),
        collectives=merged(sent),
        memory=stage_memory(kept, held_bytes(of_experts), recorder, dummy_bytes()),
    )


def _count_rows(layers: Sequence[Any], clock: PhaseClock) -> dict[int, int]:
    """{layer, 1-based: rows that its experts take}, filled by hooks while the clock runs."""
    import torch

    from megatron_mone.profiling.load_facts import layer_number

    rows = {layer_number(layer): 0 for layer in layers}

    def watch(layer: Any) -> None:
        def count(_experts: Any, inputs: tuple) -> None:
            # not the first of two passes of a recomputed layer
            if clock.running and torch.is_grad_enabled():
                rows[layer_number(layer)] += int(inputs[1].sum())

        layer.experts.register_forward_pre_hook(count)

    for layer in layers:
        watch(layer)
    return rows


def _readers(args: Namespace, chunks: int) -> Any:
    """What the training loop reads micro-batches from: one, or one for each model chunk."""
    from megatron.core.rerun_state_machine import RerunDataIterator

    readers = [RerunDataIterator(_micro_batches(args)) for _ in range(chunks)]
    return readers if args.virtual_pipeline_model_parallel_size is not None else readers[0]


def _micro_batches(args: Namespace) -> Iterator[dict[str, Any]]:
    """Micro-batches as the datasets make them, without values; of packed documents each is as long
    as its sample."""
    import torch

    size, length = args.micro_batch_size, args.seq_length
    shapes: dict[str, Any] = {
        **dict.fromkeys(("tokens", "labels", "position_ids"), ((size, length), torch.int64)),
        "loss_mask": ((size, length), torch.float32),
    }
    if args.create_attention_mask_in_dataloader:
        shapes["attention_mask"] = ((size, 1, length, length), torch.bool)
    bounds = {}
    if args.dataloader_inter_document_masking:
        whole = torch.tensor([[0, length]] * size, dtype=torch.int32)
        bounds = {"cu_seqlens": whole, "max_seqlen": whole[:, 1]}
    while True:
        yield bounds | {
            key: torch.empty(shape, dtype=dtype, device="meta")
            for key, (shape, dtype) in shapes.items()
        }
