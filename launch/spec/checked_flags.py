"""Whether Megatron takes the flags of a job, asked before the job waits in a queue.

Megatron's own parser and checks and ours decide, for as many ranks as the job has, in a child
process that stands for a rank on the cluster (planning/tracing/trace_server.py, which remembers its
answers). Data, tokenizer and checkpoints may lie where only the compute nodes see them: what is
here is checked, what is not is named. May touch: the tracer's processes and cache.
"""

from __future__ import annotations

import functools
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.spec.megatron_flags import flag_parser
from megatron_mone.data import blend
from megatron_mone.deepspeed.supported import check_zero
from megatron_mone.model.run_config import to_flags

if TYPE_CHECKING:
    from megatron_mone.planning.job import JobSpec
    from megatron_mone.planning.tracing.trace_server import JobDescription, Tracer

NOT_FLAGS = ("cannot be planned", "cannot be traced", "CUDA_DEVICE_MAX_CONNECTIONS")
"""In refusals that are not of the flags: by the planner, which asks Megatron first, and of this
process's environment, where the job's own script sets what Megatron wants."""
_NEEDED_THERE = ("mone_record_masks", "mone_replay_masks", "mone_profile_dir")
_DATA = (*blend.WORDS, *blend.FILES, "mock_data")
_ANY_VOCABULARY = 32_768


def stated_job(name: str, values: Mapping[str, Any], words: Sequence[str]) -> JobSpec:
    """A training job as the planner takes it.

    Args:
        name: of the run, for errors.
        values: Megatron's arguments of the run file.
        words: Megatron flags, which win.

    Raises:
        ValueError: an unknown flag, with the nearest known one, or a value it does not take.
    """
    from megatron_mone.planning.job import JobSpec

    return JobSpec(name, {**values, **_given(words)}, {}, {}, {})


def check_flags(tracer: Tracer, job: JobSpec, ranks: int, gpus: bool) -> JobDescription | None:
    """Have Megatron check a job.

    Args:
        tracer: entered.
        job: of `stated_job`.
        ranks: of the job, W.
        gpus: whether ranks have GPUs.

    Returns:
        What the planner knows of it; None where it cannot plan what Megatron takes.

    Raises:
        ValueError: one line; Megatron or a check of ours refuses it.
        RuntimeError: one line; the child failed.
    """
    values = job.values()
    if not any(values.get(name) for name in _DATA):
        raise ValueError("data_path is not set: name a dataset prefix, or pass --mock-data")
    blend.check_sources(values)
    flags = to_flags(_values_here(job), megatron_parser(), Path(job.name))
    megatron_parser().parse_args(flags)
    _check_deepspeed_json(values)
    if not gpus and values.get("transformer_impl", "transformer_engine") != "local":
        raise ValueError(
            "transformer_impl = 'transformer_engine' needs GPUs: give --gpus-per-node, or "
            "`cluster: cpu` in the run file"
        )
    try:
        return tracer.describe(flags, ranks)
    except ValueError as error:
        if any(words in str(error) for words in NOT_FLAGS):
            return None
        raise
    except RuntimeError as error:
        # The planner's own part may fail on what trains well; the ranks' first step may not.
        if any("in parse_arguments" in note for note in getattr(error, "__notes__", ())):
            raise ValueError(f"Megatron cannot read these flags: {error}") from error
        raise


def _check_deepspeed_json(values: Mapping[str, Any]) -> None:
    """What DeepSpeed itself makes of its JSON, which the ranks would find out; where it is here."""
    if find_spec("deepspeed") is not None:
        check_zero(Namespace(deepspeed_config=values.get("deepspeed_config")))


def knows_vocabulary(job: JobSpec) -> bool:
    """Whether the vocabulary's size is known here: no memory is known without."""
    try:
        job.planned_values()
    except ValueError:
        return False
    return True


def check_data(job: JobSpec, prefixes: Sequence[str]) -> list[str]:
    """Check the datasets that are on this machine.

    Args:
        job: of `stated_job`.
        prefixes: of its datasets.

    Returns:
        Those that are not.

    Raises:
        ValueError: one is broken, does not fit the vocabulary or the tokenizer, or leaves a part of
            the run without documents; one line.
    """
    from megatron_mone.data.checks import check_dataset
    from megatron_mone.model.checks.data_split import READ, check_split

    values = job.values()
    tokenizer = Path(values.get("tokenizer_model") or "")
    absent = []
    for prefix in prefixes:
        if not any(Path(f"{prefix}{suffix}").is_file() for suffix in (".idx", ".bin")):
            absent.append(prefix)
            continue
        check_dataset(
            Path(prefix),
            vocab_size=values.get("vocab_size"),
            tokenizer_path=tokenizer if tokenizer.name and tokenizer.exists() else None,
        )
    default = megatron_parser().get_default
    read = {name: values.get(name, default(name)) for name in READ}
    check_split(read, blend.read_data(values))
    return absent


def _values_here(job: JobSpec) -> dict[str, Any]:
    """Arguments without what lies on the cluster; any size where the vocabulary's is unknown."""
    from megatron_mone.planning.job import JobSpec

    if not knows_vocabulary(job):
        job = JobSpec(job.name, {**job.values(), "vocab_size": _ANY_VOCABULARY}, {}, {}, {})
    return {k: v for k, v in job.planned_values().items() if k not in _NEEDED_THERE}


@functools.cache
def megatron_parser() -> ArgumentParser:
    """Megatron's parser with our flags; an error is a ValueError of one line."""
    return flag_parser()


@functools.cache
def _text_parser() -> ArgumentParser:
    """Megatron's parser, made to answer what was given alone, as it was written.

    Numbers are read, for the planner compares them; other types would not print as they are read.
    """
    parser = flag_parser()
    for action in parser._actions:
        action.default = SUPPRESS
        if action.type not in (int, float):
            action.type = None
            action.choices = None
    return parser


def _given(words: Sequence[str]) -> dict[str, Any]:
    """Argument -> value of some flags."""
    if not words:
        return {}
    return vars(_text_parser().parse_args(list(words)))
