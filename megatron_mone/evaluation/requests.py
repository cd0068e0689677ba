"""One request of lm-eval's, as tokens that fit into the model's length. Touches nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_mone.evaluation.batches import Prompt, Row

MOST_NEW = 256
"""Tokens of a continuation where its task names no number, as lm-eval's own models take it."""


def row_of(context: Sequence[int], scored: Sequence[int], length: int) -> tuple[Row, bool]:
    """A row to score, and whether the beginning of its context was cut.

    Args:
        context: ids before those that are scored, at least one.
        scored: ids whose log-likelihood is asked for.
        length: most tokens of a sequence.

    Raises:
        ValueError: what is scored does not fit.
    """
    if len(scored) > length:
        raise ValueError(
            f"a request scores {len(scored)} tokens, the model's seq_length is {length}: give a "
            "greater --seq-length, or another task"
        )
    tokens = (*context, *scored)
    return Row(tokens[-(length + 1) :], len(scored)), len(tokens) > length + 1


def prompt_of(
    tokens: Sequence[int], options: Mapping[str, Any], length: int
) -> tuple[Prompt, bool]:
    """A prompt to go on from, and whether its beginning was cut.

    Args:
        tokens: ids of the prompt, at least one.
        options: the task's generation_kwargs.
        length: most tokens of a sequence.

    Raises:
        ValueError: a task asks for samples or beams, or for more tokens than fit.
    """
    if options.get("do_sample") or options.get("temperature") or options.get("num_beams", 1) > 1:
        raise ValueError(
            f"a task asks for generation with {dict(options)}: only greedy decoding is here; set "
            "do_sample: false in its generation_kwargs"
        )
    most = int(options.get("max_gen_toks", MOST_NEW))
    if most >= length:
        raise ValueError(
            f"a task generates up to {most} tokens, the model's seq_length is {length}: lower "
            "max_gen_toks in its generation_kwargs, or give a greater --seq-length"
        )
    until = options.get("until") or ()
    until = (until,) if isinstance(until, str) else tuple(until)
    room = length - most
    return Prompt(tuple(tokens[-room:]), most, until), len(tokens) > room
