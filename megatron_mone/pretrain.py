"""Entry point: one YAML run file and/or Megatron flags -> megatron.training.pretrain.

    torchrun --nproc-per-node 2 -m megatron_mone.pretrain --config configs/demo-mone.yaml [flags]

Without CUDA it runs on CPU ranks through the emulation. Without mone_* fields it trains the stock
MoE model, so that a baseline differs in nothing else.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from megatron_mone.common.child_processes import end_with_starter
from megatron_mone.common.command_line import ERROR
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


def main() -> None:
    """Run one training job; a user's mistake is one line on stderr and exit status 2."""
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
    from megatron_mone.model import checks
    from megatron_mone.model.checks.flags import notices
    from megatron_mone.model.checks.layout_notices import layout_notices

    args = None
    has_stepped, end_watch = failure.watch_first_step()
    try:
        try:
            args = parse_arguments()
            model_config = build_model_config(args)
            checks.check_length(args)
        except ValueError as error:
            fail(str(error))
        if args.rank == 0:
            said = (*notices(args), *layout_notices(args, sys.argv), *restart_notices(args))
            for line in said:
                print(f"megatron-mone: {line}", file=sys.stderr, flush=True)
        _train(args, model_config, started)
    except SystemExit as ended:
        if args is None or ended.code or has_stepped() or args.ckpt_convert_format:
            raise
        why = f"no checkpoint is in load = {args.load}" if args.exit_on_missing_checkpoint else ""
        fail(f"Megatron ended before the first step: {why or 'its last words are above'}")
    except Exception as error:
        if has_stepped():
            raise
        failure.end_with_line(error, args)
    finally:
        end_watch()


def fail(message: str, status: int = USER_ERROR) -> NoReturn:
    """Print one line, on one rank only, and exit."""
    said = " ".join(message.split())
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise SystemExit(failure.say_once(said, status, failure.log_file(None)))
    print(f"{ERROR} {said}", file=sys.stderr, flush=True)
    raise SystemExit(status)


def _train(args: argparse.Namespace, model_config: Any, started: float) -> None:
    import torch
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from megatron.core.enums import ModelType
    from megatron.training import get_timers, pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.training import set_startup_timestamps

    from megatron_mone.checkpoint import optimizer_layout, ownership, schedule, signals, verify
    from megatron_mone.checkpoint import save as safe_save
    from megatron_mone.checkpoint.lease.lease import LeaseLostError
    from megatron_mone.model.gpt_training import datasets_provider, forward_step
    from megatron_mone.model.loss_check import rejection
    from megatron_mone.model.step_flops import step_flops
    from megatron_mone.moe.finite_check import NonFiniteExpertError
    from megatron_mone.moe.masks.trace import MaskTraceError
    from megatron_mone.moe.metrics import install_tracker
    from megatron_mone.profiling.attach import attach, window_of

    stop = signals.arm(args) if args.save else None
    safe_save.install()
    ownership.install(args, fail)  # before `verify`, lest that reads what is still written
    verify.install(fail)
    optimizer_layout.install()
    schedule.install()
    container = pretrain_cfg_container_from_args(args, model_config)
    tracker = install_tracker()
    tracker.log_interval = args.log_interval
    tracker.step_flops = lambda: step_flops(args, model_config.transformer, args.global_batch_size)
    tracker.interval_seconds = lambda: get_timers()("interval-time").elapsed(reset=False)
    if args.tensorboard_dir and args.rank == 0:
        _write_run_facts(Path(args.tensorboard_dir), args, tracker.step_flops())
    set_startup_timestamps(program_start=started, main_entry=time.time())
    end_profile = attach(args, window_of(args))
    end_progress = liveness.report_progress()
    try:
        pretrain(container, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    except CheckpointingException as error:
        fail(f"checkpoint {args.load}: {error}")
    except LeaseLostError as error:
        fail(str(error), LEASE_LOST)
    except safe_save.SaveFailedError as error:
        fail(str(error), SAVE_FAILED)
    except (NonFiniteExpertError, MaskTraceError) as error:
        status = USER_ERROR if isinstance(error, MaskTraceError) else NOT_FINITE
        fail(str(error), status)
    except (RuntimeError, SystemExit) as error:
        if refused := rejection(error):
            fail(refused, NOT_FINITE)
        if isinstance(error, RuntimeError) or stop is None or not stop.stopped:
            raise
        raise SystemExit(STOPPED) from None
    finally:
        end_profile()
        end_progress()
        ownership.release()
        if (
            stop is not None and not stop.stopped
        ):  # torchrun signals ranks that are on their way out
            stop.release()
    torch.distributed.destroy_process_group()


def _write_run_facts(folder: Path, args: argparse.Namespace, flops: tuple[float, float]) -> None:
    """run.json beside the event files: the constants a reader needs to scale what they hold."""
    facts = {
        "schema": "megatron-mone/run/1",
        "world_size": args.world_size,
        "tokens_per_step": args.global_batch_size * args.seq_length,
        "executed_flops_per_step": flops[0],
        "active_flops_per_step": flops[1],
        "argv": sys.argv[1:],
    }
    write_json(folder / "run.json", facts)


def parse_arguments() -> argparse.Namespace:
    """Read --config and flags, check files and folders, and let Megatron validate the rest.

    Raises:
        ValueError: anything wrong in the run file, the flags or the files they name.
    """
    from megatron.training import arguments

    from megatron_mone.checkpoint.vocabulary import keep_padded_vocabulary
    from megatron_mone.model.checks import check_checkpoint, check_layout, check_run
    from megatron_mone.model.checks.flags import parse_given
    from megatron_mone.model.loss_check import settle_rerun_mode
    from megatron_mone.profiling.attach import window_of

    _expand_config()
    given = parse_given(add_arguments)
    check_run(given)
    try:
        args = arguments.parse_and_validate_args(extra_args_provider=add_arguments)
    except ValueError:
        raise
    except SystemExit:  # the one exit() there is
        raise ValueError(
            "checkpoint_activations is no longer read: pass --recompute-activations"
        ) from None
    except Exception as error:
        raise ValueError(f"Megatron refuses the arguments: {failure.words(error)}") from error
    check_layout(args)
    check_checkpoint(args)  # compares widths that validation derives
    keep_padded_vocabulary(args, given.padded_vocab_size)
    settle_rerun_mode(args)
    window_of(args)  # refuses a wrong one
    return args


def build_model_config(args: argparse.Namespace):
    """The GPTModelConfig of `args`: MoNE where a mone_* field turns it on, stock otherwise.

    Raises:
        ValueError: a mone_* field does not fit, or Megatron refuses the model.
    """
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.training.argument_utils import gpt_config_from_args

    from megatron_mone.config import MoNEConfig, MoNEMLAConfig, check_packages
    from megatron_mone.config_checks import is_mone
    from megatron_mone.model.layer_spec import MoNEGPTModelConfig

    check_packages(args)
    if args.num_experts is not None and args.moe_router_topk > args.num_experts:
        raise ValueError(
            f"moe_router_topk = {args.moe_router_topk} is not allowed: it must be 1 to "
            f"num_experts = {args.num_experts}"
        )
    try:
        if not is_mone(args):
            stock = _transformer_config(args, TransformerConfig)
            return _with_rope_scaling(gpt_config_from_args(args, stock), args)
        if args.multi_latent_attention:
            # With the flag on, Megatron's helper ignores config_class for its own MLA class.
            plain = argparse.Namespace(
                **{**vars(args), "multi_latent_attention": False, "rope_type": None}
            )
            transformer = _transformer_config(plain, MoNEMLAConfig)
            if args.rope_type is not None:
                transformer.rope_type = args.rope_type
        else:
            transformer = _transformer_config(args, MoNEConfig)
        config = gpt_config_from_args(args, transformer, MoNEGPTModelConfig)
        return _with_rope_scaling(config, args)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"Megatron refuses the model: {failure.words(error)}") from error


