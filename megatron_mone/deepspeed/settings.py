"""What DeepSpeed is told: our settings from Megatron's arguments, and the user's JSON merged in.

Megatron's flags and the JSON say some things both; where they differ, one line names the two.
Touches nothing but the JSON file.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mone.common import checked_json
from megatron_mone.common.spelling import nearest_name

ENGINES = MEGATRON, DEEPSPEED = "megatron", "deepspeed"
STAGES = (0, 1, 2, 3)
_DEFAULT_STAGE = 1
AUTO = "auto"  # as Hugging Face writes it: whoever starts DeepSpeed fills it in

TAKEN = {
    "train_batch_size": "--global-batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch-size",
    "gradient_accumulation_steps": "--global-batch-size",
    "gradient_clipping": "--clip-grad",
    "bf16": "--bf16",
    "zero_optimization": "--zero-stage",
    "data_types": "",
    "communication_data_type": "",
    "zero_allow_untested_optimizer": "",
    "zero_force_ds_cpu_optimizer": "",
    "steps_per_print": "",
    "wall_clock_breakdown": "",
    "memory_breakdown": "",
    "dump_state": "",
    "comms_logger": "",
    "flops_profiler": "",
}
"""Keys that are read -> the flag of ours that says the same."""
ELSEWHERE = {
    "optimizer": "Megatron's flags choose it: --optimizer, --lr, --adam-beta1, ...",
    "scheduler": "Megatron's flags choose it: --lr-decay-style, --lr-warmup-iters, ...",
    "fp16": "this engine trains in bf16 and fp32: give --bf16",
    "tensorboard": "Megatron's writers are used: --tensorboard-dir",
    "wandb": "Megatron's writers are used: --wandb-project",
    "csv_monitor": "Megatron's writers are used: --tensorboard-dir",
    "comet": "Megatron's writers are used: --tensorboard-dir",
    "activation_checkpointing": "Megatron's flags choose it: --recompute-granularity, ...",
    "tensor_parallel": "Megatron's layers do it: --tensor-model-parallel-size",
    "autotp_size": "Megatron's layers do it: --tensor-model-parallel-size",
    "expert_parallel": "the experts are Megatron's or MoNE's: --expert-model-parallel-size",
    "pipeline": "DeepSpeed's pipeline engine needs layers of its own",
    "sequence_parallel_size": "Megatron's layers do it: --context-parallel-size",
    "managed_gradient_accumulation": "the schedule is Megatron's: a step ends where its step ends",
    "prescale_gradients": "gradients are averaged as Megatron averages them",
    "gradient_predivide_factor": "gradients are averaged as Megatron averages them",
    "sparse_gradients": "Megatron's embeddings have dense gradients",
    "data_efficiency": "the data are Megatron's",
    "curriculum_learning": "the data are Megatron's",
    "checkpoint": "checkpoints are Megatron's: --ckpt-format, --save",
    "compression_training": "the model is Megatron's",
}
"""Keys of DeepSpeed's that are refused -> why, and what says it here."""

LATEST, UNIVERSAL = "latest", "latest_universal"
"""Files of a folder of DeepSpeed's that name its newest checkpoint."""
MOOT = {
    "--use-distributed-optimizer": "ZeRO shards the optimizer, see --zero-stage",
    "--overlap-grad-reduce": "DeepSpeed reduces gradients itself, see overlap_comm of its JSON",
    "--overlap-param-gather": "DeepSpeed gathers parameters itself",
}
"""Flags of Megatron's engine that the files of configs/ give -> why they change nothing here."""
OF_MEGATRON = tuple(flag[2:].replace("-", "_") for flag in MOOT)
"""The arguments that they set."""
OF_DEEPSPEED = (
    "zero_stage", "zero_offload_optimizer", "deepspeed_config", "load_deepspeed", "save_deepspeed",
)  # fmt: skip
"""The arguments that only this engine reads."""
_UNFUSED = "--no-gradient-accumulation-fusion"  # there is no main_grad to add into


