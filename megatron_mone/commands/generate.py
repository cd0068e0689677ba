"""`generate`: text from the model of a Hugging Face folder."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Option

from megatron_mone.common.program import Program

program = Program()
main = program.main


class _Type(StrEnum):
    auto, float32, bfloat16 = "auto", "float32", "bfloat16"


@program.command("generate")
def generate(
    model: Annotated[Path, Option(metavar="FOLDER", help="of a Hugging Face model")],
    prompt: Annotated[str, Option(metavar="TEXT", help="what the text begins with")],
    max_new_tokens: Annotated[int, Option(help="most tokens to add")] = 100,
    temperature: Annotated[
        float, Option(help="of the softmax to draw from; 0 takes the likeliest token")
    ] = 0.0,
    top_p: Annotated[
        float, Option(help="draw among the likeliest that have this probability together")
    ] = 1.0,
    seed: Annotated[int | None, Option(help="of the draws; 0 if left out")] = None,
    dtype: Annotated[_Type, Option(help="of the weights; auto: as stored")] = _Type.auto,
    trust_remote_code: Annotated[
        bool, Option("--trust-remote-code", help="run Python files that lie in the folder")
    ] = False,
) -> None:
    """Print a text while a model makes it, on the CPU.

        megatron-mone generate --model FOLDER --prompt "It was" [--temperature 0.8 --top-p 0.95]

    For MoNE models and any that transformers has. Code that lies in the folder is not run unless it
    is this package's own, byte for byte, or --trust-remote-code is given. Of the folder's settings
    for generation only the tokens that end a text are used. Exit status 2 for wrong input.
    """
    from megatron_mone.conversion.hf_model.generation import Sampling, stream_text

    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    stream_text(model, prompt, sampling, dtype=dtype.value, trust_code=trust_remote_code)