def _transformer_config(args: argparse.Namespace, kind: type) -> Any:
    """The config of Megatron's helper, which hands Xavier's method to a field that is not there."""
    from megatron.training.argument_utils import core_transformer_config_from_args
    from torch.nn.init import xavier_uniform_

    plain = argparse.Namespace(**{**vars(args), "init_method_xavier_uniform": False})
    config = core_transformer_config_from_args(plain, kind)
    if args.init_method_xavier_uniform:
        config.init_method = config.output_layer_init_method = xavier_uniform_
        config.embedding_init_method = xavier_uniform_
    return config


def _with_rope_scaling(config: Any, args: argparse.Namespace) -> Any:
    """gpt_config_from_args hands on use_rope_scaling alone, so that every factor would be 8."""
    config.rope_scaling_factor = args.rope_scaling_factor
    return config


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Our flags, and errors of one line instead of Megatron's thousand lines of usage."""
    from megatron_mone.checkpoint import ownership, verify
    from megatron_mone.common.spelling import nearest_name
    from megatron_mone.config import add_mone_args
    from megatron_mone.model.flag_values import refuse_in_words
    from megatron_mone.profiling import attach

    add_mone_args(parser)
    attach.add_arguments(parser)
    verify.add_arguments(parser)
    ownership.add_arguments(parser)
    refuse_in_words(parser)
    flags = [flag for action in parser._actions for flag in action.option_strings]

    def one_line(message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ").split()
        hint = nearest_name(unknown[0], flags) if message.startswith("unrecognized") else ""
        raise ValueError(message + hint)

    parser.error = one_line  # type: ignore[method-assign,assignment]
    return parser


def flag_parser() -> argparse.ArgumentParser:
    """A parser of Megatron's flags and ours, for its actions."""
    from megatron.training.arguments import add_megatron_arguments

    return add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))


def _expand_config() -> None:
    """Replace `--config FILE` in sys.argv by the flags it stands for, before those given."""
    from megatron_mone.model.run_config import load_run, to_flags

    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    known, rest = own.parse_known_args(sys.argv[1:])
    if known.config is None:
        return
    flags = to_flags(load_run(known.config), flag_parser(), known.config)
    sys.argv[1:] = flags + rest


if __name__ == "__main__":
    main()