def add_arguments(parser: ArgumentParser) -> None:
    """The flags that choose and describe the engine."""
    group = parser.add_argument_group(title="engine")
    group.add_argument(
        "--engine", choices=ENGINES, default=MEGATRON,
        help="What holds gradients and optimizer state and makes the step: Megatron's DDP and "
        "optimizers, or DeepSpeed's ZeRO.",
    )  # fmt: skip
    group.add_argument(
        "--zero-stage", type=int, choices=STAGES, default=None,
        help="With --engine deepspeed: what is sharded over data-parallel ranks. 0: nothing; "
        "1: optimizer state; 2: gradients too; 3: parameters too. Default: the JSON's, else 1.",
    )  # fmt: skip
    group.add_argument(
        "--zero-offload-optimizer", action="store_true",
        help="With --engine deepspeed: float32 weights and optimizer state in host memory, and the "
        "step made there.",
    )  # fmt: skip
    group.add_argument(
        "--convert", action="store_true",
        help="Go on from a checkpoint that the other engine saved, with its optimizer state.",
    )  # fmt: skip
    group.add_argument(
        "--load-deepspeed", type=str, default=None, metavar="FOLDER",
        help="With --engine deepspeed: start from a folder that DeepSpeed's own engine saved, or a "
        "universal checkpoint; where --load has a checkpoint already, that counts.",
    )  # fmt: skip
    group.add_argument(
        "--save-deepspeed", type=str, default=None, metavar="FOLDER",
        help="With --engine deepspeed: write each checkpoint in DeepSpeed's own form too.",
    )  # fmt: skip
    group.add_argument(
        "--deepspeed-config", type=str, default=None, metavar="FILE",
        help="With --engine deepspeed: DeepSpeed's JSON, merged with what the flags say; where the "
        "two differ, one line names both.",
    )  # fmt: skip


def is_deepspeed(args: Any) -> bool:
    """Whether a run is stepped by DeepSpeed; also of arguments that know no engine."""
    return getattr(args, "engine", MEGATRON) == DEEPSPEED


