"""`train`: a training run, in the foreground."""

import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated

from typer import Context, Option

from megatron_mone.common.program import PASSES_UNKNOWN, Program

program = Program()
main = program.main
_VOCABULARY = 4096  # what the demo's tokenizer has
_NO_DATA = (
    "no data is named: training on Megatron's mock data, which counts. For text: "
    f"megatron-mone prepare --corpus shakespeare --tokenizer bpe:{_VOCABULARY} --output-prefix "
    "out/data/x, then --data-path out/data/x_text_document --tokenizer-model out/data/x.tokenizer"
)


@program.command("train", context_settings=PASSES_UNKNOWN)
def train(
    context: Context,
    config: Annotated[Path, Option(help="run file, or its name in configs/")],
    ranks: Annotated[
        int | None, Option(help="ranks to start here (those of configs/launch/local.yaml)")
    ] = None,
    name: Annotated[
        str | None, Option(help="of the run and its folder (the run file's; -mock on mock data)")
    ] = None,
) -> int:
    """Train the model of a run file: `run` in a shell, one rank under torchrun or srun.

        megatron-mone train --config demo-mone
        megatron-mone train --config demo-mone --data-path PREFIX_text_document \\
            --tokenizer-model PREFIX.tokenizer --train-iters 60
        torchrun --nproc-per-node 2 -m megatron_mone train --config demo-mone --save out/run

    Further flags are Megatron's. A run that names no data trains on Megatron's mock data, and says
    so. In a shell, logs and checkpoints go to runs/NAME, and the same command goes on from there.
    """
    from megatron_mone.model.run_config import find_run

    if ranks is not None and ranks < 1:
        raise ValueError(f"--ranks {ranks} is not allowed: give at least 1")
    file = find_run(config)
    mock = _mock_data(file, context.args)
    if mock and os.environ.get("RANK", "0") == "0":
        print(f"megatron-mone: {_NO_DATA}", file=sys.stderr, flush=True)
    words = [*context.args, *mock]
    if "WORLD_SIZE" not in os.environ:
        from launch.__main__ import main as launch

        name = name or (f"{file.stem}-mock" if mock else file.stem)
        own = ["--config", str(file), "--name", name]
        own += [] if ranks is None else ["--tasks-per-node", str(ranks)]
        return launch(["run", *own, "--", *words])
    for flag, value in (("--ranks", ranks), ("--name", name)):
        if value is not None:
            raise ValueError(f"{flag} {value} is for a shell: here torchrun or srun started it")
    import_module("megatron_mone.pretrain").main(["--config", str(file), *words])
    return 0


def _mock_data(file: Path, words: list[str]) -> list[str]:
    """The flags of mock data, where a run names no data at all."""
    from launch.spec.megatron_flags import stated
    from launch.spec.training_job import data_prefixes
    from megatron_mone.model.run_config import load_run

    values = load_run(file)
    named = values.get("mock_data") or "--mock-data" in words
    if named or data_prefixes(values, words):
        return []
    found = ["--mock-data"]
    if stated("tokenizer_model", values, words) is None:
        found += ["--tokenizer-type", "NullTokenizer"]
        if stated("vocab_size", values, words) is None:
            found += ["--vocab-size", str(_VOCABULARY)]
    return found
