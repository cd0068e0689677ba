"""What a rank of tests/integration/test_evaluation.py does: evaluations, one after another."""

import gc
import json
from importlib import import_module
from pathlib import Path

from tests.training_cases import _Groups, spare_repeated_work


def evaluate(todo: str, folder: str) -> None:
    """Evaluate each [name, words, tasks, batch] of a JSON file into folder/NAME.

    A case that is refused leaves folder/NAME.refused. A case `... direct` asks the model itself;
    the case `registered` is the last: ranks end with it.
    """
    from megatron_mone import cpu_emulation

    cpu_emulation.install()
    import torch
    from megatron.training import training

    from megatron_mone.evaluation import run

    spare_repeated_work()
    groups = _Groups()
    for name, words, tasks, batch in json.loads(Path(todo).read_text()):
        print(f"=== {name}", flush=True)
        out = Path(folder) / name
        try:
            if name.endswith("direct"):
                _direct(words, tasks, out)
            elif name == "registered":
                return _registered(words, tasks, out)  # ends the ranks that serve
            else:
                include = Path(folder) / "tasks"
                run.evaluate_checkpoint(words, tasks, include, 4, batch, out, lambda *told: None)
        except ValueError as error:
            Path(f"{out}.refused").write_text(str(error))
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        training.destroy_global_state()
        groups.end_run()
        gc.collect()
    groups.end()


def export(checkpoint: str, folder: str) -> None:
    """Write a checkpoint as a MoNE model of transformers."""
    from megatron_mone.conversion.exporting import export_model

    export_model(Path(checkpoint), Path(folder), lambda *told: None, mone=True)


def _direct(words: list[str], texts: list[str], out: Path) -> None:
    """Each text's log-likelihood from Megatron's own loss, alone in a batch, and the token that is
    most likely after it."""
    import torch

    from megatron_mone.evaluation.loading import load

    loaded = load(words)
    (model,) = loaded.chunks
    found = []
    for text in texts:
        ids = [loaded.tokenizer.eod, *loaded.tokenizer.encode(text)]
        tokens = torch.tensor([ids])
        positions = torch.arange(len(ids))[None]
        with torch.no_grad():
            inputs = (tokens[:, :-1], positions[:, :-1], None)
            loss = model(*inputs, labels=tokens[:, 1:])
        found.append(-float(loss.double().sum()))
    out.write_text(json.dumps(found))


def _registered(words: list[str], tasks: list[str], out: Path) -> None:
    """lm-eval makes the model itself, by its name."""
    from lm_eval import simple_evaluate

    import_module("megatron_mone.evaluation.language_model")
    from megatron_mone.evaluation.harness import prepare
    from megatron_mone.evaluation.suites import task_manager  # without lm-eval's own 14,000 files

    prepared = prepare(tasks, None)
    load, rest = words[1], " ".join(words[2:])
    found = simple_evaluate(
        model="mone", model_args={"load": load, "flags": rest}, limit=4, bootstrap_iters=0,
        tasks=list(prepared.tasks.values()), task_manager=task_manager(prepared.names, None),
    )  # fmt: skip
    samples = found["samples"][tasks[0]]
    out.write_text(json.dumps([one["resps"][0][0][0] for one in samples]))
