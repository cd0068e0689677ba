"""An evaluation from words or a folder to written results."""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_mone.evaluation.results import write_results


def evaluate_checkpoint(
    words: Sequence[str], tasks: Sequence[str], include: Path | None, limit: int | None, batch: int,
    out: Path, say: Any,
) -> dict[str, Any] | None:  # fmt: skip
    """Evaluate a Megatron checkpoint. Collective over all ranks.

    Args:
        words: Megatron's, of the checkpoint and its layout.
        tasks: names of tasks.
        include: folder of YAML tasks.
        limit: samples of each task; all when None.
        batch: most rows of a forward pass on a rank.
        out: folder of the results.
        say: told (requests done, of how many, of what).

    Returns:
        The document on rank 0, None elsewhere.

    Raises:
        ValueError: one line: wrong words, tasks or checkpoint.
    """
    first = os.environ.get("RANK", "0") == "0"
    prepared: Any = None
    if first:  # before a model is loaded for a task that is not there
        from megatron_mone.evaluation.harness import prepare

        prepared = prepare(tasks, include)
    import torch

    from megatron_mone.evaluation import loading
    from megatron_mone.evaluation.scoring import Scorer
    from megatron_mone.evaluation.service import Service

    loaded = loading.load(words)
    service = Service(Scorer(loaded, batch, say))
    document = None
    if first:
        from megatron_mone.evaluation.harness import evaluate
        from megatron_mone.evaluation.language_model import MegatronLM

        model = MegatronLM(service, loaded.tokenizer, loaded.args.seq_length)
        results = evaluate(model, prepared, limit, _facts(loaded.args))
        service.end()
        write_results(results, out)
        document = results.document
    else:
        service.serve()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return document


def evaluate_folder(
    folder: Path, tasks: Sequence[str], include: Path | None, limit: int | None, batch: int,
    out: Path, trusted: bool,
) -> dict[str, Any]:  # fmt: skip
    """Evaluate a Hugging Face folder with lm-eval's own model.

    Args:
        folder: with config.json; nothing is fetched for it.
        trusted: whether code that the folder holds may run.
        tasks, include, limit, batch, out: as of `evaluate_checkpoint`.

    Raises:
        ValueError: the folder is none of a model, a task is wrong, or a package is missing.
    """
    from megatron_mone.common.machine import version
    from megatron_mone.evaluation.harness import evaluate, prepare

    if not (folder / "config.json").is_file():
        raise ValueError(f"--model {folder} holds no config.json: name a Hugging Face folder")
    if not version("accelerate"):
        raise ValueError(
            "the package accelerate is not installed, lm-eval's Hugging Face model needs it: "
            "pip install 'megatron-mone[eval]'"
        )
    prepared = prepare(tasks, include)
    import torch
    from lm_eval.models.huggingface import HFLM

    from megatron_mone.conversion.hf_model.loading import load_model, load_tokenizer

    loaded = load_model(folder, trust_code=trusted)
    for note in loaded.notes:
        print(f"megatron-mone: {note}", file=sys.stderr)
    tokenizer = load_tokenizer(folder, loaded.model, trust_code=trusted)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    network = loaded.model.to("cuda" if torch.cuda.is_available() else "cpu")
    model = HFLM(pretrained=network, tokenizer=tokenizer, batch_size=batch)
    results = evaluate(model, prepared, limit, {"folder": str(folder)})
    write_results(results, out)
    return results.document


def _facts(args: Any) -> dict[str, Any]:
    """Of a checkpoint, for the results."""
    sizes = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    return {
        "load": str(args.load),
        "iteration": int(args.iteration),
        "world_size": args.world_size,
        **{f"{name}_parallel_size": getattr(args, f"{name}_parallel_size") for name in sizes},
        "precision": str(args.params_dtype).removeprefix("torch."),
        "seq_length": args.seq_length,
    }
