"""Entry point: one YAML run file and/or Megatron flags -> megatron.training.pretrain.

    torchrun --nproc-per-node 2 -m megatron_mone.pretrain --config configs/demo-mone.yaml [flags]

Without CUDA it runs on CPU ranks through the emulation. Without mone_* fields it trains the stock
MoE model, so that a baseline differs in nothing else.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.common.exit_status import (
    LEASE_LOST,
    NOT_FINITE,
    SAVE_FAILED,
    STOPPED,
    USER_ERROR,
)
from megatron_mone.common.files import write_json
from megatron_mone.common.local_ranks import free_port
from megatron_mone.model import failure, liveness


def main(words: Sequence[str] | None = None) -> None:
    """Run one training job; a user's mistake is one line on stderr and exit status 2.

    Args:
        words: of the command line, without the program's name; this process's when None.
    """
    words = sys.argv[1:] if words is None else words
    started = failure.begin()
    end_with_starter()  # before the seconds that imports take
    import torch

    liveness.dump_stacks_on_signal()
    if not torch.cuda.is_available():
        from megatron_mone import cpu_emulation

        cpu_emulation.install()
    if "WORLD_SIZE" not in os.environ:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    from megatron_mone.checkpoint.schedule import restart_notices
    from megatron_mone.deepspeed.settings import for_engine
    from megatron_mone.model import checks, patches
    from megatron_mone.model.arguments import parse_arguments, written_out
    from megatron_mone.model.checks.flags import notices
    from megatron_mone.model.checks.layout_notices import layout_notices
    from megatron_mone.model.config_builder import build_model_config
    from megatron_mone.model.trackers import attach as trackers

    patches.install()
    args = None
    has_stepped, end_watch = failure.watch_first_step()
    try:
        try:
            words = written_out(words)
            args = parse_arguments(words)
            model_config = build_model_config(args)
            checks.check_length(args)
        except ValueError as error:
            failure.fail(str(error))
        if args.rank == 0:
            said = (*for_engine(words)[1], *notices(args), *layout_notices(args, words))
            said += tuple(restart_notices(args))
            for line in said:
                print(f"megatron-mone: {line}", file=sys.stderr, flush=True)
        with trackers.ending():
            _train(args, words, model_config, started)
    except SystemExit as ended:
        if args is None or ended.code or has_stepped() or args.ckpt_convert_format:
            raise
        why = f"no checkpoint is in load = {args.load}" if args.exit_on_missing_checkpoint else ""
        failure.fail(f"Megatron ended before the first step: {why or 'its last words are above'}")
    except Exception as error:
        if has_stepped():
            raise
        failure.end_with_line(error, args, words)
    finally:
        end_watch()


def _train(
    args: argparse.Namespace, words: Sequence[str], model_config: Any, started: float
) -> None:
    import torch
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.training import get_timers, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import set_startup_timestamps

    from megatron_mone.checkpoint import ownership, signals
    from megatron_mone.checkpoint.lease.lease import LeaseLostError
    from megatron_mone.checkpoint.save import SaveFailedError
    from megatron_mone.checkpoint.verify import CheckpointRefusedError
    from megatron_mone.model.gpt_training import datasets_provider, forward_step
    from megatron_mone.model.loss_check import rejection
    from megatron_mone.model.profile_window import window_of
    from megatron_mone.model.routing_files import attach as replay_routing
    from megatron_mone.model.step_flops import step_flops
    from megatron_mone.moe import faults
    from megatron_mone.moe.masks.trace import MaskTraceError
    from megatron_mone.moe.metrics import install_tracker
    from megatron_mone.moe.routing_tape import RoutesError
    from megatron_mone.profiling.attach import attach

    stop = signals.arm(args) if args.save else None
    ownership.begin(args)
    container = pretrain_cfg_container_from_args(args, model_config)
    tracker = install_tracker()
    tracker.decoder_layers = model_config.transformer.num_layers
    tracker.predicting_layers = model_config.transformer.mtp_num_layers or 0
    tracker.log_interval = args.log_interval
    tracker.step_flops = lambda: step_flops(args, model_config.transformer, args.global_batch_size)
    tracker.interval_seconds = lambda: get_timers()("interval-time").elapsed(reset=False)
    if args.tensorboard_dir and args.rank == 0:
        _write_run_facts(Path(args.tensorboard_dir), args, words, tracker.step_flops())
    set_startup_timestamps(program_start=started, main_entry=time.time())
    end_profile = attach(args, words, window_of(args))
    replaying = replay_routing(args)
    end_progress = liveness.report_progress()
    end_looks = liveness.on_step_end(faults.look)  # evaluation has no optimizer that looks
    try:
        pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except CheckpointingException as error:
        failure.fail(f"checkpoint {args.load}: {error}")
    except CheckpointRefusedError as error:
        failure.fail(str(error))
    except LeaseLostError as error:
        failure.fail(str(error), LEASE_LOST)
    except SaveFailedError as error:
        failure.fail(str(error), SAVE_FAILED)
    except (faults.NonFiniteExpertError, MaskTraceError, RoutesError) as error:
        status = NOT_FINITE if isinstance(error, faults.NonFiniteExpertError) else USER_ERROR
        failure.fail(str(error), status)
    except (RuntimeError, SystemExit) as error:
        if refused := rejection(error):
            failure.fail(faults.words() or refused, NOT_FINITE)
        if isinstance(error, RuntimeError) or stop is None or not stop.stopped:
            raise
        raise SystemExit(STOPPED) from None
    finally:
        replaying.close()
        end_profile()
        end_progress()
        end_looks()
        ownership.release()
        if stop is not None and __name__ == "__main__":
            stop.end_process()
        elif stop is not None and not stop.stopped:
            stop.release()
    torch.distributed.destroy_process_group()


def _write_run_facts(
    folder: Path, args: argparse.Namespace, words: Sequence[str], flops: tuple[float, float]
) -> None:
    """run.json beside the event files: the constants a reader needs to scale what they hold."""
    facts = {
        "schema": "megatron-mone/run/1",
        "world_size": args.world_size,
        "tokens_per_step": args.global_batch_size * args.seq_length,
        "executed_flops_per_step": flops[0],
        "active_flops_per_step": flops[1],
        "argv": list(words),
    }
    write_json(folder / "run.json", facts)


if __name__ == "__main__":
    main()