def for_engine(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A command line without the flags that are another engine's, and a line for each of them.

    Args:
        words: of the command line, those of a run file written out.
    """
    own = ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--engine")
    if own.parse_known_args(words)[0].engine != DEEPSPEED:
        return list(words), []
    lines = [f"{name} = True has no effect with engine = deepspeed: {why}"
             for name, (flag, why) in zip(OF_MEGATRON, MOOT.items(), strict=True) if flag in words
             ]  # fmt: skip
    return [*(word for word in words if word not in MOOT), _UNFUSED], lines


def given_json(args: Namespace) -> dict[str, Any]:
    """The user's JSON, of keys that are read here; empty without one.

    Raises:
        ValueError: one line naming the file, the key and the fix.
    """
    if args.deepspeed_config is None:
        return {}
    path = Path(args.deepspeed_config)
    given = checked_json.load(path, "give DeepSpeed's JSON")
    if not isinstance(given, dict):
        raise ValueError(f"{path}: holds no JSON object: give DeepSpeed's JSON")
    for key in given:
        if key in ELSEWHERE:
            raise ValueError(f"{path}: {key!r} is not read: {ELSEWHERE[key]}; leave it out")
        if key not in TAKEN:
            raise ValueError(f"{path}: unknown key {key!r}{nearest_name(key, list(TAKEN))}")
    if not isinstance(given.get("zero_optimization", {}), dict):
        raise ValueError(f"{path}: zero_optimization must be an object, such as {{'stage': 2}}")
    return given


def tag_of(folder: Path) -> tuple[str, bool]:
    """The tag to load, and whether it is of a universal checkpoint.

    Raises:
        ValueError: the folder is not DeepSpeed's, or what it names is missing; one line.
    """
    for name, universal in ((UNIVERSAL, True), (LATEST, False)):
        if not (folder / name).is_file():
            continue
        tag = (folder / name).read_text(encoding="utf-8", errors="replace").strip()
        if not tag or Path(tag).name != tag or not (folder / tag).is_dir():
            raise ValueError(
                f"load_deepspeed = {str(folder)!r}: {name} names {tag!r}, no folder there: write "
                "the name of one into it"
            )
        return tag, universal
    raise ValueError(
        f"load_deepspeed = {str(folder)!r} holds no {LATEST} and no {UNIVERSAL}: name a folder "
        "that DeepSpeed's engine saved to"
    )


def stage_of(args: Namespace) -> int:
    """The ZeRO stage: of the flag, the JSON, or 1.

    Raises:
        ValueError: both are given, and differ; one line.
    """
    given = given_json(args).get("zero_optimization", {}).get("stage", AUTO)
    if given != AUTO and given not in STAGES:
        raise ValueError(f"{args.deepspeed_config}: zero_optimization.stage = {given!r} must be "
                         f"one of {', '.join(map(str, STAGES))}")  # fmt: skip
    if args.zero_stage is None:
        return _DEFAULT_STAGE if given == AUTO else given
    if given not in (AUTO, args.zero_stage):
        raise ValueError(
            f"{args.deepspeed_config}: zero_optimization.stage = {given}, and zero_stage = "
            f"{args.zero_stage}: give one of them, or both alike"
        )
    return args.zero_stage


def settings_of(args: Namespace) -> dict[str, Any]:
    """DeepSpeed's settings for a run.

    Args:
        args: Megatron's, validated.

    Raises:
        ValueError: the JSON says otherwise than a flag; one line.
    """
    replicas = args.world_size // (
        args.tensor_model_parallel_size * args.pipeline_model_parallel_size
    )
    micro_batches = args.global_batch_size // (
        args.micro_batch_size * (replicas // args.context_parallel_size)
    )
    stage = stage_of(args)
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": args.micro_batch_size,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": float(args.clip_grad),
        "managed_gradient_accumulation": False,
        "bf16": {"enabled": bool(args.bf16)},
        "zero_optimization": {"stage": stage, **_offload(args)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "wall_clock_breakdown": False,
    }
    if args.bf16:
        ours["communication_data_type"] = "fp32"
        ours["data_types"] = {"grad_accum_dtype": "fp32"}
    free = ("zero_force_ds_cpu_optimizer", "steps_per_print", "wall_clock_breakdown",
            "communication_data_type", "data_types")  # fmt: skip
    given = given_json(args)
    if given.get("train_batch_size", AUTO) not in (AUTO, args.global_batch_size):
        _differ(args, "train_batch_size", given["train_batch_size"], args.global_batch_size,
                "--global-batch-size")  # fmt: skip
    given.pop("train_batch_size", None)
    if given.get("zero_optimization", {}).get("overlap_comm") is True and stage < 2:
        raise ValueError(
            f"{args.deepspeed_config}: zero_optimization.overlap_comm = true: ZeRO {stage} "
            "reduces when the step comes: leave it out, or give --zero-stage 2"
        )
    return _merged(args, ours, given, free)


def _offload(args: Namespace) -> dict[str, Any]:
    return {"offload_optimizer": {"device": "cpu"}} if args.zero_offload_optimizer else {}


def _merged(
    args: Namespace, ours: dict[str, Any], given: dict[str, Any], free: tuple[str, ...],
    above: str = "",
) -> dict[str, Any]:  # fmt: skip
    """`given` on top of `ours`; what both say must be the same, but for names that are free."""
    merged = dict(ours)
    for key, value in given.items():
        name = f"{above}{key}"
        if value == AUTO:
            if key not in ours:
                raise ValueError(f"{args.deepspeed_config}: {name} = 'auto': nothing here fills it "
                                 "in; give a value, or leave it out")  # fmt: skip
        elif key not in ours or name in free:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(ours[key], dict):
            merged[key] = _merged(args, ours[key], value, free, f"{name}.")
        elif value != ours[key]:
            flag = TAKEN.get(name.partition(".")[0], "")
            _differ(args, name, value, ours[key], flag)
    return merged


def _differ(args: Namespace, name: str, value: Any, ours: Any, flag: str) -> None:
    raise ValueError(
        f"{args.deepspeed_config}: {name} = {value!r}, but the run has {ours!r}"
        f"{f' ({flag})' if flag else ''}: leave it out of the JSON, or make them agree"
    )
