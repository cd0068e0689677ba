"""The words of a training run, or a checkpoint alone -> Megatron's arguments of its evaluation.

A run file says what is trained and how; only the model, its tokenizer, its layout and the machine
are of use here. What is of training is left out of a run file and refused on the command line.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

TRAINING = (
    "*data_path", "*data_args_path", "per_dataset_sequences_path", "data_cache_path", "mock_data",
    "split", "save*", "async_save", "tensorboard*", "wandb*", "mlflow*", "log_*",
    "profile*",
    "mone_profile*", "mone_record*", "mone_replay*", "micro_batch_size", "global_batch_size",
    "step_batch_size_schedule", "decrease_batch_size_if_needed", "eval_*", "exit_*", "train_*",
    "lr", "lr_*", "min_lr", "*weight_decay*", "phase_transition_iterations",
    "use_distributed_optimizer", "use_precision_aware_optimizer", "optimizer*", "overlap_*",
    "delay_wgrad_compute", "recompute_*", "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank", "moe_expert_capacity_factor",
    "moe_pad_expert_input_to_capacity", "full_validation", "multiple_validation_sets",
    "engine", "zero_*", "deepspeed_config", "convert", "finetune",
    "dist_ckpt_optim_fully_reshardable", "rerun_mode",
)  # fmt: skip
"""Patterns of arguments that say how a model is trained: capacities too, for they drop tokens."""

_FIXED = [
    *("--mock-data", "--micro-batch-size", "1", "--train-iters", "1", "--eval-iters", "0"),
    *("--lr", "1e-3", "--skip-train", "--no-load-optim", "--no-load-rng"),
]
_MINUTES = "1440"
"""Other ranks wait for rank 0 while it reads tasks."""


def is_training(name: str) -> bool:
    """Whether an argument is of training alone."""
    return any(fnmatchcase(name, pattern) for pattern in TRAINING)


def evaluation_words(words: Sequence[str]) -> list[str]:
    """The words that Megatron's parser reads for an evaluation.

    Args:
        words: `--config FILE` and flags, or `--load FOLDER` and flags; no flag is of training.

    Raises:
        ValueError: a flag is of training, no checkpoint is named or there is none, or the run file
            is wrong.
    """
    from megatron_mone.model.arguments import flag_parser
    from megatron_mone.model.run_config import to_flags
    from megatron_mone.model.saved_model import model_values, saved_arguments

    parser = flag_parser()
    _refuse_training(words, parser)
    values, config, load, step, rest = _read(words)
    if config is None:
        values = model_values(saved_arguments(_iteration(load, step)))
        values |= _converted_tokenizer(load, values)
    values = {k: v for k, v in values.items() if not is_training(k) and k != "load"}
    source = config or load
    flags = to_flags(values, parser, source)
    chosen = ["--load", str(load), *([] if step is None else ["--ckpt-step", str(step)])]
    waits = [] if _gives("--distributed-timeout-minutes", rest) else [
        "--distributed-timeout-minutes", _MINUTES]  # fmt: skip
    return [*flags, *_FIXED, *waits, *chosen, *rest]


def _converted_tokenizer(load: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint that `convert` wrote: the tokenizer that travelled with it."""
    from megatron_mone.conversion.folders import SOURCE

    folder = load / SOURCE
    if values.get("tokenizer_type") != "NullTokenizer" or not any(folder.glob("tokenizer*")):
        return {}
    return {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(folder)}


def checkpoint_of(words: Sequence[str]) -> Path:
    """The folder of the iteration that is evaluated, whether it is whole or not.

    Args:
        words: as of `evaluation_words`.

    Raises:
        ValueError: no checkpoint is named, or there is none.
    """
    from megatron_mone.checkpoint.tracker import ITERATION_FORMAT, read_tracker

    _, _, load, step, _ = _read(words)
    text = str(step) if step is not None else read_tracker(load) or ""
    return load / (ITERATION_FORMAT.format(int(text)) if text.isdigit() else text)


def _read(
    words: Sequence[str],
) -> tuple[dict[str, Any], Path | None, Path, int | None, list[str]]:
    """A run file's values, the file, the folder of checkpoints, the iteration where one is named,
    and the other words."""
    from megatron_mone.model.run_config import load_run

    own = ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--config", type=Path)
    own.add_argument("--load")
    own.add_argument("--ckpt-step")
    known, rest = own.parse_known_args(list(words))
    values = {} if known.config is None else load_run(known.config)
    load, step = _checkpoint(known.load or values.get("load"))
    named = known.ckpt_step or values.get("ckpt_step")
    if named is not None:
        if not str(named).isdigit():
            raise ValueError(f"--ckpt-step {named} is no iteration: give its number")
        step = int(named)
    return values, known.config, load, step, rest


def _iteration(load: Path, step: int | None) -> Path:
    """The folder of the iteration that will be loaded: `step`, or the newest."""
    from megatron_mone.checkpoint.verify import folder_to_load

    given = Namespace(load=str(load), ckpt_step=step, ckpt_format="torch_dist")
    return folder_to_load(given) or load


def _checkpoint(load: Any) -> tuple[Path, int | None]:
    """The folder of a run's checkpoints, and the iteration where one is named by its folder."""
    from megatron_mone.checkpoint.tracker import TRACKER_NAME, iteration_of

    if not load:
        raise ValueError("--load is missing: name the folder of a checkpoint (a run's --save)")
    folder = Path(load)
    step = iteration_of(folder)
    if step is not None and folder.is_dir():
        return folder.parent, step
    if not (folder / TRACKER_NAME).is_file():
        raise ValueError(
            f"--load {load} holds no checkpoint ({TRACKER_NAME} is missing): name the folder that "
            "a run saved to"
        )
    return folder, None


def _refuse_training(words: Sequence[str], parser: ArgumentParser) -> None:
    by_flag = {flag: action.dest for action in parser._actions for flag in action.option_strings}
    for word in words:
        flag = word.partition("=")[0]
        if is_training(by_flag.get(flag, "")):
            raise ValueError(f"{flag} is of training, an evaluation does not read it: leave it out")


def _gives(flag: str, words: Iterable[str]) -> bool:
    return any(word.partition("=")[0] == flag for word in words)
